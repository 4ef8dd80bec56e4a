"""NVFP4, four-bit floats with two levels of scales: rounding, memory layout, linears that emulate or store it, files.

A matrix [N, K] becomes a code of 4 bits for each number (E2M1: 0, .5, 1, 1.5, 2, 3, 4, 6 and a sign), a scale of 8 bits
(E4M3) for each 16 neighbours in a row, and one fp32 maximum of the whole: 4.5 bits a weight (Pretraining LLMs with
NVFP4, arXiv:2509.25149). The arithmetic is that of Transformer Engine 2.20, bit for bit.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from common import compute_dtype, put

BLOCK, CODE_MAX, SCALE_MAX = 16, 6, 448                 # neighbours that share a scale; largest code, largest scale
FLOAT_MAX = torch.finfo(torch.float32).max
HEADER = {"format": "nvfp4", "block": "16", "tile": "1x16", "nibble": "low"}            # of a file that `save` wrote


# ---- Rounding --------------------------------------------------------------------------------------------------------

@torch.library.custom_op("biwm::nvfp4_scales", mutates_args=())
def nvfp4_scales(x: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales of x [M, K] as bytes of E4M3 [M, K/16], the factors that bring x onto the grid [M, K/16], amax [].

    An operator of its own, so that compilers leave it alone: theirs are approximate divisions, and ties would flip.
    """
    b = x.unflatten(1, (-1, BLOCK)).abs().amax(-1).float()                              # [M, K/16]
    if rows == BLOCK:                                                                   # one scale for a 16x16 tile
        b = b.unflatten(0, (-1, BLOCK)).amax(1).repeat_interleave(BLOCK, 0)
    amax = b.amax()
    S = torch.div(torch.full_like(amax, CODE_MAX * SCALE_MAX), amax).clamp(max=FLOAT_MAX)
    s = (b * (S * (1 / CODE_MAX))).clamp(max=SCALE_MAX).to(torch.float8_e4m3fn)         # S / 6 first: others differ
    e = (1 / (s.float() * (1 / S))).clamp(max=FLOAT_MAX)
    return s.view(torch.uint8), e, amax


@nvfp4_scales.register_fake
def _(x, rows):
    s = x.new_empty(x.shape[0], x.shape[1] // BLOCK, dtype=torch.uint8)
    return s, s.new_empty(s.shape, dtype=torch.float32), s.new_empty((), dtype=torch.float32)


def check(shape, tile=(1, BLOCK), name="the tensor", divisors=(1, BLOCK)):
    """ValueError unless rows and columns of a [..., K] shape are multiples of the tile and of `divisors`."""
    if tile not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise ValueError(f"a tile is (1, 16) or (16, 16), got {tile}")
    size = (shape[:-1].numel(), shape[-1])
    for what, n, step in zip(("rows", "columns"), size, map(max, tile, divisors)):
        if n % step:
            raise ValueError(f"{name} is {list(size)}, but {what} must be a multiple of {step}; keep it unquantized")


def on_grid(x, tile=(1, BLOCK)):
    """x [..., K] -> nearest values q of E2M1 [M, K/16, 16], scales [M, K/16], amax []; ties go to even codes."""
    check(x.shape, tile)
    x = x.reshape(-1, x.shape[-1])
    scales, e, amax = nvfp4_scales(x, tile[0])
    y = (x.float().unflatten(1, (-1, BLOCK)) * e[..., None]).clamp(-CODE_MAX, CODE_MAX)
    a = y.abs()                                                                         # in steps of 0.5, 1 and 2
    a = torch.where(a < 2, (a * 2).round() * 0.5, torch.where(a < 4, a.round(), (a * 0.5).round() * 2))
    return torch.where(y < 0, -a, a), scales, amax


def factors(scales, amax):
    """scales [M, K/16], amax [] -> what a code stands for 1 of, fp32 [M, K/16]."""
    return (e4m3(scales) * amax) * (1 / (CODE_MAX * SCALE_MAX))


def rounded(x, tile=(1, BLOCK), dtype=None):
    """x as NVFP4 stores it, in its own shape; NaN or infinity turns all of it into NaN or infinity."""
    q, scales, amax = on_grid(x, tile)
    return (q * factors(scales, amax)[..., None]).reshape(x.shape).to(dtype or x.dtype)


# ---- Memory layout ---------------------------------------------------------------------------------------------------

def half(bits):
    """Integers as the bits of half-precision numbers, in fp32. Both small formats sit in them, exponents shifted."""
    return bits.to(torch.int16).view(torch.float16).float()


def e2m1(codes):
    c = codes.int()
    return half((c & 8) << 12 | (c & 7) << 9) * 2.0 ** 14


def e4m3(scales):
    s = scales.int()
    return half((s & 128) << 8 | (s & 127) << 7) * 2.0 ** 8


def quantize(x, tile=(1, BLOCK)):
    """x [..., K] -> codes uint8 [M, K/2] (even columns in low nibbles), scales as bytes of E4M3 [M, K/16], amax []."""
    q, scales, amax = on_grid(x, tile)
    if not torch.isfinite(amax):
        raise ValueError("a tensor with NaN or infinity cannot be quantized")
    bits = (q.flatten(1) * 2.0 ** -14).half().view(torch.int16).int()                   # e2m1 backwards
    c = (bits >> 12 & 8 | bits >> 9 & 7).to(torch.uint8)                                # [M, K]
    return c[:, ::2] | c[:, 1::2] << 4, scales, amax


def dequantize(codes, scales, amax, dtype):
    """codes [M, K/2], scales [M, K/16], amax [] -> [M, K]; said for each number alone, so that a compiler makes it one
    kernel that writes nothing else. A GPU has room for a packed model, but not for a weight in fp32 beside it."""
    k = torch.arange(2 * codes.shape[1], device=codes.device)                           # columns [K]
    q = e2m1(codes[:, k // 2] >> (k % 2 * 4).to(torch.uint8))                           # [M, K]
    return (q * factors(scales, amax)[:, k // BLOCK]).to(dtype)


class FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tile):
        return rounded(x, tile)

    @staticmethod
    def backward(ctx, g):
        return g, None


def fake_quant(x, tile=(1, BLOCK)):
    """x rounded to NVFP4 and back; the gradient passes as if it had not been (arXiv:1308.3432)."""
    return FakeQuant.apply(x, tile)


# ---- Linears ---------------------------------------------------------------------------------------------------------

class QuantizedLinear(nn.Linear):
    """Computes in low precision with the parameters of the nn.Linear it replaces.

    Optimizer, EMA, FSDP, adapters and files see no difference.
    """

    quantized = True                                    # `full_precision` turns it off

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        return self.low_precision(x.to(compute_dtype(x))) if self.quantized else super().forward(x)


class StraightThrough(torch.autograd.Function):
    """y = Q(x) Q(W)^T + b, with dx = g Q(W) and dW = g^T Q(x): the straight-through estimator (arXiv:1308.3432).

    Q(x) is x without `activations`. x and W are kept for the backward, not their rounded copies.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, tile, activations):
        ctx.save_for_backward(x, weight)
        ctx.tile, ctx.activations = tile, activations
        b = None if bias is None else bias.to(x.dtype)
        if not activations:
            return F.linear(x, rounded(weight, tile, x.dtype), b)
        # Code times scale is exact in 16 bits, so this is the 4-bit matmul itself, up to the order of its sums.
        (qx, sx, ax), (qw, sw, aw) = on_grid(x), on_grid(weight, tile)
        qx, qw = ((q * e4m3(s)[..., None]).flatten(1).to(x.dtype) for q, s in ((qx, sx), (qw, sw)))
        y = (F.linear(qx, qw).float() * (ax * aw / (CODE_MAX * SCALE_MAX) ** 2)).to(x.dtype)        # [M, N]
        return (y if b is None else y + b).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, g):                                                               # [..., N]
        (x, weight), g2 = ctx.saved_tensors, g.flatten(0, -2)                           # [..., K], [N, K], [M, N]
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = g @ rounded(weight, ctx.tile, g.dtype)
        if ctx.needs_input_grad[1]:
            dw = (g2.T @ (rounded(x) if ctx.activations else x).flatten(0, -2)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = g2.sum(0).to(weight.dtype)
        return dx, dw, db, None, None


class EmulatedLinear(QuantizedLinear):
    update = None                                       # of adapters: weight -> what it is with them, to be rounded

    def __init__(self, layer, tile, activations):
        super().__init__(layer)
        self.tile, self.activations = tile, activations

    def low_precision(self, x):
        weight = self.weight if self.update is None else self.update(self.weight)
        return StraightThrough.apply(x, weight, self.bias, self.tile, self.activations)


class PackedLinear(nn.Module):
    """A linear whose weight takes 4.5 bits a number and is unpacked just before an ordinary matmul.

    All buffers are integers, bit patterns of scales and amax included: `.to(torch.bfloat16)` must not round them.
    """

    def __init__(self, layer, tile=(1, BLOCK)):
        super().__init__()
        (N, K), self.bias = layer.weight.shape, layer.bias
        self.in_features, self.out_features = K, N
        if layer.weight.is_meta:                                                        # a file will fill it
            shapes = ((N, K // 2), torch.uint8), ((N, K // BLOCK), torch.uint8), ((), torch.float32)
            codes, scales, amax = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes)
        else:
            codes, scales, amax = quantize(layer.weight.detach(), tile)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scales)
        self.register_buffer("weight_amax", amax.view(torch.int32))

    def forward(self, x):
        dtype = compute_dtype(x)
        weight = unpack(self.weight, self.weight_scale, self.weight_amax.view(torch.float32), dtype)    # [N, K]
        return F.linear(x.to(dtype), weight, None if self.bias is None else self.bias.to(dtype))


def fused(function):
    """`function` of tensors as a kernel of its own on a GPU, unless it is within what is being compiled."""
    @functools.cache
    def compiled():                                     # for each shape: with sizes left open it is five times slower
        torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
        return torch.compile(function, dynamic=False)

    def call(x, *rest):
        return (compiled() if x.is_cuda and not torch.compiler.is_compiling() else function)(x, *rest)
    return call


unpack = fused(dequantize)                              # half a byte read and two written for each weight


# ---- Files -----------------------------------------------------------------------------------------------------------

def save(model, path, modelopt=False, **notes):
    """Write a model with packed linears: codes, E4M3 scales, fp32 amax; everything else in bf16. With `modelopt`, under
    the names of NVIDIA ModelOpt: NAME.weight_scale_2 = amax / 2688 for NAME.weight_amax."""
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not packed:
        raise ValueError("the model has no packed linear; quantize_model(model, 'packed') makes them")
    tensors = {}
    for key, value in model.state_dict().items():
        name, _, leaf = key.rpartition(".")
        if name in packed and leaf == "weight_scale":
            value = value.view(torch.float8_e4m3fn)
        elif name in packed and leaf == "weight_amax":
            value = value.view(torch.float32)
            key, value = (f"{key[:-4]}scale_2", value / (CODE_MAX * SCALE_MAX)) if modelopt else (key, value)
        elif value.is_floating_point():
            value = value.bfloat16()
        tensors[key] = value.cpu().contiguous()
    partial = Path(f"{path}.partial")
    save_file(tensors, partial, metadata=HEADER | {"scale": "amax/2688" if modelopt else "amax"} | notes)
    put(partial, path)


def load(model, files, device, dtype):
    """Fill `model`, a backbone on the meta device, from packed files: no full weight is ever made.

    What is not packed becomes `dtype`, or what the backbone says. Errors (ValueError) name the file and the tensor.
    """
    tensors, linears = {}, {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for file in files:
        with safe_open(file, "pt") as reader:
            stored = {key: reader.get_tensor(key) for key in reader.keys()}
            tensors |= buffers(stored, reader.metadata() or {}, file)
    tensors = {own: value for key, value in tensors.items() if (own := model.official(key))}
    for name in {key.rpartition(".")[0] for key in tensors if key.endswith(".weight_scale")} & linears:
        model.set_submodule(name, PackedLinear(model.get_submodule(name)))
    kinds = {key: model.stored_dtype(key, dtype) if value.is_floating_point() else value.dtype
             for key, value in tensors.items()}
    try:
        model.load_state_dict({key: value.to(device, kinds[key]) for key, value in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{files[0]}: {' '.join(str(error).split())}") from None
    return model.requires_grad_(True)


def buffers(tensors, header, file):
    """Tensors of a file -> the buffers of PackedLinear where it has them; all others unchanged."""
    kinds = {"weight_scale": torch.float8_e4m3fn, "weight_amax": torch.float32, "weight_scale_2": torch.float32}
    leaves, out = {key.rpartition(".")[2] for key in tensors}, {}
    said = HEADER | header if "weight_amax" not in leaves else header                   # ModelOpt's need no header
    if leaves & kinds.keys() and not all(said.get(k) in (v, "high" if k == "nibble" else v) for k, v in HEADER.items()):
        raise ValueError(f"{file} is packed in another way than {HEADER}: its header says {header}")
    for key, value in tensors.items():
        name, _, leaf = key.rpartition(".")
        kind = torch.uint8 if leaf == "weight" and f"{name}.weight_scale" in tensors else kinds.get(leaf, value.dtype)
        if value.dtype != kind:
            raise ValueError(f"{file}: '{key}' is {value.dtype}, expected {kind}")
        if leaf == "weight_scale":
            value = value.view(torch.uint8)
        elif leaf == "weight_amax":
            value = value.view(torch.int32)
        elif leaf == "weight_scale_2":
            key, value = f"{name}.weight_amax", (value.reshape(()) * (CODE_MAX * SCALE_MAX)).view(torch.int32)
        elif value.dtype == torch.uint8 and said["nibble"] == "high":
            value = value >> 4 | value << 4
        if leaf != "input_scale":                   # of static activations; ours stay in 16 bits or bring their own
            out[key] = value
    return out
