"""What a running rollout keeps of its past, at a size that does not grow, and what of it the next chunk is shown.

FramePack keeps the latents that its ladder reaches, some 360 frames, and one mean of all that is older. PackForcing
keeps its blocks as latents on the host, at most 0.2 MB a frame at 480x832, and of each a vector to choose it by.
"""

import copy
from typing import NamedTuple

import torch

from common import autocast
from compress import Past
from inject import Signal
from scales import part

MARGIN, SWAPS = 0.1, 4              # by which share of the scores' spread a new block must win; exchanges a chunk
DEPTHS = (0.5, 1.0, 2.0, 4.0)       # where fields of view are compared, in units of the cameras


# ---- Which blocks of a long past are shown ---------------------------------------------------------------------------

def select(scores, shown, top, margin=MARGIN, swaps=SWAPS):
    """Numbers of the `top` blocks to show, oldest first, by `scores` [m], the newer of equal ones first.

    Blocks that were `shown` stay unless another beats the weakest of them by `margin` of the spread of all scores, and
    at most `swaps` go: what flickers cannot be remembered.
    """
    best = (len(scores) - 1 - scores.flip(0).argsort(descending=True, stable=True)).tolist()
    chosen, fresh = ([i for i in best if (i in shown) == old] for old in (True, False))
    room = max(0, top - len(chosen))
    chosen, fresh = chosen[:top] + fresh[:room], fresh[room:]
    step = margin * float(scores.max() - scores.min())
    for new in fresh[:swaps]:
        weakest = min(chosen, key=lambda i: (scores[i], i))
        if scores[new] <= scores[weakest] + step:
            break
        chosen[chosen.index(weakest)] = new
    return sorted(chosen)


def content(model, latents):
    """(queries, keys) [B, D] of clean `latents` [B, C, T, H, W] in the first block, without positions, summed up.

    PackForcing scores a block by the sum of q k over all pairs of tokens and heads (arXiv:2603.25730): the product of
    the sums, so a vector stands for a block. Queries are those of clean recent frames; noise would ask for nothing.
    """
    block, B = getattr(model, model.block_list)[0], len(latents)
    with autocast(latents.device):
        x = model.embed(latents, 1).flatten(1, 2)[:, None]                              # [B, 1, N, D]
        group = model.group("memory", x, latents.new_zeros(B, 1), latents.new_zeros(B, 0, 1), Signal(), (), None)
        q, k, *_ = block.before(group)                                                  # [B, heads, N, d]
    return [y.float().sum(2).flatten(1) for y in (q, k)]


def overlap(seen, c2w, K):
    """[m] which share of what cameras c2w [B, n, 4, 4], K [B, 3, 3] see is in view of blocks `seen` [B, m, k, 4, 4]."""
    grid = [(torch.arange(n, device=c2w.device) + 0.5) / n for n in (6, 8)]
    y, x = torch.meshgrid(*grid, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], -1).reshape(-1, 3)                 # [P, 3] on the image, 0..1
    rays = pixels @ K.inverse().mT                                                      # [B, P, 3]
    points = torch.cat([rays * depth for depth in DEPTHS], 1)                           # [B, 4P, 3]
    points = points[:, None] @ c2w[..., :3, :3].mT + c2w[..., None, :3, 3]              # [B, n, 4P, 3]
    points = points.flatten(1, 2)[:, None, None]                                        # [B, 1, 1, n * 4P, 3]
    local = (points - seen[..., None, :3, 3]) @ seen[..., :3, :3] @ K[:, None, None].mT
    at = local[..., :2] / local[..., 2:].clamp_min(1e-6)
    inside = (local[..., 2] > 0) & (at > 0).all(-1) & (at < 1).all(-1)                  # [B, m, k, n * 4P]
    return inside.any(2).float().mean((0, 2))


# ---- The state of a rollout ------------------------------------------------------------------------------------------

def settings_of(model):
    """Those of a network's compressor; None if there is none."""
    return model.compress.settings if model is not None and model.compress is not None else None


class Seen(NamedTuple):
    """What is in front of a chunk: clean `latents` [B, C, m, H, W] from frame `start` on, and the `past` before."""
    latents: torch.Tensor
    start: int
    past: Past | None


class History:
    """The `n` clean frames of a rollout, as far as they are ever looked at again.

    Without a compressor the latest `most` frames; with `model.compress`, what its plan needs. `store` is where
    PackForcing's blocks lie, by default where the latents are.
    """

    def __init__(self, latents, most, model=None, store=None):
        self.model, self.most = model, most
        self.settings = settings_of(model)
        self.store = store or latents.device
        self.n, self.at = 0, 0                          # frames so far; number of the first in `self.latents`
        self.latents = self.first = latents[:, :, :0]
        self.blocks, self.keys, self.shown = [], [], set()
        self.sum, self.summed, self.kept = 0.0, 0, {}   # of frames that are older than the ladder, and how many
        self.append(latents)

    def copy(self, model=None):
        """To go back to, or for another `model` to go on from: tensors are never written into, so they are shared."""
        other = copy.copy(self)
        if model is not None and model is not self.model:
            if settings_of(model) != self.settings:
                raise ValueError(f"this history was kept for {self.settings or 'no compressor'}, "
                                 f"not for {settings_of(model) or 'none'}")
            other.model, other.kept = model, {}
        other.blocks, other.keys, other.shown = list(self.blocks), list(self.keys), set(self.shown)
        return other

    @property
    def by_view(self):
        """Whether the cameras of all frames are needed."""
        return self.settings is not None and self.settings.kind == "packforcing" and self.settings.choose == "fov"

    def begin(self):
        """The first frame that the next chunk is given as it is."""
        return max(0, self.n - self.most) if self.settings is None else part(self.plan(()))[0]

    def plan(self, blocks):
        return self.settings.plan(self.n, blocks)

    @torch.no_grad()
    def append(self, latents):
        """The clean latents [B, C, k, H, W] of the frames that follow."""
        self.latents, self.n = torch.cat([self.latents, latents], 2), self.n + latents.shape[2]
        keep = self.begin()
        if self.settings is not None:
            missing = self.settings.sink - self.first.shape[2]
            if missing > 0 and self.at == 0:
                self.first = self.latents[:, :, :self.settings.sink]
            needed = [s.start for s in self.plan(()) if s.role not in ("sink", "tail")]
            keep = min([keep, *needed])
            self.archive()
            gone = self.latents[:, :, :keep - self.at][:, :, max(0, self.settings.sink - self.at):]
            if gone.shape[2]:
                self.sum = self.sum + gone.mean((3, 4), keepdim=True).sum(2, keepdim=True)
                self.summed += gone.shape[2]
        self.latents, self.at = self.latents[:, :, keep - self.at:].clone(), keep

    def archive(self):
        """Store the PackForcing blocks that are whole and no longer recent."""
        K, sink = self.settings.chunk, self.settings.sink
        whole = max(0, self.n - sink - self.settings.recent) // K * (self.settings.kind == "packforcing")
        while len(self.blocks) < whole:
            start = sink + K * len(self.blocks) - self.at
            block = self.latents[:, :, start:start + K]
            self.blocks.append(block.to(self.store))
            if self.settings.choose == "affinity":
                self.keys.append(content(self.model, block)[1])

    @torch.no_grad()
    def view(self, frames, control=None, offset=0):
        """The `Seen` of the next chunk, of so many `frames`. `control` is that of the frames from number `offset` on up
        to its end; to choose by fov it has to be of all."""
        if self.settings is None:
            return Seen(self.latents, self.at, None)
        self.shown = self.choose(frames, control, offset)
        start, older = part(self.plan(self.shown))
        latents = tuple(self.of(segment) for segment in older)
        before, self.kept = self.kept, {}
        past = Past(tuple(older), latents, start, self.n, self.kept, before)
        return Seen(self.latents[:, :, start - self.at:], start, past)

    def of(self, segment):
        """The latents of a segment."""
        device = self.latents.device
        if segment.role == "sink":
            return self.first[:, :, segment.start:segment.end]
        if segment.role == "tail":
            return self.sum / self.summed
        if self.settings.kind == "packforcing":
            return self.blocks[(segment.start - self.settings.sink) // self.settings.chunk].to(device)
        return self.latents[:, :, segment.start - self.at:segment.end - self.at]

    def choose(self, frames, control, offset):
        """Numbers of the PackForcing blocks that are shown to the next chunk."""
        s, m = self.settings, len(self.blocks)
        if m <= s.top or s.choose == "recency":
            return set(range(max(0, m - s.top), m))
        if s.choose == "affinity":
            query = content(self.model, self.latents[:, :, -s.chunk:])[0]               # [B, D]
            scores = (torch.stack(self.keys, 1) * query[:, None]).mean((0, 2))          # [m]
        else:
            if control is None or control.c2w is None or offset:
                raise ValueError("to choose blocks by fov, the cameras of all frames have to be told")
            seen = control.c2w[:, s.sink:s.sink + m * s.chunk].unflatten(1, (m, s.chunk))
            scores = overlap(seen, control.c2w[:, self.n:self.n + frames], control.K[:, self.n])
        return set(select(scores.cpu(), self.shown, s.top))
