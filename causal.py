"""The causal baseline: the same network, block-causal, with a K/V cache over clean frames.

CausVid (arXiv:2412.07772), Self Forcing (arXiv:2506.08009) and minWM go this way: a block of frames attends to itself
and to clean blocks before it, never to later ones, so that the keys and values of history are computed once. A pass
over a finished Wan backbone: only its self-attention changes, and no weight. What the bidirectional rollout does
better and what it costs more is measured against this (train_causal.py, evaluate.py --causal).
"""

from dataclasses import replace
from functools import partial

import torch

from block import attention
from common import autocast
from control import Condition, Control
from flow import add_noise, draw_sigma, flow_loss
from rollout import few_step


def blocks(frames, chunk):
    """(start, stop) of the blocks of a clip: whole chunks, behind the odd first frames if there are any."""
    first = frames % chunk
    return [(0, first)] * bool(first) + [(s, s + chunk) for s in range(first, frames, chunk)]


def forcing_mask(frames, chunk, past):
    """Which of [clean | noisy] frames sees which: bool [2 * frames, 2 * frames].

    A clean block sees itself and clean frames up to `past` before it; a noisy block sees itself and the same frames.
    """
    sees = torch.zeros(2 * frames, 2 * frames, dtype=torch.bool)
    for s, e in blocks(frames, chunk):
        sees[s:e, max(0, s - past):e] = True
        sees[frames + s:frames + e, max(0, s - past):s] = True
        sees[frames + s:frames + e, frames + s:frames + e] = True
    return sees


class Causal:
    """The callable (x, sigma, condition) -> velocity of new frames x [B, C, T, H, W] behind those it remembers.

    It changes the self-attention of `model` in place: the model is causal from then on, and this is the way to run it.
    """

    def __init__(self, model):
        kinds = {*(model.control.kinds if model.control else ())}
        if model.spec.arch != "wan" or not kinds or kinds - {"adaln", "prope"}:
            raise ValueError("the causal baseline is a Wan backbone with control adaln or prope, which tell each frame "
                             f"of itself; {model.spec.name} has {'+'.join(sorted(kinds)) or None}")
        self.model, self.spec, self.device = model, model.spec, next(model.parameters()).device
        self.kept = 1 + ("prope" in kinds)              # caches of a block: PRoPE's attention has keys of its own
        self.reset(self.spec.window - self.spec.chunk)
        for i, block in enumerate(model.blocks):
            block.attend = partial(self.attend, i)

    def attend(self, i, q, k, v, mask=None, shared=0):      # [B, heads, N, d], positions turned
        """What block i calls instead of attention: new tokens also see those remembered."""
        caches = self.cache[i]
        known = caches.pop(0)                           # its caches take turns, as its attentions do
        if known is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(known, (k, v)))
        if self.writing:
            keep = self.past * (q.shape[2] // self.writing)                             # tokens of `past` frames
            known = k[:, :, -keep:], v[:, :, -keep:]
        caches.append(known)
        return attention(q, k, v, self.mask)

    def run(self, x, sigma, condition, frames):
        with autocast(self.device):
            return self.model(x, sigma, condition.text, condition.control, frames=frames)

    def reset(self, past):
        """Forget all frames; of those to come, the latest `past` are remembered."""
        self.past, self.seen, self.writing, self.mask = past, 0, 0, None
        self.cache = [[None] * self.kept for _ in range(self.spec.layers)]

    def __call__(self, x, sigma, condition):
        return self.run(x, sigma, condition, self.seen + torch.arange(x.shape[2], device=x.device))

    @torch.no_grad()
    def remember(self, x, condition):
        """Keep the keys and values of the clean block x [B, C, T, H, W]."""
        self.writing = x.shape[2]
        self(x, torch.zeros(x.shape[0], x.shape[2], device=x.device), condition)
        self.seen, self.writing = self.seen + x.shape[2], 0

    def forced(self, x0, x_t, sigma, condition):
        """Teacher forcing: velocity of x_t [B, C, T, H, W] at levels sigma [B, T], each block behind the clean blocks
        of x0 before it, in one masked forward over both."""
        T, (_, q, r) = x0.shape[2], self.spec.patch
        L = x0.shape[3] // q * (x0.shape[4] // r)
        self.reset(self.spec.window - self.spec.chunk)                                  # as the bidirectional history
        mask = forcing_mask(T, self.spec.chunk, self.past).to(x0.device)
        self.mask = mask.repeat_interleave(L, 0).repeat_interleave(L, 1)                # [2*T*L, 2*T*L]
        doubled = {name: torch.cat([x, x], 1) for name, x in vars(condition.control).items() if x is not None}
        twice = Condition(condition.text, Control(**doubled))
        levels = torch.cat([torch.zeros_like(sigma), sigma], 1)
        v = self.run(torch.cat([x0, x_t], 2), levels, twice, torch.arange(T, device=x0.device).repeat(2))[:, :, T:]
        self.mask = None
        return v


def forcing_loss(net, x0, condition):
    """Flow matching of every block behind the true ones before it; one noise level per block and clip."""
    parts = [draw_sigma((len(x0), 1), net.spec.shift, device=x0.device).expand(-1, e - s)
             for s, e in blocks(x0.shape[2], net.spec.chunk)]
    sigma, noise = torch.cat(parts, 1), torch.randn_like(x0)                            # [B, T]
    return flow_loss(net.forced(x0, add_noise(x0, noise, sigma), sigma, condition), x0, noise)


def told(condition, start, stop):
    """As `Condition.frames`, but cameras stay relative to the clip's first frame, as those of keys that are kept."""
    part, c2w = condition.frames(start, stop), condition.control.c2w
    return part if c2w is None else replace(part, control=replace(part.control, c2w=c2w[:, start:stop]))


def chunks(net, condition, prefix, frames, sigmas, chunk, window, noise, sampler, options_at):
    """`rollout.chunks` with a cache instead of a history that is computed again at every step."""
    (B, C, n, H, W), samples, clean = prefix.shape, [prefix], [prefix]
    net.reset(window - chunk)
    for s, e in blocks(n, chunk):
        net.remember(prefix[:, :, s:e], told(condition, s, e))
    while n < frames:
        K = min(chunk, frames - n)
        part, nothing = told(condition, n, n + K), prefix[:, :, :0]
        sample, finished = sampler(net, nothing, (B, C, K, H, W), sigmas, part, noise, **options_at(n + K))
        n += K
        if n < frames:
            net.remember(finished, part)
        samples.append(sample)
        clean.append(finished)
    return torch.cat(samples, 2), torch.cat(clean, 2)                                   # each [B, C, frames, H, W]


def rollout(net, condition, prefix, frames, sigmas, chunk, window, noise, sampler=few_step, model=None, **options):
    """As `rollout.rollout`, of a `Causal` network with the same history: the latest `window - chunk` frames."""
    return chunks(net, condition, prefix, frames, sigmas, chunk, window, noise, sampler, lambda n: options)[0]


def self_rollout(net, condition, prefix, plan, spec, sigmas, noise, grad_step, complete=True):
    """As `selfforcing.self_rollout`: (samples, finished), both [B, C, plan.frames, H, W]."""
    in_window = {"grad_step": grad_step, "complete": complete}
    return chunks(net, condition, prefix, plan.frames, sigmas, spec.chunk, spec.window, noise, few_step,
                  lambda n: in_window if n > plan.first else {})
