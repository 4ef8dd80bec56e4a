"""Doom: walks through a second world, one that no one here drew, into shards (extra `doom`).

    python doom.py --out runs/doom --walks 2048 --workers 8
    python doom.py --walks 8 --sheet doom.png                   # a look at some of them
    python train_stage1.py --data runs/doom

Maps and pictures come with ViZDoom (code MIT, engine ZDoom, textures and things of Freedoom, BSD 3-clause). Pictures,
cameras, step and angle are those of the tiny world: all that its codec and its settings know holds here too. Few small
maps, so that the hold-out is by walk, as in the tiny world, and not by map.
"""

import signal
import sys
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image

import world
from camera import relative
from common import derive, generator, one_line_errors, parse, require_positive
from control import labels_from_poses
from encode import codec
from jobs import finished, plan, stop_without_parent
from shards import Recording, write_index, write_shard
from video import draw_keys
from walker import Lost, Walker

TRANSLATIONS, ROTATIONS = [22, 28] + [50 / 7] * 7, [8.0, 1, 1, 3, 3, 1, 1, 1, 1]    # how often a walker asks for each
CAPTION = ""                        # the tiny codec knows only the words of its own world


@dataclass(frozen=True)
class Config:
    """Record walks through Doom's maps into shards. Running the same command again goes on where it stopped."""
    out: str = "runs/doom"          # folder of the shards
    maps: str = "my_way_home.wad,deathmatch.wad"    # scenarios of ViZDoom (.wad), or maps of Freedoom 2 (map01..map32)
    walks: int = 256                # trajectories, in turn on each map; each is a scene of its own
    frames: int = 48                # of each
    seed: int = 0                   # of everything random
    held_out: float = 0.05          # share of walks that training does not see
    shard: int = 32                 # walks of a shard
    workers: int = 1                # processes
    sheet: str = ""                 # only write this contact sheet (.png) of a few walks

    def __post_init__(self):
        require_positive(self, "walks", "frames", "shard", "workers")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"--held_out is a share, 0 <= share < 1, got {self.held_out}")


def walk(walker, seed, frames):
    """Views uint8 [T, H, W, 3] and cameras c2w [T, 4, 4] of a random walk: actions are held for 2 to 8 frames, one that
    is blocked is drawn again (but one time in eight)."""
    g, share = generator(seed, "doom walk"), torch.outer(torch.tensor(TRANSLATIONS), torch.tensor(ROTATIONS)).flatten()
    seen, left, label = [walker.begin(seed)], 0, 0
    while len(seen) < frames:
        stuck = label >= 9 and (seen[-1][1] - seen[-2][1])[:3, 3].norm() < world.SHORT * world.STEP
        if left == 0 or stuck and torch.rand(1, generator=g) > 1 / 8:
            label, left = int(torch.multinomial(share, 1, generator=g)), int(torch.randint(2, 9, (1,), generator=g))
        seen.append(walker.step(label))
        left -= 1
    views, cameras = zip(*seen)
    return torch.from_numpy(np.stack(views)), torch.stack(cameras)


def record(walker, seed, frames):
    """A walk that did not get lost: the first of the seeds (seed, 0), (seed, 1), ..."""
    for attempt in range(100):
        try:
            return walk(walker, derive(seed, attempt), frames)
        except Lost:
            stop_without_parent()
    raise ValueError(f"100 walks in a row got lost; give this map up or lower --frames (now {frames})")


def maker(cfg, device):
    """A process's function (path, items) that makes a shard of the walks (number, map)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))        # or the games would go on alone
    coder, walkers = codec("tiny", device), {}

    def make(path, items):
        recordings = []
        for number, name in items:
            walkers[name] = walkers.get(name) or Walker(name)
            views, c2w = record(walkers[name], derive(cfg.seed, "walk", number), cfg.frames)
            text = {key: states[0] for key, states in coder.text([CAPTION]).items()}
            recordings.append(Recording(
                f"{name}#{number}", f"walk {number}", CAPTION, coder.encode(views[None])[0], text,
                labels_from_poses(c2w, world.STEP), relative(c2w), world.K.expand(len(c2w), 3, 3)))
        write_shard(path, {"backbone": "tiny", "codec": coder.fingerprint(), "fps": world.FPS}, recordings)
    return make


def sheet(cfg, path):
    """A contact sheet: a row for each of --walks walks, every fourth frame, with the label that led to it."""
    rows = []
    for number in range(cfg.walks):
        name = cfg.maps.split(",")[number % len(cfg.maps.split(","))]
        views, c2w = record(Walker(name), derive(cfg.seed, "walk", number), cfg.frames)
        pictures = draw_keys(views[::4], labels_from_poses(c2w, world.STEP)[::4], 2)
        rows.append(np.concatenate([*pictures], 1))
    Image.fromarray(np.concatenate(rows)).save(path)


def main(cfg):
    with one_line_errors():
        if cfg.sheet:
            return sheet(cfg, cfg.sheet)
        maps, free = cfg.maps.split(","), {"out", "workers", "held_out", "sheet"}
        settings = {key: value for key, value in asdict(cfg).items() if key not in free}
        items = [(number, maps[number % len(maps)]) for number in range(cfg.walks)]
        for _ in finished(plan(cfg.out, {**settings, "codec": codec("tiny").fingerprint()}, items, cfg.shard),
                          cfg.workers, maker, cfg):
            pass
        write_index(cfg.out, cfg.held_out)
        print(f"wrote {cfg.out}: {cfg.walks} walks of {cfg.frames} frames")


if __name__ == "__main__":
    main(parse(Config))
