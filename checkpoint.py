"""A run folder: settings, log and checkpoints that exist completely or not at all.

A checkpoint holds what a run needs to go on with the same bits: all that learns, EMA, optimizers, counters, by
torch.distributed.checkpoint, imported where it is used: that takes half a second. Learning rates, random numbers and
the data's position follow from (seed, rank, step).
"""

import dataclasses
import json
import os
import shutil
import time
from fcntl import LOCK_EX, LOCK_NB, lockf
from pathlib import Path

import torch
from tqdm import tqdm

from common import barrier, gather, mean_over_ranks, provenance, rank, sha256, shutdown, sync, world_size, write_text
from control import ACTION_SPEC
from faults import SAVE, SIGNALS
from model import PRESETS
from weights import fingerprint

# May change on resuming: these change what is watched and written, or how the same numbers are computed.
HARMLESS = {"out", "steps", "save_every", "keep", "log_every", "preview", "compile", "cuda_graphs", "recompute",
            "validate", "health", "patience", "shard", "replicas"}


# ---- The folder ------------------------------------------------------------------------------------------------------

class Run:
    """A run folder: config.json, log.jsonl (one line per logged step) and checkpoints; rank 0 writes.

    `stage` and `began_from`, the weights that the networks began with ("": random), are noted in what is written.
    ValueError when the folder has a checkpoint of other settings, OSError when it cannot be written or is in use.
    """

    def __init__(self, out, config, stage, began_from=""):
        self.folder, self.bar, self.begin, self.asked = Path(out), None, time.time(), 0
        self.facts = {"stage": stage, "settings": dataclasses.asdict(config), **provenance()}
        if rank() == 0:
            self.facts["parent"] = fingerprint(began_from, PRESETS[config.backbone]) if began_from else "random"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock()
                self.refuse_other_settings()
                write_text(self.folder / "config.json", json.dumps(self.facts, indent=1) + "\n")
            except OSError as error:
                reason = error.strerror or error
                raise OSError(f"cannot write to --out {out}: {reason}; choose another folder") from None
        barrier()

    def lock(self):
        """One process at a time works in a folder. The lock is the system's and goes with the process that has it."""
        handle = os.open(self.folder / "run.lock", os.O_RDWR | os.O_CREAT)          # kept open: closing it unlocks
        try:
            lockf(handle, LOCK_EX | LOCK_NB)
        except OSError:
            raise OSError(f"it is in use by {os.read(handle, 200).decode() or 'another process'}") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)

    def refuse_other_settings(self):
        """A folder with a checkpoint goes on with its settings: a change that matters is refused, others are noted.

        The number of processes is no setting: with another, as many clips per update must come from the others.
        """
        path = self.folder / "config.json"
        if not path.exists() or not list(self.folder.glob("checkpoint-????????")):
            return
        old, new = json.loads(path.read_text()), self.facts
        changed = {f"--{key}": (old["settings"].get(key), value) for key, value in new["settings"].items()}
        changed |= {key: (old.get(key), new[key]) for key in ("processes", "parent", "commit", "torch", "device")}
        changed = {key: f"{key} {was} -> {now}" for key, (was, now) in changed.items() if was != now}
        harmless = {f"--{key}" for key in HARMLESS} | {"commit", "torch", "device"}
        if clips_per_update(old) == clips_per_update(new):
            harmless |= {"--batch", "--accumulate", "--sequence", "processes"}
        if matters := [text for key, text in changed.items() if key not in harmless]:
            raise ValueError(f"{self.folder} holds a run with other settings ({', '.join(matters)}); choose another "
                             f"--out{', or keep the clips per update' * ('processes' in changed)}")
        if changed:
            print(f"{self.folder} goes on with {', '.join(changed.values())}")

    def header(self, **notes):
        """What a file of weights says of itself."""
        settings = self.facts["settings"]
        facts = {key: value for key, value in self.facts.items() if key != "settings"}
        return {"seed": settings["seed"], "config": json.dumps(settings), "actions": ACTION_SPEC, **facts, **notes}

    def progress(self, start, stop, what):
        """Iterate over the steps left, with a progress bar on rank 0; meanwhile signals ask for a checkpoint."""
        self.bar = tqdm(range(start, stop), what, stop, initial=start, disable=rank() > 0, dynamic_ncols=True)
        self.trim(start)
        SIGNALS.install()
        yield from self.bar
        SIGNALS.restore()

    def trim(self, start):
        """Forget log lines of steps at or after `start`: they will be made again."""
        path = self.folder / "log.jsonl"
        if rank() == 0 and path.exists():
            whole = [line for line in path.read_text().splitlines() if line.endswith("}")]  # a kill may tear one
            write_text(path, "".join(line + "\n" for line in whole if json.loads(line)["step"] < start))

    def log(self, step, **metrics):
        """Write one line; all ranks call it."""
        metrics = mean_over_ranks(metrics)
        if rank() == 0:
            line = {"step": step, "seconds": round(time.time() - self.begin, 2), **metrics}
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            self.bar.set_postfix({k: f"{metrics[k]:.3g}" for k in ("loss", "dmd", "critic") if k in metrics})

    def due(self, done, last, every):
        """Is a checkpoint due after `done` steps: by the clock, at the end, or since a signal asked for one?

        Every rank calls it at every step, and all hear the same.
        """
        self.asked = SIGNALS.asked()
        return done % every == 0 or done == last or self.asked >= SAVE

    def leave_if_asked(self, done):
        """After the checkpoint of step `done`: end the process on every rank if a signal wants it to go."""
        code = max(self.asked, SIGNALS.asked())                                     # it may have come while saving
        if code > SAVE:
            if rank() == 0:
                self.bar.close()
                print(f"\nsaved {self.folder} after step {done} and left, as a signal asked; the same command goes on")
            shutdown()
            raise SystemExit(code)


def clips_per_update(facts):
    """Clips of all processes together in one update; a setting that a script does not have is 1."""
    batch, accumulate, sequence = (facts["settings"].get(name, 1) for name in ("batch", "accumulate", "sequence"))
    return batch * accumulate * facts["processes"] / sequence


# ---- Saving ----------------------------------------------------------------------------------------------------------

def save_checkpoint(folder, step, modules, optimizers, averages, keep=1):
    """Write folder/checkpoint-STEP: weights, optimizers, EMA. It exists completely or not at all; `keep` stay.

    `modules`, `optimizers` and `averages` are dicts; an optimizer belongs to the module of the same name. OSError when
    it cannot be written (on every rank if torch could not; otherwise on rank 0); what was there before still is.
    """
    import torch.distributed.checkpoint as dcp
    folder, final = Path(folder), Path(folder) / f"checkpoint-{step:08d}"
    partial = final.with_suffix(".partial")
    try:
        if rank() == 0:
            _sweep(folder)
            partial.mkdir()                             # not its parents: a run folder that has gone stays gone
        for optimizer in optimizers.values():
            complete(optimizer)
        barrier()
        dcp.save(_state(modules, optimizers, averages), checkpoint_id=partial, no_dist=world_size() == 1)    # and sync
        names = [f"__{rank()}_*"] + [".metadata"] * (rank() == 0)
        files = [file for name in names for file in partial.glob(name)]
        files = gather({file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files})
        if rank() == 0:
            files = {name: facts for part in files for name, facts in part.items()}
            write_text(partial / "manifest.json", json.dumps({"step": step, **provenance(), "files": files}, indent=1))
            if final.exists():
                final.rename(folder / f"{final.name}.old.partial")
            partial.rename(final)
            sync(folder)
            for old in sorted(folder.glob("checkpoint-????????"))[:-keep]:
                old.rename(old.with_suffix(".partial"))
            _sweep(folder)
        barrier()
    except (dcp.api.CheckpointException, OSError) as error:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, dcp.api.CheckpointException):                              # all ranks have it, and wait
            barrier()
        raise OSError(f"{final} could not be written ({_reason(error)}); those before it are as they were") from None


def complete(optimizer):
    """Give parameters of AdamW without any gradient so far the state that they will begin with: a checkpoint has all.

    A level of a compressed history has none before a past is long enough.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p not in optimizer.state:
                count = torch.zeros((), device=p.device if group["fused"] else "cpu")
                optimizer.state[p] = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def _sweep(folder):
    """Remove what was not finished, and what was about to be removed."""
    for left in folder.glob("checkpoint-*.partial"):
        shutil.rmtree(left)


def _reason(error):
    """The first line of what went wrong, on the first rank where it did."""
    from torch.distributed.checkpoint import CheckpointException
    while isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".splitlines()[0]


def _state(modules, optimizers, averages):
    import torch.distributed.checkpoint.state_dict as dsd
    return {"modules": {k: dsd.get_model_state_dict(m) for k, m in modules.items()},
            "optimizers": {k: dsd.get_optimizer_state_dict(modules[k], o) for k, o in optimizers.items()},
            "averages": {k: e.average for k, e in averages.items()}}


# ---- Loading ---------------------------------------------------------------------------------------------------------

def damage(path):
    """What is wrong with the checkpoint `path`, in words, or None. Ranks share the reading and hear the same."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
    except OSError:
        return "it has no manifest.json"
    except (ValueError, KeyError, TypeError):
        return "its manifest.json is not one"
    wrong = []
    for name, facts in list(files.items())[rank()::world_size()]:
        file = path / name
        if not file.exists():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != facts["bytes"]:
            wrong.append(f"{name} has {file.stat().st_size} bytes, not {facts['bytes']}")
        elif sha256(file) != facts["sha256"]:
            wrong.append(f"{name} has other bytes than were written")
    return next((text for part in gather(wrong) for text in part), None)


def newest(folder):
    """The newest complete checkpoint of `folder`, and (path, damage) of those after it. (None, []) when there is none.

    OSError when all are damaged.
    """
    damaged = []
    for path in sorted(Path(folder).glob("checkpoint-????????"), reverse=True):
        if (wrong := damage(path)) is None:
            return path, damaged
        damaged.append((path, wrong))
    if damaged:
        raise OSError(f"no checkpoint is left: {'; '.join(f'{path} is damaged ({wrong})' for path, wrong in damaged)}. "
                      "Delete them and start again")
    return None, []


def load_checkpoint(folder, stop, modules, optimizers, averages):
    """Restore the newest complete checkpoint of `folder` in place; returns its step, or 0 when there is none.

    It may have been saved by another number of ranks. Damaged ones are named and set aside. ValueError when it is
    beyond the step `stop` or of other networks, OSError when all are damaged.
    """
    path, damaged = newest(folder)
    for bad, wrong in damaged:
        if rank() == 0:
            print(f"{bad} is damaged ({wrong}) and set aside; the run goes on from {path.name}")
            aside = bad.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
    if path is None:
        return 0
    step = int(path.name[-8:])
    if step > stop:
        raise ValueError(f"{path} is already beyond step {stop}; raise --steps or choose another --out")
    import torch.distributed.checkpoint as dcp
    import torch.distributed.checkpoint.state_dict as dsd
    state = _state(modules, optimizers, averages)
    try:
        dcp.load(state, checkpoint_id=path, no_dist=world_size() == 1)
    except (dcp.api.CheckpointException, RuntimeError) as error:
        raise ValueError(f"{path} does not fit these networks ({_reason(error)}); choose another --out") from None
    for name, module in modules.items():
        dsd.set_model_state_dict(module, state["modules"][name])
    for name, optimizer in optimizers.items():
        dsd.set_optimizer_state_dict(modules[name], optimizer, state["optimizers"][name])
    for name, ema in averages.items():
        ema.average = state["averages"][name]
    return step
