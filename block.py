"""What all transformer blocks do: groups of tokens say queries, keys and values, and each attends to those it sees.

A group is tokens of one kind, with a modulation, positions and a text of their own: compressed `memory`, `clean`
frames in front of the chunk, the `frames` being made; where text takes part in self-attention, the `caption` that
history hears and the `text` of the frames. Without memory there are frames and text. Who sees whom:

    joint     all see all (BiWM, arXiv:2606.10135): history's features depend on the noisy chunk, nothing can be kept
    self      history (memory, clean, caption) sees history alone; frames and text see memory, clean and themselves
    segment   segments of memory see themselves and the caption, clean frames likewise, the caption itself; frames and
              text as before. A segment is encoded as if it began at time 0, as the caption has no position

No mask is needed for that: attention is called once for each set of groups that see the same. Keys are kept before
rotary positions and turned when they are read; turning kept bf16 keys again and again would wear them off.
"""

import contextlib
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import inject

MODES = ("joint", "self", "segment")
FASTEST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(q, k, v, mask=None, shared=0):
    """Softmax attention [B, heads, N, d] by the first kernel of FASTEST that can; on Hopper cuDNN is 1.6x flash.

    The last `shared` rows are no tokens of the clip: it matters where ranks share a clip's (parallel.Ulysses).
    """
    with sdpa_kernel(FASTEST, set_priority=True) if q.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class PerBlock(tuple):
    """Among what blocks are told: for each, by its number, what it is told."""


class Group(NamedTuple):
    """Tokens of one kind; see above."""
    role: str
    x: torch.Tensor | None                  # [B, T, L, D], T rows of L tokens that share a modulation; None: cached
    rope: tuple | None                      # cos and sin of their positions; None: they have none
    frames: tuple[int, int] | None = None   # the frames [start, stop) of the window that they are; None: no camera
    e: torch.Tensor | None = None           # time embedding of the rows, for the head
    told: tuple = ()                        # modulation, text, ...: what a block of the architecture takes besides
    words: torch.Tensor | None = None       # [B, L] bool: which tokens are to be seen; None: all
    home: tuple | None = None               # as `rope`, within segments that see themselves alone

    def at(self, i):
        """As block number `i` is told."""
        return self._replace(told=tuple(part[i] if isinstance(part, PerBlock) else part for part in self.told))

    def count(self):
        """Number of tokens (a NamedTuple has a length of its own)."""
        return self.rope[0].shape[-2] if self.x is None else self.x.shape[1] * self.x.shape[2]


class Sight(NamedTuple):
    """Groups that attend, by number, and the groups that they see."""
    asking: tuple
    seen: tuple
    runs: tuple = ()                        # (length, how many) of segments: the first group sees them one by one, and
                                            # all that follows it
    mask: torch.Tensor | None = None        # [B, 1, 1, keys], if some keys are padding


def sights(groups, mode, lengths=()):
    """Who sees whom among `groups`: a tuple of `Sight`; `lengths` are those of the segments of memory."""
    of = lambda *roles: tuple(i for i, g in enumerate(groups) if g.role in roles)
    chunk = of("frames", "text"), of("memory", "clean", "frames", "text")
    runs = tuple((n, len([*alike])) for n, alike in groupby(lengths))
    pairs = {"joint": [(of("memory", "frames", "text"),) * 2],
             "self": [(of("memory", "clean", "caption"),) * 2, chunk],
             "segment": [(of("memory"), of("memory", "caption"), runs), (of("clean"), of("clean", "caption")),
                         (of("caption"),) * 2, chunk]}[mode]
    return tuple(Sight(*pair)._replace(mask=mask_of([groups[i] for i in pair[1]])) for pair in pairs
                 if pair[0] and groups[pair[0][0]].x is not None)


def mask_of(groups):
    """Mask [B, 1, 1, keys] of the tokens of `groups`; None if all are to be seen."""
    words = next((g.words for g in groups if g.words is not None), None)
    if words is None:
        return None
    B = len(words)
    return torch.cat([words.new_ones(B, g.count()) if g.words is None else g.words for g in groups], 1)[:, None, None]


def join(parts):
    """Neighbours along the tokens of [B, heads, N, d], which stay [B, N, heads, d] in memory; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat([x.transpose(1, 2) for x in parts], 1).transpose(1, 2)


def meet(sight, q, k, v, attend, alone=None, whole=0):
    """Attention outputs [B, n, D] by number of the group; None where it has no queries.

    q, k, v [B, heads, n, d]; what segments see are the keys `alone`; the last `whole` tokens are text.
    """
    out = [None] * len(q)
    for asking, seen, runs, mask in sight:
        keys = alone or k if runs else k
        given = [join([x[i] for i in which]) for x, which in ((q, asking), (keys, seen), (v, seen))]
        y = apart(*given, runs, mask, attend) if runs else attend(*given, mask, whole)
        y = rearrange(y, "b h n d -> b n (h d)")
        for i, part in zip(asking, y.split([q[i].shape[2] for i in asking], 1)):
            out[i] = part
    return out


def apart(q, k, v, runs, mask, attend):
    """Attention [B, heads, N, d] within segments, `runs` of s of n neighbours; keys after the N-th are seen by all."""
    N, at, out = q.shape[2], 0, []
    for n, s in runs:                                                                   # equally long ones: one call
        fold = lambda x: rearrange(x[:, :, at:at + s * n], "b h (s n) d -> (b s) h n d", n=n)
        known = [torch.cat([fold(x), x[:, :, N:].repeat_interleave(s, 0)], 2) for x in (k, v)]
        seen = None if mask is None else F.pad(mask[..., N:].repeat_interleave(s, 0), (n, 0), value=True)
        out.append(rearrange(attend(fold(q), *known, seen), "(b s) h n d -> b h (s n) d", s=s))
        at += s * n
    return join(out)


def geometry(groups, sight, q, k, v, branch, attend):
    """What `prope` adds, by number of the group: frames attend to frames that they see; memory has no camera."""
    added = [0.0] * len(groups)
    for asking, seen, *_ in sight if branch else ():
        seen = [i for i in seen if groups[i].frames]
        for i in asking:
            if groups[i].frames:
                part = branch.cut(groups[i].frames, (groups[seen[0]].frames[0], groups[seen[-1]].frames[1]))
                added[i] = inject.prope(q[i], *(join([x[j] for j in seen]) for x in (k, v)), part, attend)
    return added


class Block(nn.Module):
    """A transformer block in two halves with attention between them. What an architecture has of its own:

    before(group) -> queries, keys, values [B, heads, n, d], and what `after` will need again
    after(group, y, added, that) -> tokens [B, T, L, D], of attention's output y [B, n, D]; `prope` is added to the
                                    projected one
    turn(x, rope)                   rotary positions of queries and keys
    """

    attend = staticmethod(attention)

    def forward(self, groups, sight, past=(), branch=None, keep=False):
        """Tokens of all groups that have some, one block on; with `keep` also the keys and values of history.

        `past` has keys and values of the first groups, which are cached; `branch` is that of `prope`.
        """
        said = [(None, *pair, None) for pair in past] + [self.before(g) for g in groups[len(past):]]
        q, k, v, rest = zip(*said)
        place = lambda x, rope, like: x if x is None else (self.turn(x, rope) if rope else x).to(like.dtype)
        keys = [place(x, g.rope, y) for x, g, y in zip(k, groups, v)]
        alone = [place(x, g.home, y) if g.home else key for x, g, y, key in zip(k, groups, v, keys)]
        asked = [place(x, g.home or g.rope, y) for x, g, y in zip(q, groups, v)]
        whole = sum(g.count() for g in groups if g.rope is None)
        heard = meet(sight, asked, keys, v, self.attend, alone, whole)
        added = geometry(groups, sight, q, k, v, branch, self.attend)
        xs = [self.after(g, *each) for g, *each in zip(groups, heard, added, rest) if g.x is not None]
        return xs, [(k[i].to(v[i].dtype), v[i]) for i, g in enumerate(groups) if keep and g.role in ("memory", "clean")]
