"""Weights out of a run folder, at any time: one safetensors file from the newest complete checkpoint.

    python export.py runs/stage2 --out student.safetensors                  # of a run that has ended or is under way
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

from checkpoint import newest
from common import one_line_errors, parse
from lora import Adapters
from model import PRESETS, load
from weights import save


@dataclass(frozen=True)
class Config:
    """Write the weights of a run's newest complete checkpoint as one safetensors file, as the run itself does."""
    run: str                        # run folder
    out: str = "weights.safetensors"    # file to write
    what: str = "result"            # that is the averaged teacher of stage 1 or student of stage 2; or critic

    def __post_init__(self):
        if self.what not in ("result", "teacher", "student", "critic"):
            raise ValueError(f"--what is result, teacher, student or critic, got '{self.what}'")


def read_part(path, *where):
    """{name: tensor} of one part of a checkpoint, such as ("averages", "student"), whatever ranks wrote it."""
    reader = dcp.FileSystemReader(path)
    metadata = reader.read_metadata()
    names = {flat: place[-1] for flat, place in metadata.planner_data.items() if place[:-1] == where}
    stored = {flat: metadata.state_dict_metadata[flat] for flat in names}
    state = {flat: torch.empty(facts.size, dtype=facts.properties.dtype) for flat, facts in stored.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {names[flat]: tensor for flat, tensor in state.items()}


def export(cfg):
    """The file is as those that the run writes: adapters are folded into the teacher that they adapt.

    Its header is theirs, with the step of the checkpoint, which is returned.
    """
    if not (facts := Path(cfg.run) / "config.json").exists():
        raise OSError(f"{cfg.run} is no run folder: it has no config.json")
    facts = json.loads(facts.read_text())
    if facts["stage"] not in (1, 2):
        raise ValueError(f"{cfg.run} is a run of {facts['stage']}, whose .safetensors are all it has to give")
    settings, result = facts["settings"], {1: "teacher", 2: "student"}[facts["stage"]]
    what = result if cfg.what == "result" else cfg.what
    if what != result and (what, facts["stage"]) != ("critic", 2):
        raise ValueError(f"a run of stage {facts['stage']} has no {what} of its own; it began from the weights "
                         f"'{settings.get('init', settings.get('teacher'))}'")
    path, _ = newest(cfg.run)
    if path is None:
        raise OSError(f"{cfg.run} has no checkpoint yet")
    weights = read_part(path, *{"teacher": ("averages", "model"), "student": ("averages", "student"),
                                "critic": ("modules", "critic")}[what])
    with safe_open(Path(cfg.run) / f"{result}.safetensors", "numpy") as file:   # it is there before any checkpoint
        notes = {key: note for key, note in file.metadata().items() if key not in ("base", "steps", "updates")}
    if settings.get("tune") == "lora":
        base = load(settings["backbone"], settings["teacher"])
        weights = Adapters(base, [what], settings["rank"]).merged(what, weights)
    save(SimpleNamespace(spec=PRESETS[settings["backbone"]], compress=None), cfg.out, weights=weights,
         **notes | {"step": int(path.name[-8:]), "what": what})
    return path


def main(cfg):
    with one_line_errors():
        print(f"wrote {cfg.out} from {export(cfg)}")


if __name__ == "__main__":
    main(parse(Config))
