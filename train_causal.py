"""The causal baseline's training, as short as it can be: teacher forcing, then distillation by self-rollout.

    torchrun train_causal.py                       # from the shipped stage-1 teacher, as stage 2 is
    python evaluate.py --student none --causal runs/causal/student.safetensors

The route of minWM and Self Forcing (arXiv:2506.08009): a bidirectional network becomes block-causal by flow matching
behind clean blocks (--forcing updates), then DMD against the guided bidirectional teacher as in train_stage2.py, with
the same losses, critic and rollout plan. --forcing 0 leaves the extra stage out: the compute of stage 2 alone.
"""

import random
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from causal import Causal, forcing_loss, self_rollout
from checkpoint import Run, load_checkpoint, save_checkpoint
from common import (EMA, alarm, data_rank, derive, descend, one_line_errors, parse, require_positive, reseed, setup,
                    shutdown)
from data import WorldStream
from dmd import Clip, Networks, Recipe, critic_gradients, student_gradients
from encode import codec
from faults import Finite, together
from flow import schedule
from model import load
from rollout import velocity_of
from selfforcing import draw_plan
from weights import default_source, save


@dataclass(frozen=True)
class Config:
    """Teacher forcing, then DMD, of a block-causal student. Running the same command again resumes."""
    backbone: str = "tiny"          # a preset with the tiny codec
    teacher: str = ""               # stage-1 weights; empty: the shipped teacher
    out: str = "runs/causal"        # run folder
    forcing: int = 2000             # updates of teacher forcing
    steps: int = 60                 # student updates of DMD after them
    seed: int = 0                   # of everything random
    save_every: int = 500           # updates between checkpoints
    forcing_batch: int = 64         # clips per update of teacher forcing
    batch: int = 4                  # clips per rollout
    frames: int = 12                # latent frames of clips and rollouts, the real start included
    t2v: float = 0.15               # share of clips and rollouts that start from nothing
    i2v: float = 0.15               # share that start from one real frame
    denoise: int = 4                # denoising steps of the student
    guidance: float = 0.0           # of the teacher; 0: the preset's
    critic_steps: int = 5           # critic updates per student update
    critic_warmup: int = 2          # first steps of DMD in which only the critic learns
    sigma_low: float = 0.02         # bounds of the noise levels of DMD and critic
    sigma_high: float = 0.98        # on the shifted sigma; the law is truncated to them
    forcing_lr: float = 3e-4        # learning rate at first; it falls in a line to --lr, the student's of DMD
    lr: float = 1e-4                # of the student in DMD
    critic_lr: float = 2e-4         # of the critic
    clip: float = 1.0               # global gradient norm
    ema: float = 0.98               # decay of the averaged student, which is the result
    pool: int = 256                 # trajectories in memory
    refresh: int = 100              # updates until they are replaced
    log_every: int = 10             # updates between log lines

    def __post_init__(self):
        require_positive(self, "steps", "save_every", "forcing_batch", "batch", "denoise", "critic_steps", "forcing_lr",
                         "lr", "critic_lr", "clip", "pool", "refresh", "log_every")
        if self.forcing < 0 or self.critic_warmup < 0:
            raise ValueError("--forcing and --critic_warmup must not be negative")


def prepare(cfg):
    """The networks, the data, the run folder."""
    device = setup()
    coder, load_one = codec(cfg.backbone, device), lambda: load(cfg.backbone, cfg.teacher, device)
    teacher, critic, student = load_one().requires_grad_(False).eval(), load_one(), load_one()
    stream = WorldStream(coder, cfg.seed, cfg.pool, max(24, cfg.frames), cfg.refresh)
    run = Run(cfg.out, cfg, "causal", cfg.teacher or default_source(teacher.spec))
    return device, teacher, critic, student, Causal(student), coder, stream, run


def distil(cfg, net, nets, recipe, optimizers, batch, plan, grad_step, empty):
    """One step of DMD by self-rollout, as in train_stage2.py; returns what to log. Without `grad_step` only the critic
    learns."""
    spec, told, notes = net.spec, batch.condition, {}
    with torch.set_grad_enabled(grad_step is not None):
        x0, _ = self_rollout(net, told, batch.x0[:, :, :plan.start], plan, spec, schedule(cfg.denoise, spec.shift),
                             lambda shape: torch.randn(shape, device=net.device), grad_step)
    cond, real = told.frames(plan.first, plan.frames), batch.x0[:, :, plan.first:]
    clip = Clip(x0[:, :, plan.first:], real, cond, cond.null(empty), plan.mask(len(x0), net.device))
    if grad_step is not None:
        notes = student_gradients(nets, recipe, clip, real.shape[2], spec.chunk)
        notes["student_norm"] = descend(optimizers["student"], cfg.clip)
    for _ in range(cfg.critic_steps):
        notes |= critic_gradients(nets, recipe, clip)[0]
        notes["critic_norm"] = descend(optimizers["critic"], cfg.clip)
    return notes | {"std": x0.detach()[:, :, plan.start:].std() / batch.x0[:, :, plan.start:].std()}


def learning_rate(step, cfg):
    """Of the student: --forcing_lr at first, in a line down to --lr, that of DMD, when teacher forcing ends."""
    return (cfg.forcing_lr - cfg.lr) * max(0, 1 - step / max(1, cfg.forcing)) + cfg.lr


@together()
def main(cfg):
    with one_line_errors():
        device, teacher, critic, student, net, coder, stream, run = prepare(cfg)
        learning, last = {"student": student, "critic": critic}, cfg.forcing + cfg.critic_warmup + cfg.steps
        optimizers = {name: torch.optim.AdamW(module.parameters(), rate, (0.0, 0.999), weight_decay=0.0)
                      for (name, module), rate in zip(learning.items(), (cfg.lr, cfg.critic_lr))}
        ema = EMA(student, cfg.ema)
        finite = Finite(cfg.out, learning)
        state = {**learning, "finite": finite}, optimizers, {"student": ema}
        start = load_checkpoint(cfg.out, last, *state)
    spec, empty = teacher.spec, coder.text([teacher.spec.negative])
    nets = Networks(velocity_of(teacher), net, velocity_of(critic), None, lambda name: nullcontext())
    recipe = Recipe(cfg.guidance or spec.guidance, spec.shift, cfg.sigma_low, cfg.sigma_high, cfg.denoise, 0, 0, 0, 0)

    for step in run.progress(start, last, "causal"):
        reseed(cfg.seed, "causal", data_rank(), step)
        shared = random.Random(derive(cfg.seed, "causal, all ranks", step))             # what all ranks draw alike
        plan = draw_plan(shared, spec, cfg.frames, cfg.t2v, cfg.i2v)
        forcing, learns = step < cfg.forcing, step >= cfg.forcing + cfg.critic_warmup
        batch = stream.batch(step, cfg.forcing_batch if forcing else cfg.batch, plan.frames)
        if plan.start <= 1 or shared.random() < 0.5:        # nothing is known of a motion before the start
            batch.condition.control.actions[:, 0] = 0
        optimizers["student"].param_groups[0]["lr"] = learning_rate(step, cfg)
        if forcing:
            loss = forcing_loss(net, batch.x0, batch.condition)
            loss.backward(alarm(loss))
            metrics = {"loss": loss, "student_norm": descend(optimizers["student"], cfg.clip)}
        else:
            grad_step = shared.randrange(cfg.denoise) if learns else None
            metrics = distil(cfg, net, nets, recipe, optimizers, batch, plan, grad_step, empty)
        sound = [finite.check(step, name, metrics[f"{name}_norm"], [batch], **metrics) for name in learning
                 if f"{name}_norm" in metrics]
        if (forcing or learns) and sound[0]:
            ema.update(student)
        if step % cfg.log_every == 0 or step + 1 == last:
            run.log(step, skipped=finite.total, **metrics)
        if run.due(step + 1, last, cfg.save_every):
            save(student, run.folder / "student.safetensors", weights=ema.average, **run.header(updates=step + 1))
            save_checkpoint(cfg.out, step + 1, *state)
            run.leave_if_asked(step + 1)
    shutdown()


if __name__ == "__main__":
    main(parse(Config))
