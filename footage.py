"""Footage: which videos there are, and their frames, upright, at one rate and size.

A video is a file or a folder of pictures; captions, actions and cameras come from files beside it or from a list.

A folder of ten thousand files holds files of every kind. Each kind has one result, whoever looks. Refused are

    missing         there is no such file
    unreadable      not a video that FFmpeg knows, or not a picture of 8 bits that Pillow knows
    no video        sound alone
    truncated       ends before its own header says
    corrupt         damage that the decoder notices (it cannot see all there is)
    no times        times of frames are missing or do not rise
    interlaced      two moments in one picture
    high range      PQ or HLG light, whose colours would be wrong in 8 bits
    too small       would be enlarged more than twice

Mended are: turned videos, set upright; pixels that are not square, stretched; 10 bits, rounded to 8; grey, in RGB; odd
sizes and other shapes, by a centred crop and a resize; rates that vary, by picking the frame nearest to each time.
"""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

VIDEOS = ".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v"
PICTURES = ".png", ".jpg", ".jpeg"
COLUMNS = "video", "caption", "action_frames", "action_label", "cameras", "scene"       # of csv and jsonl; video is due
TIE = 1e-6                          # seconds: of two frames that are equally near it is the earlier
MISSING = 1.0                       # seconds that a header may promise too many
HDR = 16, 18                        # transfer functions PQ and HLG (ITU-T H.273)


@dataclass(frozen=True)
class Item:
    """A video to encode: its file, or the folder of its pictures."""
    name: str
    path: Path
    scene: str
    caption: str = ""
    actions: str | int | None = None
    cameras: Path | None = None


def find(folder, metadata=""):
    """All items in the order of their names; ValueError names the row of the metadata that is wrong."""
    root = Path(folder)
    if not folder or not root.is_dir():
        raise ValueError(f"--videos '{folder}' is not a folder")
    items = scan(root) if not metadata else \
        from_list(root, Path(metadata)) if metadata.endswith(".json") else from_table(root, Path(metadata))
    if not items:
        raise ValueError(f"there are no videos ({', '.join(VIDEOS)}) and no folders of pictures in {root}")
    names = [item.name for item in items]
    if len({*names}) < len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is listed twice")
    return sorted(items, key=lambda item: item.name)


def scan(root):
    """Every video file and folder of pictures; cameras are NAME.txt or NAME.json beside a video, or poses.npy in its
    folder if it is alone there. A scene is the folder that a video or a folder of pictures is in."""
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in VIDEOS + PICTURES and path.is_file())
    videos = [path for path in files if path.suffix.lower() in VIDEOS]
    folders = {path.parent for path in files} - {path.parent for path in videos} - {root}
    alone = [path.parent for path in videos]
    items = []
    for path in [*videos, *folders]:
        poses = (path if path in folders else path.parent) / "poses.npy"
        near = [path.with_suffix(".txt"), path.with_suffix(".json"), *[poses] * (path in folders or
                                                                                 alone.count(path.parent) == 1)]
        name = path.relative_to(root).as_posix()
        scene = name if path.parent == root else path.parent.relative_to(root).as_posix()
        items.append(Item(name, path, scene, cameras=next((p for p in near if p.exists()), None)))
    return items


def rows_of(metadata):
    """The rows of a .csv, the lines of a .jsonl or the entries of a .json as dicts; ValueError names what is none."""
    with open(metadata, newline="") as file:
        if metadata.suffix == ".csv":
            return [*csv.DictReader(file)]
        texts, rows = [file.read()] if metadata.suffix == ".json" else [s for s in file if s.strip()], []
    for number, text in enumerate(texts, 1):
        try:
            rows.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{metadata}, row {number}: {error}") from None
    rows = rows[0] if metadata.suffix == ".json" else rows
    if not isinstance(rows, list):
        raise ValueError(f"{metadata} is not a JSON list with an entry for each video")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{metadata}, row {number} is not a JSON object")
    return rows


def from_list(root, metadata):
    """BiWM's layout: entry i of a JSON list is the folder `<i, six digits>_*` with gen.mp4 (or poses.npy as well)."""
    folders = {path.name[:6]: path for path in sorted(root.iterdir()) if re.match(r"\d{6}_", path.name)}
    items = []
    for i, entry in enumerate(rows_of(metadata)):
        folder = folders.get(f"{i:06d}", root / f"{i:06d}_")
        poses = folder / "poses.npy"
        items.append(Item(f"{i:06d}", folder / "gen.mp4", str(entry.get("source_folder") or f"{i:06d}"),
                          entry.get("caption", ""), entry.get("action_label", entry.get("action_frames")),
                          poses if poses.exists() else None))
    return items


def from_table(root, metadata):
    """Rows of csv or jsonl with the COLUMNS; files are relative to --videos."""
    items = []
    for number, row in enumerate(rows_of(metadata), 1):
        row = {key: value for key, value in row.items() if value not in ("", None)}
        if "video" not in row or {*row} - {*COLUMNS}:
            raise ValueError(f"{metadata}, row {number}: the columns are {', '.join(COLUMNS)}, video must be there; "
                             f"got {', '.join(map(str, row))}")
        label = row.get("action_label")
        if label is not None and not str(label).isdecimal():
            raise ValueError(f"{metadata}, row {number}: action_label is a number, got '{label}'")
        items.append(Item(row["video"], root / row["video"], row.get("scene", row["video"]), row.get("caption", ""),
                          row.get("action_frames") if label is None else int(label),
                          root / row["cameras"] if "cameras" in row else None))
    return items


# ---- Frames ----------------------------------------------------------------------------------------------------------

class Refused(Exception):
    """(result, detail): why footage is of no use."""


def frames_of(path, picture_fps):
    """(seconds, PIL picture that stands upright, width of a pixel in heights) of every frame; raises Refused."""
    if not path.exists():
        raise Refused("missing", str(path))
    if path.is_dir():
        natural = lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.name)]
        for i, file in enumerate(sorted((p for p in path.iterdir() if p.suffix.lower() in PICTURES), key=natural)):
            try:
                with Image.open(file) as picture:
                    if picture.mode[0] in "IF":
                        raise Refused("unreadable", f"{file.name} has more than 8 bits")
                    yield i / picture_fps, ImageOps.exif_transpose(picture).convert("RGB"), 1.0
            except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
                raise Refused("unreadable", f"{file.name}: {error}") from None
        return
    try:
        import av
    except ImportError:
        raise ValueError('videos are read with PyAV: pip install "biwm[encode]"') from None
    av.logging.set_level(av.logging.PANIC)
    result = "unreadable"
    try:
        with av.open(str(path)) as file:
            films = [s.index for s in file.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not films:
                raise Refused("no video", f"{len(file.streams)} streams, none of moving pictures")
            result, stream = "corrupt", file.streams[films[0]]
            packets = [packet.pts for packet in file.demux(stream) if packet.size]      # one a frame
            times = [pts * stream.time_base for pts in packets if pts is not None]
            promised = file.duration / av.time_base if len(file.streams) == 1 and file.duration else 0      # seconds
            if len(packets) < stream.frames or times and max(times) - min(times) < promised - MISSING:
                raise Refused("truncated", f"{len(packets)} of {stream.frames or f'{promised:.1f} seconds of'} frames")
        with av.open(str(path)) as file:
            stream = file.streams[films[0]]
            for seconds, picture, turns in upright(file.decode(stream)):
                aspect = float(stream.sample_aspect_ratio or 1)
                yield seconds, picture, 1 / aspect if turns % 2 else aspect
    except av.error.FFmpegError as error:
        raise Refused(result, str(error)) from None


def upright(frames):
    """(seconds, PIL picture, quarter turns made) of PyAV's frames; raises Refused."""
    last = None
    for frame in frames:
        for wrong, result in ((frame.is_corrupt, "corrupt"), (frame.interlaced_frame, "interlaced"),
                              (int(frame.color_trc) in HDR, "high range"),
                              (frame.time is None or last is not None and frame.time <= last, "no times")):
            if wrong:
                raise Refused(result, f"at {last or 0:.2f} s")
        last, turns = frame.time, round(frame.rotation / 90) % 4
        yield last, Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), turns)), turns


def at_rate(frames, fps):
    """(index, frame) nearest to the times first, first + 1 / fps, ..., last; an index comes twice where frames are far
    apart. Frames are (seconds, ...); files round their times, so the last may be a tenth early."""
    last, count, first = None, 0, 0.0
    for index, frame in enumerate(frames):
        first = frame[0] if last is None else first
        while last and 2 * (first + count / fps) < last[1][0] + frame[0] + TIE:
            yield last
            count += 1
        last = index, frame
    while last and first + (count - 0.1) / fps < last[1][0]:
        yield last
        count += 1


def fit(picture, aspect, width, height):
    """Centred crop of the wanted shape, resized: uint8 [height, width, 3], and the crop (left, top, width, height) in
    shares of the picture."""
    shape = picture.width * aspect / picture.height / (width / height)      # above 1: too wide
    w, h = min(1, 1 / shape), min(1, shape)
    left, top = (1 - w) / 2, (1 - h) / 2
    box = (left * picture.width, top * picture.height, (left + w) * picture.width, (top + h) * picture.height)
    if 2 * (box[2] - box[0]) * aspect < width or 2 * (box[3] - box[1]) < height:
        raise Refused("too small", f"{picture.width}x{picture.height} for {width}x{height}")
    return np.asarray(picture.resize((width, height), Image.BICUBIC, box)), (left, top, w, h)
