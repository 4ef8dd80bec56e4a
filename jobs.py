"""Making shards on many processes, each of them once: a run that is killed goes on with the shards that are missing.

A job is (path, items): the shard and what belongs into it, the same for any number of processes.
"""

import json
import time
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from tqdm import tqdm

from common import fail, write_text


def plan(out, settings, items, size):
    """Jobs of `size` items each; ValueError if the folder `out` was begun with other `settings`."""
    path = Path(out) / "settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (old := json.loads(path.read_text())) != settings:
        changed = [f"{key} {old.get(key)} -> {value}" for key, value in settings.items() if old.get(key) != value]
        raise ValueError(f"{out} holds shards of other settings ({', '.join(changed)}); choose another --out")
    for left in path.parent.glob("*.partial"):                      # by a run that was killed
        left.unlink(missing_ok=True)
    write_text(path, json.dumps(settings, indent=1) + "\n")
    return [(path.with_name(f"shard-{i // size:05d}.safetensors"), items[i:i + size])
            for i in range(0, len(items), size)]


def finished(jobs, workers, maker, cfg):
    """Yield every job once its shard is there, those of an earlier run first, under a progress bar. `maker(cfg,
    device)` gives a process its function (path, items) -> None; with one worker it is this process."""
    todo = [job for job in jobs if not job[0].exists()]
    with tqdm(total=sum(len(items) for _, items in jobs), dynamic_ncols=True) as bar:
        there = [job for job in jobs if job[0].exists()]
        bar.update(sum(len(items) for _, items in there))
        yield from there
        for job in alone(todo, maker, cfg) if workers == 1 else together(todo, workers, maker, cfg):
            bar.update(len(job[1]))
            yield job


def alone(jobs, maker, cfg):
    make = maker(cfg, "cuda" if torch.cuda.is_available() else "cpu")
    for path, items in jobs:
        make(path, items)
        yield path, items


def together(jobs, workers, maker, cfg):
    context = get_context("spawn")
    processes = [context.Process(target=work, args=(jobs[i::workers], i, maker, cfg), daemon=True)
                 for i in range(min(workers, len(jobs)))]
    for process in processes:
        process.start()
    while jobs:
        codes = [process.exitcode for process in processes]         # first these, then the files: then all are written
        there = {path for path, _ in jobs if path.exists()}
        yield from (job for job in jobs if job[0] in there)
        jobs = [job for job in jobs if job[0] not in there]
        if jobs and (any(codes) or None not in codes):
            fail(f"a process ended with {codes}; what is finished is kept: run the same command again")
        time.sleep(0.1)
    for process in processes:
        process.join()


def work(jobs, number, maker, cfg):
    """One process; on a machine with GPUs it has one of them."""
    torch.set_num_threads(1)
    make = maker(cfg, f"cuda:{number % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu")
    for path, items in jobs:
        make(path, items)


def stop_without_parent():
    """End this process if the one that started it is gone: called now and then, so that a kill leaves nobody behind."""
    if parent_process() and not parent_process().is_alive():
        raise SystemExit("the main process has ended")
