"""Stage 1: a bidirectional video diffusion transformer learns to be controlled (BiWM, arXiv:2606.10135).

Flow matching on clips whose first n frames stay clean at sigma 0 (n = 0 text-, 1 image-, more video-to-video), with the
action or camera of every frame, and caption and control dropped now and then so that the teacher can be guided.

    torchrun train_stage1.py --steps 20                                              # anywhere
    torchrun train_stage1.py --steps 20000 --batch 256 --compile --cuda_graphs       # a good teacher, one GPU
    torchrun train_stage1.py --control prope --init runs/stage1/teacher.safetensors --init_partial --train control
"""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from checkpoint import Run, load_checkpoint, save_checkpoint
from common import (EMA, data_rank, derive, descend, one_line_errors, parse, provenance, require_positive, reseed,
                    setup, shutdown)
from parallel import Layout, checkpoint_blocks, compile_blocks
from control import NO_ACTION, Condition, Control, attach
from data import RandomStream, WorldStream
from encode import codec
from flow import add_noise, draw_sigma, flow_loss
from model import PRESETS, build, build_on, load
from weights import save
from rollout import velocity_of


@dataclass(frozen=True)
class Config:
    """Stage 1 of BiWM: control fine-tuning. Running the same command again resumes."""
    backbone: str = "tiny"          # a preset of model.py
    control: str = "adaln"          # how control enters: adaln, text, plucker, prope, or several joined by +
    init: str = ""                  # weights to start from; empty: random; random: data too, for speed and memory only
    init_partial: bool = False      # take of them what fits: other control, missing or surplus tensors
    train: str = "all"              # all weights, or control: only those of --control, on a frozen --init
    save_trained: bool = False      # with --train control: save those alone; --init is needed to load them
    out: str = "runs/stage1"        # run folder
    steps: int = 2000               # optimizer steps
    seed: int = 0                   # of everything random
    save_every: int = 1000          # steps between checkpoints
    batch: int = 16                 # clips per process and backward pass
    accumulate: int = 1             # backward passes per step: as if the batch were so many times larger
    frames: int = 12                # latent frames of the longest clips: the window
    grown: float = 0.6              # share of steps with those; the others have fewer chunks, as a rollout begins
    i2v: float = 0.15               # share of steps whose clips begin with one clean frame
    t2v: float = 0.2                # share of clips without a clean chunk (when not i2v: without anything clean)
    drop: float = 0.1               # share of clips with neither caption nor actions: what guidance starts from
    drop_text: float = 0.05         # further share without caption
    drop_actions: float = 0.05      # further share without actions
    lr: float = 1e-3                # peak learning rate of AdamW
    warmup: int = 500               # steps to reach it; then cosine to zero
    decay: float = 0.01             # weight decay
    clip: float = 1.0               # global gradient norm
    ema: float = 0.999              # decay of the averaged weights, which are the result
    pool: int = 256                 # trajectories in memory
    refresh: int = 500              # steps until they are replaced
    log_every: int = 20             # steps between log lines
    shard: str = "ddp"              # weights: none, one process; ddp, a copy in each; fsdp, rows of one copy in each
    replicas: int = 1               # with --shard fsdp: so many sharded copies, such as one per machine
    sequence: int = 1               # neighbouring processes that share each clip
    recompute: bool = False         # recompute activations in the backward pass: less memory
    compile: bool = False           # torch.compile the transformer blocks
    cuda_graphs: bool = False       # with --compile on a GPU: launch the network as CUDA graphs

    def __post_init__(self):
        require_positive(self, "steps", "save_every", "batch", "accumulate", "frames", "lr", "pool", "refresh",
                         "log_every", "clip")
        if self.backbone not in PRESETS:
            raise ValueError(f"unknown backbone '{self.backbone}'; choose {', '.join(PRESETS)}")
        if self.train not in ("all", "control") or (self.train == "control" and not self.init) or (
                self.train == "control" and self.control == "text"):
            raise ValueError("--train is all or control; control needs --init and parameters to train: text has none")
        if self.save_trained and (self.train == "all" or self.init_partial):
            raise ValueError("--save_trained needs --train control, and an --init that fits without --init_partial")
        for name in ("grown", "i2v", "t2v", "drop", "drop_text", "drop_actions", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is a share, 0..1, got {getattr(self, name)}")
        if self.drop + self.drop_text + self.drop_actions > 1 or self.ema == 1 or self.warmup < 0:
            raise ValueError("the --drop shares are at most 1 together, --ema is below 1, --warmup is not negative")
        if self.cuda_graphs and not (self.compile and torch.cuda.is_available() and self.shard != "fsdp"
                                     and self.sequence == 1):
            raise ValueError("--cuda_graphs needs --compile and a GPU, and a network that no other process has part in")
        if self.frames < 2 * PRESETS[self.backbone].chunk:
            raise ValueError(f"--frames must hold two chunks of {PRESETS[self.backbone].chunk}, got {self.frames}")


def draw_frames(cfg, chunk, shared):
    """Length of a step's clips: those that rollouts meet, whole chunks behind nothing or (i2v) behind one frame."""
    first = int(shared.random() < cfg.i2v)
    most = (cfg.frames - first) // chunk
    return first + chunk * (most if shared.random() < cfg.grown else shared.randint(1, most))


def draw_prefix(cfg, chunk, batch, frames, device):
    """Clean prefix lengths [B]: the odd first frame and whole chunks that leave at least one chunk to predict."""
    first, chunks = frames % chunk, frames // chunk
    clean = torch.randint(min(1, chunks - 1), chunks, (batch,), device=device)
    return first + chunk * torch.where(torch.rand(batch, device=device) < cfg.t2v, 0, clean)


def drop(condition, empty, cfg):
    """Withhold caption, control or both, for guidance; a window's first label is half the time still."""
    actions = condition.control.actions.clone()
    B, device = actions.shape[0], actions.device
    actions[:, 0] *= torch.rand(B, device=device) < 0.5
    u = torch.rand(B, device=device)                                # both | caption | actions | nothing is withheld
    no_text = u < cfg.drop + cfg.drop_text
    no_actions = (u < cfg.drop) | ~no_text & (u < cfg.drop + cfg.drop_text + cfg.drop_actions)
    actions[no_actions] = NO_ACTION
    text = {key: torch.where(no_text[:, None, None], empty[key], value) for key, value in condition.text.items()}
    return Condition(text, replace(condition.control, actions=actions))


def stage1_loss(velocity, x0, condition, cfg, spec):
    """L = E |v - (noise - x0)|^2 on the frames behind the prefix; one noise level per clip, 0 on the prefix."""
    B, C, T, H, W = x0.shape
    n = draw_prefix(cfg, spec.chunk, B, T, x0.device)
    mask = torch.arange(T, device=x0.device) >= n[:, None]                              # [B, T]
    sigma = draw_sigma((B, 1), spec.shift, device=x0.device) * mask                     # [B, T]
    noise = torch.randn_like(x0)
    return flow_loss(velocity(add_noise(x0, noise, sigma), sigma, condition), x0, noise, mask)


class Tensors(nn.Module):
    """A network whose arguments are tensors alone, as CUDA graphs want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, sigma, text, *control):
        return velocity_of(self.model)(x, sigma, Condition({"text": text}, Control(*control)))


def fast_velocity(model, cfg):
    """`velocity_of(model)` with compiled blocks and, on a GPU, one CUDA graph per clip length: small kernels leave the
    processor no time to launch them one by one."""
    compile_blocks(model)
    if not cfg.cuda_graphs:
        return velocity_of(model)
    graphs = {}

    def velocity(x, sigma, condition):
        inputs = x, sigma, condition.text["text"], *vars(condition.control).values()
        if x.shape[2] not in graphs:
            example = tuple(tensor.clone() for tensor in inputs)
            graphs[x.shape[2]] = torch.cuda.make_graphed_callables(Tensors(model), example)
        return graphs[x.shape[2]](*inputs)
    return velocity


def learning_rate(step, cfg):
    """Linear warm-up, then cosine to zero."""
    return cfg.lr * min((step + 1) / max(cfg.warmup, 1), 1.0) * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))


def adamw(model, cfg, device):
    """AdamW; biases and norms are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, cfg.lr, (0.9, 0.99), weight_decay=cfg.decay, fused=device.type == "cuda")


def initial_model(cfg, coder, layout, device):
    """The network of --init, or a random one, with the control of --control: what is new begins without effect."""
    def prepare(model):
        attach(model, cfg.control, coder.sentences() if "text" in cfg.control else None, device)
        for name, p in model.named_parameters():
            p.requires_grad_(cfg.train == "all" or name.startswith("control."))
        return layout.place(checkpoint_blocks(model) if cfg.recompute else model)

    reseed(cfg.seed, "initialisation")
    if cfg.init == "random":
        return prepare(build_on(device, torch.float32, cfg.backbone, control=None))
    if cfg.init:
        return load(cfg.backbone, cfg.init, device, control=cfg.control, partial=cfg.init_partial, prepare=prepare)
    return prepare(build(cfg.backbone, None).to(device))


def save_teacher(model, ema, cfg, step):
    """teacher.safetensors: the averaged weights, all or (--save_trained) those of the control on top of --init."""
    notes = {"stage": 1, "steps": step, "seed": cfg.seed, "control": cfg.control, **provenance()}
    weights = ema.average
    if cfg.save_trained:
        weights = {key: value for key, value in weights.items() if key.startswith("control.")}
        notes["base"] = Path(cfg.init).resolve() if Path(cfg.init).exists() else cfg.init
    save(model, Path(cfg.out) / "teacher.safetensors", weights=weights, **notes)


def prepare(cfg):
    """The networks, the data and the run folder; bad input ends here with one line."""
    device = setup()
    layout = Layout(device, cfg.shard, cfg.replicas, cfg.sequence)
    noise = RandomStream(PRESETS[cfg.backbone], cfg.seed, device) if cfg.init == "random" else None
    coder = noise or codec(cfg.backbone, device)
    stream = noise or WorldStream(coder, cfg.seed, cfg.pool, max(48, cfg.frames), cfg.refresh * cfg.accumulate)
    model = initial_model(cfg, coder, layout, device)
    return device, model, coder, stream, Run(cfg.out, cfg)


def main(cfg):
    with one_line_errors():
        device, model, coder, stream, run = prepare(cfg)
        optimizer, ema = adamw(model, cfg, device), EMA(model, cfg.ema)
        state = {"model": model}, {"model": optimizer}, {"model": ema}
        start = load_checkpoint(cfg.out, cfg.steps, *state)
    spec, empty = model.spec, coder.text([""])
    velocity = fast_velocity(model, cfg) if cfg.compile else velocity_of(model)

    for step in run.progress(start, cfg.steps, "stage 1"):
        reseed(cfg.seed, "stage 1", data_rank(), step)
        shared = random.Random(derive(cfg.seed, "stage 1, all ranks", step))
        frames, loss = draw_frames(cfg, spec.chunk, shared), 0.0
        for i in range(cfg.accumulate):
            batch = stream.batch(step * cfg.accumulate + i, cfg.batch, frames)
            part = stage1_loss(velocity, batch.x0, drop(batch.condition, empty, cfg), cfg, spec) / cfg.accumulate
            part.backward()
            loss += part.detach()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        norm = descend(optimizer, cfg.clip, "the network")
        ema.update(model, min(cfg.ema, (1 + step) / (10 + step)))          # early on, forget the random start sooner

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            gib = {"peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30} if device.type == "cuda" else {}
            run.log(step, loss=loss, norm=norm, lr=group["lr"], **gib)
        if cfg.init != "random" and ((step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps):
            save_teacher(model, ema, cfg, step + 1)     # before the checkpoint: a complete one never lacks its weights
            save_checkpoint(cfg.out, step + 1, *state)
    shutdown()


if __name__ == "__main__":
    main(parse(Config))
