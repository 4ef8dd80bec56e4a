"""What a running rollout keeps of its past, at a size that does not grow, and what of it the next chunk is shown.

FramePack keeps the latents that its ladder reaches, some 360 frames, and one mean of all that is older. PackForcing
keeps its blocks as latents on the host, at most 0.2 MB a frame at 480x832, and of each a vector to choose it by.
"""

import copy
import math
from dataclasses import replace
from typing import NamedTuple

import torch

from block import Group
from common import autocast
from compress import Past, Settings, attach
from inject import Signal
from scales import part, tokens

MARGIN, SWAPS = 0.1, 4              # by which share of the scores' spread a new block must win; exchanges a chunk
DEPTHS = (0.5, 1.0, 2.0, 4.0)       # where fields of view are compared, in units of the cameras
MOST = 32                           # blocks whose keys are made at once


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


def content(model, tokens):
    """(queries, keys) [B, D] of clean `tokens` [B, N, D] in the first block, without positions: their means.

    PackForcing scores a block by the sum of q k over all pairs of tokens and heads (arXiv:2603.25730): the product of
    the sums, so a vector stands for a block. Queries are those of clean recent frames; noise would ask for nothing.
    """
    B = len(tokens)
    x, _, told = model.tell(tokens[:, None], tokens.new_zeros(B, 1), tokens.new_zeros(B, 0, 1), Signal())
    q, k, *_ = getattr(model, model.block_list)[0].before(Group("memory", x, (), told=told))    # [B, heads, N, d]
    return [y.float().mean(2).flatten(1) for y in (q, k)]


def overlap(seen, c2w, K):
    """[m] which share of what cameras c2w [B, n, 4, 4], K [B, 3, 3] see is in view of blocks `seen` [B, m, k, 4, 4].

    All blocks are looked at, 10 000 points each: the one thing that a longer past makes dearer."""
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
                self.first = self.latents[:, :, :self.settings.sink].clone()             # a view would keep all alive
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
            self.blocks.append(block.to(self.store, torch.half, copy=True))             # latents are of order 1

    @torch.no_grad()
    def view(self, frames, control=None, offset=0):
        """The `Seen` of the next chunk, of so many `frames`. `control` is that of the frames from number `offset` on up
        to its end; to choose by fov it has to be of all."""
        if self.settings is None:
            return Seen(self.latents, self.at, None)
        self.shown = self.choose(frames, control, offset)
        start, older = part(self.plan(self.shown))
        latents = tuple(self.of(segment) for segment in older)
        before, self.kept = self.kept if self.settings.attention == "segment" else {}, {}
        past = Past(tuple(older), latents, start, self.n, self.kept, before)
        return Seen(self.latents[:, :, start - self.at:], start, past)

    def of(self, segment):
        """The latents of a segment."""
        if segment.role == "sink":
            return self.first[:, :, segment.start:segment.end]
        if segment.role == "tail":
            return self.sum / self.summed
        if self.settings.kind == "packforcing":
            return self.blocks[(segment.start - self.settings.sink) // self.settings.chunk].to(self.latents)
        return self.latents[:, :, segment.start - self.at:segment.end - self.at]

    def affinity(self):
        """[m] what the latest frames have in common with each block, whose key is made when it is first asked for."""
        s = self.settings
        with autocast(self.latents.device):
            while fresh := self.blocks[len(self.keys):][:MOST]:                         # few, unless the past was given
                x = torch.stack(fresh, 1).to(self.latents)                              # [B, new, C, K, H, W]
                keys = content(self.model, self.model.compress.embed(self.model, s.mid, x.flatten(0, 1), False))[1]
                self.keys += keys.unflatten(0, x.shape[:2]).unbind(1)                   # [B, D] each
            query, _ = content(self.model, self.model.embed(self.latents[:, :, -s.chunk:], 1).flatten(1, 2))
        return (torch.stack(self.keys, 1) * query[:, None]).mean((0, 2))

    def choose(self, frames, control, offset):
        """Numbers of the PackForcing blocks that are shown to the next chunk."""
        s, m = self.settings, len(self.blocks)
        if m <= s.top or s.choose == "recency":
            return set(range(max(0, m - s.top), m))
        if s.choose == "affinity":
            scores = self.model.within(self.affinity)
        else:
            if control is None or control.c2w is None or offset:
                raise ValueError("to choose blocks by fov, the cameras of all frames have to be told")
            seen = control.c2w[:, s.sink:s.sink + m * s.chunk].unflatten(1, (m, s.chunk))
            scores = overlap(seen, control.c2w[:, self.n:self.n + frames], control.K[:, self.n])
        return set(select(scores.cpu(), self.shown, s.top))


def identity(text):
    """Equal for texts of the same tensors in memory, as long as they are alive: guidance makes a new dict each time."""
    return tuple((name, x.data_ptr(), x.shape, x.stride()) for name, x in text.items() if torch.is_tensor(x))


def behind_cache(model, x, sigma, condition, who):
    """Velocity of the chunk at the end of x behind history that does not see it, zeros for the frames before: keys and
    values are made once, for `who` asks, and for each text with control or without: for each branch of guidance."""
    text, control, past = condition.text, condition.control, condition.past
    memory, frames = model.within(model.compress, model, past, x.shape[2])
    branch = who, control is None, identity(text)
    n = memory.clean
    if branch not in past.kept:
        own, (before, _) = control.frames(0, n) if control and n else None, past.before.pop(branch, (None, None))
        cache = model.within(model.prefill, x[:, :, :n], text, own, memory, frames[:n], before)
        past.kept[branch] = cache, text                 # which keeps the text alive, and its memory its own
    v = model(x[:, :, n:], sigma[:, n:], text, control, past.kept[branch][0], frames)
    return torch.cat([torch.zeros_like(x[:, :, :n]), v.to(x.dtype)], 2)


# ---- Training --------------------------------------------------------------------------------------------------------

def draw_past(shared, most, chunk, odd=0.0):
    """Frames before a training clip: whole chunks, up to `most` frames, log-uniform: each doubling of age is as likely,
    with the levels and plans that are new in it. A share `odd` has one more, like a start from one frame."""
    if not most:
        return 0
    chunks = int(math.exp(shared.random() * math.log(most // chunk + 1)) + 1e-9) - 1
    return chunk * chunks + (chunks > 0 and shared.random() < odd)


def clean_frames(model, frames):
    """How many of the latest of so many frames stay as they are in front of what follows."""
    settings = settings_of(model)
    return frames - part(settings.plan(frames, ()))[0] if settings else 0


def room(model, spec):
    """`spec` with a window that, with the frames that history leaves as they are, is no longer than before."""
    settings, K = settings_of(model), spec.chunk
    if settings is None or settings.kind == "none":
        return spec
    clean = max(clean_frames(model, frames) for frames in range(10 * K, 20 * K))
    return replace(spec, window=max(2 * K, spec.window - K * -(-clean // K)))


def behind(model, latents, first, control=None):
    """(start, past): what a network is given with frames `first` on of `latents`: those from `start` on, and a past."""
    if settings_of(model) is None or not first:
        return first, None
    _, start, past = History(latents[:, :, :first], 0, model).view(1, control)
    return start, replace(past, kept=None)


# ---- Settings on a command line --------------------------------------------------------------------------------------

def configure(model, history="", attention="", recent=0, choose=""):
    """Give `model` the compressor that is asked for; what is not is as in its weights."""
    given = {"attention": attention, "recent": recent, "choose": choose}
    given = {name: value for name, value in given.items() if value}
    if history:
        return attach(model, Settings.of(model.spec, history, **given))
    if given and model.compress is None:
        raise ValueError(f"--{' --'.join(given)}: these weights have no history; give --history too")
    return attach(model, replace(model.compress.settings, **given)) if given else model


def budget(model, start, labels):
    """What a rollout of so many labels behind `start` latent frames costs with the model's history, at native size."""
    spec, s, frames = model.spec, settings_of(model), start + labels - 1
    grid, K = spec.grid(*spec.size[1:]), spec.chunk
    frame = spec.channels * math.prod(n // m for n, m in zip(spec.size[1:], spec.stride[1:])) * 4   # bytes, fp32
    if s is None:
        most = spec.window - K
        return f"history: the latest {most} of {frames} frames, {most * grid[0] * grid[1]:,} tokens"
    blocks = lambda T: range(min(s.top, max(0, T - s.sink - s.recent) // s.chunk))
    plans = [s.plan(T, blocks(T)) for T in range(start, frames + 1, K)]
    most = max(tokens(segments, grid) for segments in plans)
    kept = sum(min(segment.end - segment.start, 1 if segment.role == "tail" else frames)
               for segment in plans[-1] if segment.role != "mid" or s.kind != "packforcing")
    text = (f"history {s.kind}, attention {s.attention}: of {frames} frames ({frames * grid[0] * grid[1]:,} tokens) a "
            f"chunk sees at most {most:,} tokens; {kept} latent frames are kept, {kept * frame / 2 ** 20:.1f} MiB")
    if s.kind == "packforcing":
        text += f", and on the host {max(0, frames - kept) * frame / 2 ** 21:.1f} MiB of blocks"
    if s.attention != "joint":
        twice = 1 + (s.attention == "segment")              # old ones are there while the new are put together
        text += f"; their keys and values take {twice * 4 * spec.dim * spec.layers * most / 2 ** 30:.2f} GiB in bf16"
    return text
