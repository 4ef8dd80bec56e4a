"""Quality against the exact world: does the dream obey the keys, look like the world, follow the truth, remember it?

Truth is the re-rendered future, seen through the codec as everything the networks see and make. The figures are those
of metrics.py, means over held-out trajectories with 95 % bootstrap intervals.

    python evaluate.py --quick                                            # the shipped weights, two CPU cores, minutes
    python evaluate.py --student runs/stage2/student.safetensors          # teacher 50 and 4 steps, student 4 steps
    python evaluate.py --seconds 60 --clips 64 --revisit 64 --dreams 4 --seeds 3 --out results/x.json    # everything
    python evaluate.py --train_probe 12000                                # makes assets/probe.safetensors

With --out x.json it also writes x.md, the tables, and x-*.png, the pictures of plots.py; all say what made them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

import causal
import plots
import qat
import world
from common import (generator, one_line_errors, parse, provenance, rank, require_positive, setup, sha256, timed,
                    write_text)
from control import Condition, parse_actions
from data import Trips
from encode import codec
from flow import schedule
from metrics import (CHUNK, CONTROL, SECOND, START, TEN, bootstrap, consistency, drift, measure, over_seeds, psnr,
                     spread, table, travel)
from model import load
from probe import FILE, load_probe, train_probe
from rollout import few_step, guided, launched, ode, rollout, velocity_of
from weights import ASSETS, default_source, weight_files

HORIZON = 4 * SECOND                            # frames generated after the start, unless more are asked for
QUICK = {"clips": 16, "seconds": 1, "revisit": 0, "dreams": 0, "seeds": 1}
WALKS = {"away and back": "right-8, left-8", "full turn": "right-52",
         "loop": "w-3, right-12, w-3, right-12, w-3, right-12, w-3, right-12, w-3"}
CANDIDATES = 200                                # starts tried for each walk that must meet no wall


# ---- Sequences and samplers ------------------------------------------------------------------------------------------

class Sampler(NamedTuple):
    """How a network is rolled out: steps a chunk, guidance, Euler ODE (a teacher) or few-step renoising (a student)."""
    name: str
    model: nn.Module
    steps: int
    guidance: float
    ode: bool
    rollout: Callable = rollout                 # or that of another network, with the same arguments
    velocity: Callable = velocity_of            # of the model


def held_out(clips, seed, horizon=HORIZON):
    """Trajectories [clips, START + horizon] that no training stream contains."""
    return Trips(*world.explore(clips, START + horizon, generator(seed, "held-out")))


def returning(walk, clips, seed):
    """Trajectories [clips, START + T] of a walk of WALKS, from places where no wall stops it."""
    labels = torch.cat([torch.zeros(START - 1, dtype=torch.long), parse_actions(WALKS[walk])])
    g = generator(seed, "returning", walk)
    maps = torch.arange(CANDIDATES * clips) % len(world.MAPS)
    start, asked = world.spawn(maps, g), labels.expand(len(maps), -1)
    states, happened, blocked = world.walk(maps, start, asked)
    brushed = (travel(asked[:, 1:], start) - states[:, -1])[:, :2].abs().amax(1) > 1e-6     # a wall, but hardly
    free = (~blocked.any(1) & ~brushed).nonzero()[:clips, 0]
    if len(free) < clips:
        raise ValueError(f"only {len(free)} of {len(maps)} places leave room for the walk '{walk}', not {clips}")
    return Trips(*(x[free] for x in (maps, states, happened, blocked, asked)))


@torch.no_grad()
def dream(sampler, coder, trips, video, seed, piece=128):
    """`video` uint8 [N, T, H, W, 3] with the frames after the START real ones generated, `piece` sequences at once."""
    spec, captions, out = sampler.model.spec, coder.text(world.CAPTIONS), []
    velocity = guided(sampler.velocity(sampler.model), sampler.guidance, coder.text([spec.negative]))
    noise = lambda shape, g=generator(seed, "dream"): torch.randn(shape, generator=g).to(coder.device)
    for i in tqdm(range(0, len(video), piece), desc=sampler.name, leave=False, disable=rank() > 0):
        maps = trips.maps[i:i + piece].to(coder.device)
        told = trips.part(i, i + piece).control(coder.device).frames(0, video.shape[1])
        condition = Condition({k: v[maps] for k, v in captions.items()}, told)
        out.append(coder.decode(sampler.rollout(
            velocity, condition, coder.encode(video[i:i + piece, :START]), video.shape[1],
            schedule(sampler.steps, spec.shift), spec.chunk, spec.window, noise, ode if sampler.ode else few_step,
            sampler.model)))
    return torch.cat(out)


def latency(sampler, coder, trips, video, chunks=2):
    """Milliseconds a chunk for one player, from an 8-frame history on; of a second time, when all is warm."""
    go = lambda: dream(sampler, coder, trips.part(0, 1), video[:1, :START + chunks * CHUNK], 0)
    return [timed(go, coder.device)[0] for _ in range(2)][1] / chunks


def still(sampler, coder, clips, seed):
    """PSNR in dB over one second of standing still, against the codec's reconstruction of the start."""
    trips, none = held_out(clips, seed, 0), torch.zeros(clips, START + SECOND, dtype=torch.long)
    trips = Trips(trips.maps, trips.states[:, -1:].expand(-1, START + SECOND, -1), none, none.bool(), none)
    video = trips.video()
    quality = psnr(dream(sampler, coder, trips, video, seed), coder.decode(coder.encode(video)))[:, START:].mean(1)
    return bootstrap(lambda i: float(quality[i].mean()), clips)


def memory(sampler, coder, clips, seed):
    """{"walk: figure": ...}: does the dream see again what it saw, on walks that come back?"""
    figures = {}
    for walk in WALKS:
        trips = returning(walk, clips, seed)
        truth = trips.video(coder.device).cpu()
        made = dream(sampler, coder, trips, truth, seed)
        found = consistency(made, coder.decode(coder.encode(truth)), trips.states, coder.device)
        figures |= {f"{walk}: {name}": row for name, row in found.items()}
    return figures


def diversity(sampler, coder, trips, truth, seeds, first):
    """[figure]: standard deviation over `seeds` dreams, from seed `first` on, of what the start does not show."""
    dreams = torch.stack([dream(sampler, coder, trips, truth, first + i) for i in range(seeds)])
    return spread(dreams, trips.states[..., 2], coder.device)


# ---- The evaluation --------------------------------------------------------------------------------------------------

def assess(sampler, coder, trips, truth, coded, real, probe, seed, piece, revisit, dreams):
    """All figures of one sampler on `trips`, and its video. `real` is what the probe reads in the true one, `coded`."""
    video = dream(sampler, coder, trips, truth, seed, piece)
    seen = probe.read(video), real
    ms = latency(sampler, coder, trips, truth)
    figures = {**measure(video, coded, trips, probe, seen), "ms a chunk": [ms] * 3, "ms a frame": [ms / CHUNK] * 3,
               "still": still(sampler, coder, max(2, len(video) // 4), seed)}
    if video.shape[1] - START > TEN:
        figures |= {f"{name} {when}": row for when, rows in drift(video, coded, trips, probe, seen).items()
                    for name, row in rows.items() if name in plots.DRIFT}
    if revisit:
        figures |= memory(sampler, coder, revisit, seed)
    if dreams:
        few = trips.part(0, 64).frames(0, START + HORIZON)
        found = diversity(sampler, coder, few, truth[:64, :START + HORIZON], dreams, seed)
        figures |= {"diversity": row for row in found}
    return figures, video


def evaluate(samplers, clips, seed, device, piece=128, seconds=HORIZON // SECOND, revisit=0, dreams=0, references=True):
    """All samplers on the same held-out sequences: {sampler: {figure: [value, low, high]}}, videos, sequences."""
    coder, probe = codec(samplers[0].model.spec.name, device), load_probe(device)
    trips = held_out(clips, seed, seconds * SECOND)
    truth = trips.video(device).cpu()
    coded, results, videos = coder.decode(coder.encode(truth)), {}, {"truth": truth}
    real = probe.read(coded)
    if references:
        ceiling = measure(coded, coded, trips, probe, (real, real))
        results["real video"] = {k: v for k, v in ceiling.items() if k.startswith((*CONTROL, "move: ", "turn: "))}
        copy = coded[:, [*range(START)] + [START - 1] * (truth.shape[1] - START)]
        results["copy the last frame"] = measure(copy, coded, trips, probe, (probe.read(copy), real))
    for sampler in samplers:
        results[sampler.name], videos[sampler.name] = assess(sampler, coder, trips, truth, coded, real, probe, seed,
                                                             piece, revisit, dreams)
    return results, videos, trips


COLUMNS = ("translation 1s", "rotation 1s", "both 1s", "both all", "frechet", "sharpness", "motion", "seam",
           "psnr 0.5s", "psnr 1s", "psnr 2s", "psnr 4s", "still", "ms a chunk")


def samplers_of(teacher, students, guidance, steps=50, few=4):
    """The rows of every comparison; the teacher at `few` steps is unguided: it costs what a student costs."""
    return [Sampler(f"teacher, {steps} steps, guided", teacher, steps, guidance, True),
            Sampler(f"teacher, {few} steps", teacher, few, 1.0, True),
            *(Sampler(f"student{f' {i}' * (len(students) > 1)}, {few} steps", s, few, 1.0, False)
              for i, s in enumerate(students))]


@dataclass(frozen=True)
class Config:
    """Teacher and student against the exact world, with 95 % intervals."""
    backbone: str = "tiny"      # a preset with the tiny codec
    teacher: str = ""           # stage-1 weights; empty: the shipped teacher
    student: str = ""           # stage-2 weights, several separated by commas; empty: the shipped student; none
    quant: str = "none"         # round the students: nvfp4, nvfp4-w4a4 (activations too), fp8; packed, te: see quant.py
    causal: str = ""            # weights of train_causal.py, for a row of their own
    references: bool = True     # also the rows of real video, of a copy and of the teacher
    clips: int = 256            # held-out sequences per seed
    seconds: int = 4            # length of a rollout; above ten also figures of each ten seconds
    revisit: int = 0            # walks of each kind that come back to where they were
    dreams: int = 0             # dreams of the same four seconds, for diversity
    seed: int = 1000            # of the sequences and the noise
    seeds: int = 1              # so many successive seeds, each with its own sequences
    teacher_steps: int = 50     # denoising steps of the guided teacher
    guidance: float = 0.0       # of the teacher; 0: the preset's
    out: str = ""               # write the figures as JSON, and tables and pictures beside it
    quick: bool = False         # 16 sequences of one second: minutes on two CPU cores
    train_probe: int = 0        # train assets/probe.safetensors for so many steps first

    def __post_init__(self):
        require_positive(self, "clips", "seconds", "seeds", "teacher_steps")
        if self.revisit < 0 or self.dreams < 0 or self.dreams == 1:
            raise ValueError("--revisit must not be negative, and --dreams is 0 or, for a spread, 2 or more")
        if not self.references and self.student == "none" and not self.causal:
            raise ValueError("nothing to evaluate: --no-references, --student none and no --causal")
        qat.check(self.quant, [*qat.ROUNDING, "packed", "te"])


def rows_of(cfg, device):
    """The samplers that `cfg` asks for, and the files of their weights."""
    teacher, files = load(cfg.backbone, cfg.teacher, device), [FILE]
    paths = cfg.student.split(",") if cfg.student else [ASSETS / f"{cfg.backbone}-student.safetensors"]
    paths = [] if cfg.student == "none" else paths
    students = [qat.apply(load(cfg.backbone, path, device).requires_grad_(False), cfg.quant) for path in paths]
    rows = samplers_of(teacher, students, cfg.guidance or teacher.spec.guidance, cfg.teacher_steps)
    fast = lru_cache(maxsize=None)(launched)                # each network is recorded once
    rows = [row._replace(velocity=fast) for row in rows]
    if cfg.references:
        files += weight_files(cfg.teacher or default_source(teacher.spec), teacher.spec)
    else:
        rows = rows[2:]
    if cfg.causal:
        rows.append(Sampler("causal, 4 steps", load(cfg.backbone, cfg.causal, device), 4, 1.0, False, causal.rollout,
                            causal.Causal))
        paths.append(cfg.causal)
    return rows, [*files, *paths]


def known(report, out):
    """The seeds that `out` already has, if the same command, code and weights made it: an evaluation goes on."""
    text = Path(out).read_text() if out and Path(out).exists() else ""
    old = json.loads(text) if text else {}
    done = old.pop("seeds", [])
    return done if old == {key: json.loads(json.dumps(value)) for key, value in report.items()} else []


def write(report, seeds, out):
    """`out` with the figures of `seeds`, beside it a markdown table of their means and pictures; all tell `report`."""
    stamp, means = json.dumps(report), over_seeds(seeds)
    write_text(out, json.dumps({**report, "seeds": seeds}, indent=1) + "\n")
    names = dict.fromkeys(name for row in means.values() for name in row)
    turned = {name: {row: figures[name] for row, figures in means.items() if name in figures} for name in names}
    Path(out).with_suffix(".md").write_text(f"<!-- {stamp} -->\n\n{table(turned, [*means], 'figure')}\n")
    plots.draw(means, Path(out).with_suffix(""), stamp)


def main(cfg):
    device, cfg = setup(), replace(cfg, **QUICK) if cfg.quick else cfg
    with one_line_errors():
        if cfg.train_probe:
            train_probe(cfg.train_probe, FILE, device)
        load_probe(device)
        if cfg.out:
            Path(cfg.out).touch()
        rows, files = rows_of(cfg, device)
    report = {"settings": vars(cfg), **provenance(), "weights": {str(f): sha256(f) for f in files}}
    seeds = known(report, cfg.out)
    for i, seed in enumerate(range(cfg.seed, cfg.seed + cfg.seeds)):
        if i == len(seeds):
            results, _, _ = evaluate(rows, cfg.clips, seed, device, seconds=cfg.seconds, revisit=cfg.revisit,
                                     dreams=cfg.dreams, references=cfg.references)
            seeds.append(results)
            if cfg.out:
                write(report, seeds, cfg.out)
        print(f"\nseed {seed}, {cfg.clips} held-out sequences\n{table(seeds[i], COLUMNS)}")


if __name__ == "__main__":
    main(parse(Config))
