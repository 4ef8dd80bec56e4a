"""Is a stage-2 run well? Statistics against real data at every update, validation now and then.

The statistics are of latents, so that they cost little with any backbone. Validation has fixed seeds: successive
figures and pictures of a run, and those of other runs, compare.
"""

import json
import math
from contextlib import contextmanager

import torch
from torch import nn

import world
from common import generator, mean_over_ranks, rank
from control import Condition
from evaluate import COLUMNS, dream, evaluate, held_out
from flow import add_noise, velocity_to_x0
from metrics import SECOND, START, measure, table
from probe import load_probe
from weights import ASSETS
from video import draw_keys, write_video

SEED = 1000                                     # of the held-out sequences and of the noise
CRITIC_SIGMA = 0.7                              # noise level from which the critic restores what the student dreamt
BINS = 4                                        # of noise levels 0..1, in the log of the critic's loss
REAL_STEPS, MADE_STEPS = 100, 10                # updates that the running means of real and generated data look back
SPREAD_FLOOR = 0.05                             # a spread over batches is at least this share of the mean


def statistics(x, start, chunk):
    """Figures {name: scalar} of latents x [B, C, T, H, W] whose frames from `start` on were made `chunk` at a time."""
    x, T = x.float(), x.shape[2]
    new = x[:, :, start:].flatten()
    change = x.diff(dim=2).abs().mean((0, 1, 3, 4))[max(start, 1) - 1:]                 # into each new frame
    border = (torch.arange(max(start, 1), T, device=x.device) - start) % chunk == 0     # into a chunk's first frame
    figures = {"std": new.std(), "motion": change.mean(),
               "saturation": new.abs().kthvalue(math.ceil(0.99 * len(new))).values}     # the largest hundredth
    if border.any() and not border.all():
        figures["seam"] = change[border].mean() / change[~border].mean()
    return figures


def compare(made, real, start, chunk):
    """`statistics` of both, under (who, name)."""
    return {(who, name): value for who, x in (("made", made), ("real", real))
            for name, value in statistics(x, start, chunk).items()}


def critic_by_sigma(errors):
    """{name: mean} over all ranks of pairs (error [B], sigma [B]), by bin of the noise level; empty bins have none."""
    error, sigma = (torch.cat(x) for x in zip(*errors))
    at = (sigma * BINS).long().clamp(max=BINS - 1)
    sums = {(what, i): (x * (at == i)).sum() for what, x in (("error", error), ("count", torch.ones_like(error)))
            for i in range(BINS)}
    sums = mean_over_ranks(sums)
    return {f"critic_{i / BINS:.2f}": sums["error", i] / sums["count", i] for i in range(BINS) if sums["count", i]}


class Health(nn.Module):
    """Running `statistics` of the student's rollouts against those of real clips of the same actions.

    The band of the real data is its mean, `width` standard deviations (over batches) to either side. Buffers only, so
    that a resumed run judges as it would have; every rank must be given the same figures.
    """

    names = ("std", "saturation", "motion", "seam")

    def __init__(self, width):
        super().__init__()
        self.width = width
        for name in ("count", "real", "square", "made"):
            self.register_buffer(name, torch.zeros(len(self.names), dtype=torch.float64))
        self.register_buffer("outside", torch.zeros((), dtype=torch.long))              # steps in a row
        self.register_buffer("best", torch.tensor(torch.inf, dtype=torch.float64))      # smallest validation metric yet

    def update(self, look):
        """Take in one step's figures, {(who, name): number} of `compare`; returns made / real of the running means."""
        for i, name in enumerate(self.names):
            if ("made", name) in look:
                made, real = look["made", name], look["real", name]
                self.count[i] += 1
                slow, fast = (1 / min(float(self.count[i]), memory) for memory in (REAL_STEPS, MADE_STEPS))
                self.real[i] += slow * (real - self.real[i])
                self.square[i] += slow * (real ** 2 - self.square[i])
                self.made[i] += fast * (made - self.made[i])
        self.outside.copy_(self.outside + 1 if self.complaints() else 0)
        return {name: float(self.made[i] / self.real[i]) for i, name in enumerate(self.names) if self.count[i]}

    def improves(self, metric):
        """Is this validation metric the smallest so far? It is remembered."""
        better = metric < self.best
        self.best.copy_(torch.minimum(self.best, torch.tensor(metric, dtype=torch.float64)))
        return bool(better)

    def complaints(self):
        """What lies outside the band, in words; [] when all is well, and in the first steps."""
        spread = (self.square - self.real ** 2).clamp_min(0).sqrt().maximum(SPREAD_FLOOR * self.real.abs())
        return [f"{name} {self.made[i]:.3g}, real data {self.real[i]:.3g} +- {self.width:g} x {spread[i]:.2g}"
                for i, name in enumerate(self.names) if self.count[i] >= MADE_STEPS
                and not (self.made[i] - self.real[i]).abs() <= self.width * spread[i]]     # NaN is outside too


# ---- Validation ------------------------------------------------------------------------------------------------------

@contextmanager
def averaged(module, ema):
    """Within it `module` has its averaged parameters."""
    now = {key: value.clone() for key, value in module.state_dict().items()}
    module.load_state_dict(ema.average)
    try:
        yield
    finally:
        module.load_state_dict(now)


def figures(sampler, coder, clips):
    """Frechet distance, sharpness, motion and control of `sampler` over the first second of `clips` sequences."""
    trips = held_out(clips, SEED, SECOND)
    truth = trips.video(coder.device).cpu()
    rows = measure(dream(sampler, coder, trips, truth, SEED), coder.decode(coder.encode(truth)), trips,
                   load_probe(coder.device))
    names = {"frechet": "frechet", "sharpness": "sharpness", "moving": "motion", "control": "both 1s"}
    return {f"val_{ours}": rows[theirs][0] for ours, theirs in names.items()}


@torch.no_grad()
def critic_view(critic, coder, trips, video, window):
    """`video` uint8 [N, T, H, W, 3] as the critic restores it from noise, a window of the teacher's at a time.

    It shows what the critic believes that the student makes. The first START frames are its clean context.
    """
    x0, text = coder.encode(video), coder.text([world.CAPTIONS[i] for i in trips.maps])    # [N, C, T, h, w]
    noise = torch.randn(x0.shape, generator=generator(SEED, "critic")).to(x0.device)
    sigma = torch.full((len(x0), x0.shape[2]), CRITIC_SIGMA, device=x0.device)
    sigma[:, :START] = 0
    condition, x_t = Condition(text, trips.control(x0.device)), add_noise(x0, noise, sigma)
    views = []
    for s in range(0, x0.shape[2], window):
        e = min(s + window, x0.shape[2])
        v = critic(x_t[:, :, s:e], sigma[:, s:e], condition.frames(s, e)).float()
        views.append(velocity_to_x0(v, x_t[:, :, s:e], sigma[:, s:e]))
    return coder.decode(torch.cat(views, 2))


def side_by_side(path, coder, teacher, student, nets):
    """Four seconds of truth, of the samplers `teacher` and `student` and of the critic's x0, with the keys drawn."""
    trips, spec = held_out(1, SEED), student.model.spec
    truth = trips.video(coder.device).cpu()                                             # [1, T, H, W, 3]
    side = {"truth": truth}
    for who, row in ((None, teacher), ("student", student)):
        with nets.using(who):
            side[row.name] = dream(row, coder, trips, truth, SEED)
    side["critic's x0"] = critic_view(nets.critic, coder, trips, side[student.name], spec.window)
    frames = torch.cat([video[0] for video in side.values()], 2)
    if rank() == 0:             # several come here where they share a network
        write_video(path, draw_keys(frames, trips.actions[0], 3, list(side)), spec.fps)


def final_table(folder, coder, rows, clips, shipped):
    """A table over `clips` held-out sequences, printed and as preview.json; a `shipped` teacher's row is stored."""
    stored = ASSETS / f"{rows[0].model.spec.name}-stage1.json"
    known = shipped and stored.exists()                                                 # it costs 25 times the student
    results, _, _ = evaluate(rows[1:] if known else rows, clips, SEED, coder.device)
    if known:
        row = json.loads(stored.read_text())["figures"][rows[0].name]
        row = {k: v for k, v in row.items() if k not in ("frechet", "ms a chunk")}      # of other counts, hardware
        results = {f"{rows[0].name} (stored: 768 others)": row, **results}
    if rank() == 0:             # several come here where they share a network
        print(f"\nPreview on {clips} held-out sequences (for acceptance: python evaluate.py)",
              table(results, COLUMNS), sep="\n")
        (folder / "preview.json").write_text(json.dumps(results, indent=1) + "\n")


def curves(folder):
    """curves.png: every logged figure against the step."""
    from matplotlib.figure import Figure
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    counters = "step", "seconds", "student_updates", "critic_updates", "rollouts"
    names = dict.fromkeys(k for line in lines for k in line if k not in counters)
    figure = Figure(figsize=(14, 9), layout="constrained")
    axes = figure.subplots(4, (len(names) + 3) // 4, squeeze=False)
    for axis, name in zip(axes.flat, names):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points), lw=1)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    figure.savefig(folder / "curves.png", dpi=110)
