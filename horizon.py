"""What a chunk costs by how much came before it: tokens, operations, milliseconds and memory of each way to remember.

Weights are random and the past is noise, so any backbone can be measured; the loop is that of rollout.py.

    python horizon.py tiny --steps 1 --minutes 0.5,1                # anywhere
    python horizon.py wan2.1-1.3b --out horizon.json                # one GPU
"""

import gc
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from common import one_line_errors, parse, provenance, require_positive, reseed, setup, timed
from compress import Settings, attach
from control import Condition, Control
from data import RandomStream
from flow import schedule
from history import History, settings_of
from model import PRESETS, build_on, chunk_flops
from parallel import compile_blocks
from rollout import chunks, few_step, launched
from scales import cells, part, tokens


@dataclass(frozen=True)
class Config:
    """Cost of a chunk of a rollout at several horizons, for kinds of history and attention."""
    backbone: str               # a preset of model.py
    histories: str = "none,window,framepack,packforcing"    # kinds, separated by commas
    attentions: str = "joint,self,segment"                  # and how history is attended to
    minutes: str = "1,10"       # of video that came before
    height: int = 0             # pixels; 0: the preset's
    width: int = 0              # the same
    steps: int = 4              # denoising steps a chunk
    chunks: int = 4             # measured, after those that compile or warm up
    choose: str = "recency"     # how packforcing chooses blocks: recency, affinity
    recent: int = 0             # latent frames that history leaves as they are; 0: the kind's own
    most: float = 20000.0       # TFLOP: a dearer chunk is not run
    compile: bool = False       # torch.compile the transformer blocks
    out: str = ""               # write the figures as JSON

    def __post_init__(self):
        require_positive(self, "steps", "chunks", "most")
        if self.backbone not in PRESETS:
            raise ValueError(f"unknown backbone '{self.backbone}'; choose {', '.join(PRESETS)}")
        if self.choose not in ("recency", "affinity"):
            raise ValueError(f"--choose is recency or affinity here, where nothing has cameras; got '{self.choose}'")


def filled(model, frames, shape):
    """A history of so many frames of noise [1, C, frames, H, W], in pieces."""
    device, spec = next(model.parameters()).device, model.spec
    noise = lambda n: torch.randn(1, shape[0], n, *shape[1:], device=device)
    history = History(noise(0), spec.window - spec.chunk, model, store="cpu")
    while history.n < frames:
        history.append(noise(min(64, frames - history.n)))
    return history


def expected(model, frames, grid, steps):
    """(tokens of history, operations by kind) of the chunk behind so many frames, from the plan alone."""
    s, K = settings_of(model), model.spec.chunk
    shown = lambda T: range(max(0, T - s.sink - s.recent) // s.chunk)[-s.top:]
    start, older = part(s.plan(frames, shown(frames)))
    _, before = part(s.plan(frames - K, shown(frames - K)))
    lengths = [tokens([segment], grid) for segment in older]
    new = []                                            # segments that no cache has: one a block or one a cell in time
    for segment in older:
        if segment not in before:
            each = 1 if s.dense else cells(segment, grid)[0]
            new += [tokens([segment], grid) // each] * each
    work = chunk_flops(model.spec, s.attention, steps, K, frames - start, *grid, sum(lengths), new, heard=True)
    return sum(lengths) + (frames - start) * grid[0] * grid[1], work


@torch.no_grad()
def measure(model, history, text, cfg):
    """Milliseconds of a chunk and GiB at its peak on the GPU, of which `kept` is history. The first chunk is not
    counted; under --compile the first five: the segments that enter repeat after four."""
    device, K, cuda = history.latents.device, model.spec.chunk, history.latents.is_cuda
    velocity, times, sigmas = launched(model), [], schedule(cfg.steps, model.spec.shift)
    for _ in range((5 if cfg.compile else 1) + cfg.chunks):
        begin, n = history.begin(), history.n
        told = Condition(text, Control(torch.zeros(1, n + K - begin, dtype=torch.long, device=device)))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        noise = lambda shape: torch.randn(shape, device=device)
        go = lambda: chunks(velocity, told, history, n + K, sigmas, K, noise, few_step, lambda n: {}, begin)
        times.append(timed(go, device)[0])
    return {"ms": sorted(times[-cfg.chunks:])[cfg.chunks // 2], "times": times,
            "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else None,
            "kept_mib": (history.latents.nbytes + history.first.nbytes) / 2 ** 20,
            "stored_mib": sum(block.nbytes for block in history.blocks) / 2 ** 20}


def row(model, kind, attention, minutes, cfg, shape, text):
    """One line of the table."""
    spec, K = model.spec, model.spec.chunk
    attach(model, Settings.of(spec, kind, cfg.recent if kind != "none" else 0, attention=attention, **(
        {"choose": cfg.choose} if kind == "packforcing" else {})))
    frames = round(minutes * 60 * spec.fps / spec.stride[0]) // K * K
    seen, work = expected(model, frames, (shape[1] // spec.patch[1], shape[2] // spec.patch[2]), cfg.steps)
    work = sum(work.values()) / 1e12
    done = {"history": kind, "attention": attention, "minutes": minutes, "frames": frames, "tokens": seen,
            "tflop": work, "seconds_of_video": K * spec.stride[0] / spec.fps}
    if work > cfg.most:
        return done | {"ms": None, "why": "too dear"}
    try:
        return done | measure(model, filled(model, frames, shape), text, cfg)
    except torch.OutOfMemoryError:
        return done | {"ms": None, "why": "out of memory"}


def line(r):
    """A row in markdown."""
    rest = [r["why"], *"---"] if r["ms"] is None else [
        f"{r['ms']:.1f}", f"{1000 / r['ms']:.2f}", "-" if r["peak_gib"] is None else f"{r['peak_gib']:.2f}",
        f"{r['stored_mib']:.0f}"]
    return "| " + " | ".join([r["history"], r["attention"], f"{r['minutes']:g}", f"{r['tokens']:,}",
                              f"{r['tflop']:.4g}", *rest]) + " |"


def main(cfg):
    device = setup()
    with one_line_errors():
        reseed(0, "horizon")
        model = build_on(device, torch.bfloat16 if device.type == "cuda" else torch.float32, cfg.backbone)
        model = compile_blocks(model) if cfg.compile else model
        size = cfg.height or model.spec.size[1], cfg.width or model.spec.size[2]
        shape = model.spec.channels, *(n // s for n, s in zip(size, model.spec.stride[1:]))
        text, rows = RandomStream(model.spec, 0, device).text([""]), []
        if cfg.out:
            Path(cfg.out).touch()
    print(f"{cfg.backbone}, {size[0]}x{size[1]}, {cfg.steps} steps a chunk; {provenance()['device']}")
    print("| history | attention | minutes | tokens before | TFLOP | ms a chunk | chunks/s | peak GiB | MiB on host |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for kind in cfg.histories.split(","):
        for attention in cfg.attentions.split(","):
            for minutes in map(float, cfg.minutes.split(",")):
                gc.collect()
                torch.cuda.empty_cache() if device.type == "cuda" else None
                with one_line_errors():
                    rows.append(row(model, kind, attention, minutes, cfg, shape, text))
                print(line(rows[-1]), flush=True)
                if cfg.out:
                    report = {"settings": vars(cfg), **provenance(), "rows": rows}
                    Path(cfg.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(parse(Config))
