"""Videos into shards: any folder of video files, with their actions or cameras, becomes clips of latents.

    python encode.py --backbone wan2.2-5b --videos clips --metadata clips.csv --frames 81 --out shards --workers 8

Items are video files and folders of pictures; footage.py says which of them are refused and which are mended. Here are
refused in addition, and counted and listed with the others in report.json:

    too short       has not the frames of one clip
    too slow        more than one frame in 50 would be shown twice
    changing size   frames of several sizes
    bad cameras     a file that cannot be read, or not one camera a frame
    bad actions     a wrong string, for another rate, or for too few frames
    no control      neither actions nor cameras

A video of several clips' length gives several; what is left over is dropped. Cameras are one a frame of the file;
labels come from them. Actions are `action_label`, one for all, or `action_frames`, a string of BiWM's grammar whose
labels last --action_stride frames of the file.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from camera import crop_K, read_cameras, relative
from common import digest, fail, one_line_errors, require_positive, write_text
from control import labels_from_poses, parse_actions, resample
from encode import codec
from footage import Refused, at_rate, find, fit, frames_of
from jobs import finished, plan, stop_without_parent
from model import PRESETS
from shards import Recording, notes_of, write_index, write_shard

REPEATS = 0.02                      # share of frames that may be shown twice where the rate is raised


@dataclass(frozen=True)
class Config:
    """Encode videos into shards. Running the same command again goes on where it stopped."""
    backbone: str = "tiny"          # a preset of model.py: its codec, and what --frames, --fps and sizes are by default
    codec: str = ""                 # of an official backbone: folder or hub repository, by default the official one
    videos: str = ""                # folder of videos and of folders of pictures
    metadata: str = ""              # .json (BiWM's list), .csv or .jsonl; empty: all there is in --videos
    out: str = "runs/shards"        # folder of the shards
    frames: int = 0                 # pixel frames of a clip; 0: the preset's
    height: int = 0                 # of the pictures; 0: the preset's
    width: int = 0                  # of the pictures; 0: the preset's
    fps: float = 0.0                # frames a second; 0: the preset's
    picture_fps: float = 0.0        # of folders of pictures; 0: as --fps
    caption: str = ""               # of videos that have none
    label: int = -1                 # action label of videos without actions and cameras; -1: they are refused
    action_stride: int = 4          # frames of the file that a label of action_frames lasts
    step: float = 0.0               # motion of a latent frame in the units of the cameras; 0: known from their median
    smooth: bool = True             # majority of three labels: for estimated cameras, not for exact ones
    held_out: float = 0.05          # share of scenes that training does not see
    tolerate: float = 0.05          # share of refused videos above which the run stops
    shard: int = 16                 # videos of a shard
    workers: int = 1                # processes; on GPUs one after the other has the next

    def __post_init__(self):
        if self.backbone not in PRESETS:
            raise ValueError(f"unknown backbone '{self.backbone}'; choose {', '.join(PRESETS)}")
        spec = PRESETS[self.backbone]
        for name, default in zip(("frames", "height", "width", "fps"), (*spec.size, float(spec.fps))):
            object.__setattr__(self, name, getattr(self, name) or default)
        require_positive(self, "frames", "height", "width", "fps", "action_stride", "shard", "workers")
        for name, stride, rest in zip(("frames", "height", "width"), spec.stride, (1, 0, 0)):
            if getattr(self, name) % stride != rest % stride:
                raise ValueError(f"{self.backbone} wants --{name} {f'1 + {stride} k' if rest else f'{stride} k'}, "
                                 f"got {getattr(self, name)}")
        if self.frames < 2:
            raise ValueError("--frames of a clip are 2 or more")
        if not 0 <= self.held_out < 1 or not 0 <= self.tolerate <= 1 or not -1 <= self.label <= 80:
            raise ValueError("--held_out and --tolerate are shares, 0..1; --label is -1..80")


# ---- Clips -----------------------------------------------------------------------------------------------------------

def clips_of(item, cfg, coder):
    """Recordings of an item; raises Refused."""
    if item.actions is None and item.cameras is None and cfg.label < 0:
        raise Refused("no control", "give actions or cameras, or --label for all")
    times, pictures, picked, latents, size, crop = [], [], [], [], None, None
    for index, (_, picture, aspect) in at_rate(noted(frames_of(item.path, cfg.picture_fps or cfg.fps), times), cfg.fps):
        if size not in (None, picture.size):
            raise Refused("changing size", f"{size} and {picture.size}")
        size, (pixels, crop) = picture.size, fit(picture, aspect, cfg.width, cfg.height)
        pictures.append(torch.from_numpy(pixels.copy()))
        picked.append(index)
        if len(pictures) == cfg.frames:
            latents.append(coder.encode(torch.stack(pictures)[None])[0].cpu())          # [C, T, H, W]
            pictures.clear()
    if not latents:
        raise Refused("too short", f"{len(picked)} frames at {cfg.fps:g} a second, a clip has {cfg.frames}")
    repeats = sum(a == b for a, b in zip(picked, picked[1:]))
    if repeats > REPEATS * len(picked):
        raise Refused("too slow", f"{repeats} of {len(picked)} frames would be repeats at {cfg.fps:g} a second")
    stride = PRESETS[cfg.backbone].stride[0]
    shown = [picked[i * cfg.frames:][:cfg.frames:stride] for i in range(len(latents))]  # the frame of each latent
    controls = cameras_of(item, cfg, shown, len(times), size, crop) if item.cameras else \
        [(labels, None, None) for labels in labels_of(item, cfg, times, len(latents), stride)]
    text = {key: states[0] for key, states in coder.text([item.caption or cfg.caption]).items()}
    return [Recording(f"{item.name}#{i}", item.scene, item.caption or cfg.caption, x0, text, *control)
            for i, (x0, control) in enumerate(zip(latents, controls))]


def noted(frames, times):
    """`frames`, while their times are written down."""
    for frame in frames:
        times.append(frame[0])
        yield frame


def cameras_of(item, cfg, shown, total, size, crop):
    """(labels [T], c2w [T, 4, 4], K) of every clip, whose latents show the frames `shown` of `total`. The farthest
    camera of the file comes to distance 1."""
    try:
        cameras = read_cameras(item.cameras, total, size[::-1])
    except (ValueError, OSError) as error:
        raise Refused("bad cameras", str(error)) from None
    if cameras.K is None:
        raise Refused("bad cameras", f"{item.cameras} has no intrinsics")
    near, K = cameras.normalised(), crop_K(cameras.K, *crop)
    return [(labels_from_poses(cameras.c2w[at], cfg.step or None, cfg.smooth), relative(near.c2w[at]), K[at])
            for at in shown]


def labels_of(item, cfg, times, clips, stride):
    """Labels of the first clips: one label counts for all of them, a string for the first. Its labels last
    --action_stride frames of the file, so they hold only if --fps is the file's rate."""
    T = (cfg.frames - 1) // stride + 1
    if not isinstance(item.actions, str):
        label = cfg.label if item.actions is None else item.actions
        if not 0 <= label <= 80:
            raise Refused("bad actions", f"label {label} is not 0..80")
        return [torch.tensor([0] + [label] * (T - 1))] * clips
    rate = (len(times) - 1) / (times[-1] - times[0])
    if abs(rate / cfg.fps - 1) > 0.01:
        raise Refused("bad actions", f"action_frames are for {rate:.2f} frames a second, not {cfg.fps:g}")
    try:
        labels = parse_actions(item.actions)
    except ValueError as error:
        raise Refused("bad actions", str(error)) from None
    whole = next(n for n in range(len(labels), 0, -1) if (n - 1) * cfg.action_stride % stride == 0)
    labels = labels[:whole] if stride == cfg.action_stride else resample(labels[:whole], cfg.action_stride, stride)
    if len(labels) < T:
        raise Refused("bad actions", f"they reach {len(labels)} of {T} latent frames")
    return [labels[:T]]


# ---- The run ---------------------------------------------------------------------------------------------------------

def maker(cfg, device):
    """A process's function (path, items) that makes a shard; an item that gives no clips is noted in it."""
    coder = codec(cfg.backbone, device, cfg.codec)

    def make(path, items):
        recordings, refused = [], []
        for item in items:
            stop_without_parent()
            try:
                recordings += clips_of(item, cfg, coder)
            except Refused as error:
                refused.append({"name": item.name, "result": error.args[0], "detail": error.args[1]})
        write_shard(path, {"backbone": cfg.backbone, "codec": coder.fingerprint(), "fps": cfg.fps}, recordings, refused)
    return make


def prepare(cfg):
    """The items and the jobs of their shards."""
    items = find(cfg.videos, cfg.metadata)
    free = {"out", "workers", "codec", "tolerate", "held_out", "videos", "metadata"}      # may change on resuming
    settings = {key: value for key, value in asdict(cfg).items() if key not in free}
    coder = codec(cfg.backbone, "cpu", cfg.codec)
    settings |= {"codec": coder.fingerprint(), "items": digest([str(item) for item in items])}
    return items, plan(cfg.out, settings, items, cfg.shard)


def report(out, items, done):
    """report.json of the shards that are `done` [(path, items)]: counts of results, every refused item, its shard."""
    notes = [(path.name, notes_of(path)) for path, _ in sorted(done, key=lambda job: job[0])]
    refused = [{**entry, "shard": name} for name, note in notes for entry in note["refused"]]
    over = sum(len(part) for _, part in done)
    counts = {"ok": over - len(refused), **Counter(entry["result"] for entry in refused)}
    summary = {"videos": len(items), "done": over, "clips": sum(len(note["clips"]) for _, note in notes),
               "results": counts, "refused": refused}
    write_text(Path(out) / "report.json", json.dumps(summary, indent=1) + "\n")
    return summary


def main(cfg):
    with one_line_errors():
        items, jobs = prepare(cfg)
        done, bad = [], 0
        for job in finished(jobs, cfg.workers, maker, cfg):
            done.append(job)
            bad += len(notes_of(job[0])["refused"])
            if bad > cfg.tolerate * len(items):
                break
        summary = report(cfg.out, items, done)
        print("\n".join(f"{count:8d}  {result}" for result, count in summary["results"].items()))
        if bad > cfg.tolerate * len(items):
            fail(f"{bad} of {len(items)} videos are refused, more than --tolerate {cfg.tolerate:g}; report.json in "
                 f"{cfg.out} lists them. Mend them and delete their shards, or tolerate more; then run it again")
        write_index(cfg.out, cfg.held_out)
        print(f"wrote {cfg.out}: {summary['clips']} clips of {len(items)} videos; report.json, index.jsonl")
