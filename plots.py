"""Pictures of an evaluation: one PNG per question, out of {sampler: {figure: [value, low, high]}}.

    python plots.py results/1-shipped.json       # draws them again beside the JSON that evaluate.py wrote
"""

import json
import math
import re
import sys
from pathlib import Path

DRIFT = ("frechet", "sharpness", "motion", "saturation", "both all", "seam")    # of each ten seconds
UNITS = {"psnr": "PSNR to the truth, dB", "ssim": "SSIM to the truth", "frechet": "Fréchet distance",
         "sharpness": "sharpness / real", "motion": "motion / real", "saturation": "saturation / real",
         "both all": "obeyed, %", "seam": "seam / real", "both": "obeyed, %", "cells off": "error a frame, cells",
         "degrees off": "error a frame, degrees"}


def axes(count, width=4.4):
    """A figure and its axes, at most three beside each other: it stays legible at the width of a page."""
    from matplotlib.figure import Figure                # here: it takes longer than all else that is imported
    rows, columns = math.ceil(count / 3), min(count, 3)
    figure = Figure(figsize=(width * columns, 3 * rows + 0.6), layout="constrained")
    return figure, [*figure.subplots(rows, columns, squeeze=False).flat]


def curves(axis, results, pattern, unit, label):
    """A line with its interval per sampler: figures whose name matches `pattern`, at the number in its group."""
    for i, (name, figures) in enumerate(results.items()):
        points = sorted((float(m[1]), *figures[key]) for key in figures if (m := re.fullmatch(pattern, key)))
        if points:
            at, value, low, high = zip(*points)
            axis.errorbar(at, value, [[v - a for v, a in zip(value, low)], [b - v for v, b in zip(value, high)]],
                          marker="o", ms=3, lw=1.2, capsize=2, label=name, color=f"C{i}")
    axis.set(xlabel=label, ylabel=unit)
    axis.grid(alpha=0.3)


def horizon(results):
    """Likeness to the truth by seconds since the start."""
    figure, row = axes(2)
    for axis, name in zip(row, ("psnr", "ssim")):
        curves(axis, results, rf"{name} ([\d.]+)s", UNITS[name], "seconds since the last real frame")
        axis.set_xscale("log", base=2)
        axis.set_xticks([0.5, 1, 2, 4, 10, 20, 60], ["0.5", 1, 2, 4, 10, 20, 60])
    return figure, row


def turns(results):
    """Control and pose error of the first command after the start, the second, ..."""
    figure, row = axes(3)
    for axis, name in zip(row, ("both", "cells off", "degrees off")):
        curves(axis, results, rf"{name} turn (\d+)", UNITS[name], "command since the start (the last: and later)")
    return figure, row


def ten_seconds(results):
    """Drift: each ten seconds against the same ten of the real world."""
    figure, row = axes(len(DRIFT))
    for axis, name in zip(row, DRIFT):
        curves(axis, results, rf"{name} (\d+)-\d+ s", UNITS[name], "seconds, beginning of ten")
    return figure, row


def bars(results, groups, units):
    """Grouped bars with intervals; `groups` are lists of (label, figure), one axis each."""
    figure, row = axes(len(groups), 6.4)
    for axis, group, unit in zip(row, groups, units):
        shown = {name: [f[key] for _, key in group] for name, f in results.items() if all(key in f for _, key in group)}
        for i, (name, figures) in enumerate(shown.items()):
            value, low, high = zip(*figures)
            at = [x + (i - (len(shown) - 1) / 2) * 0.8 / len(shown) for x in range(len(group))]
            axis.bar(at, value, 0.8 / len(shown), label=name, color=f"C{[*results].index(name)}",
                     yerr=[[v - a for v, a in zip(value, low)], [b - v for v, b in zip(value, high)]], capsize=1.5,
                     error_kw={"lw": 0.8})
        axis.set_xticks(range(len(group)), [label for label, _ in group], rotation=30, ha="right")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3, axis="y")
    return figure, row


def actions(results):
    """Control of each class of motion."""
    names = dict.fromkeys(key for figures in results.values() for key in figures)
    return bars(results, [[(key.removeprefix(kind), key) for key in names if re.fullmatch(rf"{kind}[a-z+]+", key)]
                          for kind in ("move: ", "turn: ")], ["translation obeyed, %", "rotation obeyed, %"])


def memory(results):
    """Walks that come back: is the place the same, and the right one?"""
    keys = [key for figures in results.values() for key in figures]
    walks = dict.fromkeys(m[1] for key in keys if (m := re.fullmatch("(.*): recognised", key)))
    return bars(results, [[(walk, f"{walk}: {what}") for walk in walks] for what in ("recognised", "psnr to itself")],
                ["place recognised, %", "PSNR to its own earlier frame, dB"])


PICTURES = {"horizon": (horizon, r"psnr .*"), "turns": (turns, "both turn 1"), "actions": (actions, "move: .*"),
            "drift": (ten_seconds, r"seam \d.*"), "memory": (memory, ".*: recognised")}


def draw(results, stem, stamp):
    """STEM-NAME.png for each picture whose figures there are; `stamp` goes into the file."""
    for name, (make, needs) in PICTURES.items():
        if any(re.fullmatch(needs, key) for figures in results.values() for key in figures):
            figure, row = make(results)
            handles = dict(pair[::-1] for axis in row for pair in zip(*axis.get_legend_handles_labels()))
            figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
            figure.savefig(f"{stem}-{name}.png", dpi=110, metadata={"Description": stamp})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python plots.py figures.json")
    from metrics import over_seeds
    report = json.loads(Path(sys.argv[1]).read_text())
    draw(over_seeds(report["seeds"]), Path(sys.argv[1]).with_suffix(""),
         json.dumps({key: value for key, value in report.items() if key != "seeds"}))
