"""Stage 2: distil the guided teacher into a 4-step generator that rolls out chunk by chunk (BiWM, arXiv:2606.10135).

    torchrun train_stage2.py                       # the embedded world, ten minutes on two CPU cores
    torchrun train_stage2.py --tune lora           # student and critic as adapters on the teacher: one network
    torchrun train_stage2.py --quant nvfp4         # a student that will run with 4-bit weights (qat.py)
    torchrun train_stage2.py --dry-run             # settings, and what they will take on GPUs (plan.py)

Each step: the student rolls out clips from real starts (text, image or video), with gradient through one random
denoising step of every chunk (Self Forcing, arXiv:2506.08009); distribution matching against the guided teacher moves
the student (DMD, arXiv:2311.18828), with the terms of dmd.py that --gan, --teacher_fkl, --real_fkl and --sft add; then
the critic catches up on what the student made (DMD2, arXiv:2405.14867).
"""

import random
import shutil
from dataclasses import dataclass, replace

import torch

import qat
from checkpoint import Run, load_checkpoint, save_checkpoint
from common import (EMA, adamw, data_rank, derive, descend, fail, mean_over_ranks, one_line_errors, parse, rank,
                    require_positive, reseed, setup, shutdown)
from faults import Finite, together
from parallel import Layout
from plan import dry_run
from data import RandomStream, open_stream
from dmd import HEAD_RATE, Clip, Recipe, critic_gradients, student_gradients
from encode import codec
from evaluate import samplers_of
from flow import schedule
from history import behind, room
from health import Health, averaged, compare, critic_by_sigma, curves, figures, final_table, side_by_side
from model import PRESETS, load
from networks import networks
from probe import load_probe
from weights import default_source, save
from selfforcing import draw_plan, self_rollout


@dataclass(frozen=True)
class Config:
    """Stage 2 of BiWM: distribution matching distillation with self-rollout. Running the same command again resumes."""
    backbone: str = "tiny"          # a preset of model.py
    codec: str = ""                 # of an official backbone: folder or hub repository, by default the official one
    teacher: str = ""               # stage-1 weights; empty: the shipped teacher; random: for speed and memory only
    data: str = ""                  # folder of shards (encode.py, doom.py); empty: the embedded world, rendered live
    out: str = "runs/stage2"        # run folder
    steps: int = 60                 # student updates
    seed: int = 0                   # of everything random
    save_every: int = 20            # student updates between checkpoints
    keep: int = 2                   # checkpoints that stay: the newest and those before it; the best stays besides
    tune: str = "full"              # full: three networks; lora: two adapters on the teacher
    rank: int = 32                  # of the adapters
    batch: int = 4                  # clips per rollout and process
    accumulate: int = 1             # rollouts per update: as if the batch were so many times larger
    frames: int = 12                # latent frames of a rollout, its real start included; may outgrow the window
    t2v: float = 0.15               # share of rollouts that start from nothing
    i2v: float = 0.15               # share that start from one real frame; the rest start from a chunk of real frames
    past: int = 0                   # latent frames: a rollout that starts from a chunk may have a past of up to so many
    history: str = ""               # compression: none, window, framepack, packforcing; empty: that of the teacher
    attention: str = ""             # of history: joint, or self or segment, which do not see the chunk
    recent: int = 0                 # latent frames that history leaves as they are; 0: the kind's own
    choose: str = ""                # packforcing's blocks: affinity, recency or fov
    grow: int = 0                   # curriculum: one chunk, and one more after each so many updates; 0: all at once
    short: float = 0.0              # share of rollouts with fewer chunks than there could be
    denoise: int = 4                # denoising steps of the student
    complete: bool = True           # finish the denoising of the history copy; otherwise the early x0 is history
    guidance: float = 0.0           # of the teacher, anchored at the unconditional prediction; 0: the preset's
    gan: float = 0.0                # weight of the GAN on the critic's features
    teacher_fkl: float = 0.0        # weight of the teacher's forward KL; it takes denoising step 0, DMD the others
    real_fkl: float = 0.0           # weight of the forward KL to real data
    sft: float = 0.0                # weight of the flow-matching anchor
    quant: str = "none"             # rounding the student learns with: nvfp4, nvfp4-w4a4 (activations too) or fp8
    quant_loss: float = 0.03        # with --quant: weight of the student's imitation of itself without rounding
    quant_softmax: bool = False     # that loss as BiWM's KL over channels; blind to an offset of all, such as a tint
    critic_steps: int = 5           # critic updates per student update
    critic_warmup: int = 2          # first steps in which only the critic learns
    sigma_low: float = 0.02         # bounds of the noise levels of DMD, critic and GAN, on the shifted sigma
    sigma_high: float = 0.98        # the law is truncated to them, not clamped
    lr: float = 1e-4                # of the student
    critic_lr: float = 2e-4         # of the critic
    cooldown: float = 0.0           # share of the updates, the last, in which --lr falls to zero in a line
    clip: float = 1.0               # global gradient norm of each
    ema: float = 0.98               # decay of the averaged student, which is the result
    pool: int = 64                  # trajectories in memory, for starts and actions
    refresh: int = 25               # steps until they are replaced
    validate: int = 0               # updates between validations, which keep the best student; 0: only at the end
    preview: int = 16               # held-out sequences of validations and of the table at the end; 0: none
    health: float = 4.0             # band around real data, in standard deviations over batches; 0: no watch
    patience: int = 20              # updates in a row outside of it until the run saves and stops
    shard: str = "ddp"              # weights: none, one process; ddp, a copy in each; fsdp, rows of one copy in each
    replicas: int = 1               # with --shard fsdp: so many sharded copies, such as one per machine
    sequence: int = 1               # neighbouring processes that share each clip
    recompute: bool = False         # recompute activations in the backward pass: less memory
    compile: bool = False           # torch.compile the transformer blocks

    def __post_init__(self):
        require_positive(self, "steps", "save_every", "keep", "batch", "accumulate", "rank", "denoise", "critic_steps",
                         "lr", "critic_lr", "clip", "pool", "refresh", "patience")
        negative = [f for f in ("past", "grow", "guidance", "gan", "teacher_fkl", "real_fkl", "sft", "quant_loss",
                                "critic_warmup", "validate", "preview", "health", "t2v", "i2v", "short", "ema",
                                "cooldown")
                    if getattr(self, f) < 0]
        wrong = [
            (negative, f"--{' --'.join(negative)} must not be negative"),
            (self.backbone not in PRESETS, f"unknown backbone '{self.backbone}'; choose {', '.join(PRESETS)}"),
            (self.tune not in ("full", "lora"), f"--tune is full or lora, got '{self.tune}'"),
            (self.tune == "lora" and self.history not in ("", "none", "window"),
             "--tune lora trains no compressor: leave out --history, for that of a teacher that has one"),
            (self.t2v + self.i2v > 1, f"--t2v {self.t2v} and --i2v {self.i2v} are shares, at most 1 together"),
            (max(self.short, self.cooldown) > 1 or self.ema >= 1,
             f"--short {self.short} and --cooldown {self.cooldown} are at most 1, --ema {self.ema} is below 1"),
            (not 0 <= self.sigma_low < self.sigma_high <= 1,
             f"--sigma_low {self.sigma_low} must be below --sigma_high {self.sigma_high}, both in 0..1"),
            (self.teacher_fkl and self.denoise < 2, "--teacher_fkl takes one step for itself: --denoise 2 or more"),
            (self.validate and not self.preview, "--validate needs sequences: --preview above 0"),
            (self.preview and self.data, "--preview compares with the embedded world: with --data say --preview 0"),
            (self.preview and self.teacher == "random", "--teacher random dreams nothing to look at: --preview 0")]
        for bad, message in wrong:
            if bad:
                raise ValueError(message)
        qat.check(self.quant)
        if self.frames < 2 * PRESETS[self.backbone].chunk:
            raise ValueError(f"--frames must hold two chunks of {PRESETS[self.backbone].chunk}, got {self.frames}")


def data(cfg, spec, device):
    """The codec and the stream of clips."""
    if cfg.teacher == "random" and not cfg.data:
        return (RandomStream(spec, cfg.seed, device),) * 2
    if cfg.preview:
        load_probe(device)
    coder = codec(cfg.backbone, device, cfg.codec)
    return coder, open_stream(cfg.data, coder, spec, cfg.seed, cfg.frames + cfg.past, cfg.pool, 24,
                              cfg.refresh * cfg.accumulate)


def learning_rate(update, cfg):
    """Of the student, in its updates 0, 1, ...: while it falls the critic catches up with it."""
    return cfg.lr * min(1.0, (cfg.steps - update) / max(1.0, cfg.cooldown * cfg.steps))


def mean_of(dicts):
    return {key: sum(d[key] for d in dicts) / len(dicts) for key in dicts[0]}


@together()
def main(cfg):
    with one_line_errors():                     # bad input ends here, with one line and before anything is written
        device, spec = setup(), PRESETS[cfg.backbone]
        layout = Layout(device, cfg.shard, cfg.replicas, cfg.sequence)
        nets, models, learning, weights = networks(cfg, layout, device)
        coder, stream = data(cfg, spec, device)
        run = Run(cfg.out, cfg, 2, "" if cfg.teacher == "random" else cfg.teacher or default_source(spec))
        rates = {"student": cfg.lr, "critic": cfg.critic_lr, "head": HEAD_RATE}
        optimizers = {name: adamw(module, rates[name], (0.0, 0.999), device) for name, module in learning.items()}
        ema, health, last = EMA(learning["student"], cfg.ema), Health(cfg.health), cfg.steps + cfg.critic_warmup
        finite = Finite(cfg.out, learning)
        state = {**learning, "health": health, "finite": finite}, optimizers, {"student": ema}
        start, best = load_checkpoint(cfg.out, last, *state), run.folder / "best"
    if start == 0 and rank() == 0:
        shutil.rmtree(best, ignore_errors=True)                                 # of a run that is no more
    sigmas, empty, share = schedule(cfg.denoise, spec.shift), coder.text([spec.negative]), 1 / cfg.accumulate
    coder.release()
    recipe = Recipe(cfg.guidance or spec.guidance, spec.shift, cfg.sigma_low, cfg.sigma_high, cfg.denoise, cfg.gan,
                    cfg.teacher_fkl, cfg.real_fkl, cfg.sft, cfg.quant_loss * (cfg.quant != "none"), cfg.quant_softmax)
    shown, _, sampler = samplers_of(models[0], [models[1]], recipe.guidance, few=cfg.denoise)

    for step in run.progress(start, last, "stage 2"):
        reseed(cfg.seed, "stage 2", data_rank(), step)
        shared = random.Random(derive(cfg.seed, "stage 2, all ranks", step))    # what every rank must draw alike
        updates, learns = max(0, step + 1 - cfg.critic_warmup), step >= cfg.critic_warmup
        most = 1 + max(0, updates - 1) // cfg.grow if cfg.grow else None        # curriculum: chunks of a rollout
        plan = draw_plan(shared, room(models[1], spec), cfg.frames, cfg.t2v, cfg.i2v, cfg.past, most, cfg.short)
        grad_step = shared.randrange(1 if cfg.teacher_fkl else 0, cfg.denoise)  # step 0 belongs to the forward KL
        still = plan.start <= 1 or shared.random() < 0.5
        stop = plan.frames - spec.chunk * shared.randrange(plan.made // spec.chunk)

        # One rollout serves both: with gradient for the student, detached for the critic.
        batches, clips, notes, looks, metrics = [], [], [], [], {}
        for i in range(cfg.accumulate):
            real = stream.batch(step * cfg.accumulate + i, cfg.batch, plan.frames)
            if still:       # nothing is known of a motion before the start: when playing it is still
                real.condition.control.actions[:, 0] = 0
            with torch.set_grad_enabled(learns):
                x0, clean = self_rollout(nets.student, real.condition, real.x0[:, :, :plan.start], plan, spec, sigmas,
                                         lambda shape: torch.randn(shape, device=device), grad_step, cfg.complete,
                                         models[1])
            batches.append(real)
            told = real.condition.control
            (begin, past), (_, happened) = (behind(models[1], x, plan.first, told) for x in (clean, real.x0))
            cond = replace(real.condition.frames(begin, plan.frames), past=past)
            clips.append(Clip(x0[:, :, begin:], real.x0[:, :, begin:], cond, cond.null(empty),
                              plan.mask(cfg.batch, device, begin), happened))
            if learns:
                notes.append(student_gradients(nets, recipe, clips[-1], stop - begin, spec.chunk, share))
                looks.append(compare(clean, real.x0, plan.start, spec.chunk))
        if learns:
            for group in optimizers["student"].param_groups:
                group["lr"] = learning_rate(updates - 1, cfg)
            metrics = mean_of(notes) | {"student_norm": descend(optimizers["student"], cfg.clip)}
            if finite.check(step, "student", metrics["student_norm"], batches, **metrics):
                ema.update(learning["student"])
                metrics |= health.update(mean_over_ranks(mean_of(looks)))

        # The critic learns the velocity field of what the student just made: several updates for the student's one.
        errors = []
        for _ in range(cfg.critic_steps):
            notes, by_sigma = zip(*(critic_gradients(nets, recipe, clip, share) for clip in clips))
            errors += by_sigma
            norms = {name: descend(optimizers[name], cfg.clip) for name in learning if name != "student"}
            for name, norm in norms.items():
                finite.check(step, name, norm, batches, **mean_of(notes))
            metrics |= mean_of(notes) | {f"{name}_norm": norm for name, norm in norms.items()}
        metrics |= critic_by_sigma(errors)

        better = False
        if learns and cfg.validate and updates % cfg.validate == 0:
            with averaged(learning["student"], ema), nets.using("student"):
                metrics |= figures(sampler, coder, cfg.preview)
                if rank() == 0 or layout.together:
                    side_by_side(run.folder / f"validation-{updates:06d}.mp4", coder, shown, sampler, nets)
            better = health.improves(metrics["val_frechet"])
        if device.type == "cuda":
            metrics["peak_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
        run.log(step, student_updates=updates, critic_updates=(step + 1) * cfg.critic_steps,
                rollouts=(step + 1) * cfg.accumulate, skipped=finite.total, **metrics)

        sick = cfg.health and health.outside >= cfg.patience
        if cfg.health and health.outside == 1 and rank() == 0:
            run.bar.write(f"warning, update {updates}: {'; '.join(health.complaints())}")
        due = run.due(step + 1, last, cfg.save_every) or sick
        if cfg.teacher == "random":             # noise is not worth a file, but for who asks by a signal
            due = run.asked
        for folder in [run.folder] * bool(due) + [best] * better:
            if cfg.teacher != "random":         # first: a complete checkpoint never lacks its weights
                folder.mkdir(exist_ok=True)
                notes = run.header(updates=updates)
                save(models[1], folder / "student.safetensors", weights=weights(ema.average), **notes)
                if cfg.tune == "lora":
                    save(models[1], folder / "adapter.safetensors", weights=ema.average, alpha=cfg.rank, **notes)
                if sick and rank() == 0:
                    curves(run.folder)
            save_checkpoint(folder, step + 1, *state, keep=1 if folder == best else cfg.keep)
        if due:
            run.leave_if_asked(step + 1)
        if sick:
            fail(f"for {cfg.patience} updates the student has been unlike real data: {'; '.join(health.complaints())}. "
                 f"All is saved in {run.folder}; lower --lr or change the terms, or go on with --health 0")
    if rank() == 0:
        curves(run.folder)
    if cfg.preview and (rank() == 0 or layout.together):
        finish(cfg, run, coder, models[0], recipe.guidance, nets, layout)
    shutdown()


def finish(cfg, run, coder, teacher, guidance, nets, layout):
    """The table and a side-by-side video, made from the weights that were saved."""
    student = load(cfg.backbone, run.folder / "student.safetensors", coder.device,
                   prepare=lambda model: layout.place(qat.apply(model, cfg.quant)))
    rows = samplers_of(teacher, [student], guidance, few=cfg.denoise)
    with nets.using(None):
        final_table(run.folder, coder, rows, cfg.preview, not cfg.teacher and guidance == teacher.spec.guidance)
    side_by_side(run.folder / "compare.mp4", coder, rows[0], rows[2], nets)
    if rank() == 0:
        print(f"\nwrote {run.folder}: student.safetensors, compare.mp4, preview.json, curves.png, log.jsonl")


if __name__ == "__main__":
    main(parse(Config, dry_run=lambda cfg: dry_run(2, cfg)))
