"""What every script shares: processes and devices, settings as a command line, seeds, logs, EMA and checkpoints.

Only this file touches `torch.distributed`; started by torchrun or by plain python, the scripts are the same.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction
from functools import partial
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

ROOT = Path(__file__).parent


# ---- Errors and settings ---------------------------------------------------------------------------------------------

def fail(message):
    """End the program with one line that names what is wrong; exit code 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


@contextlib.contextmanager
def one_line_errors():
    """Bad input found while a script sets up (ValueError, OSError) ends it with one line instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)


class _Parser(ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def parse(config, argv=None):
    """Read a dataclass from the command line: field `save_every` is the flag --save_every, its comment the help text.

    A field without default is an argument by its place.
    Unknown and abbreviated flags are errors, and so is a value that `config.__post_init__` refuses (ValueError).
    """
    notes = dict(re.findall(r"^ +(\w+):.*?#\s*(.*)$", inspect.getsource(config), re.M))
    parser = _Parser(description=inspect.getdoc(config), allow_abbrev=False)
    for field in dataclasses.fields(config):
        how = {"action": BooleanOptionalAction} if field.type is bool else {"type": field.type}
        note = notes.get(field.name, "").replace("%", "%%")
        if field.default is dataclasses.MISSING:
            parser.add_argument(field.name, type=field.type, help=note)
            continue
        parser.add_argument(f"--{field.name}", default=field.default, help=f"{note} [{field.default}]", **how)
    try:
        return config(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


def command_line(config):
    """The inverse of `parse`: the flags of all fields that differ from their defaults."""
    changed = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)
               if getattr(config, f.name) != f.default]
    flags = ([f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
             for name, value in changed)
    return [word for flag in flags for word in flag]


def require_positive(config, *names):
    """ValueError unless each of these fields of `config` is above zero."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"--{name} must be above 0, got {getattr(config, name)}")


# ---- Processes, devices, seeds ---------------------------------------------------------------------------------------

def setup():
    """Join the process group if torchrun started us and choose this rank's device, which is returned."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    elif not cuda:
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # torchrun would leave us one thread
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def shutdown():
    if dist.is_initialized():
        dist.destroy_process_group()


def autocast(device):
    """bf16 compute over fp32 weights on a GPU; fp32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.device(device).type == "cuda")


def derive(seed, *names):
    """A 63-bit seed for the stream `names` of `seed`; every use of chance has a stream of its own."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed, *names):
    return torch.Generator().manual_seed(derive(seed, *names))


def reseed(seed, *names):
    """Seed torch's global state, CPU and GPU: called at each step, so that a resumed run draws what it would have."""
    torch.manual_seed(derive(seed, *names))


def mean_over_ranks(metrics):
    """Average a dict of scalars over all ranks; every rank must call it with the same keys."""
    keys = sorted(metrics)
    values = torch.stack([torch.as_tensor(metrics[k]).detach().double().cpu() for k in keys])
    if world_size() > 1:
        values = values.to("cuda") if dist.get_backend() == "nccl" else values
        dist.all_reduce(values)
        values = values / world_size()
    return dict(zip(keys, values.tolist()))


# ---- Passes over a finished backbone: its blocks are in the list that `block_list` names -----------------------------

# What a block under checkpointing keeps: the results of attention, few bytes for the dearest work.
KEPT = [getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default for kernel in (
    "cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu")]


def checkpoint_blocks(model, keep_attention=True):
    """Make each block keep its input and its attention, and compute the rest again in the backward pass, in place.

    `keep_attention=False` computes attention again too. Call it before `compile_blocks`: the compiler then sees the
    checkpoint inside the block and obeys it. Around a compiled block, attention could not be told from the rest.
    """
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, KEPT)} if keep_attention else {}

    def forward(block, *args):                          # nothing in a block is random: no generator state to keep
        return checkpoint(type(block).forward, block, *args, use_reentrant=False, preserve_rng_state=False, **kept)

    for block in getattr(model, model.block_list):
        block.forward = MethodType(forward, block)
    return model


def compile_blocks(model, **options):
    """Compile each transformer block in place; all share one compilation per shape. What stays eager is small."""
    for block in getattr(model, model.block_list):
        block.compile(dynamic=False, **options)
    return model


# ---- Optimisation ----------------------------------------------------------------------------------------------------

def descend(optimizer, clip, step_name):
    """Average gradients over ranks, clip their global norm, step, clear. Returns the norm before clipping.

    A norm that is not finite raises FloatingPointError on every rank and changes no weight.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if world_size() > 1:
        for p in parameters:
            dist.all_reduce(p.grad)
            p.grad /= world_size()
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"the gradient norm of {step_name} is {float(norm)}; no weight was changed")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class EMA:
    """Exponential moving average of a module's parameters, in fp32: avg <- decay * avg + (1 - decay) * now."""

    def __init__(self, module, decay):
        self.decay = decay
        self.average = {k: v.detach().clone().float() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module, decay=None):
        """Take `module` in, with `decay` instead of the usual one if given."""
        now, decay = module.state_dict(), self.decay if decay is None else decay
        torch._foreach_lerp_([*self.average.values()], [now[k].float() for k in self.average], 1 - decay)


# ---- Run folder: settings, log, checkpoints --------------------------------------------------------------------------

def provenance():
    """Commit and versions, for everything that is written down."""
    commit = "unknown"
    if shutil.which("git"):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip() or commit
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"commit": commit, "torch": torch.__version__, "python": sys.version.split()[0],
            "device": device, "processes": world_size()}


HARMLESS = {"out", "steps", "save_every", "log_every", "preview", "compile", "cuda_graphs", "recompute", "validate",
            "health", "patience"}                                                       # may change on resuming


class Run:
    """A run folder: config.json, log.jsonl (one line per logged step) and checkpoints; rank 0 writes."""

    def __init__(self, out, config):
        self.folder, self.bar, self.begin = Path(out), None, time.time()
        self.refuse_other_settings(dataclasses.asdict(config))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if rank() == 0:
                partial = self.folder / "config.json.partial"
                settings = {"settings": dataclasses.asdict(config), **provenance()}
                partial.write_text(json.dumps(settings, indent=1) + "\n")
                partial.rename(self.folder / "config.json")
        except OSError as error:
            raise OSError(f"cannot write to --out {out}: {error.strerror}; choose another folder") from None

    def refuse_other_settings(self, settings):
        """A folder with a checkpoint continues with the settings it began with, or not at all."""
        path = self.folder / "config.json"
        if not path.exists() or not list(self.folder.glob("checkpoint-????????")):
            return
        began = json.loads(path.read_text())
        old = began["settings"]
        changed = [f"--{k} {old.get(k)} -> {v}" for k, v in settings.items() if k not in HARMLESS and old.get(k) != v]
        if began["processes"] != world_size():
            changed.append(f"processes {began['processes']} -> {world_size()}")
        if changed:
            raise ValueError(f"{self.folder} holds a run with other settings ({', '.join(changed)}); "
                             "choose another --out")

    def progress(self, start, stop, what):
        """Iterate over the steps left, with a progress bar on rank 0."""
        self.bar = tqdm(range(start, stop), what, stop, initial=start, disable=rank() > 0, dynamic_ncols=True)
        self.trim(start)
        return self.bar

    def trim(self, start):
        """Forget log lines of steps at or after `start`: they will be made again."""
        path = self.folder / "log.jsonl"
        if rank() == 0 and path.exists():
            whole = [line for line in path.read_text().splitlines() if line.endswith("}")]  # a kill may tear one
            path.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] < start))

    def log(self, step, **metrics):
        """Write one line; all ranks call it."""
        metrics = mean_over_ranks(metrics)
        if rank() == 0:
            line = {"step": step, "seconds": round(time.time() - self.begin, 2), **metrics}
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            self.bar.set_postfix({k: f"{metrics[k]:.3g}" for k in ("loss", "dmd", "critic") if k in metrics})


def save_checkpoint(folder, step, modules, optimizers, averages):
    """Write folder/checkpoint-STEP: weights, optimizers, EMA. It exists completely or not at all; older ones go.

    `modules`, `optimizers` and `averages` are dicts; an optimizer belongs to the module of the same name.
    """
    final = Path(folder) / f"checkpoint-{step:08d}"
    partial = final.with_suffix(".partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    _barrier()
    dcp.save(_state(modules, optimizers, averages), checkpoint_id=partial)
    _barrier()
    if rank() == 0:
        for file in [*partial.iterdir(), partial]:
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(Path(folder).glob("checkpoint-????????"))[:-1]:
            shutil.rmtree(old)
    _barrier()


def load_checkpoint(folder, stop, modules, optimizers, averages):
    """Restore the newest checkpoint of `folder` in place; returns its step, or 0 when there is none.

    ValueError when it is beyond the step `stop`, OSError when it is damaged.
    """
    found = sorted(Path(folder).glob("checkpoint-????????"))
    if not found:
        return 0
    if int(found[-1].name[-8:]) > stop:
        raise ValueError(f"{found[-1]} is already beyond step {stop}; raise --steps or choose another --out")
    state = _state(modules, optimizers, averages)
    try:
        dcp.load(state, checkpoint_id=found[-1])
    except (dcp.api.CheckpointException, RuntimeError) as error:
        raise OSError(f"{found[-1]} is damaged ({str(error).splitlines()[0]}); delete it and start again") from None
    for name, module in modules.items():
        set_model_state_dict(module, state["modules"][name])
    for name, optimizer in optimizers.items():
        set_optimizer_state_dict(modules[name], optimizer, state["optimizers"][name])
    for name, ema in averages.items():
        ema.average = state["averages"][name]
    return int(found[-1].name[-8:])


def _state(modules, optimizers, averages):
    return {"modules": {k: get_model_state_dict(m) for k, m in modules.items()},
            "optimizers": {k: get_optimizer_state_dict(modules[k], o) for k, o in optimizers.items()},
            "averages": {k: e.average for k, e in averages.items()}}


def _barrier():
    if dist.is_initialized():
        dist.barrier()
