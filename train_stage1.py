"""Stage 1: a bidirectional video diffusion transformer learns to be controlled (BiWM, arXiv:2606.10135).

Flow matching on clips whose first n frames stay clean at sigma 0 (n = 0 text-, 1 image-, more video-to-video), with the
action or camera of every frame, and caption and control dropped now and then so that the teacher can be guided.

    torchrun train_stage1.py --steps 20                                              # anywhere; --dry-run: a plan
    torchrun train_stage1.py --control adaln+prope --init A.safetensors --init_partial --train control
"""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import qat
from checkpoint import Run, load_checkpoint, save_checkpoint
from common import (EMA, adamw, alarm, data_rank, derive, descend, one_line_errors, parse, require_positive, reseed,
                    setup, shutdown)
from faults import Finite, together
from parallel import Layout, checkpoint_blocks, compile_blocks
from plan import dry_run
from control import NO_ACTION, attach
from data import RandomStream, open_stream
from encode import codec
from flow import add_noise, draw_sigma, flow_loss
from graphs import recorded
from history import behind, clean_frames, configure, draw_past
from model import PRESETS, build, build_on, load
from weights import save
from rollout import velocity_of


@dataclass(frozen=True)
class Config:
    """Stage 1 of BiWM: control fine-tuning. Running the same command again resumes."""
    backbone: str = "tiny"          # a preset of model.py
    codec: str = ""                 # of an official backbone: folder or hub repository, by default the official one
    control: str = ""               # adaln, text, plucker, prope, several joined by +; empty: --init's or the preset's
    init: str = ""                  # weights to start from; empty: random; random: data too, for speed and memory only
    init_partial: bool = False      # take of them what fits: other control, missing or surplus tensors
    train: str = "all"              # all weights, or control: only those of --control, on a frozen --init
    save_trained: bool = False      # with --train control: save those alone; --init is needed to load them
    data: str = ""                  # folder of shards (encode.py, doom.py); empty: the embedded world, rendered live
    out: str = "runs/stage1"        # run folder
    steps: int = 2000               # optimizer steps
    seed: int = 0                   # of everything random
    save_every: int = 1000          # steps between checkpoints
    keep: int = 2                   # checkpoints that stay: the newest and those before it
    batch: int = 16                 # clips per process and backward pass
    accumulate: int = 1             # backward passes per step: as if the batch were so many times larger
    frames: int = 12                # latent frames of the longest clips: the window
    grown: float = 0.6              # share of steps with those; the others have fewer chunks, as a rollout begins
    history: str = ""               # compression: none, window, framepack, packforcing; empty: that of --init, if any
    attention: str = ""             # of history: joint, or self or segment, which do not see the chunk
    recent: int = 0                 # latent frames that history leaves as they are; 0: the kind's own
    choose: str = ""                # packforcing's blocks: affinity or recency
    past: int = 0                   # clips have up to so many frames before them, log-uniform, for --history
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
    quant: str = "none"             # fp8: matmuls in 8 bits, forward and backward (Hopper and later)
    cuda_graphs: bool = False       # with --compile on a GPU: launch the network as CUDA graphs

    def __post_init__(self):
        require_positive(self, *("steps save_every keep batch accumulate lr pool refresh log_every clip".split()))
        if self.backbone not in PRESETS:
            raise ValueError(f"unknown backbone '{self.backbone}'; choose {', '.join(PRESETS)}")
        shares = ("grown", "i2v", "t2v", "drop", "drop_text", "drop_actions", "ema")
        outside = [f"--{name} {getattr(self, name)}" for name in shares if not 0 <= getattr(self, name) <= 1]
        spec, alone = PRESETS[self.backbone], self.train == "control"
        graphs = self.compile and torch.cuda.is_available() and self.shard != "fsdp" and spec.arch != "hunyuan"
        for wrong, message in (
                (outside, f"{', '.join(outside)}: a share is 0..1"),
                (self.train not in ("all", "control") or alone and (not self.init or self.control == "text"),
                 "--train is all or control; control needs --init and parameters to train: text has none"),
                (self.save_trained and (not alone or self.init_partial),
                 "--save_trained needs --train control, and an --init that fits without --init_partial"),
                (self.drop + self.drop_text + self.drop_actions > 1 or self.ema == 1 or self.warmup < 0,
                 "the --drop shares are at most 1 together, --ema is below 1, --warmup is not negative"),
                (self.cuda_graphs and (self.history or self.sequence > 1 or self.accumulate > 1 or not graphs),
                 "--cuda_graphs needs --compile, a GPU and one that fits it; no HunyuanVideo, --history, --accumulate"),
                (self.past < 0 or bool(self.past) != bool(self.history),
                 f"--history is learned behind --past frames, such as 400; got '{self.history}' and {self.past}"),
                (self.frames < 2 * spec.chunk, f"--frames must hold two chunks of {spec.chunk}, got {self.frames}")):
            if wrong:
                raise ValueError(message)
        qat.check(self.quant, ["fp8"])


def draw_frames(cfg, chunk, shared, clean=0):
    """Length of a step's clips: those that rollouts meet, whole chunks behind nothing or (i2v) behind one frame; or
    behind `clean` frames, the latest of a past."""
    first = int(not clean and shared.random() < cfg.i2v)
    most = (cfg.frames - clean - first) // chunk
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
    row = lambda x: no_text.view(-1, *[1] * (x.ndim - 1))           # masks have two axes, states three
    text = {key: torch.where(row(value), empty[key], value) if key in empty else value          # a picture stays
            for key, value in condition.text.items()}
    return replace(condition, text=text, control=replace(condition.control, actions=actions))


def stage1_loss(velocity, x0, condition, cfg, spec, clean=0):
    """L = E |v - (noise - x0)|^2 on the frames behind the prefix; one noise level per clip, 0 on the prefix. The first
    `clean` frames belong to the past and to all prefixes."""
    B, C, T, H, W = x0.shape
    n = clean + draw_prefix(cfg, spec.chunk, B, T - clean, x0.device)
    mask = torch.arange(T, device=x0.device) >= n[:, None]                              # [B, T]
    sigma = draw_sigma((B, 1), spec.shift, device=x0.device) * mask                     # [B, T]
    noise = torch.randn_like(x0)
    return flow_loss(velocity(add_noise(x0, noise, sigma), sigma, condition), x0, noise, mask)


def learning_rate(step, cfg):
    """Linear warm-up, then cosine to zero."""
    return cfg.lr * min((step + 1) / max(cfg.warmup, 1), 1.0) * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))


def initial_model(cfg, coder, layout, device):
    """The network of --init, or a random one, with the control of --control: what is new begins without effect."""
    def prepare(model):
        control = cfg.control or ("" if model.control else model.spec.control)  # that of --init stays
        attach(model, control, coder.sentences() if "text" in control else None, device)
        qat.apply(model, cfg.quant)                                     # first: frozen weights would be stored rounded
        for name, p in model.named_parameters():
            p.requires_grad_(cfg.train == "all" or name.startswith(("control.", "compress.")))
        return layout.place(checkpoint_blocks(model) if cfg.recompute else model)

    reseed(cfg.seed, "initialisation")
    if cfg.init == "random":
        model = prepare(build_on(device, torch.float32, cfg.backbone, control=None))
    elif cfg.init:
        model = load(cfg.backbone, cfg.init, device, torch.float32, cfg.control or None, cfg.init_partial, prepare)
    else:
        model = prepare(build(cfg.backbone, None).to(device))
    return layout.place_history(configure(model, cfg.history, cfg.attention, cfg.recent, cfg.choose))


def save_teacher(model, ema, cfg, run, step):
    """teacher.safetensors: the averaged weights, all or (--save_trained) those of the control on top of --init."""
    notes, trained = run.header(steps=step), ("control.", "compress.") if cfg.save_trained else ""
    weights = {key: value for key, value in ema.average.items() if key.startswith(trained)}
    if cfg.save_trained:
        notes["base"] = Path(cfg.init).resolve() if Path(cfg.init).exists() else cfg.init
    save(model, Path(cfg.out) / "teacher.safetensors", weights=weights, **notes)


def prepare(cfg):
    """The networks, the data and the run folder; bad input ends here with one line."""
    device, spec = setup(), PRESETS[cfg.backbone]
    layout = Layout(device, cfg.shard, cfg.replicas, cfg.sequence)
    if cfg.init == "random":
        coder = stream = RandomStream(spec, cfg.seed, device)
    else:
        coder = codec(cfg.backbone, device, cfg.codec)
        stream = open_stream(cfg.data, coder, spec, cfg.seed, cfg.frames + cfg.past + bool(cfg.past), cfg.pool, 48,
                             cfg.refresh * cfg.accumulate)
    model = initial_model(cfg, coder, layout, device)
    return device, model, coder, stream, Run(cfg.out, cfg, 1, "" if cfg.init == "random" else cfg.init)


@together()
def main(cfg):
    with one_line_errors():
        device, model, coder, stream, run = prepare(cfg)
        optimizer = adamw(model, cfg.lr, (0.9, 0.99), device, cfg.decay)
        ema, finite = EMA(model, cfg.ema), Finite(cfg.out, ["model"])
        state = {"model": model, "finite": finite}, {"model": optimizer}, {"model": ema}
        start = load_checkpoint(cfg.out, cfg.steps, *state)
    spec, empty = model.spec, coder.text([""])
    coder.release()
    velocity = velocity_of(compile_blocks(model) if cfg.compile else model)
    velocity = recorded(model, velocity) if cfg.cuda_graphs else velocity

    for step in run.progress(start, cfg.steps, "stage 1"):
        reseed(cfg.seed, "stage 1", data_rank(), step)
        shared = random.Random(derive(cfg.seed, "stage 1, all ranks", step))
        before, loss, batches = draw_past(shared, cfg.past, spec.chunk, cfg.i2v), 0.0, []
        clean = clean_frames(model, before)
        frames = before + draw_frames(cfg, spec.chunk, shared, clean)
        for i in range(cfg.accumulate):
            batch = stream.batch(step * cfg.accumulate + i, cfg.batch, frames)
            begin, past = behind(model, batch.x0, before, batch.condition.control)
            condition = replace(drop(batch.condition.frames(begin, frames), empty, cfg), past=past)
            part = stage1_loss(velocity, batch.x0[:, :, begin:], condition, cfg, spec, clean) / cfg.accumulate
            part.backward(alarm(part))
            loss, batches = loss + part.detach(), [*batches, batch]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        norm = descend(optimizer, cfg.clip)
        if finite.check(step, "model", norm, batches, loss=loss):
            ema.update(model, min(cfg.ema, (1 + step) / (10 + step)))      # early on, forget the random start sooner

        if step % cfg.log_every == 0 or step + 1 == cfg.steps:
            gib = {"peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30} if device.type == "cuda" else {}
            run.log(step, loss=loss, norm=norm, lr=group["lr"], skipped=finite.total, **gib)
        due = run.due(step + 1, cfg.steps, cfg.save_every)
        if run.asked if cfg.init == "random" else due:          # noise is not worth a file, but for a signal
            save_teacher(model, ema, cfg, run, step + 1)        # first: a complete checkpoint never lacks its weights
            save_checkpoint(cfg.out, step + 1, *state, keep=cfg.keep)
            run.leave_if_asked(step + 1)
    shutdown()


if __name__ == "__main__":
    main(parse(Config, dry_run=lambda cfg: dry_run(1, cfg, draw_frames)))
