"""The rollouts that stage 2 trains on: how they start, how long they are, which part of them the loss sees.

The student sees its own past, as when it is played: Self Forcing (arXiv:2506.08009).
"""

from dataclasses import dataclass

import torch

from history import History
from rollout import chunks, few_step


@dataclass(frozen=True)
class Plan:
    """A training rollout: `start` real frames, then whole chunks up to `frames`; the loss sees frames `first` on."""
    start: int
    frames: int
    first: int

    @property
    def made(self):
        """Generated frames in the loss window."""
        return self.frames - max(self.start, self.first)

    def mask(self, B, device, begin=None):
        """[B, T] of frames `begin` (default: `first`) on: which of them are generated and in the loss window."""
        frames = torch.arange(self.first if begin is None else begin, self.frames, device=device)
        return (frames >= max(self.start, self.first)).expand(B, -1)


def draw_plan(shared, spec, frames, t2v, i2v, past=0, most=None, short=0.0):
    """Start, length and loss window of a rollout. Ranks that draw from equal `shared` draw the same.

    It starts from nothing (t2v), from one real frame (i2v) or from real chunks: one, or up to `past` frames of them, a
    stored past. Chunks follow as `frames` has room for, a start of at most one chunk included; at most `most`, and a
    share `short` of rollouts has fewer. When they outgrow the teacher's window, the loss is on a random window of them
    that ends with a chunk, and the rollout ends there: what comes later cannot change it.
    """
    u, K = shared.random(), spec.chunk
    start = n = 0 if u < t2v else 1 if u < t2v + i2v else K
    if n == K and past > K:
        start = K * shared.randint(1, past // K)
    M = min((frames - n) // K, most or frames)
    if short and shared.random() < short:
        M = shared.randint(1, M)
    fit = (spec.window - n) // K                                                        # chunks that one window holds
    end = start + K * (shared.randint(fit, M) if M > fit else M)
    return Plan(start, end, max(0, end - spec.window))


def self_rollout(velocity, condition, prefix, plan, spec, sigmas, noise, grad_step, complete=True, model=None):
    """The rollout that stage 2 trains on (Self Forcing): (samples, finished), both [B, C, plan.frames, H, W].

    Within the loss window `samples` holds the x0 of step `grad_step` with its graph; before it, as in all of
    `finished`, what inference would make.
    """
    in_window = {"grad_step": grad_step, "complete": complete}
    history = History(prefix, spec.window - spec.chunk, model)
    made = chunks(velocity, condition, history, plan.frames, sigmas, spec.chunk, noise, few_step,
                  lambda n: in_window if n > plan.first else {})
    return tuple(torch.cat([prefix, each], 2) for each in made)
