"""What an update runs: how often each network, on how many frames, what of it differentiated; its operations.

Nothing is written down a second time: stage 2's own rollout and losses run here, on clips of one pixel, with networks
that only count. How long it takes says clock.py.
"""

from collections import Counter, defaultdict
from contextlib import nullcontext
from typing import NamedTuple

import torch

from control import Condition, Control
from dmd import Clip, Networks, Recipe, critic_gradients, student_gradients
from flow import schedule
from model import Spec, flops
from selfforcing import draw_plan, self_rollout


class Call:
    """One forward of a network: on how many latent frames, whether a graph was kept, which gradients were asked for;
    whether graphs of earlier forwards waited with it, so that one backward pass adds up the gradients of all."""

    def __init__(self, who, frames):
        self.who, self.frames, self.graph, self.asked, self.joins = who, frames, False, set(), False


class Seen(torch.autograd.Function):
    """The identity; its backward notes that the gradient of `what` was asked for."""

    @staticmethod
    def forward(ctx, x, call, what):
        ctx.call, ctx.what = call, what
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.call.asked.add(ctx.what)
        return g, None, None


class Tally:
    """Networks that only count. `calls` in order; `alive` {who: (frames, frames of the last call)}: the graphs that
    waited for their backward pass at the worst moment."""

    def __init__(self):
        self.calls, self.alive = [], defaultdict(lambda: (0, 0))

    def network(self, who, learns):
        weight = torch.ones((), requires_grad=learns)

        def velocity(x, sigma, condition):
            self.calls.append(call := Call(who, x.shape[2]))
            v = Seen.apply(x, call, "x") * Seen.apply(weight, call, "weights")
            if v.requires_grad:
                call.graph = True
                waiting = [c.frames for c in self.calls if c.who == who and c.graph and not c.asked]
                call.joins = len(waiting) > 1
                self.alive[who] = max(self.alive[who], (sum(waiting), call.frames))
            return v
        return velocity


def stage1_calls(frames, accumulate=1):
    """The calls of one update of stage 1 on clips of so many latent frames."""
    tally = Tally()
    for _ in range(accumulate):
        tally.network("model", True)(torch.zeros(1, 1, frames, 1, 1), None, None).sum().backward()
    return tally


def stage2_calls(cfg, spec, shared):
    """The calls of one update of stage 2, all its critic updates included: the body of its loop."""
    tally, actions = Tally(), torch.zeros(1, cfg.frames + cfg.past, dtype=torch.long)
    teacher, student, critic = (tally.network(who, who != "teacher") for who in ("teacher", "student", "critic"))
    logits = lambda x, sigma, condition: critic(x, sigma, condition).mean((1, 3, 4))
    nets = Networks(teacher, student, critic, logits, lambda name: nullcontext(), student)
    recipe = Recipe(2.0, spec.shift, cfg.sigma_low, cfg.sigma_high, cfg.denoise, cfg.gan, cfg.teacher_fkl, cfg.real_fkl,
                    cfg.sft, cfg.quant_loss * (cfg.quant != "none"), cfg.quant_softmax)
    plan = draw_plan(shared, spec, cfg.frames, cfg.t2v, cfg.i2v, cfg.past, None, cfg.short)
    stop = plan.frames - plan.first - spec.chunk * shared.randrange(plan.made // spec.chunk)
    for _ in range(cfg.accumulate):
        x, condition = torch.randn(1, 1, plan.frames, 1, 1), Condition({}, Control(actions[:, :plan.frames]))
        x0, _ = self_rollout(student, condition, x[:, :, :plan.start], plan, spec,
                             schedule(cfg.denoise, spec.shift), torch.randn,
                             shared.randrange(1 if cfg.teacher_fkl else 0, cfg.denoise), cfg.complete)
        condition = condition.frames(plan.first, plan.frames)
        clip = Clip(x0[:, :, plan.first:], x[:, :, plan.first:], condition, condition.null({}), plan.mask(1, "cpu"))
        student_gradients(nets, recipe, clip, stop, spec.chunk)
        for _ in range(cfg.critic_steps):
            critic_gradients(nets, recipe, clip)
    return tally


# ---- What it takes ---------------------------------------------------------------------------------------------------

class Job(NamedTuple):
    """An update and where it runs: `batch` clips per GPU and pass, `tallies` one or several draws of what runs."""
    spec: Spec
    tallies: list
    batch: int = 1
    accumulate: int = 1
    gpus: int = 1
    shard: str = "ddp"
    replicas: int = 1
    sequence: int = 1
    trains: bool = True             # the weights themselves, not adapters or control on them
    compile: bool = True            # the blocks

    @property
    def shards(self):
        """GPUs that share one copy of the weights."""
        return self.gpus // self.replicas if self.shard == "fsdp" else 1


def passes(job, call, mode):
    """Operations of a call's forward and of its backward pass: linear, attention alone, attention that has a backward
    (of 2.5 forwards)."""
    kinds, share = flops(job.spec, call.frames, *job.spec.grid(*job.spec.size[1:])), job.batch / job.sequence
    linear, scores = share * kinds["linear"], share * (kinds["self_attention"] + kinds["text_attention"])
    asked, own = bool(call.asked), "weights" in call.asked and job.trains
    again = asked and mode != "none"
    return ({"linear": linear, "attention": scores * (not asked), "attention_train": scores * asked},
            {"linear": linear * (asked + own + again), "attention": scores * (again and mode == "full"),
             "attention_train": 2.5 * scores * asked})


def work(job, tally, mode):
    """Operations of one update on one GPU, by kind."""
    done = Counter(linear=0.0, attention=0.0, attention_train=0.0)
    for call in tally.calls:
        for part in passes(job, call, mode):
            done.update(part)
    return done
