"""Injections: four ways of telling a video transformer what the actions or the cameras of a clip are.

    adaln    two tables, translation and rotation, added to the time embedding of each frame
    text     a camera sentence for each frame, next to the caption in cross-attention (BiWM, arXiv:2606.10135)
    plucker  the ray of every pixel, added to the patch tokens (CameraCtrl, arXiv:2404.02101)
    prope    a second attention in the cameras' relative geometry, beside each self-attention (PRoPE, arXiv:2507.10496)

Each has parameters that begin at zero in exactly one place, so an untrained one leaves every bit of the output as it
was and yet learns; `text` has none. They are `control.*` in checkpoints.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from camera import between, pluecker, projections

SENTENCES = tuple(f"Camera {move}. Camera {turn}." for move in (      # of the 81 labels
    "does not move", "moves forward", "moves backward", "moves right", "moves left", "moves forward-right",
    "moves forward-left", "moves backward-right", "moves backward-left") for turn in (
    "does not rotate", "pitches up", "pitches down", "yaws right", "yaws left", "pitches up and yaws right",
    "pitches up and yaws left", "pitches down and yaws right", "pitches down and yaws left"))


class Sentences(NamedTuple):
    """`text`: states [81, S, E] of the camera sentences, the label [B, T] of each frame, and which rows of its sentence
    are words, bool [B, T, S]."""
    states: torch.Tensor
    labels: torch.Tensor
    words: torch.Tensor

    def embed(self, function):
        return self._replace(states=function(self.states))

    def per_frame(self, function):
        """A sentence for each frame, for a `function` of states [B, T*S, E] that differs from sample to sample."""
        labels = torch.arange(self.labels.numel(), device=self.labels.device).view_as(self.labels)
        states = function(self.states[self.labels].flatten(1, 2)).unflatten(1, self.words.shape[1:])
        return Sentences(states.flatten(0, 1), labels, self.words)


class Branch(NamedTuple):
    """`prope` in one block: matrices [B, T, 4, 4] of queries, of keys and values, of the output; its projection."""
    query: torch.Tensor
    key: torch.Tensor
    out: torch.Tensor
    project: nn.Module

    def cut(self, asking, seen):
        """For queries of the frames `asking` and keys of the frames `seen`, each [start, stop)."""
        asking, seen = slice(*asking), slice(*seen)
        return Branch(self.query[:, asking], self.key[:, seen], self.out[:, asking], self.project)


class Signal(NamedTuple):
    """What one forward is told, by the place where it enters; the defaults change nothing."""
    time: torch.Tensor | float = 0.0        # [B, T, D], to be added to the time embedding of the frames
    tokens: torch.Tensor | float = 0.0      # [B, T, L, D], to be added to the patch tokens
    sentences: Sentences | None = None      # for `hear`, in every cross-attention
    branches: dict = {}                     # for `prope`: number of a block -> its Branch

    def frames(self, start, stop):
        """What the frames start..stop-1 are told; `branches` are of all frames and stay so (`Branch.cut`)."""
        part = lambda x: x[:, start:stop] if torch.is_tensor(x) else x
        said = self.sentences and Sentences(self.sentences.states, *(part(x) for x in self.sentences[1:]))
        return Signal(part(self.time), part(self.tokens), said, self.branches)


def hear(q, k, v, sentences, keys, attend):
    """Attention [B, heads, N, d], with `sentences` cross-attention in which a frame sees its own beside the caption.

    q [B, heads, T*L, d] of the frames; k, v [B, heads, N, d] of the caption, shared by them; `keys` makes keys and
    values [81, heads, S, d] of all sentences, once. No row of the caption makes room for a sentence.
    """
    if sentences is None:
        return attend(q, k, v)
    B, T, S = sentences.words.shape
    own = (y.to(v.dtype)[sentences.labels].flatten(0, 1) for y in keys(sentences.states))       # [B*T, heads, S, d]
    k, v = (torch.cat([repeat(y, "b h n d -> (b t) h n d", t=T), o], 2) for y, o in zip((k, v), own))
    mask = F.pad(sentences.words.flatten(0, 1), (k.shape[2] - S, 0), value=True)        # [B*T, N+S]
    y = attend(rearrange(q, "b h (t l) d -> (b t) h l d", t=T), k, v, mask[:, None, None])
    return rearrange(y, "(b t) h l d -> b h (t l) d", b=B)


def prope(q, k, v, branch, attend):
    """PRoPE (arXiv:2507.10496) beside a pretrained attention: what to add to its output, [B, T*L, D].

    q, k, v [B, heads, T*L, d] of the video tokens, before rotary positions: q -> P^T q, k -> P^-1 k, v -> P^-1 v and
    P on the result, four channels at a time. So frame i sees frame j through P_i P_j^-1, their relative geometry alone.
    Video attends to video: a key of text, which has no camera, would see P_i itself. P_i^T q and P_j^-1 k grow with the
    way from the first camera though their product does not: distances of order 1 (`Cameras.normalised`) suit bf16.
    """
    y = attend(*(turn(x, m).to(v.dtype) for x, m in ((q, branch.query), (k, branch.key), (v, branch.key))))
    return branch.project(rearrange(turn(y, branch.out).to(v.dtype), "b h n d -> b n (h d)"))     # [B, T*L, D]


def turn(x, matrix):
    """x [B, heads, T*L, d], each four channels multiplied by its frame's matrix [B, T, 4, 4], in fp32."""
    with torch.autocast(x.device.type, enabled=False):
        x = rearrange(x.float(), "b h (t l) (c i) -> b h t l c i", t=matrix.shape[1], i=4)
        columns = matrix.mT[:, None, :, None, None].unbind(-2)          # a sum, no matmul: the compiler fuses it
        y = sum(part[..., None] * column for part, column in zip(x.unbind(-1), columns))
    return rearrange(y, "b h t l c i -> b h (t l) (c i)")


class PlueckerAdapter(nn.Module):
    """`plucker`: the rays of all pixels and frames, folded onto the patch tokens (CameraCtrl, arXiv:2404.02101).

    Only the last layer begins at zero, so that it can learn: BiWM's public code zeroes those before it too.
    """

    BLOCK, WIDTH = 8, 256           # pixels that become channels, both ways; hidden width

    def __init__(self, spec):
        super().__init__()
        self.frames, self.side = spec.stride[0], [s * p for s, p in zip(spec.stride[1:], spec.patch[1:])]
        kernel = [n // self.BLOCK for n in self.side]
        self.conv = nn.Conv2d(6 * self.frames * self.BLOCK ** 2, self.WIDTH, kernel, kernel)
        self.out = zero(self.WIDTH, spec.dim)

    def forward(self, K, c2w, rows, columns):
        """K [B, T, 3, 3], c2w [B, T, 4, 4] of latent frames -> [B, T, rows * columns, D]."""
        S = self.frames             # pixel frames a latent frame; latent 0 is a single one, S times
        c2w = torch.cat([c2w[:, :1].expand(-1, S - 1, -1, -1), between(c2w, S)], 1)     # [B, T*S, 4, 4]
        rays = pluecker(K.repeat_interleave(S, 1), c2w, rows * self.side[0], columns * self.side[1])
        rays = F.pixel_unshuffle(rearrange(rays, "b (t s) c h w -> (b t) (s c) h w", s=S), self.BLOCK)
        return self.out(rearrange(F.silu(self.conv(rays)), "(b t) d r c -> b t (r c) d", b=len(K)))


def zero(inputs, outputs):
    """A linear layer that begins at zero; without biases nothing is added where its input is zero."""
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


# Per kind: what it reads of a `Control`, and its names below `control.` in a checkpoint.
KINDS = {"adaln": (("actions",), ("translation", "rotation")), "text": (("actions",), ("sentences",)),
         "plucker": (("c2w", "K"), ("plucker",)), "prope": (("c2w", "K"), ("prope",))}


class Injection(nn.Module):
    """The injections of a backbone: their parameters, and what they make of a clip's control."""

    def __init__(self):
        super().__init__()
        self.kinds, self.reads = [], set()

    def add(self, kind, spec, sentences):
        if kind == "adaln":         # two tables let unseen combinations compose; BiWM embeds the label as one number
            self.translation, self.rotation = (nn.Parameter(torch.zeros(9, spec.dim)) for _ in range(2))
        elif kind == "text":        # encoded once and kept in checkpoints; no parameters
            if sentences is None or sentences.ndim != 3 or len(sentences) != len(SENTENCES):
                raise ValueError("control text needs the 81 camera sentences as text states [81, S, E]")
            self.register_buffer("sentences", sentences.to(torch.get_default_device()))
        elif kind == "plucker":
            self.plucker = PlueckerAdapter(spec)
        else:
            if spec.dim % (4 * spec.heads):
                raise ValueError(f"control prope needs heads of 4 n channels, not {spec.dim / spec.heads:g}")
            self.prope = nn.ModuleList(zero(spec.dim, spec.dim) for _ in range(spec.layers))
        self.kinds.append(kind)
        self.reads.update(KINDS[kind][0])

    def forward(self, control, shape, patch):
        """The `Signal` of clips whose latents have `shape` [B, C, T, H, W] and patches `patch`."""
        B, _, T, H, W = shape
        for name in self.reads:
            part = getattr(control, name)
            if part is None or part.shape[:2] != (B, T):
                raise ValueError(f"control {'+'.join(self.kinds)} takes {name} of every frame [{B}, {T}, ...], "
                                 f"got {part if part is None else list(part.shape)}")
        a, given, signal = control.actions, control.given(), {}
        if "adaln" in self.kinds:
            digits = torch.arange(9, device=a.device)
            move, turn = ((x[..., None] == digits) * given[..., 0] for x in (a // 9, a % 9))    # one-hot [B, T, 9]
            with torch.autocast(a.device.type, enabled=False):
                signal["time"] = move @ self.translation + turn @ self.rotation
        if "text" in self.kinds:
            words = (self.sentences != 0).any(-1)[a] & (a >= 0)[..., None]              # zero rows are padding
            signal["sentences"] = Sentences(self.sentences, a, words)
        if "plucker" in self.kinds:
            tokens = self.plucker(control.K, control.c2w, H // patch[1], W // patch[2])
            signal["tokens"] = tokens * given.to(tokens.dtype)                          # or a bf16 stream would widen
        if "prope" in self.kinds:
            P, inverse = projections(control.K, control.c2w)                            # [B, T, 4, 4]
            signal["branches"] = {i: Branch(P.mT, inverse, P * given, out) for i, out in enumerate(self.prope)}
        return Signal(**signal)


def attach(backbone, kind="adaln", sentences=None, device=None):
    """Give `backbone` the injections of `kind`, such as "adaln", "adaln+prope" or none, "", that it does not have yet,
    on its own `device` or on that given.

    `text` needs `sentences` [81, S, E]: SENTENCES as the text encoder gives them, zeros after the end of each.
    """
    kinds = kind.split("+") if kind else []
    if not {*kinds} <= {*KINDS}:
        raise ValueError(f"unknown control '{kind}'; choose {', '.join(KINDS)} or several joined by +")
    for name in kinds:
        if name in backbone.refuses:
            raise ValueError(f"{backbone.spec.name} cannot take control {name}: {backbone.refuses[name]}")
    injection = backbone.control or Injection()
    with torch.device(device or next(backbone.parameters()).device):
        for name in kinds:
            if name not in injection.kinds:
                injection.add(name, backbone.spec, sentences)
    backbone.control = injection
    return backbone


def kinds_in(names):
    """The control kinds whose tensors are among the `names` of a checkpoint."""
    parts = {name.split(".")[1] for name in names if name.startswith("control.")}
    return [kind for kind, (_, own) in KINDS.items() if parts & {*own}]
