"""Memory: compressed history as a backbone takes it, who attends to whom, and keys and values that serve again.

    joint     all tokens see all (BiWM, arXiv:2606.10135): history's features depend on the noisy chunk, nothing is kept
    self      history (memory, and the clean frames in front of the chunk) sees history alone, the chunk sees all: keys
              and values of history are made once per chunk, at sigma 0, and serve all of its denoising steps
    segment   each segment of memory sees itself alone, and so do the clean frames; the chunk sees all: keys and values
              of a segment serve as long as it lives, wherever it is placed and whatever else is chosen

The last two are other functions than `joint`, to be trained as such. No mask is needed for them: attention is called
once for each set of tokens that see the same. Keys are kept before rotary positions and turned when they are read;
turning bf16 keys again and again would wear them off.
"""

from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

MODES = ("joint", "self", "segment")


@dataclass(frozen=True)
class Memory:
    """History that is not among the frames of a forward, as tokens; and how all of history is attended to.

    Tokens act at sigma 0, are told the caption and no action or camera, and are dropped before the head. Positions are
    in latent frames and patch cells. A cell [s, e) has its centre at (s + e - 1) / 2; a packed time stands in for age.
    """
    tokens: torch.Tensor            # [B, N, D], as the backbone's `embed` makes them
    centres: torch.Tensor           # [N, 3] float64: time (packed), row, column
    bounds: torch.Tensor            # [N, 3, 2]: what a token covers, [start, stop) in absolute frames, rows, columns
    segment: torch.Tensor           # [N] int64: the segment it belongs to; neighbours share one
    mode: str = "joint"
    clean: int = 0                  # self, segment: how many frames in front of the chunk are history

    def __post_init__(self):
        N = self.tokens.shape[1]
        for name, shape in (("centres", (N, 3)), ("bounds", (N, 3, 2)), ("segment", (N,))):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{N} memory tokens need {name} {list(shape)}, got {list(getattr(self, name).shape)}")
        if self.mode not in MODES:
            raise ValueError(f"unknown attention '{self.mode}'; choose {', '.join(MODES)}")

    def segments(self):
        """[(id, tokens)] in order; ValueError unless a segment's tokens are neighbours."""
        ids, counts = torch.unique_consecutive(self.segment, return_counts=True)
        if len(set(ids.tolist())) != len(ids):
            raise ValueError(f"tokens of a segment of memory must be neighbours, got the order {ids.tolist()}")
        return list(zip(ids.tolist(), counts.tolist()))

    @property
    def history(self):
        """Frames in front that are no part of the chunk."""
        return 0 if self.mode == "joint" else self.clean

    def without(self, other):
        """The tokens of segments that `other` does not have; all but under `segment`, where they stand for themselves."""
        if self.mode != "segment":
            return self
        keep = ~torch.isin(self.segment, other.segment)                                 # [N]
        return replace(self, tokens=self.tokens[:, keep.to(self.tokens.device)], centres=self.centres[keep],
                       bounds=self.bounds[keep], segment=self.segment[keep])


EMPTY = Memory(torch.zeros(1, 0, 0), torch.zeros(0, 3).double(), torch.zeros(0, 3, 2).long(), torch.zeros(0).long())


@dataclass(frozen=True)
class Cache:
    """What `Backbone.prefill` keeps of history: keys and values of every block, for one condition and its chunk."""
    memory: Memory                  # its tokens are no longer needed, only where they are
    layers: list                    # per block: (keys before rotary positions, values), both [B, heads, M, d], of the
    #                                 memory and of the clean frames, as far as there are any

    @property
    def bytes(self):
        return sum(x.numel() * x.element_size() for layer in self.layers for pair in layer for x in pair)


class Group(NamedTuple):
    """Tokens of one kind: `memory`, `clean` frames, the `frames` being made; where text is part of self-attention,
    `told` is that which history hears and `text` the other."""
    role: str
    x: torch.Tensor | None                  # [B, T, L, D], T rows of L tokens that share a modulation; None: cached
    rope: tuple | None                      # cos and sin of their positions; None: they have none
    frames: tuple[int, int] | None = None   # the frames [start, stop) of the window that they are; None: no camera
    e: torch.Tensor | None = None           # time embedding of the rows, for the head
    told: tuple = ()                        # modulation, text, ...: what a block of the architecture takes besides
    words: torch.Tensor | None = None       # [B, T * L] bool: which tokens are to be seen; None: all

    def count(self):
        """Number of tokens; a NamedTuple has a length of its own."""
        return self.rope[0].shape[-2] if self.x is None else self.x.shape[1] * self.x.shape[2]


class Sight(NamedTuple):
    """Groups that attend, by number, to which groups; `lengths`: within runs of so many neighbours, and to what comes
    after these runs among the keys; `mask` [B, 1, 1, keys] if some keys are padding."""
    asking: tuple
    seen: tuple
    lengths: tuple = ()
    mask: torch.Tensor | None = None


def sights(groups, mode, lengths=()):
    """Who sees whom among `groups`, a tuple of `Sight`; `lengths` are those of the segments of memory."""
    of = lambda *roles: tuple(i for i, g in enumerate(groups) if g.role in roles)
    kept = "memory", "clean"
    if mode == "joint":
        pairs = [(of("memory", "frames", "text"),) * 2]
    elif mode == "self":
        pairs = [(of(*kept, "told"),) * 2, (of("frames", "text"), of(*kept, "frames", "text"))]
    else:
        pairs = [(of("memory"), of("memory", "told"), lengths), (of("clean"), of("clean", "told")),
                 (of("told"),) * 2, (of("frames", "text"), of(*kept, "frames", "text"))]
    return tuple(Sight(*pair)._replace(mask=mask_of([groups[i] for i in pair[1]])) for pair in pairs
                 if pair[0] and groups[pair[0][0]].x is not None)


def mask_of(groups):
    """Mask [B, 1, 1, keys] of the tokens of `groups`, None if all are to be seen."""
    words = next((g.words for g in groups if g.words is not None), None)
    if words is None:
        return None
    B = len(words)
    return torch.cat([words.new_ones(B, g.count()) if g.words is None else g.words for g in groups], 1)[:, None, None]


def join(parts):
    """Neighbours along the tokens [B, heads, n, d]; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def meet(sight, q, k, v, attend):
    """Attention outputs [B, n, D] by number of the group; None where it has no queries. q, k, v [B, heads, n, d]."""
    out = [None] * len(q)
    for asking, seen, lengths, mask in sight:
        given = [join([x[i] for i in which]) for x, which in ((q, asking), (k, seen), (v, seen))]
        y = apart(*given, lengths, mask, attend) if lengths else attend(*given, mask)
        y = rearrange(y, "b h n d -> b n (h d)")
        for i, part in zip(asking, y.split([q[i].shape[2] for i in asking], 1)):
            out[i] = part
    return out


def apart(q, k, v, lengths, mask, attend):
    """Attention [B, heads, N, d] within segments of `lengths` neighbours; keys after the N-th are seen by all."""
    N, at, out = q.shape[2], 0, []
    for n, run in groupby(lengths):
        s = len([*run])                                                                 # equally long ones are one call
        fold = lambda x: rearrange(x[:, :, at:at + s * n], "b h (s n) d -> (b s) h n d", n=n)
        known = [torch.cat([fold(x), x[:, :, N:].repeat_interleave(s, 0)], 2) for x in (k, v)]
        seen = None if mask is None else F.pad(mask[..., N:].repeat_interleave(s, 0), (n, 0), value=True)
        out.append(rearrange(attend(fold(q), *known, seen), "(b s) h n d -> b h (s n) d", s=s))
        at += s * n
    return join(out)


def assemble(memory, *sources):
    """Layers of a `Cache` of `memory` out of (Memory, layers): each segment from the first source that has it, clean
    frames from the first one."""
    found, layers = {}, []
    for source, (held, _) in enumerate(sources):
        at = 0
        for name, n in held.segments():
            found.setdefault(name, (source, at, at + n))
            at += n
    parts = [found[name] for name, _ in memory.segments()]
    for pairs in zip(*(kept for _, kept in sources)):
        clean = [pairs[0][-1]] if memory.clean else []
        stored = [join([pairs[s][0][j][:, :, a:b] for s, a, b in parts]) for j in (0, 1)] if parts else None
        layers.append([tuple(stored), *clean] if parts else clean)
    return layers
