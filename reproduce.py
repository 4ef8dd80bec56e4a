"""One command per table: recipes train, evaluate and write results/NAME.json; `report` writes the tables from them.

    python reproduce.py 3                       # all rows of table 3; what is finished is skipped, the rest goes on
    python reproduce.py 3 --row gan --seeds 3   # one row, trained with seeds 0, 1 and 2
    python reproduce.py all --dry_run           # the commands, nothing else
    python reproduce.py report                  # RESULTS.md and README.md between their markers

A recipe is a list of commands of this repository, {run} being its folder; a row that several tables share is run once.
"""

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import bench
from claims import claims
from common import ROOT, fail, one_line_errors, parse, require_positive, write_text
from metrics import over_seeds, sweep, table

RESULTS = ROOT / "results"
SPEED = "forward", "fp8-forward", "fp8-train", "train", "cpu-forward", "cpu-train"      # rows of bench.py
LONG = "--seconds 60 --clips 64 --revisit 64 --dreams 4 --out {run}/figures.json --seeds"
STUDENT = f"evaluate.py --no-references --student {{run}}/stage2/student.safetensors {LONG} 3"
STAGE1 = ("train_stage1.py --steps 9000 --batch 256 --pool 4096 --refresh 4000 --save_every 1000 --log_every 50 "
          "--warmup 1000 --ema 0.9995 --compile --cuda_graphs --out {run}/stage1")
TAUGHT = ("train_stage1.py --init assets/tiny-stage1.safetensors --steps 3000 --batch 64 --past 400 --pool 256 "
          "--refresh 1000 --lr 5e-4 --warmup 100 --ema 0.998 --out {run}/stage1")
STAGE2 = "train_stage2.py --pool 64 --frames 12 --preview 0 --out {run}/stage2"
CAUSAL = "train_causal.py --steps 60 --batch 4 --pool 256 --frames 12 --forcing_batch 64 --out {run}/causal"


def distilled(flags="", more="", steps=60, batch=4):
    """The shipped teacher distilled by stage 2 with `flags`; `more` are flags of the evaluation."""
    return f"{STAGE2} --steps {steps} --batch {batch} {flags}", f"{STUDENT} {more}"


def both(first, second="", backbone="", lr="2e-3"):
    """Both stages from random weights, and all rows of the comparison."""
    new = " --teacher {run}/stage1/teacher.safetensors"
    return (f"{STAGE1} --lr {lr} {first}{backbone}", f"{STAGE2} --steps 60 --batch 4 {second}{new}{backbone}",
            f"evaluate.py --student {{run}}/stage2/student.safetensors{new}{backbone} {LONG} 1")


def remembering(kind, how):
    """The shipped teacher with a history, taught with pasts of up to 50 s, then distilled behind up to 25 s."""
    more = {"none": " --recompute", "framepack": " --recent 4"}.get(kind, "")
    return (f"{TAUGHT} --history {kind} --attention {how}{more}",
            f"{STAGE2} --steps 60 --batch 4 --past 200 --teacher {{run}}/stage1/teacher.safetensors", STUDENT)


def causal(forcing):
    """The baseline: so many updates of teacher forcing, then the same distillation."""
    return (f"{CAUSAL} --forcing {forcing}", "evaluate.py --no-references --student none --causal "
            f"{{run}}/causal/student.safetensors {LONG} 3")


KINDS, QUANTS = ("adaln", "text", "plucker", "prope", "adaln+prope"), ("nvfp4", "nvfp4-w4a4", "fp8")
HISTORIES = [(kind, "joint") for kind in ("none", "window", "framepack", "packforcing")] + [
    (kind, "self") for kind in ("window", "framepack", "packforcing")] + [("packforcing", "segment")]
RECIPES = {
    "shipped": (f"evaluate.py {LONG} 3",), "default": distilled(), "causal": causal(2000), "causal-dmd": causal(0),
    "gan": distilled("--gan 0.01"), "teacher-fkl": distilled("--teacher_fkl 0.1"), "sft": distilled("--sft 0.1"),
    "real-fkl": distilled("--real_fkl 0.1"), "early-history": distilled("--no-complete"),
    "all-terms": distilled("--gan 0.01 --teacher_fkl 0.1 --real_fkl 0.1 --sft 0.1"),
    **{kind.replace("+", "-"): both(f"--control {kind}") for kind in KINDS},
    **{f"{kind}-{how}": remembering(kind, how) for kind, how in HISTORIES},
    **{f"{q}-after": distilled("", f"--quant {q}") for q in QUANTS},
    **{q: distilled(*[f"--quant {q}"] * 2) for q in QUANTS},
    **{f"lora-{rank}": distilled(f"--tune lora --rank {rank}") for rank in (8, 32)},
    **{f"updates-{n}": distilled(steps=n) for n in (15, 30, 120, 240)},
    **{f"batch-{n}": distilled(batch=n) for n in (1, 16, 64)},
    "small": both("", "--lr 5e-5 --critic_lr 1e-4", " --backbone small"),
    "base": both("", "--lr 2e-5 --critic_lr 4e-5", " --backbone base", lr="1e-3")}

LOOKS = ("both 1s", "frechet", "sharpness", "motion", "psnr 1s", "seam")
AGES = ("both all", "frechet 0-10 s", "frechet 50-60 s", "drift of sharpness", "drift of saturation", "drift of motion",
        "psnr 60s")
MEMORY = ("away and back: recognised", "full turn: recognised", "loop: recognised", "loop: psnr to itself")
COST = ("ms a chunk", "ms a frame")
TABLES = {                      # number: title, figures, {name of a row: recipe}
    "1": ("Teacher at 50 steps, teacher at 4 steps, student", (
        "translation 1s", "rotation 1s", *LOOKS, "psnr 4s", "ssim 1s", "still", "diversity", *AGES, *MEMORY, *COST),
        {"": "shipped", "student, trained again": "default"}),
    "2": ("Two stages against a causal baseline of the same size", (*LOOKS, *AGES, *MEMORY, *COST), {
        "bidirectional, stage 2": "default", "causal, teacher forcing and DMD": "causal",
        "causal, DMD alone": "causal-dmd"}),
    "3": ("Terms of the distillation", (*LOOKS, "diversity", "frechet 50-60 s", "drift of motion"), {
        "DMD": "default", "+ GAN": "gan", "+ teacher's forward KL": "teacher-fkl", "+ forward KL to data": "real-fkl",
        "+ flow-matching anchor": "sft", "+ all": "all-terms", "DMD, early x0 as history": "early-history"}),
    "4": ("How control enters; both stages from random weights", (
        "translation 1s", "rotation 1s", *LOOKS, "cells off in 1s", "degrees off in 1s", *COST),
        {kind: kind.replace("+", "-") for kind in KINDS}),
    "5": ("History and attention; the shipped teacher taught to remember", (*LOOKS, *AGES, *MEMORY, *COST), {
        f"{kind}, {how}": f"{kind}-{how}" for kind, how in HISTORIES}),
    "6": ("Number formats", (*LOOKS, "frechet 50-60 s", *COST), {
        "bf16": "default", **{f"{q} {when} training": q + "-after" * (when == "after")
                              for q in QUANTS for when in ("after", "in")}}),
    "7": ("Full tuning against adapters", (*LOOKS, "frechet 50-60 s"), {
        "full": "default", "LoRA, rank 32": "lora-32", "LoRA, rank 8": "lora-8"}),
    "8": ("Student updates and batch size", (*LOOKS, "frechet 50-60 s"), {
        "60 updates, batch 4": "default", **{f"{n} updates": f"updates-{n}" for n in (15, 30, 120, 240)},
        **{f"batch {n}": f"batch-{n}" for n in (1, 16, 64)}}),
    "9": ("Model sizes; both stages from random weights", (*LOOKS, *AGES, *MEMORY, *COST), {
        "tiny": "prope", "small": "small", "base": "base"})}

# What --scale shrinks, and how far: a whole table then runs anywhere and says nothing.
LEAST = {"steps": 2, "batch": 1, "pool": 4, "frames": 8, "forcing": 1, "forcing_batch": 2, "warmup": 1, "refresh": 25,
         "seconds": 1, "clips": 2, "revisit": 1, "dreams": 2, "seeds": 1, "past": 8}


@dataclass(frozen=True)
class Config:
    """Make the tables of RESULTS.md."""
    table: str                          # 1 to 9, all, or report
    row: str = ""                       # only this recipe of it
    seeds: int = 1                      # train with so many seeds: 0, 1, ...
    runs: str = "runs/reproduce"        # folder of the runs
    scale: float = 1.0                  # below 1 shrinks everything; results then stay in --runs
    dry_run: bool = False               # print the commands only

    def __post_init__(self):
        require_positive(self, "seeds", "scale")
        if self.table not in (*TABLES, "all", "report"):
            raise ValueError(f"the table is {', '.join(TABLES)}, all or report, got '{self.table}'")
        if self.row and self.row not in recipes_of(self.table):
            raise ValueError(f"table {self.table} has no row '{self.row}'; it has {', '.join(recipes_of(self.table))}")


def recipes_of(number):
    """Names of the recipes of a table, or of all tables."""
    tables = TABLES.values() if number == "all" else [TABLES[number]] if number in TABLES else []
    return [*dict.fromkeys(name for _, _, rows in tables for name in rows.values())]


# ---- Running ---------------------------------------------------------------------------------------------------------

def command(line, folder, seed, scale):
    """The words of a recipe's command for one run: its folder, its seed, its size."""
    words = line.format(run=folder).split()
    if seed and words[0].startswith("train"):
        words += ["--seed", str(seed)]
    for i, word in enumerate(words):
        least = LEAST.get(word.removeprefix("--")) if scale < 1 else None
        if least is not None:
            words[i + 1] = str(max(least, round(int(words[i + 1]) * scale)))
    if scale < 1 and words[0] == "evaluate.py":
        words += ["--teacher_steps", "1"]
    return [word for word in words if scale == 1 or word not in ("--compile", "--cuda_graphs")]


def run(name, seed, cfg):
    """Do what is left of a recipe, and write its JSON; what is done is in the folder's ledger.json."""
    folder = Path(cfg.runs) / (name + (f"-seed{seed}" if seed else ""))
    result = (RESULTS if cfg.scale == 1 else Path(cfg.runs)) / f"{folder.name}.json"
    commands = [command(line, folder, seed, cfg.scale) for line in RECIPES[name]]
    if result.exists() or cfg.dry_run:
        lines = [f"python {shlex.join(words)}" for words in commands]
        return print(*[f"{result} exists: skipped"] if result.exists() else lines, sep="\n")
    folder.mkdir(parents=True, exist_ok=True)
    ledger = folder / "ledger.json"
    done = json.loads(ledger.read_text()) if ledger.exists() else {}
    for words in commands:
        entry, begin = done.setdefault(shlex.join(words), {"seconds": 0.0, "code": None}), time.time()
        if entry["code"] == 0:
            continue
        print(f"\npython {shlex.join(words)}", flush=True)
        try:
            entry["code"] = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
        finally:                                # an interruption counts: minutes are those that the row has cost
            entry["seconds"] += time.time() - begin
            ledger.write_text(json.dumps(done, indent=1) + "\n")
        if entry["code"]:
            fail(f"a command of row {name} failed ({shlex.join(words)}); the same command goes on from there")
    figures = json.loads((folder / "figures.json").read_text(), parse_float=lambda x: float(f"{float(x):.5g}"))
    minutes = {line: round(done[line]["seconds"] / 60, 2) for line in map(shlex.join, commands)}
    result.parent.mkdir(exist_ok=True)
    write_text(result, json.dumps({"recipe": name, "training_seed": seed, "minutes": minutes, **figures}) + "\n")


# ---- Reporting -------------------------------------------------------------------------------------------------------

def results():
    """{recipe: [reports of its training seeds]} of what has been run."""
    found = {name: [*RESULTS.glob(f"{name}.json"), *sorted(RESULTS.glob(f"{name}-seed*.json"))] for name in RECIPES}
    return {name: [json.loads(file.read_text()) for file in files] for name, files in found.items() if files}


def figures_of(reports):
    """{sampler: {figure: [value, low, high]}} of one recipe: a mean over training seeds has their range as interval."""
    runs = [over_seeds(report["seeds"]) for report in reports]
    if len(runs) == 1:
        return runs[0]
    def across(values):
        return [sum(values) / len(values), min(values), max(values)]
    return {row: {figure: across([r[row][figure][0] for r in runs if figure in r[row]]) for figure in figures}
            for row, figures in runs[0].items()}


def table_of(number, found):
    """A table in markdown: rows that are there, and which are not."""
    title, columns, names = TABLES[number]
    rows, notes, missing = {}, [], []
    for label, name in names.items():
        if name not in found:
            missing.append(f"{label or name} (`python reproduce.py {number} --row {name}`)")
            continue
        reports, samplers = found[name], figures_of(found[name])
        for sampler in samplers if not label else [*samplers][-1:]:
            rows[(label or sampler) + f", {len(reports)} training seeds" * (len(reports) > 1)] = samplers[sampler]
        notes.append(f"{label or name}: `python reproduce.py {number} --row {name}`, {reports[0]['device']}, "
                     f"{sum(sum(r['minutes'].values()) for r in reports):.1f} minutes, commit {reports[0]['commit']}")
    shown = [c for c in columns if any(c in row for row in rows.values())]
    parts = [table(rows, shown, "row")] * bool(rows) + ["; ".join(notes) + "."] * bool(notes)
    return "\n\n".join([f"**Table {number}. {title}**", *parts, *[f"Not run: {'; '.join(missing)}."] * bool(missing)])


def blocks():
    """{marker: what stands between it and its end}."""
    found = results()
    speed = {name: "\n".join(bench.table(json.loads((RESULTS / f"{name}.json").read_text())["rows"]))
             for name in SPEED}
    tables = {f"table {number}": table_of(number, found) for number in TABLES}
    speed |= {f"sweep {file.stem}": sweep(json.loads(file.read_text())) for file in RESULTS.glob("sweeps/*.json")}
    return speed | tables | {"claims": claims({name: figures_of(reports) for name, reports in found.items()}, found)}


def fill(text):
    """`text` with the blocks between their markers, <!-- NAME --> and <!-- end -->, as the JSON has them now."""
    for name, block in blocks().items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        text = marked.sub(lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text)
    return text


def main(cfg):
    with one_line_errors():
        if cfg.table == "report":
            return [write_text(ROOT / name, fill((ROOT / name).read_text())) for name in ("RESULTS.md", "README.md")]
        for seed in range(cfg.seeds):
            for name in [cfg.row] if cfg.row else recipes_of(cfg.table):
                run(name, seed, cfg)


if __name__ == "__main__":
    main(parse(Config))
