"""Pictures in and out: a picture to start from, frames with the pressed keys drawn on them, video files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from control import keys_from_label


def read_picture(file, spec):
    """A PNG or JPEG of the size of the model's frames: uint8 [1, H, W, 3]."""
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as picture:
            if picture.size != spec.size[:0:-1]:
                raise ValueError("a start picture has {}x{} pixels, not {}x{}".format(*spec.size[:0:-1], *picture.size))
            return torch.tensor(np.asarray(picture.convert("RGB")))[None]
    except (SyntaxError, Image.DecompressionBombError) as error:                # what Pillow says of a broken PNG
        raise ValueError(f"not a picture: {error}") from None


KEY_PLACES = {"w": (1, 0), "a": (0, 1), "s": (1, 1), "d": (2, 1),       # column, row of a key on the overlay
              "up": (5, 0), "left": (4, 1), "down": (5, 1), "right": (6, 1)}
ARROWS = {"up": ((.5, .25), (.2, .7), (.8, .7)), "down": ((.5, .75), (.2, .3), (.8, .3)),
          "left": ((.25, .5), (.7, .2), (.7, .8)), "right": ((.75, .5), (.3, .2), (.3, .8))}


def draw_keys(frames, actions, scale=4, titles=()):
    """Enlarge uint8 frames [T, H, W, 3] by `scale`, with the pressed keys and, side by side, `titles` on top."""
    out, key = [], 5 * scale
    for frame, action in zip(frames, actions):
        picture = Image.fromarray(np.asarray(frame))
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)
        draw, pressed = ImageDraw.Draw(picture, "RGBA"), keys_from_label(int(action))
        for name, (column, row) in KEY_PLACES.items():
            x, y = scale + column * key, picture.height - (3 - row) * key + 3 * scale
            down = name in pressed
            fill = (255, 255, 255, 230) if down else (0, 0, 0, 70)
            draw.rectangle((x, y, x + key - 3, y + key - 3), fill, (255, 255, 255, 160))
            ink = (20, 20, 20, 255) if down else (255, 255, 255, 200)
            if name in ARROWS:
                draw.polygon([(x + u * (key - 3), y + v * (key - 3)) for u, v in ARROWS[name]], ink)
            else:
                draw.text((x + key / 2 - 1, y + key / 2 - 1), name.upper(), ink, anchor="mm")
        for i, title in enumerate(titles):
            place = (picture.width * i // len(titles) + 2 * scale, scale)
            draw.text(place, title, "white", stroke_width=1, stroke_fill="black")
        out.append(np.asarray(picture))
    return np.stack(out)


def compose(dream, labels, steps, exact=None):
    """The frames of a video: `dream` [T, H, W, 3] with the keys of `labels` [T], beside the `exact` ones if given."""
    if exact is None:
        return draw_keys(dream, labels)
    return draw_keys(torch.cat([exact, dream], 2), labels, 3, ("truth", f"dream, {steps} steps a chunk"))


H264 = {"codec": "libx264", "macro_block_size": 8, "output_params": ["-crf", "18"]}


def write_video(path, frames, fps):
    """uint8 [T, H, W, 3] -> mp4 or gif, by the suffix of `path`."""
    import imageio.v3 as iio
    if Path(path).suffix == ".gif":
        iio.imwrite(path, frames, duration=1000 / fps, loop=0)
    else:
        iio.imwrite(path, frames, fps=fps, **H264)
