"""What a training step will take, before anything is allocated: operations, bytes per GPU, seconds, GPUs that hold it.

    python bench.py plan --backbone wan2.2-5b --stage 2 --gpus 8 --shard fsdp --height 704 --width 1280 --frames 121
    torchrun --nproc_per_node 8 train_stage2.py --tune lora --dry-run           # the same of a training command

Bytes of weights, gradients, optimizers and averages are exact. Activations are what compiled blocks save, counted
tensor by tensor for each architecture; with them the peaks that bench.py measured are met within 2 %. What runs says
tally.py, how long it takes clock.py.
"""

import os
from dataclasses import dataclass, replace
from importlib import import_module
from random import Random
from typing import NamedTuple

import torch

from clock import GPUS, Network, times
from common import require_positive
from dmd import Head
from lora import Adapters
from model import build, preset
from parallel import check_layout
from tally import Job, stage1_calls, stage2_calls, work

SHOWN = "H200"                                              # whose seconds the table has by kind
RESERVE = 1.5                                               # GiB for NCCL, cuBLAS and what fragmentation wastes
# Bytes that a compiled block keeps for each token and unit of width: with full and selective checkpointing, without
# any; the last also 4 for each unit of the MLP. Of Wan the residual stream has 4 bytes, of the others 2.
KEPT = {"wan": (4, 8, 38), "hunyuan": (2, 4, 24), "ltx": (2, 6, 40)}
MODES = ("full", "selective", "none")
DRAWS = 32                                                  # rollouts of stage 2 to average over


class State(NamedTuple):
    """Bytes of what lives as long as a run: weights of all networks, gradients that exist at one time, moments of AdamW
    and its counters, averages. `gathered`: two blocks and what is outside of the blocks, of the widest network.
    `adapters`: those of the weights that fully_shard has not got hold of; `networks` {who: clock.Network}."""
    parameters: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    adapters: int = 0
    networks: dict = {}


def state(cfg, stage, frozen=torch.bfloat16):
    """The `State` of a training script's settings, from models on the meta device; what never learns is `frozen`, on a
    GPU bf16. Student and critic, with its head, have their gradients in turn."""
    kinds = stage == 1 and cfg.control or preset(cfg.backbone).control
    kinds = kinds.replace("text", "adaln")                                      # `text` has no parameters
    with torch.device("meta"):
        model = build(cfg.backbone, kinds)
        head = [*Head(model.spec.dim).parameters()] if stage == 2 and cfg.gan else []
    named, average = dict(model.named_parameters()), [*model.parameters()]
    if stage == 1:
        learns = [[p for key, p in named.items() if cfg.train == "all" or key.startswith("control.")]]
    elif cfg.tune == "full":
        learns = [average, average + head]
    else:
        sets = Adapters(model, ("student", "critic"), cfg.rank).sets
        average = [*sets["student"].parameters()]
        learns = [average, [*sets["critic"].parameters()] + head]

    def base(dtype, prefix=""):
        return sum(p.numel() * model.stored_dtype(key, dtype).itemsize for key, p in named.items()
                   if key.startswith(prefix))

    def network(dtype, learnt=(), steps=0, average=()):
        blocks, low = base(dtype, f"{model.block_list}."), learnt if lora else ()
        cast = size(low) + size(named.values()) * (dtype == torch.float32)
        # in bf16, a token: [r, in] reads in; [out, r] writes out, which is read with the linear's, the sum written
        moved = sum((2 if p.shape[0] == cfg.rank else 8) * max(p.shape) for p in low if p.ndim > 1)
        return Network(blocks, base(dtype) - blocks, cast, size(learnt), len(learnt), steps, size(average), moved)
    size, every = lambda tensors: sum(p.numel() for p in tensors), sum(learns, [])
    lora = stage == 2 and cfg.tune == "lora"
    wide = frozen if lora else torch.float32
    if stage == 1:
        networks = {"model": network(wide, learns[0], 1, average)}
    else:
        networks = {"teacher": network(frozen), "student": network(wide, learns[0], 1, average),
                    "critic": network(wide, learns[1], cfg.critic_steps)}
    return State(base(torch.float32) if stage == 1 else base(frozen) + 4 * size(every), 4 * max(map(size, learns)),
                 8 * size(every) + 4 * len(every), 4 * size(average),
                 base(wide) - base(wide, f"{model.block_list}.") * (1 - 2 / model.spec.layers),
                 4 * size(every) * lora, networks)


def memory(job, state, mode):
    """Bytes on one GPU by kind; their sum is the peak. The graphs of a backward pass go as its gradients come."""
    spec, (rows, columns) = job.spec, job.spec.grid(*job.spec.size[1:])
    most, kept = KEPT[spec.arch][-1], KEPT[spec.arch][MODES.index(mode)]
    shards, own = job.shards, 1 if state.adapters else job.shards           # GPUs that share weights, and what learns

    def tokens(frames):
        return job.batch * (frames * rows * columns / job.sequence + spec.text_len * (spec.arch == "hunyuan"))

    def graph(frames):
        return tokens(frames) * spec.layers * (kept * spec.dim + 4 * spec.ffn * (mode == "none"))
    peaks, ways = [], [alive for tally in job.tallies for alive in tally.alive.values()]
    # Where several graphs wait for one backward pass, autograd adds up whole gradients before FSDP2 gets them.
    several = any(every > last for every, last in ways)
    gradients = state.gradients / (1 if several else own)
    for every, last in ways:
        # one block's backward: what the forward did not keep of it, and the gradient of the MLP's hidden layer
        block = tokens(last) * ((most - kept) * spec.dim + (2 if mode == "none" else 6) * spec.ffn)
        first = graph(every) + state.gradients / own * (job.accumulate > 1)
        peaks.append(block + max(first, graph(every - last) + gradients))
    whole = state.gathered * (1 + (job.trains and not several)) * (shards > 1)          # their gradients as well
    weights = (state.parameters - state.adapters) / shards + state.adapters
    return {"weights": weights, "gradients": gradients, "AdamW": state.optimizer / own, "average": state.average / own,
            "gathered": whole, "activations": max(0, max(peaks) - gradients)}


# ---- The table -------------------------------------------------------------------------------------------------------

def table(job, state):
    """The plan as lines, a column for each way of checkpointing."""
    spec, draws = job.spec, len(job.tallies)
    calls = [call for tally in job.tallies for call in tally.calls]
    T, (rows, columns) = max(call.frames for call in calls), spec.grid(*spec.size[1:])
    cells, peaks, totals = {}, [], {}
    mean = lambda draws: {kind: sum(draw[kind] for draw in draws) / len(draws) for kind in draws[0]}
    for mode in MODES:
        for kind, n in (parts := memory(job, state, mode)).items():
            cells.setdefault(f"{kind}, GiB", []).append(f"{n / 2 ** 30:.3g}")
        peaks.append(sum(parts.values()) / 2 ** 30)
        done = mean([work(job, tally, mode) for tally in job.tallies])
        cells.setdefault("TFLOP", []).append(f"{sum(done.values()) / 1e12:.4g}")
    cells["peak, GiB"] = [f"{n:.3g}" for n in peaks]
    for name, gpu in GPUS.items():
        took = [mean([times(job, state.networks, tally, mode, gpu) for tally in job.tallies]) for mode in MODES]
        for kind in took[0] if name == SHOWN else ():
            if any(part[kind] for part in took):
                cells[f"{kind}, s"] = [f"{part[kind]:.3g}" for part in took]
        totals[f"{name}, {gpu.room:g} GiB"] = [
            f"{sum(part.values()) - part['communication']:.3g} s" if n + RESERVE < gpu.room else "too small"
            for part, n in zip(took, peaks)]
    return [
        f"{spec.name}, {spec.size[1]}x{spec.size[2]}: up to {T} latent frames of {rows}x{columns} tokens at once, "
        f"{T * rows * columns:,}; {job.gpus} GPU{'s' * (job.gpus > 1)}, {job.shard}",
        f"an update: {len(calls) / draws:.1f} forwards of {job.batch} clips a GPU, with backward "
        f"{sum(bool(call.asked) for call in calls) / draws:.1f} (means of {draws} draws); on one GPU:", "",
        f"{'checkpointing':24}" + "".join(f"{mode:>12}" for mode in MODES),
        *(f"{name:24}" + "".join(f"{cell:>12}" for cell in row) for name, row in (cells | totals).items()), "",
        f"Seconds of an update, blocks {'not ' * (not job.compile)}compiled; by kind on an {SHOWN}; communication "
        "costs what is waited for.", "Without data, codecs and what 8-bit matmuls gain; networks of a few million "
        "parameters wait for kernel launches instead."]


def show(stage, cfg, spec, gpus, frames, **layout):
    """Print the plan of a training script's settings; `frames(shared)`: latent frames of a clip of stage 1."""
    draws = [Random(i) for i in range(DRAWS)]
    tallies = [stage1_calls(frames(shared), layout.get("accumulate", 1)) if stage == 1 else
               stage2_calls(cfg, spec, shared) for shared in draws]
    trains = cfg.train == "all" if stage == 1 else cfg.tune == "full"
    job = Job(spec, tallies, cfg.batch, gpus=gpus, trains=trains, compile=cfg.compile, **layout)
    print("", *table(job, state(cfg, stage)), sep="\n")


def dry_run(stage, cfg, draw_frames=None):
    """What --dry-run of a training script prints: its settings, and their plan on the processes of torchrun."""
    settings, gpus = vars(cfg), int(os.environ.get("WORLD_SIZE", 1))
    check_layout(gpus, cfg.shard, cfg.replicas, cfg.sequence)
    if int(os.environ.get("RANK", 0)) == 0:
        print(*(f"--{name} {value}" for name, value in settings.items()), sep="\n")
        layout = {name: settings[name] for name in ("accumulate", "shard", "replicas", "sequence") if name in settings}
        spec = preset(cfg.backbone)
        show(stage, cfg, spec, gpus, lambda shared: draw_frames(cfg, spec.chunk, shared), **layout)
        if settings.get("history"):
            print(f"What --history {cfg.history} shows of a past, and its kernels, come on top.")


@dataclass(frozen=True)
class Config:
    """What a training step will take on GPUs; every other setting has the default of the training script."""
    backbone: str = "wan2.2-5b" # a preset of model.py
    stage: int = 1              # of train_stage1.py (clips as long as --frames) or of train_stage2.py (rollouts)
    frames: int = 0             # pixel frames, height and width of the clips; 0: the native ones
    height: int = 0
    width: int = 0
    gpus: int = 1               # processes, each with a GPU
    shard: str = "ddp"          # ddp: each has all weights; fsdp: they share them
    replicas: int = 1           # with fsdp: so many sharded copies
    sequence: int = 1           # neighbouring GPUs that share each clip
    tune: str = "full"          # stage 2: full or lora
    rank: int = 32              # of the adapters
    quant: str = "none"         # as in the training scripts; master weights stay, so bytes do
    compile: bool = True        # the blocks; otherwise an update takes longer
    batch: int = 1              # clips per GPU and pass
    accumulate: int = 1         # passes per update

    def __post_init__(self):
        require_positive(self, "gpus", "replicas", "sequence", "rank", "batch", "accumulate")
        spec = preset(self.backbone)
        if self.stage not in (1, 2) or self.shard not in ("ddp", "fsdp") or self.stage == 1 and self.tune != "full":
            raise ValueError("--stage is 1 or 2, --shard ddp or fsdp, --tune lora is for --stage 2")
        if self.gpus % self.replicas or self.gpus % self.sequence or spec.heads % self.sequence:
            raise ValueError(f"--replicas and --sequence must divide --gpus {self.gpus}, --sequence also {spec.heads}")
        for name, size, step in zip(("height", "width"), (self.height, self.width), spec.stride[1:]):
            if size < 0 or size % step:
                raise ValueError(f"--{name} must be a multiple of {step}, got {size}")


def main(_, cfg):
    spec, given = preset(cfg.backbone), (cfg.frames, cfg.height, cfg.width)
    spec = replace(spec, size=tuple(ours or native for ours, native in zip(given, spec.size)))
    T, more = spec.latent_frames(spec.size[0]), {"tune": cfg.tune, "rank": cfg.rank, "accumulate": cfg.accumulate}
    more = more | {"teacher": "random", "preview": 0} if cfg.stage == 2 else {}
    script = import_module(f"train_stage{cfg.stage}")
    training = script.Config(backbone=cfg.backbone, frames=T, batch=cfg.batch, quant=cfg.quant, compile=cfg.compile,
                             **more)
    show(cfg.stage, training, spec, cfg.gpus, lambda shared: T, accumulate=cfg.accumulate, shard=cfg.shard,
         replicas=cfg.replicas, sequence=cfg.sequence)
