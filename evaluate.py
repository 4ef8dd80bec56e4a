"""Quality against the exact world: does the dream obey the keys, look like the world, and follow the truth?

Truth is the re-rendered future, seen through the codec as everything the networks see and make.
An inverse-dynamics probe, trained on real frames, reads motion out of generated ones. Intervals are 95 % bootstrap.

    python evaluate.py --student runs/stage2/student.safetensors          # teacher 50 and 4 steps, student 4 steps
    python evaluate.py --train_probe 12000                                # makes assets/probe.safetensors
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import qat
import world
from common import autocast, generator, one_line_errors, parse, provenance, rank, require_positive, reseed, setup
from control import Condition
from data import Trips
from encode import codec
from flow import schedule
from model import PRESETS, load
from weights import ASSETS
from rollout import few_step, guided, ode, rollout, velocity_of

CONTROL = ("translation", "rotation", "both")
CHUNK, SECOND = PRESETS["tiny"].chunk, world.FPS
START, HORIZON = CHUNK, 32                      # real frames a sequence begins with, frames generated after them


# ---- The probe -------------------------------------------------------------------------------------------------------

def convolution(channels, out, stride):
    return nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(8, out), nn.GELU()


class Probe(nn.Module):
    """Inverse dynamics: two successive frames -> logits of the translation (9) and the rotation (9) between them."""

    def __init__(self):
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(9, 48, 5, 2, 2), nn.GELU(), *convolution(48, 64, 2))
        later = (c for width, stride in ((64, 2), (128, 1), (128, 1), (128, 1), (128, 2))
                 for c in convolution(width, 128, stride))
        self.late = nn.Sequential(*later, nn.Flatten(), nn.Linear(128 * 24, 256), nn.GELU())
        self.head = nn.Linear(256, 18)

    def forward(self, video):
        """uint8 [B, T, H, W, 3] -> logits [B, T-1, 2, 9] and early features [B, T-1, 128]."""
        x = video.permute(0, 1, 4, 2, 3).float() / 127.5 - 1                            # [B, T, 3, H, W]
        pair = torch.cat([x[:, :-1], x[:, 1:], x[:, 1:] - x[:, :-1]], 2)                # [B, T-1, 9, H, W]
        early = self.early(pair.flatten(0, 1))                                          # [B*(T-1), 64, H/4, W/4]
        logits = self.head(self.late(early)).reshape(*pair.shape[:2], 2, 9)
        features = torch.cat([early.mean((2, 3)), early.std((2, 3))], 1).reshape(*pair.shape[:2], -1)
        return logits, features

    @torch.no_grad()
    def read(self, video, chunk=64):
        """Predicted classes [B, T-1, 2] and features [B, T-1, 128] of a long video, in pieces."""
        device = self.head.weight.device
        out = [self(piece.to(device)) for piece in video.split(chunk)]
        return torch.cat([l.argmax(-1).cpu() for l, _ in out]), torch.cat([f.double().cpu() for _, f in out])


def train_probe(steps, path, device, batch=1024, length=8):
    """Train on real pairs, half of them through the codec; the last weights go to `path`."""
    reseed(0, "probe")
    probe, coder = Probe().to(device, memory_format=torch.channels_last), codec("tiny", device)
    optimizer = torch.optim.AdamW(probe.parameters(), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    for step in tqdm(range(steps), desc="probe"):
        if step % 500 == 0:
            trips = Trips(*world.explore(4 * batch, length, generator(step, "probe")))
            real = torch.cat([trips.part(i, i + 512).video(device) for i in range(0, len(trips.maps), 512)])
            coded = torch.cat([coder.decode(coder.encode(piece)).to(device) for piece in real.split(512)])
        pick, at = torch.randint(len(real), (batch // 2,), device=device), torch.randint(length - 2, (1,)).item()
        with autocast(device):
            logits, _ = probe((coded if step % 2 else real)[pick, at:at + 3])           # [B/2, 2, 2, 9]
        truth = trips.actions.to(device)[pick, at + 1:at + 3].flatten()                 # [B]
        move, turn = logits.float().flatten(0, 1).unbind(1)                             # each [B, 9]
        (F.cross_entropy(move, truth // 9) + F.cross_entropy(turn, truth % 9)).backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    save_file({k: v.cpu().contiguous() for k, v in probe.state_dict().items()}, path)


def load_probe(device, path=ASSETS / "probe.safetensors"):
    probe = Probe().to(device)
    try:
        probe.load_state_dict(load_file(path), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise OSError(f"{path} is not a probe ({error}); python evaluate.py --train_probe 12000 makes one") from None
    return probe.eval()


# ---- Sequences and samplers ------------------------------------------------------------------------------------------

class Sampler(NamedTuple):
    """How a network is rolled out: steps a chunk, guidance, Euler ODE (a teacher) or few-step renoising (a student)."""
    name: str
    model: nn.Module
    steps: int
    guidance: float
    ode: bool


def held_out(clips, seed, horizon=HORIZON):
    """Trajectories [clips, START + horizon] that no training stream contains."""
    return Trips(*world.explore(clips, START + horizon, generator(seed, "held-out")))


@torch.no_grad()
def dream(sampler, coder, trips, video, seed, piece=128):
    """`video` uint8 [N, T, H, W, 3] with the frames after the START real ones generated, `piece` sequences at once."""
    spec, captions, out = sampler.model.spec, coder.text(world.CAPTIONS), []
    velocity = guided(velocity_of(sampler.model), sampler.guidance, coder.text([spec.negative]))
    noise = lambda shape, g=generator(seed, "dream"): torch.randn(shape, generator=g).to(coder.device)
    for i in tqdm(range(0, len(video), piece), desc=sampler.name, leave=False, disable=rank() > 0):
        maps = trips.maps[i:i + piece].to(coder.device)
        told = trips.part(i, i + piece).control(coder.device).frames(0, video.shape[1])
        condition = Condition({k: v[maps] for k, v in captions.items()}, told)
        out.append(coder.decode(rollout(
            velocity, condition, coder.encode(video[i:i + piece, :START]), video.shape[1],
            schedule(sampler.steps, spec.shift), spec.chunk, spec.window, noise, ode if sampler.ode else few_step,
            sampler.model)))
    return torch.cat(out)


def latency(sampler, coder, trips, video, chunks=2):
    """Milliseconds a chunk for one player, from an 8-frame history on."""
    begin = time.perf_counter()
    dream(sampler, coder, trips.part(0, 1), video[:1, :START + chunks * CHUNK], 0)
    return 1000 * (time.perf_counter() - begin) / chunks


# ---- Metrics: one number or tensor per sequence, so that intervals come from resampling sequences --------------------

def psnr(a, b):
    """[N, T] peak signal-to-noise ratio in dB of uint8 videos."""
    return 10 * torch.log10(255 ** 2 / (a.double() - b.double()).square().mean((2, 3, 4)).clamp_min(1e-3))


def gradient(video):
    """[N, T] mean absolute spatial gradient: sharpness."""
    return sum(video.float().diff(dim=axis).abs().mean((2, 3, 4)) for axis in (2, 3))


def change(video):
    """[N, T-1] mean absolute difference of successive frames: motion."""
    return video.float().diff(dim=1).abs().mean((2, 3, 4))


def frechet(a, b):
    """Frechet distance of Gaussian fits to features [n, d] (FID, arXiv:1706.08500); only equal n compare."""
    (ma, ca), (mb, cb) = ((x.mean(0), torch.cov(x.T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T                             # symmetric square root of ca
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp_min(0).sqrt().sum()
    return float((ma - mb).square().sum() + ca.trace() + cb.trace() - 2 * cross)


def bootstrap(figure, count, draws=200):
    """`figure(index)` of all `count` sequences, and 1.96 standard deviations over resampled ones: [value, low, high].
    Percentiles would be biased for the Frechet distance, which grows when sequences repeat."""
    g = torch.Generator().manual_seed(0)
    values = torch.tensor([figure(torch.randint(count, (count,), generator=g)) for _ in range(draws)]).double()
    value, half = figure(torch.arange(count)), 1.96 * float(values.std())
    return [value, value - half, value + half]


def measure(video, truth, trips, probe):
    """Figures {name: [value, low, high]} of generated `video` against `truth`, both uint8 [N, START + T, H, W, 3]."""
    N, fresh, second = len(video), video.shape[1] - START, slice(START - 1, START - 1 + SECOND)    # second: motions
    (read, features), (_, real_features) = probe.read(video), probe.read(truth)
    wanted, free = trips.actions[:, 1:], ~trips.blocked[:, 1:]
    right = torch.stack([read[..., 0] == wanted // 9, read[..., 1] == wanted % 9], -1)  # [N, T-1, 2]

    figures, every = {}, slice(START - 1, None)
    for name, frames, use in (("1s", second, free), ("all", every, free), ("with blocked", every, free | True)):
        ok, use = right[:, frames].double(), use[:, frames].double()
        for axis, got in zip(CONTROL, (ok[..., 0], ok[..., 1], ok.prod(-1))):
            figures[f"{axis} {name}"] = lambda i, got=got, use=use: 100 * float((got[i] * use[i]).sum() / use[i].sum())

    near = slice(START - 1 + SECOND // 2, START - 1 + SECOND)                           # 0.5 to 1 s after the start
    a, b = features[:, near], real_features[:, near]
    figures["frechet"] = lambda i: frechet(a[i].flatten(0, 1), b[i].flatten(0, 1))
    each = lambda f, *videos: torch.cat([f(*(part.to(probe.head.weight.device) for part in parts)).cpu()
                                         for parts in zip(*(v.split(32) for v in videos))])    # where it is fast
    quality, moved, true = each(psnr, video, truth), each(change, video), each(change, truth)
    for name, x, y in (("sharpness", each(gradient, video), each(gradient, truth)), ("motion", moved, true)):
        figures[name] = lambda i, x=x[:, -fresh:], y=y[:, -fresh:]: float(x[i].mean() / y[i].mean())
    for seconds in (0.5, 1, 2, 4):
        frame = START - 1 + int(seconds * SECOND)
        if frame < video.shape[1]:
            figures[f"psnr {seconds}s"] = lambda i, frame=frame: float(quality[i, frame].mean())
    border = torch.arange(START - 1, video.shape[1] - 1, CHUNK)                        # into the first frame of a chunk
    inside = torch.tensor([t for t in range(START - 1, video.shape[1] - 1) if (t - START + 1) % CHUNK])
    figures["seam"] = lambda i: float((moved[i][:, border].mean() / true[i][:, border].mean())
                                      / (moved[i][:, inside].mean() / true[i][:, inside].mean()))
    return {name: bootstrap(figure, N) for name, figure in figures.items()}


def still(sampler, coder, clips, seed):
    """PSNR in dB over one second of standing still, against the codec's reconstruction of the start."""
    trips, none = held_out(clips, seed, 0), torch.zeros(clips, START + SECOND, dtype=torch.long)
    trips = Trips(trips.maps, trips.states[:, -1:].expand(-1, START + SECOND, -1), none, none.bool(), none)
    video = trips.video()
    quality = psnr(dream(sampler, coder, trips, video, seed), coder.decode(coder.encode(video)))[:, START:].mean(1)
    return bootstrap(lambda i: float(quality[i].mean()), clips)


def evaluate(samplers, clips, seed, device, piece=128):
    """All samplers on the same held-out sequences: {sampler: {figure: [value, low, high]}}, videos, sequences."""
    coder, probe = codec(samplers[0].model.spec.name, device), load_probe(device)
    trips = held_out(clips, seed)
    truth = trips.video(device).cpu()
    coded = coder.decode(coder.encode(truth))
    ceiling = {k: v for k, v in measure(coded, coded, trips, probe).items() if k.startswith(CONTROL)}
    results, videos = {"real video": ceiling}, {"truth": truth}
    copy = coded[:, [*range(START)] + [START - 1] * HORIZON]
    results["copy the last frame"] = {k: v for k, v in measure(copy, coded, trips, probe).items() if k != "seam"}
    for sampler in samplers:
        videos[sampler.name] = dream(sampler, coder, trips, truth, seed, piece)
        results[sampler.name] = {**measure(videos[sampler.name], coded, trips, probe),
                                 "ms a chunk": [latency(sampler, coder, trips, truth)] * 3,
                                 "still": still(sampler, coder, min(clips, 64), seed)}
    return results, videos, trips


COLUMNS = ("translation 1s", "rotation 1s", "both 1s", "both all", "frechet", "sharpness", "motion", "seam",
           "psnr 0.5s", "psnr 1s", "psnr 2s", "psnr 4s", "still", "ms a chunk")


def table(results, columns=COLUMNS):
    """Markdown: a row per sampler, value and half-width of the 95 % interval."""
    cell = lambda value, low, high: f"{value:.3g}" + (f" ±{(high - low) / 2:.2g}" if high > low else "")
    rows = [" | ".join([name, *(cell(*row[c]) if c in row else "-" for c in columns)]) for name, row in results.items()]
    return "\n".join(["| sampler | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|",
                      *(f"| {row} |" for row in rows)])


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
    student: str = ""           # stage-2 weights, several separated by commas; empty: the shipped student
    quant: str = "none"         # round the students: nvfp4, nvfp4-w4a4 (activations too), fp8; packed, te: see quant.py
    clips: int = 256            # held-out sequences per seed
    seed: int = 1000            # of the sequences and the noise
    seeds: int = 1              # so many successive seeds, each with its own sequences
    teacher_steps: int = 50     # denoising steps of the guided teacher
    guidance: float = 0.0       # of the teacher; 0: the preset's
    out: str = ""               # write the figures as JSON
    train_probe: int = 0        # train assets/probe.safetensors for so many steps first

    def __post_init__(self):
        require_positive(self, "clips", "seeds", "teacher_steps")
        qat.check(self.quant, [*qat.ROUNDING, "packed", "te"])


def main(cfg):
    device = setup()
    with one_line_errors():
        if cfg.train_probe:
            train_probe(cfg.train_probe, ASSETS / "probe.safetensors", device)
        load_probe(device)
        if cfg.out:
            Path(cfg.out).touch()
        teacher = load(cfg.backbone, cfg.teacher, device)
        paths = cfg.student.split(",") if cfg.student else [ASSETS / f"{cfg.backbone}-student.safetensors"]
        students = [qat.apply(load(cfg.backbone, path, device), cfg.quant) for path in paths]
    rows = samplers_of(teacher, students, cfg.guidance or teacher.spec.guidance, cfg.teacher_steps)
    report = {"settings": vars(cfg), **provenance(), "seeds": []}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        results, _, _ = evaluate(rows, cfg.clips, seed, device)
        report["seeds"].append(results)
        print(f"\nseed {seed}, {cfg.clips} held-out sequences\n{table(results)}")
        if cfg.out:
            Path(cfg.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(parse(Config))
