"""Pictures in and out: a picture to start from, frames with the pressed keys drawn on them, video files."""

from collections import deque
from contextlib import closing
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from control import keys_from_label
from footage import Refused, at_rate, fit, frames_of


def read_picture(file, spec):
    """A PNG or JPEG as a start, uint8 [1, H, W, 3]: scaled to cover the frame of the model, cut around its middle. For
    the embedded world it has the size already: to a world drawn pixel by pixel, a photograph means nothing."""
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as picture:
            if spec.stride[0] == 1 and picture.size != spec.size[:0:-1]:
                raise ValueError("a start picture has {}x{} pixels, not {}x{}".format(*spec.size[:0:-1], *picture.size))
            picture = ImageOps.exif_transpose(picture).convert("RGB")
            return torch.tensor(np.asarray(ImageOps.fit(picture, spec.size[:0:-1], Image.LANCZOS)))[None]
    except (SyntaxError, Image.DecompressionBombError) as error:                # what Pillow says of a broken PNG
        raise ValueError(f"not a picture: {error}") from None


def read_video(path, spec):
    """The end of a video or folder of pictures as a start, at the model's rate (by time) and size: uint8 [F, H, W, 3],
    the pixel frames of one chunk of latent frames."""
    count, (_, H, W) = 1 + spec.stride[0] * (spec.chunk - 1), spec.size
    try:
        frames = deque((frame for _, frame in at_rate(frames_of(Path(path), spec.fps), spec.fps)), count)
        if len(frames) < count:
            raise Refused("too short", f"{len(frames)} frames at {spec.fps:g} a second, a start has {count}; take one "
                                       "picture of it: --image")
        return torch.stack([torch.tensor(fit(picture, aspect, W, H)[0]) for _, picture, aspect in frames])
    except Refused as error:
        raise ValueError(f"{path} is {': '.join(error.args)}") from None


def spread(labels, frames, stride):
    """The label of each of `frames` pixel frames, a list, from those [T] of latent frames of `stride` pixel frames. The
    first latent frame of a video is a single pixel frame, hence the last ones count."""
    return torch.as_tensor(labels).repeat_interleave(stride)[-frames:].tolist()


KEY_PLACES = {"w": (1, 0), "a": (0, 1), "s": (1, 1), "d": (2, 1),       # column, row of a key on the overlay
              "up": (5, 0), "left": (4, 1), "down": (5, 1), "right": (6, 1)}
ARROWS = {"up": ((.5, .25), (.2, .7), (.8, .7)), "down": ((.5, .75), (.2, .3), (.8, .3)),
          "left": ((.25, .5), (.7, .2), (.7, .8)), "right": ((.75, .5), (.3, .2), (.3, .8))}


def draw_keys(frames, actions, scale=None, titles=()):
    """Enlarge uint8 frames [T, H, W, 3] by `scale` (small ones to 256 rows or more), with the pressed keys and, side by
    side, `titles` on top."""
    scale = scale or max(1, 256 // frames.shape[1])
    unit = max(1, scale * frames.shape[1] // 64)                        # keys are as large on any screen
    out, key = [], 5 * unit
    for frame, action in zip(frames, actions):
        picture = Image.fromarray(np.asarray(frame))
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)
        draw, pressed = ImageDraw.Draw(picture, "RGBA"), keys_from_label(int(action))
        for name, (column, row) in KEY_PLACES.items():
            x, y = unit + column * key, picture.height - (3 - row) * key + 3 * unit
            down = name in pressed
            fill = (255, 255, 255, 230) if down else (0, 0, 0, 70)
            draw.rectangle((x, y, x + key - 3, y + key - 3), fill, (255, 255, 255, 160))
            ink = (20, 20, 20, 255) if down else (255, 255, 255, 200)
            if name in ARROWS:
                draw.polygon([(x + u * (key - 3), y + v * (key - 3)) for u, v in ARROWS[name]], ink)
            else:
                draw.text((x + key / 2 - 1, y + key / 2 - 1), name.upper(), ink, anchor="mm")
        for i, title in enumerate(titles):
            place = (picture.width * i // len(titles) + 2 * unit, unit)
            draw.text(place, title, "white", stroke_width=1, stroke_fill="black")
        out.append(np.asarray(picture))
    return np.stack(out)


def compose(dream, labels, steps, exact=None):
    """The frames of a video: `dream` [T, H, W, 3] with the keys of `labels` [T], beside the `exact` ones if given."""
    if exact is None:
        return draw_keys(dream, labels)
    return draw_keys(torch.cat([exact, dream], 2), labels, 3, ("truth", f"dream, {steps} steps a chunk"))


H264 = {"codec": "libx264", "macro_block_size": 8, "output_params": ["-crf", "18"]}


class VideoFile:
    """An mp4 or gif (by the suffix of `path`) that is written while its frames are made."""

    def __init__(self, path, fps):
        how = {"mode": "I", "duration": 1000 / fps, "loop": 0} if Path(path).suffix == ".gif" else {"fps": fps, **H264}
        self.writer, self.frames = imageio.get_writer(path, **how), 0

    def add(self, frames):
        """uint8 [T, H, W, 3]."""
        for frame in frames:
            self.writer.append_data(np.asarray(frame))
            self.frames += 1

    def close(self):
        self.writer.close()


def write_video(path, frames, fps):
    """uint8 [T, H, W, 3] -> mp4 or gif, by the suffix of `path`."""
    with closing(VideoFile(path, fps)) as video:
        video.add(frames)
