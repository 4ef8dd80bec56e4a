"""Plans of a compressed history: which past frames become one token, in whole numbers, and where the tokens stand.

    none         every frame as it is: exact, and dearer with every chunk
    window       the first frame and the latest ones
    framepack    the older, the coarser (FramePack, arXiv:2504.12626), on a grid that does not move with time
    packforcing  first and latest frames whole, between them compressed blocks of which the most relevant are shown
                 (PackForcing, arXiv:2603.25730)
    f1, pyramid  for comparison: FramePack's released plan, and that of Yume (arXiv:2507.17744) and BiWM's public code

    python scales.py framepack 30x52 2400       # a plan: kind, token grid of a frame, latent frames
"""

import math
import sys
from itertools import groupby
from typing import NamedTuple

import torch

FINE, WHOLE = (1, 1, 1), 1 << 20                        # a frame as it is; more rows or columns than any frame has
LADDER = ((2, 2), (4, 16), (8, 64), (16, 256))          # FramePack: level k (k, k, k), and how many frames at least
PYRAMID = ((2, 2), (4, 16), (8, 64), (16, 256))         # Yume: level (1, s, s); the frames before, in pairs
STAGES = (6, 22, 86, 342)                               # latent frames up to which it has so few scales
SIZES = {"none": (0, 1), "window": (1, 15), "framepack": (1, 1), "f1": (1, 1), "pyramid": (1, 3),
         "packforcing": (8, 4)}                         # kind: first and latest frames that stay whole


class Segment(NamedTuple):
    """Latent frames start..end-1; `level` (frames, rows, columns) is how many patches along each axis become a token.

    role: sink (the first frames), mid, recent (in front of the chunk), tail (all that is older, one token)."""
    start: int
    end: int
    level: tuple[int, int, int]
    role: str


def plan(kind, frames, sink=None, recent=None, chunk=4, mid=(2, 4, 4), blocks=None):
    """The `Segment`s of a history of `frames` latent frames, oldest first.

    `sink` and `recent`: frames that stay whole at both ends, by default the paper's for a chunk of 4 frames. They are
    the latest `recent` at least: coarser cells begin on a grid, and wait until they are full. PackForcing's blocks have
    `chunk` frames, `mid` patches become a token of them; `blocks`: the numbers of those to be shown, by default all.
    """
    if kind not in SIZES:
        raise ValueError(f"unknown history '{kind}'; choose {', '.join(SIZES)}")
    sink, recent = (own if given is None else given for own, given in zip(SIZES[kind], (sink, recent)))
    least = int(kind not in ("none", "window"))         # the first latent is a single picture: never pooled with others
    if frames < 0 or sink < least or recent < 1:
        raise ValueError(f"history {kind} needs frames >= 0, sink >= {least} and recent >= 1, "
                         f"got {frames}, {sink}, {recent}")
    if kind == "pyramid":
        return pyramid(frames)
    base = min(sink, frames)
    head = [Segment(0, base, FINE, "sink")] if base else []
    if kind == "framepack":
        return head + ladder(base, frames, ((1, recent), *LADDER))
    if kind == "f1":                                    # what is older is dropped
        return head + runs(base, frames, (FINE, recent), *(((k,) * 3, count) for k, count in LADDER[:2]))
    if kind == "packforcing":
        count = max(0, frames - base - recent) // chunk
        starts = [base + chunk * i for i in (range(count) if blocks is None else sorted(blocks))]
        head += [Segment(a, a + chunk, mid, "mid") for a in starts]
        return head + runs(base + chunk * count, frames, (FINE, frames))
    return head + runs(base, frames, (FINE, frames if kind == "none" else recent))


def runs(base, hi, *levels):
    """Segments of `levels` (level, count of frames), newest level first, back from frame `hi`, as far as `base`."""
    out = []
    for level, count in levels:
        lo = max(base, hi - count)
        out[:0] = [Segment(lo, hi, level, "recent" if level == FINE else "mid")] * (lo < hi)
        hi = lo
    return out


def ladder(base, hi, levels):
    """FramePack on the absolute grid base + k j: a level begins where the next one's cells end, so a cell stays the
    same from chunk to chunk until it joins a coarser one. One global mean stands for what the ladder does not reach."""
    cells = []
    for (k, count), (coarser, _) in zip(levels, (*levels[1:], levels[-1])):
        lo = base + coarser * (max(hi - count - base, 0) // coarser)
        cells[:0] = [Segment(a, a + k, (k,) * 3, "recent" if k == 1 else "mid") for a in range(lo, hi, k)]
        hi = lo
    return [Segment(base, hi, (hi - base, WHOLE, WHOLE), "tail")] * (hi > base) + cells


def pyramid(frames):
    """Yume's and BiWM's: spatial scales only, and pairs of frames for what is older. It grows without bound."""
    if not frames:
        return []
    stage = sum(frames > most for most in STAGES)
    coarse = 2 if stage > 2 else 1
    levels = [(FINE, 3 if stage else 1), *(((1, s, s), count) for s, count in PYRAMID[:stage])]
    older = (2, 16, 16) if stage == 4 else (1, 2 << stage, 2 << stage)
    return [Segment(0, 1, (1, coarse, coarse), "sink")] + runs(1, frames, *levels, (older, frames))


def cells(segment, grid):
    """Tokens of a segment along time, rows and columns, for frames of `grid` (rows, columns) patches."""
    (k, q, r), (H, W) = segment.level, grid
    return -(-(segment.end - segment.start) // k), -(-H // q), -(-W // r)


def tokens(segments, grid, top=None):
    """Tokens of a plan; of PackForcing's blocks, at most `top` are shown."""
    counts = [(segment.role, math.prod(cells(segment, grid))) for segment in segments]
    mids = [n for role, n in counts if role == "mid"]
    return sum(n for role, n in counts if role != "mid") + sum(mids[:top])


def part(segments):
    """(start, older): frames from `start` on stay in front of the chunk as they are, `older` segments become memory."""
    older, start = list(segments), segments[-1].end if segments else 0
    while older and older[-1].level == FINE and older[-1].end == start:
        start = older.pop().start
    return start, older


# ---- Where tokens stand ----------------------------------------------------------------------------------------------

AGES = 400                          # latent frames: whatever is older stands where these do


def packed(spans, now, start, near, far, dense):
    """Places on the time axis for cells that cover frames `spans` [n, 2], and for frame `start`, the first one behind
    them; the chunk begins at frame `now`. The oldest cell is at 0 and the whole stays within what was trained.

    `dense`: one place a cell. Else by age: true up to `near` frames before the chunk and wherever frames are whole;
    beyond, logarithmic, so that order is kept and AGES frames and more are `far` away.
    """
    if dense:
        return torch.arange(len(spans), dtype=torch.float64), float(len(spans))
    age = now - (spans[:, 0] + spans[:, 1] - 1) / 2
    near = max(near, now - start + 2)                   # the newest cells stand true beside the frames that stay whole
    far, most = max(far, 2 * near), max(AGES, 4 * near)
    old = near + (far - near) * ((age / near).clamp_min(1).log() / math.log(most / near)).clamp_max(1)
    age = torch.where(age <= near, age, old)
    return age.max() - age, float(age.max()) - (now - start)


def spread(segment, grid):
    """Bounds [n, 3, 2] (start, end) of a segment's tokens in frames, rows and columns, clipped to what there is."""
    axes = []
    for low, high, step in zip((segment.start, 0, 0), (segment.end, *grid), segment.level):
        edge = torch.arange(low, high, step, dtype=torch.float64)
        axes.append(torch.stack([edge, (edge + step).clamp_max(high)], -1))             # [cells, 2]
    index = torch.meshgrid(*(torch.arange(len(axis)) for axis in axes), indexing="ij")
    return torch.stack([axis[i.flatten()] for axis, i in zip(axes, index)], 1)


def places(segments, grid, now, start, near, far, dense):
    """For all tokens of `segments`: centres [N, 3] with packed time, bounds [N, 3, 2] without, segment ids [N], and the
    place of frame `start`. A cell of k frames or rows from s on is centred at s + (k - 1) / 2, the mean of theirs.

    An id names frames whose distances stay the same from chunk to chunk: of a block when packing is dense, else a cell.
    """
    bounds = torch.cat([spread(segment, grid) for segment in segments])                 # [N, 3, 2]
    _, which, counts = bounds[:, 0, 0].unique_consecutive(return_inverse=True, return_counts=True)
    spans = bounds[counts.cumsum(0) - counts, 0]                                        # cells along time, in order
    time, first = packed(spans, now, start, near, far, dense)
    centres = bounds.sum(-1).sub(1) / 2
    centres[:, 0] = time[which]

    counts = torch.tensor([math.prod(cells(segment, grid)) for segment in segments])
    whole = torch.tensor([(segment.start, segment.end) for segment in segments]).repeat_interleave(counts, 0)
    scale = torch.tensor([segment.level[1].bit_length() for segment in segments]).repeat_interleave(counts)
    begin, end = (whole if dense else spans.long()[which]).T                            # each [N]
    return centres, bounds.long(), (begin << 20 | end - begin) << 6 | scale, first


def main(kind, grid="30x52", frames="2400"):
    grid, T = tuple(map(int, grid.split("x"))), int(frames)
    shape = lambda segment: (segment.role, segment.level)
    for (role, level), group in groupby(plan(kind, T), shape):
        group = list(group)
        print(f"{role:7} frames {group[0].start:6} to {group[-1].end - 1:6}: {tokens(group, grid):6} tokens of "
              f"{'all that is there' if level[1] == WHOLE else 'x'.join(map(str, level))}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in SIZES:
        sys.exit(f"usage: python scales.py {'|'.join(SIZES)} [30x52 [2400]]")
    main(*sys.argv[1:])
