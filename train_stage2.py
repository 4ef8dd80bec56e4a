"""Stage 2: distil the guided teacher into a 4-step generator that rolls out chunk by chunk (BiWM, arXiv:2606.10135).

    torchrun train_stage2.py                       # the embedded world, ten minutes on two CPU cores

Each step: the student rolls out a clip from a real start (text, image or video), with gradient through one random
denoising step of every chunk (Self Forcing, arXiv:2506.08009); distribution matching against the guided teacher moves
the student (DMD, arXiv:2311.18828); then the critic catches up on what the student made (DMD2, arXiv:2405.14867).
"""

import json
import random
from dataclasses import dataclass

import torch

from common import (EMA, Run, derive, descend, load_checkpoint, one_line_errors, parse, provenance, rank, reseed,
                    require_positive, save_checkpoint, setup, shutdown)
from data import WorldStream
from dmd import critic_loss, dmd_loss
from encode import codec
from evaluate import dream, evaluate, load_probe, samplers_of, table
from flow import draw_sigma, schedule
from model import ASSETS, PRESETS, compile_blocks, load, save
from rollout import draw_keys, rollout, velocity_of, write_video


@dataclass(frozen=True)
class Config:
    """Stage 2 of BiWM: distribution matching distillation with self-rollout. Running the same command again resumes."""
    backbone: str = "tiny"          # a preset of model.py
    teacher: str = ""               # stage-1 weights; empty: the shipped teacher
    out: str = "runs/stage2"        # run folder
    steps: int = 60                 # student updates
    seed: int = 0                   # of everything random
    save_every: int = 20            # student updates between checkpoints
    batch: int = 4                  # clips per rollout and process
    frames: int = 12                # latent frames of a rollout, its real start included
    t2v: float = 0.15               # share of rollouts that start from nothing
    i2v: float = 0.15               # share that start from one real frame; the rest start from a chunk of real frames
    denoise: int = 4                # denoising steps of the student
    guidance: float = 0.0           # of the teacher, anchored at the unconditional prediction; 0: the preset's
    critic_steps: int = 5           # critic updates per student update
    critic_warmup: int = 2          # first steps in which only the critic learns
    sigma_low: float = 0.02         # bounds of the noise levels of both losses, on the shifted sigma
    sigma_high: float = 0.98        # the law is truncated to them, not clamped
    lr: float = 1e-4                # of the student
    critic_lr: float = 2e-4         # of the critic
    clip: float = 1.0               # global gradient norm of both
    ema: float = 0.95               # decay of the averaged student, which is the result
    pool: int = 64                  # trajectories in memory, for starts and actions
    refresh: int = 25               # steps until they are replaced
    preview: int = 16               # held-out sequences of the table at the end; 0: no table
    compile: bool = False           # torch.compile the transformer blocks

    def __post_init__(self):
        require_positive(self, "steps", "save_every", "batch", "frames", "denoise", "critic_steps", "lr", "critic_lr",
                         "clip", "pool", "refresh")
        if self.backbone not in PRESETS:
            raise ValueError(f"unknown backbone '{self.backbone}'; choose {', '.join(PRESETS)}")
        if min(self.t2v, self.i2v) < 0 or self.t2v + self.i2v > 1:
            raise ValueError(f"--t2v {self.t2v} and --i2v {self.i2v} are shares: not negative, at most 1 together")
        if not 0 <= self.ema < 1 or self.guidance < 0:
            raise ValueError(f"--ema {self.ema} is within 0..1, below 1; --guidance {self.guidance} is not negative")
        if not 0 <= self.sigma_low < self.sigma_high <= 1:
            raise ValueError(f"--sigma_low {self.sigma_low} must be below --sigma_high {self.sigma_high}, both in 0..1")
        spec = PRESETS[self.backbone]
        if not 2 * spec.chunk <= self.frames <= spec.window:
            raise ValueError(f"--frames of {self.backbone} is {2 * spec.chunk}..{spec.window}, the teacher's window, "
                             f"got {self.frames}")
        if self.preview < 0 or self.critic_warmup < 0:
            raise ValueError("--preview and --critic_warmup are not negative")


def draw_start(cfg, chunk, shared):
    """Real frames a rollout starts from (0, 1 or a chunk) and its length: whole chunks after the start."""
    u = shared.random()
    n = 0 if u < cfg.t2v else 1 if u < cfg.t2v + cfg.i2v else chunk
    return n, n + (cfg.frames - n) // chunk * chunk


def prepare(cfg):
    """Three networks from one checkpoint, the data and the run folder; bad input ends here with one line."""
    device = setup()
    coder = codec(cfg.backbone, device)
    student, critic, teacher = (load(cfg.backbone, cfg.teacher, device) for _ in range(3))
    if cfg.compile:
        student, critic, teacher = (compile_blocks(net) for net in (student, critic, teacher))
    if teacher.control is None:
        raise ValueError(f"{cfg.teacher} has no control parameters; stage 2 distils a stage-1 teacher")
    stream = WorldStream(coder, cfg.seed, cfg.pool, 24, cfg.refresh)
    if cfg.preview:
        load_probe(device)
    return device, student, critic, teacher.requires_grad_(False).eval(), coder, stream, Run(cfg.out, cfg)


def adamw(model, lr, device):
    return torch.optim.AdamW(model.parameters(), lr, (0.0, 0.999), weight_decay=0.0, fused=device.type == "cuda")


def main(cfg):
    with one_line_errors():
        device, student, critic, teacher, coder, stream, run = prepare(cfg)
        student_opt, critic_opt = adamw(student, cfg.lr, device), adamw(critic, cfg.critic_lr, device)
        ema = EMA(student, cfg.ema)
        state = {"student": student, "critic": critic}, {"student": student_opt, "critic": critic_opt}, {"student": ema}
        start = load_checkpoint(cfg.out, cfg.steps + cfg.critic_warmup, *state)
    spec, guidance = student.spec, cfg.guidance or student.spec.guidance
    student_v, critic_v, teacher_v = (velocity_of(net) for net in (student, critic, teacher))
    sigmas, empty = schedule(cfg.denoise, spec.shift), coder.text([spec.negative])

    for step in run.progress(start, cfg.steps + cfg.critic_warmup, "stage 2"):
        reseed(cfg.seed, "stage 2", rank(), step)
        shared = random.Random(derive(cfg.seed, "stage 2, all ranks", step))    # what every rank must draw alike
        n, frames = draw_start(cfg, spec.chunk, shared)
        grad_step = shared.randrange(cfg.denoise)
        real = stream.batch(step, cfg.batch, frames)
        if n <= 1 or shared.random() < 0.5:     # nothing is known of a motion before the start: when playing it is still
            real.condition.control.actions[:, 0] = 0
        mask = (torch.arange(frames, device=device) >= n).expand(cfg.batch, -1)         # [B, T] the generated frames
        draw = lambda: draw_sigma(cfg.batch, spec.shift, cfg.sigma_low, cfg.sigma_high, device)
        metrics = {}

        # One rollout serves both: with gradient for the student, detached for the critic.
        with torch.set_grad_enabled(step >= cfg.critic_warmup):
            x0 = rollout(student_v, real.condition, real.x0[:, :, :n], frames, sigmas, spec.chunk, spec.window,
                         lambda shape: torch.randn(shape, device=device), grad_step=grad_step)   # [B, C, T, H, W]

        if step >= cfg.critic_warmup:
            loss, stats = dmd_loss(teacher_v, critic_v, x0, real.condition, real.condition.null(empty),
                                   draw(), guidance, mask)
            loss.backward()
            norm = descend(student_opt, cfg.clip, "the student")
            ema.update(student)
            metrics |= {"dmd": loss.detach(), **stats, "student_norm": norm, "std": x0.detach()[:, :, n:].std()}

        # The critic learns the velocity field of what the student just made: several updates for the student's one.
        for _ in range(cfg.critic_steps):
            loss = critic_loss(critic_v, x0, real.condition, draw(), mask)
            loss.backward()
            norm = descend(critic_opt, cfg.clip, "the critic")
        run.log(step, student_updates=max(0, step + 1 - cfg.critic_warmup),
                critic_updates=(step + 1) * cfg.critic_steps, critic=loss.detach(), critic_norm=norm, **metrics)

        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps + cfg.critic_warmup:
            if rank() == 0:                     # before the checkpoint: a complete one never lacks its weights
                notes = {"stage": 2, "updates": step + 1 - cfg.critic_warmup, "seed": cfg.seed, **provenance()}
                save(student, run.folder / "student.safetensors", weights=ema.average, **notes)
            save_checkpoint(cfg.out, step + 1, *state)
    if rank() == 0:
        finish(cfg, run, teacher, coder, guidance)
    shutdown()


def finish(cfg, run, teacher, coder, guidance):
    """Curves, the table and a side-by-side video, made from the weights that were saved."""
    device = coder.device
    curves(run.folder)
    if not cfg.preview:
        return
    student = load(cfg.backbone, run.folder / "student.safetensors", device)
    rows = samplers_of(teacher, [student], guidance, few=cfg.denoise)
    stored = ASSETS / f"{cfg.backbone}-stage1.json"
    known = not cfg.teacher and guidance == teacher.spec.guidance and stored.exists()   # it costs 25 times the student
    results, videos, trips = evaluate(rows[1:] if known else rows, cfg.preview, 1000, device)
    if known:
        figures = json.loads(stored.read_text())["figures"][rows[0].name]
        figures = {k: v for k, v in figures.items() if k not in ("frechet", "ms a chunk")}  # of other counts, hardware
        results = {f"{rows[0].name} (stored: 256 others)": figures, **results}
    print(f"\nPreview on {cfg.preview} held-out sequences (for acceptance: python evaluate.py)\n{table(results)}")
    one, truth = trips.part(0, 1), videos["truth"][:1]
    side = {"truth": truth, rows[0].name: dream(rows[0], coder, one, truth, 1000),
            rows[2].name: videos[rows[2].name][:1]}
    frames = draw_keys(torch.cat([video[0] for video in side.values()], 2), one.actions[0], 3, list(side))
    write_video(run.folder / "compare.mp4", frames, teacher.spec.fps)
    (run.folder / "preview.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwrote {run.folder}: student.safetensors, compare.mp4, curves.png, preview.json, log.jsonl, config.json")


def curves(folder):
    """curves.png: every logged figure against the step."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = [k for k in lines[-1] if k not in ("step", "seconds", "student_updates", "critic_updates")]
    figure, axes = plt.subplots(2, (len(names) + 1) // 2, figsize=(12, 5), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points), lw=1)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(parse(Config))
