"""The claims of BiWM (abstract of arXiv:2606.10135v1, since withdrawn), each with the comparison that tests it here.

A claim holds, or does not, by figures of the embedded world and their intervals; what needs the official backbones or
real video is not testable here. reproduce.py writes the table.
"""

import math
from typing import NamedTuple


class Claim(NamedTuple):
    """`ours` and `other` are (recipe, sampler; "" for its last); `sign` is 1 where high figures are good, -1 where low
    ones are; `better` asks for more than both intervals explain, otherwise it must not be worse by more than that."""
    words: str
    says: str
    table: str
    figure: str
    ours: tuple
    other: tuple
    sign: int
    better: bool


STUDENT, FEW = ("shipped", "student, 4 steps"), ("shipped", "teacher, 4 steps")
MANY, OURS, CAUSAL = ("shipped", "teacher, 50 steps, guided"), ("default", ""), ("causal", "")
WINDOW, LATE = ("window-joint", ""), "frechet 50-60 s"
FEWSTEP = "a few-step Distribution Matching Distillation (DMD) stage"
STAGES = "just two training stages instead of four in minWM"
STABLE = "more stable long-horizon exploration thanks to the self-correcting nature of bidirectional error propagation"
BOTH = "jointly optimizes for both generation quality and inference speed"
SOON = "converging in a few hundred steps"
KEPT = "GAN and mass-covering forward-KL objectives that preserve scene dynamics"
MEMORY = "pluggable history compression"
NVFP4 = "an optional NVFP4 4-bit training/inference pipeline"
CLAIMS = (
    Claim(FEWSTEP, "nearer to real video than the teacher at its steps", "1", "frechet", STUDENT, FEW, -1, True),
    Claim(FEWSTEP, "no worse than the teacher at 50 guided steps", "1", "frechet", STUDENT, MANY, -1, False),
    Claim(FEWSTEP, "as obedient as that teacher", "1", "both 1s", STUDENT, MANY, 1, False),
    Claim(STAGES, "no worse than the causal route with its extra stage", "2", "frechet", OURS, CAUSAL, -1, False),
    Claim(STABLE, "nearer to real video after 50 seconds than it", "2", LATE, OURS, CAUSAL, -1, True),
    Claim(BOTH, "a chunk as cheap as with a K/V cache", "2", "ms a chunk", OURS, CAUSAL, -1, False),
    Claim(SOON, "60 student updates no worse than 240", "8", "frechet", OURS, ("updates-240", ""), -1, False),
    Claim(KEPT, "more diverse with the teacher's forward KL", "3", "diversity", ("teacher-fkl", ""), OURS, 1, True),
    Claim(KEPT, "more diverse with the GAN", "3", "diversity", ("gan", ""), OURS, 1, True),
    Claim(KEPT, "motion drifts less with all terms", "3", "drift of motion", ("all-terms", ""), OURS, -1, True),
    Claim(MEMORY, "FramePack recognises places after a loop more often than the window", "5", "loop: recognised",
          ("framepack-joint", ""), WINDOW, 1, True),
    Claim(MEMORY, "PackForcing no worse than the window after 50 seconds", "5", LATE, ("packforcing-joint", ""), WINDOW,
          -1, False),
    Claim(NVFP4, "in training no worse than bf16", "6", "frechet", ("nvfp4", ""), OURS, -1, False))
ELSEWHERE = (
    ("A single recipe spans Wan2.1-1.3B, Wan2.2-5B, HunyuanVideo-1.5-8B, and LTX-2.3-22B", "their weights and video"),
    ("real-world camera control where minWM loses controllability", "real video, and minWM's checkpoints"))


def verdict(claim, ours, other):
    """(result, verdict) of figures [value, low, high]."""
    margin = math.hypot((ours[2] - ours[1]) / 2, (other[2] - other[1]) / 2)
    gain = claim.sign * (ours[0] - other[0])
    holds = gain > margin if claim.better else gain >= -margin
    return f"{ours[0]:.3g} against {other[0]:.3g} (±{margin:.2g})", "holds" if holds else "does not"


def row(claim, figures, reports):
    """The cells of a claim: the paper's words, command, hardware, minutes, metric, result, verdict."""
    head, command = [f"“{claim.words}”: {claim.says}"], f"`python reproduce.py {claim.table}`"
    names = list(dict.fromkeys((claim.ours[0], claim.other[0])))
    if not all(name in figures for name in names):
        return [*head, command, "-", "-", claim.figure, "-", "not run"]
    sides = [figures[name][sampler or [*figures[name]][-1]] for name, sampler in (claim.ours, claim.other)]
    if not all(claim.figure in side for side in sides):
        return [*head, command, "-", "-", claim.figure, "-", "not run"]
    minutes = sum(sum(report["minutes"].values()) for name in names for report in reports[name])
    devices = dict.fromkeys(report["device"] for name in names for report in reports[name])
    return [*head, command, ", ".join(devices), f"{minutes:.1f}", claim.figure,
            *verdict(claim, *(side[claim.figure] for side in sides))]


def claims(figures, reports):
    """The table in markdown, of {recipe: {sampler: {figure: ...}}} and {recipe: [report of each training seed]}."""
    rows = [row(claim, figures, reports) for claim in CLAIMS]
    rows += [[f"“{words}”", "-", "-", "-", f"needs {needs}", "-", "not testable here"]
             for words, needs in ELSEWHERE]
    head = "| the paper's words: what we compare | command | hardware | minutes | metric | result | verdict |"
    return "\n".join([head, "|---|---|---|---:|---|---|---|", *("| " + " | ".join(cells) + " |" for cells in rows)])
