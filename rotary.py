"""Rotary positions (RoFormer, arXiv:2104.09864) of three axes, time, row and column, as each architecture has them.

Positions are no rows of a table: they may be fractional, as those of compressed memory are, and have no limit. What is
turned by a, then by b, is turned by a + b, so attention knows differences of positions alone.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange

LTX_SPAN = (20, 2048, 2048)             # seconds, pixels down, pixels across: positions run from -1 to 1 over these


def grid(frames, rows, columns):
    """Centres [T * rows * columns, 3] of the tokens of whole frames: time (`frames` [T]), row, column."""
    axes = frames, torch.arange(rows, device=frames.device), torch.arange(columns, device=frames.device)
    return torch.stack(torch.meshgrid(*(axis.double() for axis in axes), indexing="ij"), -1).flatten(0, 2)


def rotary(centres, dims, theta, dtype):
    """cos and sin [N, head_dim / 2] of a 3-D rotary embedding (RoFormer, arXiv:2104.09864) at `centres` [N, 3].

    `dims` channels of a head turn with time, height and width, each axis with its own frequency ladder of base `theta`.
    Positions may be fractional; nothing is tabulated, so they have no limit. Angles are computed in the `dtype` of the
    official code, or its numbers are not met.
    """
    angles = []
    for position, dim in zip(centres.to(dtype).unbind(1), dims):
        omega = 1 / theta ** (torch.arange(0, dim, 2, dtype=dtype, device=centres.device) / dim)
        angles.append(position[:, None] * omega)                                        # [N, dim / 2]
    angle = torch.cat(angles, -1)                                                       # [N, head_dim / 2]
    return angle.cos().float(), angle.sin().float()


def rotate(x, rope):
    """Turn neighbouring channel pairs of x [B, heads, N, d] by the angles `rope` (cos, sin [N, d / 2]), in fp32."""
    (cos, sin), sign = rope, torch.arange(-1, 2, 2, device=x.device)                    # -1, 1: no halves to be joined
    x = x.float().unflatten(-1, (-1, 2))                                                # [B, heads, N, d/2, 2]
    return (x * cos[..., None] + x.flip(-1) * (sin[..., None] * sign)).flatten(-2)


def ltx_rope(centres, fps, spec, older):
    """cos and sin [heads, N, head_dim / 2] of LTX's rotary embedding (RoFormer, arXiv:2104.09864) at `centres` [N, 3].

    A token stands at the middle of what it covers. Latent frame f covers the pixel frames 8f - 7 to 8f + 1; the VAE is
    causal and nothing comes before frame 0, hence the clamp where x is not behind older frames. Fractions are placed by
    the same formula. One ladder of frequencies runs through all heads, slow to fast, with a slot for t, y and x at each
    step; the slots left over come first and do not turn. Angles reach 15,708, where fp32 rounds visibly: this is the
    official order; behind memory, whose times shift, they are exact.
    """
    s, J, dtype = spec.stride[0], spec.dim // 6, torch.float64 if older else torch.float32
    t, *cells = centres.to(dtype).unbind(1)
    end = s * t + 1
    start, end = (end - s if older else (end - s).clamp(min=0)) / fps, end / fps
    middles = [(start + end) / 2] + [stride * (cell + 0.5) for cell, stride in zip(cells, spec.stride[1:])]
    axes = torch.stack([2 * (middle / span) - 1 for middle, span in zip(middles, LTX_SPAN)], -1)
    omega = 10000 ** torch.linspace(0, 1, J, dtype=torch.float64, device=t.device) * (math.pi / 2)
    angle = (axes[:, None] * omega.to(dtype)[:, None]).flatten(1)                       # [N, 3 * J]: t y x t y x ...
    angle = rearrange(F.pad(angle, (spec.dim // 2 - 3 * J, 0)), "n (h d) -> h n d", h=spec.heads)
    return angle.cos().float(), angle.sin().float()


def rotate_halves(x, rope):
    """Turn channels i and i + d/2 of x [B, heads, N, d] by `rope` (cos, sin [heads, N, d/2]); always in fp32."""
    (cos, sin), sign = rope, torch.arange(-1, 2, 2, device=x.device)                    # the official rotates in bf16
    x = x.float().unflatten(-1, (2, -1))                                                # [B, heads, N, 2, d/2]
    return (x * cos[..., None, :] + x.flip(-2) * (sin[..., None, :] * sign[:, None])).flatten(-2)
