"""History compression: the clean past of a long rollout as a bounded number of tokens in front of every chunk.

What turns frames into tokens starts as the backbone's own patch embedding of the averaged latents, so an untrained
compressor is the mean of what it stands for. Which frames become one token is planned in scales.py, what a running
rollout keeps of its past is in history.py. Parameters are `compress.*` in checkpoints.
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import gathered
from memory import EMPTY, Memory
from scales import FINE, LADDER, SIZES, WHOLE, Segment, places, plan

WIDEST = 4                          # patches a kernel spans (8 of Wan2.2's: 300 M weights); what is coarser is averaged
PATCHIFY = {"wan": "patch_embedding", "hunyuan": "img_in.proj", "ltx": "patchify_proj"}
# PackForcing's cells in patches: 8 frames of 64 x 64 pixels; as many as four frames of the tiny world can bear
MID = {"wan2.1-1.3b": (2, 4, 4), "wan2.2-5b": (2, 2, 2), "hunyuan1.5-8b": (2, 4, 4), "ltx2.3-22b": (1, 2, 2),
       "tiny": (2, 2, 2), "small": (2, 2, 2), "base": (2, 2, 2)}
CHOICES = ("affinity", "recency", "fov")


@dataclass(frozen=True)
class Settings:
    """How a network remembers: saved with its weights, for it must be used as it was trained."""
    kind: str = "framepack"         # see SIZES
    sink: int = 1                   # first latent frames that stay whole
    recent: int = 1                 # latest latent frames that do
    chunk: int = 4                  # latent frames of a PackForcing block
    mid: tuple = (2, 4, 4)          # patches of its cells
    top: int = 16                   # blocks that are shown
    choose: str = "affinity"        # by affinity, recency or fov
    attention: str = "joint"        # joint: history sees the chunk; self, segment: it does not, and is reusable
    near: int = 8                   # frames whose distance in time is kept as it is
    far: int = 20                   # places on the time axis for all older ones

    def __post_init__(self):
        if self.choose not in CHOICES or self.attention not in ("joint", "self", "segment"):
            raise ValueError(f"blocks are chosen by {', '.join(CHOICES)}, attention is joint, self or segment; "
                             f"got '{self.choose}', '{self.attention}'")
        self.plan(0)                # its errors

    @classmethod
    def of(cls, spec, kind, recent=0, **fields):
        """For a backbone: sizes that fit the window it was trained on; `recent` of 0 is the kind's own."""
        if kind not in SIZES:
            raise ValueError(f"unknown history '{kind}'; choose {', '.join(SIZES)}")
        if (recent and kind in ("none", "pyramid")) or ("choose" in fields and kind != "packforcing"):
            raise ValueError(f"leave out --{'recent' if recent else 'choose'}: it means nothing to history {kind}")
        K, seen = spec.chunk, spec.window - spec.chunk
        sink, own = {"window": (1, seen - 1), "packforcing": (min(2 * K, seen - K), K)}.get(kind, SIZES[kind])
        return cls(kind, sink, recent or own, K, MID[spec.name], near=max(1, seen // 2), far=spec.window, **fields)

    @classmethod
    def read(cls, note):
        """From the text that `str` makes, as it is in the header of a checkpoint."""
        values = json.loads(note)
        return cls(**{**values, "mid": tuple(values["mid"])})

    def __str__(self):
        return json.dumps(asdict(self))

    @property
    def dense(self):
        return self.kind == "packforcing"

    def plan(self, frames, blocks=None):
        return plan(self.kind, frames, self.sink, self.recent, self.chunk, self.mid, blocks)

    def levels(self):
        """Levels that need a kernel, finest first; the last one also takes the tail."""
        scales = [k for k, _ in LADDER]
        return {"framepack": [(k,) * 3 for k in scales], "f1": [(k,) * 3 for k in scales[:2]],
                "pyramid": [*((1, s, s) for s in scales), (2, 16, 16)], "packforcing": [self.mid]}.get(self.kind, [])


@dataclass(frozen=True)
class Past:
    """What lies before the frames that a network is given, for that network's own compressor to encode.

    `latents`: of each segment [B, C, end - start, H, W], of a tail its mean [B, C, 1, 1, 1]. Frame `start` is the first
    that the network is given as it is, frame `now` the first of the chunk. In a rollout, `kept` is for what networks of
    fixed weights make of it without gradient, for all steps of the chunk; `before` is that of the chunk before."""
    segments: tuple[Segment, ...]
    latents: tuple[torch.Tensor, ...]
    start: int
    now: int
    kept: dict | None = None
    before: dict = field(default_factory=dict)

    def reusable(self, settings):
        """Whether keys and values of history serve for all steps of a chunk."""
        return self.kept is not None and settings.attention != "joint" and not torch.is_grad_enabled()


class Detail(nn.Module):
    """PackForcing's second branch, on the latents of one block: what their mean has lost. Starts at zero.

    Convolutions that halve time first, then height and width, as often as the kernel (frames, rows, columns) asks."""

    def __init__(self, channels, dim, kernel):
        super().__init__()
        halve, width, self.layers = [int(math.log2(n)) for n in kernel], 64, nn.ModuleList()
        conv = lambda a, b, stride: nn.Conv3d(a, b, 3, stride, 1, padding_mode="replicate")
        self.layers.append(conv(channels, width, 1))
        self.layers.extend(conv(width, width, (2, 1, 1)) for _ in range(halve[0]))
        for _ in range(halve[1]):
            self.layers.append(conv(width, min(2 * width, 512), (1, 2, 2)))
            width = min(2 * width, 512)
        self.out = nn.Conv3d(width, dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):                               # [n, C, t, H, W], whole kernels
        for layer in self.layers:
            x = F.silu(layer(x))
        return rearrange(self.out(x), "n d t h w -> n (t h w) d")


def own_kernel(backbone):
    """Weight [D, channels, t, h, w] and bias [D] of a backbone's patch embedding, a convolution or (LTX) a linear."""
    layer, patch = backbone.get_submodule(PATCHIFY[backbone.spec.arch]), backbone.spec.patch
    weight, bias = (gathered(p) for p in (layer.weight, layer.bias))
    return weight.unflatten(1, (-1, *patch)) if weight.ndim == 2 else weight, bias


def whole(x, sides):
    """x [n, C, t, H, W], its last frames, rows and columns repeated up to multiples of `sides`; zeros would darken."""
    missing = [-n % side for n, side in zip(x.shape[2:], sides)]
    return F.pad(x, [n for side in reversed(missing) for n in (0, side)], "replicate") if any(missing) else x


def patches(x, weight, bias):
    """The convolution whose stride is its kernel, as tokens [n, t h w, D]."""
    _, _, t, q, r = weight.shape
    x = rearrange(x, "n c (a t) (h q) (w r) -> n (a h w) (c t q r)", t=t, q=q, r=r)
    return F.linear(x, weight.flatten(1), bias)


def stretch(weight, times):
    """weight [D, C, t, h, w] with each tap repeated in place so many times along each axis."""
    for axis, n in enumerate(times, 2):
        weight = weight.repeat_interleave(n, axis)
    return weight


class HistoryMemory(nn.Module):
    """The compressor of a backbone: a kernel for each level, and how much of the past is shown.

    A kernel begins as the backbone's patch embedding of the latents' means: each weight repeated, divided by how often
    (FramePack, section 3.2; weights that are interpolated, without a division, make old frames louder than new ones).
    """

    def __init__(self, settings, backbone):
        super().__init__()
        self.settings, self.patch = settings, backbone.spec.patch
        weight, bias = own_kernel(backbone)                                             # [D, channels, t, h, w], [D]
        self.kernels = nn.ModuleDict()
        for level in settings.levels():
            spans = [min(n, WIDEST) for n in level]
            sides = [n * p for n, p in zip(spans, self.patch)]
            with weight.device:
                kernel = nn.Conv3d(weight.shape[1], len(weight), sides, sides)
            with torch.no_grad():
                kernel.weight.copy_(stretch(weight, spans) / math.prod(spans))
                kernel.bias.copy_(bias)
            self.kernels[name_of(level)] = kernel
        if settings.kind == "packforcing":
            with weight.device:
                self.detail = Detail(weight.shape[1], len(weight), [n * p for n, p in zip(settings.mid, self.patch)])

    def forward(self, backbone, past, frames):
        """The `Memory` of a `Past` and the places on the time axis of the `frames` frames from its `start` on."""
        if past.kept is None or torch.is_grad_enabled():
            memory, place = self.remember(backbone, past)
        elif self in past.kept:
            memory, place = past.kept[self]
        else:
            memory, place = past.kept[self] = self.remember(backbone, past)
        return memory, place + torch.arange(frames, dtype=torch.float64, device=memory.tokens.device)

    def remember(self, backbone, past):
        """The `Memory` of a `Past`, and where on the time axis its frame `start` is."""
        s, (_, q, r), clean = self.settings, self.patch, past.now - past.start
        if not past.segments:
            return replace(EMPTY, mode=s.attention, clean=clean), 0.0
        alike, out = lambda pair: (pair[0].level, pair[1].shape[2], pair[0].start == 0), []
        for (level, _, first), group in groupby(zip(past.segments, past.latents), alike):
            x = torch.stack([latents for _, latents in group], 1)                       # [B, m, C, t, H, W]
            y = self.embed(backbone, level, x.flatten(0, 1), first)                     # [B * m, n, D]
            out.append(y.unflatten(0, x.shape[:2]).flatten(1, 2))                       # [B, m * n, D]
        H, W = max(latents.shape[3:] for latents in past.latents)
        centres, bounds, ids, place = places(past.segments, (H // q, W // r), past.now, past.start,
                                             s.near, s.far, s.dense)
        return Memory(torch.cat(out, 1), centres, bounds, ids, s.attention, clean), place

    def embed(self, backbone, level, x, first):
        """Tokens [n, tokens, D] of latents `x` [n, C, t, H, W] at a level; `first`: they begin with the video's first.

        A tail, whose mean is a single pixel, is taken by the coarsest kernel."""
        if level == FINE:
            return backbone.embed(x, 0 if first else 1).flatten(1, 2)
        kernel = self.kernels[name_of(level)] if level[1] < WHOLE else [*self.kernels.values()][-1]
        x = backbone.inputs(x, x.new_zeros(x.shape[:3:2]), {}, first)                   # [n, channels, t, H, W]
        if level[1] == WHOLE:
            return patches(x.expand(*x.shape[:2], *kernel.kernel_size), kernel.weight, kernel.bias)
        x = whole(x, [n * p for n, p in zip(level, self.patch)])
        pool = [n // min(n, WIDEST) for n in level]
        y = patches(F.avg_pool3d(x, pool) if max(pool) > 1 else x, kernel.weight, kernel.bias)
        return y + self.detail(x) if self.settings.kind == "packforcing" else y


def name_of(level):
    return "x".join(map(str, level))


def build(kind, backbone, **fields):
    """The `HistoryMemory` of a kind for a backbone; fields of `Settings` override what fits it."""
    return HistoryMemory(Settings.of(backbone.spec, kind, **fields), backbone)


def attach(backbone, settings):
    """Give `backbone` the compressor of `settings` (None: leave it without), as `backbone.compress`; kernels that it
    has are kept. New ones begin as means."""
    if settings is not None:
        old, backbone.compress = backbone.compress, HistoryMemory(settings, backbone)
        if old is not None and old.settings.levels() == settings.levels() and old.settings.kind == settings.kind:
            backbone.compress.load_state_dict(old.state_dict(), assign=True)
    return backbone
