"""Memory: compressed history as a backbone takes it, and the keys and values that a chunk's history leaves.

A forward attends to [memory | frames] in one of three modes (block.py). Under `self` and `segment` nothing in history
depends on the chunk, so one pass over history at sigma 0 serves all denoising steps:

    cache = model.prefill(clean, text, control of clean, memory)                # once a chunk
    v = model(chunk, sigma, text, control of clean and chunk, memory=cache)     # each step

That is the same function as `model(clean and chunk, sigma, text, control, memory)`, which training uses, with a
gradient into history. A cache is of one text and control: guidance needs one for each branch.
"""

from dataclasses import dataclass, replace

import torch

from block import MODES, Group, join, sights
from common import sent
from inject import Signal


@dataclass(frozen=True)
class Memory:
    """History that is not among the frames of a forward, as tokens; and how all of history is attended to.

    Tokens act at sigma 0, are told the caption and no action or camera, and are dropped before the head. Positions are
    in latent frames and patch cells; a cell [s, e) has its centre at (s + e - 1) / 2. All but `tokens` is on the host.
    Packed times best keep the chunk where training had it: HunyuanVideo's text has no position, so it knows absolute
    ones. `bounds` tell LTX what contains latent frame 0, which is a single pixel frame.
    """
    tokens: torch.Tensor            # [B, N, D], such as the backbone's `embed` makes
    centres: torch.Tensor           # [N, 3] float64: time, row, column; packed times may stand in for long ages
    bounds: torch.Tensor            # [N, 3, 2]: what a token covers, [start, stop) in absolute frames, rows, columns
    segment: torch.Tensor           # [N] int64: the segment it belongs to; its tokens are neighbours
    mode: str = "joint"
    clean: int = 0                  # self, segment: how many frames in front of the chunk are history

    def __post_init__(self):
        N = self.tokens.shape[1]
        for name, shape in (("centres", (N, 3)), ("bounds", (N, 3, 2)), ("segment", (N,))):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{N} memory tokens need {name} {list(shape)}, got {list(getattr(self, name).shape)}")
        if self.mode not in MODES:
            raise ValueError(f"unknown attention '{self.mode}'; choose {', '.join(MODES)}")

    @property
    def history(self):
        """Frames in front that are no part of the chunk: under `joint` they are all one."""
        return 0 if self.mode == "joint" else self.clean

    def segments(self):
        """[(id, number of tokens)] in order."""
        ids, counts = torch.unique_consecutive(self.segment, return_counts=True)
        if len(ids.unique()) != len(ids):
            raise ValueError(f"tokens of one segment of memory must be neighbours, got the order {ids.tolist()}")
        return list(zip(ids.tolist(), counts.tolist()))

    def at_home(self):
        """The same with each segment beginning at time 0."""
        first = [centres[0, 0] for centres in self.centres.split([n for _, n in self.segments()])]
        time = torch.stack(first)[torch.unique_consecutive(self.segment, return_inverse=True)[1]]   # [N]
        return replace(self, centres=torch.cat([(self.centres[:, 0] - time)[:, None], self.centres[:, 1:]], 1))

    def without(self, other):
        """The tokens of segments that `other` does not have."""
        keep = ~torch.isin(self.segment, other.segment)                                 # [N]
        return replace(self, tokens=self.tokens[:, keep.to(self.tokens.device)], centres=self.centres[keep],
                       bounds=self.bounds[keep], segment=self.segment[keep])


EMPTY = Memory(torch.zeros(1, 0, 1), torch.zeros(0, 3).double(), torch.zeros(0, 3, 2).long(), torch.zeros(0).long())


@dataclass(frozen=True)
class Cache:
    """Keys and values of a chunk's history, for one text and control."""
    memory: Memory                  # of its tokens only the places are still needed
    layers: list                    # per block, of the memory and of the clean frames, as far as there are any:
    #                                 (keys before rotary positions, values), both [B, heads, n, d]

    @property
    def bytes(self):
        return sum(x.numel() * x.element_size() for layer in self.layers for pair in layer for x in pair)


def prefill(model, x, text, control=None, memory=None, frames=None, past=None):
    """See `Backbone.prefill`."""
    memory = replace(memory or replace(EMPTY, mode="self"), clean=x.shape[2])
    if memory.mode == "joint":
        raise ValueError("joint attention has no cache, its history depends on the chunk; use self or segment")
    if past and {past.memory.mode, memory.mode} != {"segment"}:
        raise ValueError(f"only segments outlive their chunk, not history under attention {memory.mode}: omit `past`")
    fresh = memory.without(past.memory) if past else memory
    groups, branches = enter(model, x, x.new_zeros(x.shape[:3:2]), text, control, memory, frames, fresh)
    _, layers = through(model, groups, branches, fresh, keep=True)
    sources = [(fresh, layers)] + ([(past.memory, past.layers)] if past else [])
    return Cache(memory, assemble(memory, *sources) if memory.mode == "segment" else layers)


def enter(model, x, sigma, text, control, memory, frames, fresh):
    """The groups (block.py) of a forward, and the `prope` of each block by number.

    The tokens of `fresh` enter, all of `memory` or a part; with None history is cached, and x begins behind it.
    """
    B, C, T, H, W = model.check(x, sigma)
    n, older, cached = memory.history, len(memory.segment) > 0, fresh is None
    first = n if cached else 0                                      # number in the window of the first frame of x
    if n > first + T:
        raise ValueError(f"memory counts {n} clean frames, but there are only {T} frames")
    frames = torch.arange(first + T, device=x.device) if frames is None else frames
    if len(frames) != first + T:
        raise ValueError(f"there are positions of {len(frames)} frames for {first + T}, those in the cache included")
    text, signal = model.prepare(text, model.inject(control, (B, C, first + T, H, W)), B)
    x = model.patchify(model.inputs(x, sigma, text, begins=not older and first == 0))       # [B, T, L, D]
    rope = lambda centres: model.rope(centres if centres.device == x.device else sent(centres, x.device), older)

    def part(role, start, stop):                                    # frames start..stop-1 of the window
        place, own = rope(model.centres(frames[start:stop], H, W)), slice(start - first, stop - first)
        if stop <= first:
            return Group(role, None, place, (start, stop))
        tokens, e, told = model.tell(x[:, own], sigma[:, own], text, signal.frames(start, stop))
        return Group(role, tokens, place, (start, stop), e, told)

    groups, zero = [], sigma.new_zeros(B, 1)
    if cached and older:
        groups.append(Group("memory", None, rope(model.places(memory))))
    elif older and len(fresh.segment):
        if fresh.tokens.shape[::2] != (B, model.spec.dim):
            raise ValueError(f"memory tokens are [{B}, N, {model.spec.dim}], got {list(fresh.tokens.shape)}")
        tokens, e, told = model.tell(fresh.tokens[:, None].to(x.dtype), zero, text, Signal())
        home = rope(model.places(fresh.at_home())) if memory.mode == "segment" else None
        groups.append(Group("memory", tokens, rope(model.places(fresh)), None, e, told, home=home))
    groups += [part("clean", 0, n)] if n else []
    if groups and not cached and memory.mode != "joint":
        groups += model.words("caption", text, torch.cat([zero, sigma[:, :n]], 1))
    if first + T > n:
        groups += [part("frames", n, first + T), *model.words("text", text, sigma[:, n - first:])]
    return groups, signal.branches


def through(model, groups, branches, memory, layers=None, keep=False):
    """The groups behind all blocks and, with `keep`, what they leave for a Cache; `layers` are those of a Cache."""
    lengths = tuple(n for _, n in memory.segments()) if memory.mode == "segment" else ()
    kept, sight, groups = [], sights(groups, memory.mode, lengths), model.scatter(groups)
    model.announce(groups, layers)
    for i, block in enumerate(getattr(model, model.block_list)):
        past = layers[i] if layers else ()
        tokens, pairs = block([g.at(i) for g in groups], sight, past, branches.get(i), keep)
        groups = groups[:len(past)] + [g._replace(x=x) for g, x in zip(groups[len(past):], tokens)]
        kept.append(pairs)
    return model.gather(groups), kept


def assemble(memory, *sources):
    """Layers of a `Cache` of `memory` from (Memory, layers): a segment from the first that has it; of the first, clean
    frames."""
    found = {}
    for source, (held, _) in enumerate(sources):
        at = 0
        for name, n in held.segments():
            found.setdefault(name, (source, at, at + n))
            at += n
    places = [found[name] for name, _ in memory.segments()]
    layers = []
    for pairs in zip(*(kept for _, kept in sources)):
        stored = [tuple(join([pairs[s][0][j][:, :, a:b] for s, a, b in places]) for j in (0, 1))] if places else []
        layers.append(stored + ([pairs[0][-1]] if memory.clean else []))
    return layers
