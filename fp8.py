"""Linears whose matmuls are in 8 bits, of torch alone and traced by torch.compile: Hopper and later.

    y  = s_x s_W (q_x q_W^T) + b              x, W = s q: a scale for each row, a token of x or an output channel of W
    dx = s_h (q_h q_W),     h = s_W dy        here the scales of W are within the sum, so dy takes them, then is rounded
    dW = dy^T x                               in 16 bits: 8 would have to be read again, scaled along tokens, transposed

A row's scale is its maximum over 448, and q is E4M3 (FP8 Formats for Deep Learning, arXiv:2209.05433) in gradients too:
with a scale of its own a row needs the third bit of fraction more than E5M2's range. Both products take the same
rounded W, so dx is the gradient of what was computed. Within a compiled block the rounding of x is part of the kernel
that makes x, a norm or a GELU; what cannot be traced, as Transformer Engine's modules, would cut the block instead.
"""

import torch
from torch import nn

from common import compute_dtype
from nvfp4 import QuantizedLinear, fused

MAX = 448                                               # largest number of E4M3


def to_fp8(x):
    """x [M, K] -> q [M, K] in E4M3, row after row whatever x is, scales fp32 [M, 1]: x is about q scale. Zeros stay; a
    row that has NaN or infinity has a scale or code that is not finite, and neither is its product then."""
    scale = (x.abs().amax(1, keepdim=True).float() / MAX).clamp(min=2 ** -100)          # whose reciprocal is finite
    return (x * (1 / scale)).to(torch.float8_e4m3fn, memory_format=torch.contiguous_format), scale


rounded = fused(to_fp8)


def dequantized(x):
    """What 8 bits make of x [M, K], in fp32."""
    q, scale = to_fp8(x)
    return q.float() * scale


def reference(a, s, b, t, bias=None):
    """What `product` is, of the dequantised operands in fp32; rounded to bf16 once."""
    with torch.autocast(a.device.type, enabled=False):
        y = (a.float() @ b.float().T) * s * t.T
        return (y if bias is None else y + bias).bfloat16()


def product(a, s, b, t, bias=None):
    """s a (t b)^T + bias in bf16 [M, N]; a [M, K] and b [N, K] in E4M3, s [M, 1] and t [N, 1] fp32, bias bf16 [N].

    K and N are multiples of 16. Errors (RuntimeError): torch's, where a GPU lacks it.
    """
    if not a.is_cuda:                                   # few processors have it, and tests need it on all
        return reference(a, s, b, t, bias)
    return torch._scaled_mm(a, b.T, s, t.T, bias, out_dtype=torch.bfloat16, use_fast_accum=True)


def refusal():
    """Why this GPU has no such product, in one line; empty when it has. Which have depends on how torch was built."""
    try:
        q, scale = to_fp8(torch.ones(16, 16, device="cuda"))
        return "" if (product(q, scale, q, scale) == 16).all() else "the 8-bit matmul of a known matrix is wrong"
    except (RuntimeError, ValueError) as error:
        return f"torch {torch.__version__} has no FP8 matmul with a scale for each row ({str(error).splitlines()[0]})"


class Matmul(torch.autograd.Function):
    """The three products above. x [M, K], bias [N] and gradients are bf16; weight [N, K] as it is stored, or E4M3 with
    its `scale` [N, 1]. x and weight are kept for the backward, not their rounded copies."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, scale)
        return product(*rounded(x), *(rounded(weight) if scale is None else (weight, scale)), bias)

    @staticmethod
    def backward(ctx, g):                                                               # [M, N]
        x, weight, scale = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            q, scale = rounded(weight) if scale is None else (weight, scale)
            dx = product(*rounded(g * scale.T), q.T.contiguous(), scale.new_ones(q.shape[1], 1))
        if ctx.needs_input_grad[1]:
            dw = (g.T @ x).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            db = g.sum(0)
        return dx, dw, None, db


def linear(x, weight, scale, bias):                                                     # x [..., K] -> [..., N]
    h, b = x.reshape(-1, x.shape[-1]).bfloat16(), None if bias is None else bias.bfloat16()
    return Matmul.apply(h, weight, scale, b).to(x.dtype).reshape(*x.shape[:-1], len(weight))


class FP8Linear(QuantizedLinear):
    """Its weight is rounded at each call, and at each backward."""

    def low_precision(self, x):
        return linear(x, self.weight, None, self.bias)


class StoredLinear(nn.Module):
    """A linear that has nothing but the rounded weight, half of 16 bits: for inference.

    Buffers are integers, bit patterns of E4M3 [N, K] and of fp32 [N, 1]: `.to(torch.bfloat16)` must not round them.
    """

    def __init__(self, layer):
        super().__init__()
        (self.out_features, self.in_features), self.bias = layer.weight.shape, layer.bias
        q, scale = rounded(layer.weight.detach())
        if not torch.isfinite(scale).all():
            raise ValueError("a weight with NaN or infinity cannot be quantized")
        self.register_buffer("weight", q.view(torch.uint8))
        self.register_buffer("weight_scale", scale.view(torch.int32))

    def forward(self, x):
        weight, scale = self.weight.view(torch.float8_e4m3fn), self.weight_scale.view(torch.float32)
        return linear(x.to(compute_dtype(x)), weight, scale, self.bias)


def replace(layer):
    """The nn.Linear `layer` in 8 bits: stored so if its weight is frozen by now, for inference; else rounded at each
    call, as training, adapters and self-distillation need it."""
    return FP8Linear(layer) if layer.weight.requires_grad else StoredLinear(layer)
