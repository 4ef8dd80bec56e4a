"""A run folder: settings, log and checkpoints that exist completely or not at all."""

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dsd
from tqdm import tqdm

from common import barrier, mean_over_ranks, provenance, rank, world_size

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
    for optimizer in optimizers.values():
        complete(optimizer)
    barrier()
    dcp.save(_state(modules, optimizers, averages), checkpoint_id=partial)
    barrier()
    if rank() == 0:
        for file in [*partial.iterdir(), partial]:
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(Path(folder).glob("checkpoint-????????"))[:-1]:
            shutil.rmtree(old)
    barrier()


def complete(optimizer):
    """Give parameters of AdamW without any gradient so far the state that they will begin with: a checkpoint has all.

    A level of a compressed history has none before a past is long enough.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p not in optimizer.state:
                count = torch.zeros((), device=p.device if group["fused"] else "cpu")
                optimizer.state[p] = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


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
        dsd.set_model_state_dict(module, state["modules"][name])
    for name, optimizer in optimizers.items():
        dsd.set_optimizer_state_dict(modules[name], optimizer, state["optimizers"][name])
    for name, ema in averages.items():
        ema.average = state["averages"][name]
    return int(found[-1].name[-8:])


def _state(modules, optimizers, averages):
    return {"modules": {k: dsd.get_model_state_dict(m) for k, m in modules.items()},
            "optimizers": {k: dsd.get_optimizer_state_dict(modules[k], o) for k, o in optimizers.items()},
            "averages": {k: e.average for k, e in averages.items()}}
