"""What every script shares: processes and devices, settings as a command line, seeds, optimisation.

Started by torchrun or by plain python, the scripts are the same.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn                 # early: read later, its defaults would hold a group and its threads

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


def optional(module, extra):
    """An optional package, imported where it is used; OSError names the `extra` that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise OSError(f"{error.name} is not installed; pip install \"biwm[{extra}]\", or {error.name} alone") from None


class _Parser(ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def parse(config, argv=None, dry_run=None):
    """Read a dataclass from the command line: field `save_every` is the flag --save_every, its comment the help text.

    A field without default is an argument by its place.
    Unknown and abbreviated flags are errors, and so is a value that `config.__post_init__` refuses (ValueError). With
    `dry_run` there is a flag --dry-run, which calls it with the settings and ends the program.
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
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="print settings and what they will take, and end")
    given = vars(parser.parse_args(argv))
    dry = dry_run and given.pop("dry_run")
    try:
        settings = config(**given)
        if not dry:
            return settings
        dry_run(settings)
    except ValueError as error:
        parser.error(str(error))
    sys.exit()


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


_sharing = 1                    # neighbouring ranks that have a clip together


def share_clips(ranks):
    """From now on so many neighbouring ranks have each clip together (parallel.Ulysses) and draw the same."""
    global _sharing
    _sharing = ranks


def data_rank():
    """This rank's number in all that is drawn for its clips: data, noise, noise levels."""
    return rank() // _sharing


def data_ranks():
    """How many there are of them."""
    return world_size() // _sharing


def barrier():
    if dist.is_initialized():
        dist.barrier()


def shutdown():
    """Leave the process group, all ranks together: gloo may end with an abort when a rank is still busy elsewhere."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def autocast(device):
    """bf16 compute over fp32 weights on a GPU; fp32 on a CPU."""
    cuda = torch.device(device).type == "cuda"
    return torch.autocast("cuda", torch.bfloat16, enabled=cuda, cache_enabled=False)    # casts live as long as a layer


def compute_dtype(x):
    """What a linear layer would compute x in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def sent(x, device):
    """`x` of the host on `device`, without waiting for what a GPU has yet to do, as a copy of plain memory would."""
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


def timed(function, device):
    """Milliseconds that a call takes on `device`, and what it returns."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    result = function()
    wait()
    return 1000 * (time.perf_counter() - begin), result


@contextlib.contextmanager
def defaults(device, dtype):
    """Within it new tensors are on `device` and, if they are floats, in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def derive(seed, *names):
    """A 63-bit seed for the stream `names` of `seed`; every use of chance has a stream of its own."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def sync(path):
    """Have the system write a file, or a folder's list of names, to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def put(partial, path):
    """Give a finished file its name, once its bytes are on the disk."""
    sync(partial)
    partial.rename(path)
    sync(partial.parent)


def write_text(path, text):
    """Replace a small file as a whole: whenever the machine stops, the old text is there or the new."""
    partial = Path(f"{path}.partial")
    partial.write_text(text)
    put(partial, path)


def sha256(file):
    """The checksum that names a file's content in everything made with it."""
    with open(file, "rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()


def digest(*parts):
    """Twelve hex digits that stand for `parts`, by their repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


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


def sharded(tensor):
    """Is it a DTensor, of which each rank has a part? Asked so, for importing that class takes half a second."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor):
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def on_host(tensor, dtype=None):
    """All of a tensor on the CPU of rank 0, which writes files; every rank calls it, and the others keep nothing."""
    whole = gathered(tensor)
    return whole.detach().to("cpu" if rank() == 0 else "meta", dtype or whole.dtype)


def gather(value):
    """The small picklable `value` of every rank, in a list, on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def provenance():
    """Commit and versions, for everything that is written down."""
    commit = "unknown"
    if shutil.which("git"):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip() or commit
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"commit": commit, "torch": torch.__version__, "python": sys.version.split()[0],
            "device": device, "processes": world_size()}


# ---- Optimisation ----------------------------------------------------------------------------------------------------

def adamw(module, lr, betas, device, decay=0.0):
    """AdamW for what is trained of `module`; biases and norms are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr, betas, weight_decay=decay, fused=device.type == "cuda")


def descend(optimizer, clip):
    """Average gradients over ranks, clip their global norm, step, clear. Returns the norm before clipping.

    Those of sharded parameters are averaged already (parallel.py); the norm is that of the whole network all the same.
    A gradient that is not finite makes the norm so on every rank, and no rank changes a weight: look at the norm.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for p in parameters:
        if world_size() > 1 and not sharded(p.grad):
            dist.all_reduce(p.grad)
            p.grad /= world_size()
    norm = gathered(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
    torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    if torch.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def alarm(loss):
    """What to start the backward pass of a scalar loss with: 1, or NaN if it is not finite, so that `descend` sees."""
    return 1 + 0 * loss.detach()


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
