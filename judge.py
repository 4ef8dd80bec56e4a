"""Does a dream of recorded video obey? Held-out clips of any shards of the tiny codec, continued by a network.

A probe (probe.py) learns from the training split to read the motion between two frames, then reads it out of what
the network made of the test split's first frames and labels. What it reads out of the real clips is the ceiling.

    python judge.py runs/doom --weights runs/doom2/student.safetensors --out runs/doom2/judged
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from common import one_line_errors, parse, provenance, require_positive, setup, sha256
from data import ShardStream
from encode import codec
from probe import Probe, learnt
from flow import schedule
from model import load
from rollout import few_step, guided, ode, rollout, velocity_of
from video import compose, write_video


@dataclass(frozen=True)
class Config:
    """Continue held-out clips of shards and read the motions out of the result."""
    data: str                       # folder of shards, such as doom.py makes
    weights: str = ""               # safetensors of a student or teacher; empty: the shipped teacher
    backbone: str = "tiny"          # a preset of model.py that uses the tiny codec
    out: str = "runs/judged"        # folder: figures.json, walks.mp4, and the probe of --data if --probe is not there
    probe: str = ""                 # a probe that an earlier call made; empty: train one
    probe_steps: int = 3000         # of its training
    clips: int = 64                 # held-out windows
    frames: int = 36                # latent frames of each, with the real chunk that it begins with
    shown: int = 4                  # walks in the video
    steps: int = 4                  # denoising steps a chunk
    guidance: float = 1.0           # of the teacher; a student needs none
    ode: bool = False               # the teacher's Euler sampler instead of the student's
    seed: int = 0                   # of the windows and the noise

    def __post_init__(self):
        require_positive(self, "probe_steps", "clips", "frames", "shown", "steps")


def train_probe(stream, coder, steps, batch=512):
    """A probe of the motions in `stream`, whose frames it sees through the codec."""
    def clips(step):
        batched = stream.batch(step, batch, 2)
        return coder.decode(batched.x0), batched.condition.control.actions
    return learnt(clips, steps, coder.device)


def obeyed(probe, video, actions):
    """Shares of the motions in uint8 video [N, T, H, W, 3] that are read as the labels [N, T] say."""
    read, truth = probe.read(video)[0], actions[:, 1:].cpu()                            # [N, T-1, 2], [N, T-1]
    move, turn = read[..., 0] == truth // 9, read[..., 1] == truth % 9
    return {name: round(float(right.double().mean()), 4)
            for name, right in (("translation", move), ("rotation", turn), ("both", move & turn))}


@torch.no_grad()
def dream(model, coder, batch, start, cfg):
    """The clips of `batch`, all but the first `start` frames generated: uint8 [N, T, H, W, 3]."""
    velocity = guided(velocity_of(model), cfg.guidance, coder.text([model.spec.negative]))
    g = torch.Generator().manual_seed(cfg.seed)
    return coder.decode(rollout(
        velocity, batch.condition, batch.x0[:, :, :start], cfg.frames, schedule(cfg.steps, model.spec.shift),
        model.spec.chunk, model.spec.window, lambda shape: torch.randn(shape, generator=g).to(coder.device),
        ode if cfg.ode else few_step, model))


def main(cfg):
    device, out = setup(), Path(cfg.out)
    with one_line_errors():
        coder, model = codec(cfg.backbone, device), load(cfg.backbone, cfg.weights, device).eval()
        train, test = (ShardStream(cfg.data, model.spec, coder.fingerprint(), cfg.seed, device, split)
                       for split in ("train", "test"))
        test.windows(cfg.frames)
        out.mkdir(parents=True, exist_ok=True)
        probe = Probe().to(device).eval()
        if cfg.probe:
            probe.load_state_dict(load_file(cfg.probe))
    if not cfg.probe:
        probe = train_probe(train, coder, cfg.probe_steps)
        save_file({key: x.cpu().contiguous() for key, x in probe.state_dict().items()}, out / "probe.safetensors")
    batch, start = test.batch(0, cfg.clips, cfg.frames), model.spec.chunk
    real, made = coder.decode(batch.x0), dream(model, coder, batch, start, cfg)
    actions = batch.condition.control.actions
    last = slice(start - 1, None)                                                       # motions into generated frames
    videos = {"real video": real, "dream": made, "a still picture": real[:, :1].expand_as(real)}
    figures = {name: obeyed(probe, video[:, last], actions[:, last]) for name, video in videos.items()}
    error = ((made[:, start:].float() - real[:, start:].float()) / 255).square().mean((0, 2, 3, 4))
    figures["psnr"] = {f"frame {n}": round(float(-10 * error[n - 1].log10()), 2)
                       for n in (4, 8, 16, 32) if n <= len(error)}
    notes = {"weights": sha256(cfg.weights) if cfg.weights else "shipped", "settings": vars(cfg), **provenance()}
    (out / "figures.json").write_text(json.dumps({**figures, **notes}, indent=1) + "\n")
    walks = [compose(made[i], actions[i].cpu(), cfg.steps, real[i]) for i in range(min(cfg.shown, cfg.clips))]
    write_video(out / "walks.mp4", np.concatenate(walks), model.spec.fps)
    for name, shares in figures.items():
        print(f"{name:16s}", "  ".join(f"{key} {value:g}" for key, value in shares.items()))


if __name__ == "__main__":
    main(parse(Config))
