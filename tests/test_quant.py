"""NVFP4 rounding against scalar arithmetic and two public libraries, the linears made of it, files, the engine's use."""

import bisect
import functools
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import common
import nvfp4
import quant
import weights
from compress import Settings, attach
from model import PRESETS, build, load
from nvfp4 import EmulatedLinear, PackedLinear, e2m1, e4m3
from quant import (Unavailable, choose, dequantize, fake_quant, full_precision, quantize, quantize_model,
                   self_distillation, softmax_distillation, snr)
from weights import save

ROOT = Path(common.__file__).parent
VALUES = [0, .5, 1, 1.5, 2, 3, 4, 6]                                                    # E2M1, in the order of codes
TILES = [(1, 16), (16, 16)]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def student_t(*shape, freedom=4):
    """Heavy tails: Student's t, a normal over the root of a mean of squares."""
    return randn(*shape) / sum(randn(*shape, seed=i).square() for i in range(1, freedom + 1)).div(freedom).sqrt()


def decoded(x, tile=(1, 16)):
    return dequantize(*quantize(x, tile), torch.float32)


def nibbles(codes):
    return torch.stack([codes & 15, codes >> 4], -1).flatten(1)                         # [M, K]


# ---- The format (1, 2, 3) --------------------------------------------------------------------------------------------

def test_every_code_and_every_scale_decodes_exactly():
    assert e2m1(torch.arange(16, dtype=torch.uint8)).tolist() == VALUES + [-v for v in VALUES]
    scales = torch.arange(256, dtype=torch.uint8)
    exact = scales.view(torch.float8_e4m3fn).float()
    finite = exact.isfinite()
    assert finite.sum() == 254 and torch.equal(e4m3(scales)[finite], exact[finite])


def test_ties_go_to_even_codes():
    middles = torch.tensor([.25, .75, 1.25, 1.75, 2.5, 3.5, 5])
    x = torch.zeros(2, 16)
    x[0, 0], x[1] = 2688, torch.cat([torch.tensor([6.0]), middles, -middles, torch.tensor([-0.0])])    # factors of 1
    codes, scales, amax = quantize(x)
    assert amax == 2688 and e4m3(scales).tolist() == [[448], [1]]
    assert nibbles(codes)[1].tolist() == [7, 0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14, 0]


@functools.cache
def scale_table():
    return [np.float32((c & 7) / 8 * 2 ** -6 if c < 8 else (1 + (c & 7) / 8) * 2.0 ** ((c >> 3) - 7)) for c in range(127)]


def nearest(table, v):
    """Index of the entry of `table` closest to `v`, the even one of two."""
    i = bisect.bisect_left(table, v)
    if i == len(table) or (i and v - table[i - 1] < table[i] - v):
        return i - 1
    return i - (i % 2) if i and v - table[i - 1] == table[i] - v else i


def oracle(x, rows):
    """Codes, scale bytes and amax of x, an fp32 array [M, K], number by number, in the arithmetic of the specification."""
    one, (M, K) = np.float32(1), x.shape
    blocks = np.abs(x).reshape(M // rows, rows, K // 16, 16).max((1, 3))
    amax, biggest = blocks.max(), np.finfo(np.float32).max
    S = one if amax == 0 else min(np.float32(2688) / amax, biggest)
    codes, scales = np.zeros((M, K), np.uint8), np.zeros((M, K // 16), np.uint8)
    for i in range(M // rows):
        for j in range(K // 16):
            s = nearest(scale_table(), min(float(blocks[i, j] * (S * (one / np.float32(6)))), 448))
            e = min(one / (scale_table()[s] * (one / S)), biggest)
            scales[i * rows:(i + 1) * rows, j] = s
            for r in range(i * rows, (i + 1) * rows):
                for k, y in enumerate((x[r, j * 16:(j + 1) * 16] * e).clip(-6, 6).tolist(), j * 16):
                    codes[r, k] = nearest(VALUES, abs(y)) + 8 * (y < 0)
    return codes, scales, amax


def hard_cases():
    """About 10^5 numbers each, [112, 896]."""
    shape = 112, 896
    peaks = torch.exp2(torch.arange(112) % 12 - 3.0)[:, None]                           # powers of two: factors are exact
    ties = torch.tensor([.25, .75, 1.25, 1.75, 2.5, 3.5, 5, 6])[torch.randint(8, shape)] * randn(*shape).sign() * peaks
    ties[:, ::16], ties[0, 0] = 6 * peaks, 2688
    onehot = torch.zeros(shape)
    onehot[5, 7] = -3.3
    return {"normal": randn(*shape), "ties": ties, "heavy rows": randn(*shape) * torch.exp(4 * randn(112, 1)),
            "zero": torch.zeros(shape), "one hot": onehot, "tiny": 1e-30 * randn(*shape), "huge": 1e30 * randn(*shape)}


@pytest.mark.parametrize("tile, dtype", [((1, 16), torch.float32), ((1, 16), torch.bfloat16), ((1, 16), torch.float16),
                                         ((16, 16), torch.bfloat16)])
@np.errstate(over="ignore", divide="ignore", under="ignore")
def test_quantize_equals_scalar_arithmetic(tile, dtype):
    for name, x in hard_cases().items():
        x = x.to(dtype)
        if dtype == torch.float16 and name in ("heavy rows", "tiny", "huge"):
            continue                                                                    # float16 cannot hold them
        codes, scales, amax = quantize(x, tile)
        expected = oracle(x.float().numpy(), tile[0])
        assert amax == expected[2], name
        assert np.array_equal(scales.numpy(), expected[1]), name
        live = torch.from_numpy(expected[1] != 0).repeat_interleave(16, 1)              # codes of zero scales mean nothing
        assert np.array_equal(nibbles(codes)[live].numpy(), expected[0][live.numpy()]), name
        factors = np.asarray(scale_table())[expected[1]] * amax.numpy() * np.float32(1 / 2688)      # in this order
        values = np.float32(VALUES + [-v for v in VALUES])[nibbles(codes)] * factors.repeat(16, 1)
        assert np.array_equal(dequantize(codes, scales, amax, torch.float32).numpy(), values), name


def test_torchao_gives_the_same_bytes():
    found = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason="torchao is not installed")
    x = randn(256, 512)
    codes, scales, amax = quantize(x)
    other = found.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=found.per_tensor_amax_to_scale(amax))
    assert torch.equal(other.qdata.view(torch.uint8), codes)
    assert torch.equal(other.scale.view(torch.uint8).flatten(), scales.flatten())


@pytest.fixture
def reference(monkeypatch):
    """Transformer Engine's own reference quantizer, plain torch: loaded alone, for the package wants a GPU."""
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None:
        pytest.skip("transformer_engine is not installed")
    root = "transformer_engine.pytorch"

    class Quantizer:
        def __init__(self, rowwise, columnwise):
            self.rowwise_usage, self.columnwise_usage = rowwise, columnwise
    parts = {"transformer_engine": {}, root: {}, f"{root}.custom_recipes": {}, f"{root}.tensor": {},
             f"{root}.tensor.utils": {"is_custom": None},
             f"{root}.quantized_tensor": {"QuantizedTensorStorage": object, "Quantizer": Quantizer}}
    for name, content in parts.items():
        module = types.ModuleType(name)
        module.__path__ = [str(Path(spec.origin).parent / "pytorch" / "custom_recipes")]
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("gemm", "reference_utils", "reference_nvfp4"):
        monkeypatch.delitem(sys.modules, f"{root}.custom_recipes.{name}", raising=False)
    found = importlib.import_module(f"{root}.custom_recipes.reference_nvfp4")
    yield found
    for name in ("gemm", "reference_utils", "reference_nvfp4"):
        sys.modules.pop(f"{root}.custom_recipes.{name}", None)


def engine_quantizer(reference, tile):
    return reference.NVFP4QuantizerRef(dtype=None, rowwise=True, columnwise=True, quant_tile_shape=tile)


@pytest.mark.parametrize("tile", TILES)
def test_transformer_engine_gives_the_same_bytes(reference, tile):
    for x in hard_cases().values():
        other, (codes, scales, amax) = engine_quantizer(reference, tile).quantize(x), quantize(x, tile)
        live = (scales != 0).repeat_interleave(8, 1)
        assert torch.equal(other.scale.view(torch.uint8), scales) and other.global_amax_row == amax
        assert torch.equal(other.data[live], codes[live])


def test_transformer_engine_gives_the_same_product(reference):
    x, weight = randn(64, 128).bfloat16(), randn(48, 128, seed=1).bfloat16()
    rows = engine_quantizer(reference, (1, 16))
    qx, qw = rows.quantize(x), engine_quantizer(reference, (16, 16)).quantize(weight)
    expected = rows.qgemm(qx.data, qw.data, None, torch.bfloat16, qx.scale, qw.scale, qresult_x=qx, qresult_w=qw)
    for kind, equal in ((torch.bfloat16, 0.5), (torch.float32, 0.999)):                 # the former is rounded twice
        ours = EmulatedLinear(linear(weight.to(kind)), (16, 16), True)(x.to(kind)).bfloat16()
        steps = (ours.view(torch.int16).int() - expected.view(torch.int16).int()).abs()     # in units of the last place
        assert steps.max() <= 1 and (steps == 0).float().mean() > equal


# ---- Its properties (4 to 10) ----------------------------------------------------------------------------------------

def test_zero_stays_zero_and_bad_input_is_named():
    codes, scales, amax = quantize(torch.zeros(16, 32))
    assert not codes.any() and not scales.any() and amax == 0 and not decoded(torch.zeros(16, 32)).any()
    for bad in (torch.nan, torch.inf):
        x = randn(4, 32)
        x[2, 3] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize(x)
        assert not fake_quant(x).isfinite().any()                                       # the loss will not be, either
    with pytest.raises(ValueError, match="columns must be a multiple of 16"):
        quantize(randn(4, 24))
    with pytest.raises(ValueError, match="rows must be a multiple of 16"):
        quantize(randn(24, 32), (16, 16))
    with pytest.raises(ValueError, match="layers.1 is .*columns must be a multiple of 16"):
        quantize_model(nn.ModuleDict({"layers": nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))}), "packed", layers=".*")


def test_powers_of_two_change_the_maximum_alone():
    x = randn(16, 64)
    codes, scales, amax = quantize(x)
    for k in range(-20, 21):
        c, s, a = quantize(x * 2.0 ** k)
        assert torch.equal(c, codes) and torch.equal(s, scales) and a == amax * 2.0 ** k


@pytest.mark.parametrize("tile", TILES)
def test_rounding_twice_is_rounding_once(tile):
    x = randn(256, 256)
    codes, scales, _ = quantize(x, tile)
    again = quantize(dequantize(*quantize(x, tile), torch.float32), tile)
    assert torch.equal(e2m1(nibbles(again[0])), e2m1(nibbles(codes))) and torch.equal(again[1], scales)     # -0 is 0
    once = fake_quant(x.bfloat16(), tile)
    assert torch.equal(fake_quant(once, tile), once)
    assert torch.equal(fake_quant(x, tile), decoded(x, tile))                           # without codes, or by them


def test_error_is_bounded_by_the_block():
    x = student_t(256, 512)
    codes, scales, amax = quantize(x)
    blocks = x.unflatten(1, (-1, 16))
    peak = blocks.abs().amax(-1, keepdim=True)
    normal = (scales >= 8)[..., None]                                                   # E4M3 without subnormals
    error = (blocks - dequantize(codes, scales, amax, torch.float32).unflatten(1, (-1, 16))).abs()
    assert normal.all() and (error <= (1 + 2 ** -4) * peak / 6).all()
    at_peak = nibbles(codes).unflatten(1, (-1, 16)).gather(-1, blocks.abs().argmax(-1, keepdim=True))
    assert (at_peak % 8 == 7).all()


def test_signal_to_noise_of_gaussians_and_heavy_tails():
    x = randn(2048, 2048)
    assert 20.3 < snr(x, fake_quant(x)) < 20.6 and 18.9 < snr(x, fake_quant(x, (16, 16))) < 19.2
    heavy = student_t(1024, 1024)
    assert snr(heavy, fake_quant(heavy)) > 3 + snr(heavy, fake_quant(heavy, (16, 16)))
    weight, x = randn(512, 1024), randn(512, 1024, seed=1)
    assert 17.2 < snr(x @ weight.T, EmulatedLinear(linear(weight), (1, 16), True)(x)) < 17.7
    assert 20.3 < snr(x @ weight.T, EmulatedLinear(linear(weight), (1, 16), False)(x)) < 20.6


def test_square_tiles_commute_with_transposition():
    x = student_t(64, 96)
    assert torch.equal(fake_quant(x.T, (16, 16)), fake_quant(x, (16, 16)).T)
    assert not torch.equal(fake_quant(x.T), fake_quant(x).T)


def test_products_of_codes_and_scales_are_exact_in_16_bits():
    table = e2m1(torch.arange(16))[:, None] * e4m3(torch.arange(127))
    assert torch.equal(table.bfloat16().float(), table) and torch.equal(table.half().float(), table)
    x, weight = randn(8, 96), randn(24, 96, seed=1)
    (cx, sx, ax), (cw, sw, aw) = quantize(x), quantize(weight)
    qx, qw = (e2m1(nibbles(c)).double().unflatten(1, (-1, 16)) for c in (cx, cw))
    blocks = torch.einsum("mbk,nbk->mnb", qx, qw) * e4m3(sx).double()[:, None] * e4m3(sw).double()
    expected = blocks.sum(-1) * ax.double() * aw.double() / (36 * 448 * 448)
    ours = EmulatedLinear(linear(weight), (1, 16), True)(x)
    assert (ours - expected).norm() < 1e-6 * expected.norm()


# ---- Linears (11, 12) ------------------------------------------------------------------------------------------------

def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    return layer


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("activations", [False, True])
def test_gradients_are_straight_through(activations, tile):
    layer = EmulatedLinear(linear(randn(32, 64), randn(32)), tile, activations)
    x, g = randn(2, 5, 64, seed=1).requires_grad_(), randn(2, 5, 32, seed=2)
    y = layer(x)
    (y * g).sum().backward()
    q = decoded(x.detach()).view_as(x) if activations else x.detach()
    torch.testing.assert_close(y, F.linear(q, decoded(layer.weight.detach(), tile), layer.bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, g @ decoded(layer.weight.detach(), tile), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, g.flatten(0, 1).T @ q.flatten(0, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, g.sum((0, 1)))
    y = randn(4, 32).requires_grad_()
    fake_quant(y).mul(3).sum().backward()
    assert torch.equal(y.grad, torch.full((4, 32), 3.0))


def test_master_weights_are_rounded_from_fp32():
    layer, x = linear(randn(32, 64), randn(32)), randn(8, 64, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = EmulatedLinear(layer, (1, 16), False)(x)
    assert torch.equal(y, F.linear(x.bfloat16(), decoded(layer.weight.detach()).bfloat16(), layer.bias.bfloat16()))


def test_on_the_grid_quantization_changes_nothing():
    weight = decoded(randn(32, 64))
    layer, x = EmulatedLinear(linear(weight, randn(32)), (1, 16), False), randn(8, 64, seed=1)
    gradients = []
    for context in (full_precision(layer), torch.enable_grad()):
        with context:
            layer(x).square().sum().backward()
        gradients.append([layer.weight.grad.clone(), layer.bias.grad.clone()])
        layer.zero_grad()
    torch.testing.assert_close(*gradients)


def test_adapters_learn_over_a_frozen_emulated_base():
    base = EmulatedLinear(linear(randn(32, 64), randn(32)), (1, 16), True).requires_grad_(False)
    down, up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
    x = randn(8, 64)
    base(x + up(down(x))).square().sum().backward()
    assert down.weight.grad.abs().sum() > 0 and base.weight.grad is None


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.Tanh(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        return x + self.ffn(x)


class Toy(nn.Module):
    """Two blocks with Wan's names and a head; every parameter random."""

    def __init__(self, dim=64):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(dim) for _ in range(2)), nn.Linear(dim, 24)
        for i, p in enumerate(self.parameters()):
            p.data = randn(*p.shape, seed=i) / dim ** 0.5

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


NAMES = ["blocks.0.ffn.0", "blocks.0.ffn.2", "blocks.1.ffn.0", "blocks.1.ffn.2"]


SMALL = dict(dim=64, heads=4, ffn=128, layers=2)


def tiny(dtype=torch.float32, name="tiny", **fields):
    """A small backbone, every parameter random; in `dtype` as `load` makes it."""
    model = build(name, **SMALL, **fields)
    for i, (name, p) in enumerate(model.named_parameters()):
        p.data = (randn(*p.shape, seed=i) / p.shape[-1] ** 0.5).to(torch.float32 if model.fp32.search(name) else dtype)
    return model.eval()


def run(model):
    spec = model.spec
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(randn(1, spec.channels, 3, 4, 6), randn(1, 3).abs(), {"text": randn(1, spec.text_len, spec.text_dim)})


@pytest.mark.parametrize("name, fields, keep, layers", [
    ("tiny", {}, (), 20), ("ltx2.3-22b", dict(text_dim=64, channels=8), (), 20),
    ("hunyuan1.5-8b", dict(text_dim=24, channels=4, rope_dims=(4, 6, 6)), ("_mod",), 24)])
def test_packed_equals_emulated_bit_for_bit_after_a_file_and_casts(tmp_path, name, fields, keep, layers):
    plain, emulated, packed = (tiny(torch.bfloat16, name, **fields) for _ in range(3))
    quantize_model(emulated, "emulate")
    quantize_model(packed, "packed", keep)
    for p in packed.parameters():
        p.data = p.data.bfloat16().to(p.dtype)                                          # what a file keeps of them
    emulated.load_state_dict({k: v for k, v in packed.state_dict().items() if v.is_floating_point()}, strict=False)
    nvfp4.save(packed, tmp_path / "packed.safetensors", backbone=name)
    loaded = load(name, tmp_path / "packed.safetensors", dtype=torch.bfloat16, **SMALL, **fields)
    stored = {k: v.clone() for k, v in packed.state_dict().items() if not v.is_floating_point()}
    assert len(stored) == 3 * layers
    for layer in loaded.modules():
        if isinstance(layer, PackedLinear):
            layer.to(torch.bfloat16).to(torch.float16).to(torch.bfloat16).to("cpu")
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in stored.items())
    assert torch.equal(run(packed), run(emulated)) and torch.equal(run(loaded), run(emulated))
    assert not torch.equal(run(plain), run(emulated))


@pytest.mark.slow
@pytest.mark.parametrize("activations", [False, True])
def test_compiled_equals_eager_bit_for_bit(activations):
    codes = quantize(randn(64, 128))
    assert torch.equal(torch.compile(dequantize, dynamic=True)(*codes, torch.bfloat16), dequantize(*codes, torch.bfloat16))
    layer = EmulatedLinear(linear(student_t(32, 64), randn(32)), (1, 16), activations)
    x = student_t(40, 64)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


# ---- Memory and names (13, 14) ---------------------------------------------------------------------------------------

def test_bytes_are_counted_exactly():
    model = Toy()
    full = sum(p.nbytes for p in model.parameters())
    names = quantize_model(model, "packed")
    weights = sum(model.get_submodule(n).in_features * model.get_submodule(n).out_features for n in names)
    kept = sum(p.nbytes for p in model.parameters())                                    # head and all biases
    assert sum(t.nbytes for t in model.state_dict().values()) == weights * 9 // 16 + 4 * len(names) + kept
    assert full - kept == 4 * weights and 2 * weights >= 3.5 * (weights * 9 // 16 + 4 * len(names))


def official(name):
    with torch.device("meta"):
        model = build(name, control=None)
    return model, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name, edge, layers, gigabytes", [
    ("wan2.1-1.3b", 0, 300, 0.84), ("wan2.1-1.3b", 3, 240, 1.24), ("wan2.2-5b", 0, 300, 2.95), ("wan2.2-5b", 3, 240, 4.36),
    ("hunyuan1.5-8b", 0, 756, 4.93), ("hunyuan1.5-8b", 3, 672, 6.23), ("ltx2.3-22b", 0, 480, 7.73), ("ltx2.3-22b", 3, 420, 10.04)])
def test_layer_lists_and_sizes_of_the_official_models(name, edge, layers, gigabytes):
    model, parameters = official(name)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = quantize_model(model, "packed", edge_blocks=edge)
    packed = sum(t.nbytes for name in names for t in model.get_submodule(name).buffers())
    weights = sum(linears[name].weight.numel() for name in names)
    assert len(names) == layers and packed == weights * 9 // 16 + 4 * layers
    assert round((packed + 2 * (parameters - weights)) / 1e9, 2) == gigabytes           # the rest in bf16
    assert all(t.is_meta for t in model.state_dict().values())
    islands = sum(p.nbytes if model.stored_dtype(k, torch.bfloat16) == torch.float32 else 2 * p.numel()
                  for k, p in model.named_parameters())                                 # as `load` has it in memory
    assert edge or packed + islands < 9e9


def test_modulation_of_hunyuan_is_only_packed():
    model, parameters = official("hunyuan1.5-8b")
    names = choose(model, "emulate")
    assert len(names) == 648 and not any("mod" in name for name in names)
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    assert round((weights * 9 / 16 + 2 * (parameters - weights)) / 1e9, 2) == 8.84


def test_the_pass_replaces_what_it_says():
    model = Toy()
    head, parameters = model.head, dict(model.named_parameters())
    assert quantize_model(model, "emulate", keep=("head",)) == NAMES == sorted(NAMES)
    assert model.head is head and type(head) is nn.Linear
    assert [n for n, m in model.named_modules() if isinstance(m, EmulatedLinear)] == NAMES
    assert all(p is parameters[name] for name, p in model.named_parameters())           # an optimizer keeps them
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(model, "packed")
    assert quantize_model(Toy(), "packed", keep=(r"ffn\.0",), layers=".*") == ["blocks.0.ffn.2", "blocks.1.ffn.2", "head"]


@pytest.mark.parametrize("arguments, words", [
    (dict(keep=("attn",)), "no linear has a name with 'attn'"), (dict(keep=("ffn",)), "no linear is left"),
    (dict(layers="nothing"), "no linear is left"), (dict(edge_blocks=1), "no linear is left"),
    (dict(delayed=True), "does not take"), (dict(activations=True), "does not take"), (dict(tile=(4, 4)), "a tile is")])
def test_what_the_pass_refuses(arguments, words):
    model = Toy()
    with pytest.raises(ValueError, match=words):
        quantize_model(model, "packed", **arguments)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    with pytest.raises(ValueError, match="unknown quantization mode 'int4'; choose emulate"):
        quantize_model(model, "int4")


# ---- The engine, as far as a machine without it can tell (15) --------------------------------------------------------

class Recipe:
    def __init__(self, **fields):
        self.fields = fields

    def delayed(self):
        return type(self).__name__ == "DelayedScaling"


@pytest.fixture
def engine(monkeypatch):
    """A GPU and a Transformer Engine that only keep a diary."""
    diary = []

    class Linear(nn.Linear):
        def __init__(self, K, N, bias, params_dtype, device):
            assert device == "meta"
            super().__init__(K, N, bias, device, params_dtype)

        def forward(self, x, is_first_microbatch):
            diary.append(("linear", x.shape[0], is_first_microbatch))
            return super().forward(x)

    class autocast:
        def __init__(self, enabled, recipe):
            self.recipe = recipe

        def __enter__(self):
            diary.append("enter")

        def __exit__(self, *_):
            diary.append("exit")
    te, common_part, recipe = (types.ModuleType(f"transformer_engine.{name}") for name in ("pytorch", "common", "common.recipe"))
    te.Linear, te.autocast, te.capability = Linear, autocast, (10, 0)
    te.is_nvfp4_available = te.is_fp8_available = lambda return_reason: (True, "")
    for name in ("DelayedScaling", "Float8CurrentScaling", "NVFP4BlockScaling"):
        setattr(recipe, name, type(name, (Recipe,), {}))
    common_part.recipe = recipe
    package = types.ModuleType("transformer_engine")
    package.pytorch, package.common = te, common_part
    for name, module in {"": package, ".pytorch": te, ".common": common_part, ".common.recipe": recipe}.items():
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: te.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    te.diary = diary
    return te


def test_a_mode_that_cannot_run_says_why_in_one_line(engine, monkeypatch, capsys):
    engine.capability = (9, 0)
    with pytest.raises(RuntimeError, match=r"mode te cannot run here: .*capability 10.0 .*Test GPU has 9.0; .*packed") as old:
        quantize_model(Toy(), "te")
    assert quantize_model(Toy(), "fp8-te") == NAMES                                     # Hopper has this
    assert quantize_model(Toy(), "auto") == NAMES and "auto: packed, for te cannot run here" in capsys.readouterr().out
    engine.capability = (8, 0)
    for mode in ("fp8", "fp8-te"):
        with pytest.raises(RuntimeError, match=rf"mode {mode} cannot run here: .*capability 8.9 .*FP8"):
            quantize_model(Toy(), mode)
    engine.capability = (8, 9)
    monkeypatch.setattr(quant.fp8, "refusal", lambda: "torch has no 8-bit matmul for it")
    with pytest.raises(RuntimeError, match="mode fp8 cannot run here: torch has no 8-bit matmul"):
        quantize_model(Toy(), "fp8")
    engine.capability = (10, 0)
    assert quantize_model(Toy(), "auto") == NAMES and "auto: te" in capsys.readouterr().out
    engine.is_nvfp4_available = lambda return_reason: (False, "no FP4 today")
    with pytest.raises(RuntimeError, match="no FP4 today"):
        quantize_model(Toy(), "te")
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    with pytest.raises(RuntimeError, match="cannot be imported.*install the extra nvfp4") as missing:
        quantize_model(Toy(), "te")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no NVIDIA GPU is visible; mode packed runs anywhere") as none:
        quantize_model(Toy(), "te")
    for error in (old, missing, none):
        assert "\n" not in str(error.value) and isinstance(error.value, Unavailable)    # an OSError: one line in scripts


def test_engine_layers_pad_rows_and_cast_frozen_weights_once(engine):
    model, plain = Toy(), Toy()
    keys = list(model.state_dict())
    quantize_model(model, "te")
    assert list(model.state_dict()) == keys                                             # no state of the engine
    x = randn(3, 15, 64).requires_grad_()
    torch.testing.assert_close(model(x), plain(x))
    assert engine.diary == ["enter", ("linear", 64, None), "exit"] * 4                  # 45 rows, trained weights
    model(x).sum().backward()
    assert model.blocks[0].ffn[0].weight.grad.abs().sum() > 0
    model.requires_grad_(False)
    for expected in (True, False, False):
        engine.diary.clear()
        model(x)
        assert {entry[2] for entry in engine.diary if entry[0] == "linear"} == {expected}
    model.blocks[0].ffn[0].weight.mul_(2)                                            # another weight: cast again
    engine.diary.clear()
    model(x)
    assert [entry[2] for entry in engine.diary if entry[0] == "linear"] == [True, False, False, False]
    with full_precision(model):
        engine.diary.clear()
        model(x)
    assert not engine.diary
    recipe = model.blocks[0].ffn[0].recipe.fields
    assert recipe["disable_rht"] and recipe["disable_2d_quantization"] and recipe["backward_override"] == "dequantized"


def test_delayed_scaling_counts_a_forward_of_the_whole_network_as_one_step(engine):
    model = Toy()
    quantize_model(model, "fp8-te", delayed=True)
    model(randn(32, 64))
    assert engine.diary[:2] == ["enter", "enter"] and engine.diary[-2:] == ["exit", "exit"]
    assert engine.diary.count("enter") == engine.diary.count("exit") == 5
    with pytest.raises(RuntimeError):
        model(randn(32, 63))
    assert engine.diary.count("enter") == engine.diary.count("exit")                    # closed after an error, too
    with pytest.raises(ValueError, match="does not take"):
        quantize_model(Toy(), "fp8-te", tile=(16, 16))


def test_importing_and_other_modes_leave_the_engine_alone():
    program = ("import sys, torch, quant; layer = torch.nn.Sequential(torch.nn.Linear(16, 16));"
               "quant.quantize_model(layer, 'emulate', layers='.*'); layer(torch.ones(1, 16));"
               "quant.settle('packed'); assert 'transformer_engine' not in sys.modules")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# ---- Training (16, 17, 18) -------------------------------------------------------------------------------------------

def regression(activations):
    """Loss of a small network quantized after training, and after 200 more steps with quantization on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32))
    x = randn(512, 64)
    y = model(x).detach()
    quantize_model(model, "emulate", layers=".*", activations=activations)
    before = F.mse_loss(model(x), y).item()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for _ in range(200):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        decay.step()
    return F.mse_loss(model(x), y).item() / before


@pytest.mark.parametrize("activations", [False, True])
def test_training_through_the_rounding_repairs_what_it_broke(activations):
    assert regression(activations) < 0.75


def test_full_precision_is_exact_and_ends_with_an_exception():
    model, x = Toy(), randn(8, 64)
    exact = model(x)
    quantize_model(model, "emulate", activations=True)
    rounded = model(x)
    with pytest.raises(KeyError):
        with full_precision(model):
            assert torch.equal(model(x), exact)
            with full_precision(model):
                pass
            assert torch.equal(model(x), exact)                                         # the inner one did not end it
            raise KeyError
    assert torch.equal(model(x), rounded) and not torch.equal(rounded, exact)
    quantize_model(packed := Toy(), "packed")
    with pytest.raises(ValueError, match="stored ones cannot"):
        full_precision(packed).__enter__()


@pytest.mark.parametrize("loss", [self_distillation, lambda a, b, s, mask: softmax_distillation(a, b, 3 * b, s, mask=mask)])
def test_losses_of_a_batch_are_the_mean_of_those_of_its_parts(loss):
    a, b, mask = randn(2, 4, 3, 5, 6, seed=1), randn(2, 4, 3, 5, 6, seed=2), torch.tensor([[False, False, True], [True] * 3])
    a, b = a * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1), b * torch.tensor([2.0, 1.0]).view(2, 1, 1, 1, 1)
    of = lambda part: loss(a[part], b[part], torch.tensor([0.3, 0.9])[part], mask=mask[part])[0].item()
    assert of(slice(None)) == pytest.approx((of(slice(0, 1)) + of(slice(1, 2))) / 2, rel=1e-5)


def test_self_distillation_sees_a_tint_and_moves_the_student_only():
    v, x_t, sigma = randn(2, 4, 3, 5, 6), randn(2, 4, 3, 5, 6, seed=1), torch.tensor([[0.2, 0.5, 1.0], [0.0, 0.3, 0.9]])
    student, teacher = (v + 2).requires_grad_(), v.clone().requires_grad_()
    loss, stats = self_distillation(student, teacher, sigma)
    power = v.square().mean((1, 2, 3, 4))                                               # of each sample
    torch.testing.assert_close(loss, ((4 * (1 + 0.25 * sigma.square())).mean(1) / power).mean())
    torch.testing.assert_close(stats["quant_snr"], -10 * torch.log10(4 / power.mean()))
    loss.backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    assert self_distillation(v, v, sigma)[0] == 0
    blind, _ = softmax_distillation(v + 2, v, x_t, sigma)
    assert abs(blind) < 1e-6 and softmax_distillation(v * 2, v, x_t, sigma)[0] > 0.1    # its known weakness
    assert softmax_distillation(v, v, x_t, sigma)[0] == 0


@pytest.mark.parametrize("loss", [self_distillation, lambda a, b, s, mask: softmax_distillation(a, b, randn(2, 4, 3, 5, 6, seed=9), s, mask=mask)])
def test_distillation_counts_the_frames_of_the_mask_alone(loss):
    v, w, sigma = randn(2, 4, 3, 5, 6), randn(2, 4, 3, 5, 6, seed=1), torch.rand(2, 3)
    mask = torch.tensor([[False, True, True]] * 2)
    inside = loss(v, w, sigma, mask=mask)[0]
    other = v.clone()
    other[:, :, 0] = 100
    assert loss(other, w, sigma, mask=mask)[0] == inside != loss(v, w, sigma, mask=None)[0]


SHARDED = """
import torch, quant
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from qat import RoundedAdapters
from test_quant import Toy, randn
torch.distributed.init_process_group("gloo")
results = []
for kind in ("whole", "sharded", "replicated"):
    model = Toy()
    quant.quantize_model(model, "emulate", activations=True)
    if kind == "sharded":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    network = DistributedDataParallel(model) if kind == "replicated" else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        y = network(randn(8, 64))
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [p.full_tensor() if kind == "sharded" else p for p in model.parameters()]
    results.append([y.detach(), *(w.detach() for w in weights)])
for other in results[1:]:
    torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)

gradients = []                                      # of adapters on a rounded base, whole or sharded
for sharded in (False, True):
    torch.manual_seed(0)
    model = Toy()
    quant.quantize_model(model, "emulate")
    adapters = RoundedAdapters(model, ("student", "critic"), 4)
    for p in adapters.sets["student"].parameters():
        torch.nn.init.normal_(p)
    if sharded:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    with adapters.using("student"):
        model(randn(8, 64)).square().mean().backward()
    gradients.append([p.grad for p in adapters.sets["student"].parameters()])
torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
print("equal")
"""


def test_sharded_and_replicated_weights_are_rounded_as_whole_ones(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, tmp_path / "sharded.py"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"})
    assert done.stdout.count("equal") == 2, done.stderr


# ---- On a GPU (19, 20) -----------------------------------------------------------------------------------------------

@pytest.fixture(params=["fp8", "fp8-te"])
def fp8(request):
    if reason := quant.unavailable(request.param):
        pytest.skip(reason)
    return request.param


@gpu
@pytest.mark.parametrize("shape", [(3072, 3072), (14336, 3072), (2048, 8192), (12288, 2048), (64, 64)])
def test_the_kernel_on_a_gpu_equals_eager_and_the_processor(shape):
    codes, scales, amax = quantize(student_t(*shape))
    there = [t.cuda() for t in (codes, scales, amax)]
    for dtype in (torch.bfloat16, torch.float32):
        here = dequantize(codes, scales, amax, dtype)
        assert torch.equal(dequantize(*there, dtype).cpu(), here) and torch.equal(nvfp4.unpack(*there, dtype).cpu(), here)
    again = quantize(student_t(*shape).cuda())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(again, (codes, scales, amax)))


@gpu
@torch.no_grad()
def test_memory_and_speed_of_packed_linears():
    sizes = [(3072, 3072)] * 8 + [(3072, 14336), (14336, 3072)]                         # a block of Wan2.2-5B
    plain = [nn.Linear(K, N, device="cuda", dtype=torch.bfloat16) for K, N in sizes]
    packed = [PackedLinear(layer) for layer in plain]
    inputs = {K: torch.randn(4096, K, device="cuda", dtype=torch.bfloat16) for K in (3072, 14336)}

    def milliseconds(layers):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for repeat in range(15):
            if repeat == 5:
                begin.record()
            for layer in layers:
                layer(inputs[layer.in_features])
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 10
    ratio = milliseconds(packed) / milliseconds(plain)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed[8](inputs[3072])
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 1.02 * 2 * 14336 * (3072 + 4096)                                     # its weight and its output, in bf16
    assert ratio < 1.15, ratio


@gpu
def test_fp8_linears_and_their_gradients(fp8):
    torch.manual_seed(0)
    model, plain = Toy(256).cuda(), Toy(256).cuda()
    plain.load_state_dict(model.state_dict())
    quantize_model(model, fp8)
    x = torch.randn(3, 65, 256, device="cuda")                                          # 195 rows: padded
    with torch.autocast("cuda", torch.bfloat16):
        y, exact = model(x), plain(x)
    assert 20 < snr(exact, y) < 45
    y.float().square().mean().backward()
    exact.float().square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        assert p.grad.dtype == torch.float32 and snr(q.grad, p.grad) > 14, name
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        trained = model(x)
        model.requires_grad_(False)
        assert torch.equal(model(x), trained) and torch.equal(model(x), trained)        # weights cast once: the same
    if fp8 == "fp8":
        return
    quantize_model(delayed := Toy(256).cuda(), "fp8-te", delayed=True)
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            y = delayed(x)
        y.float().square().mean().backward()
    assert 20 < snr(exact, y) < 45


@gpu
def test_emulation_equals_the_engines_reference_module():
    if reason := quant.unavailable("fp8-te"):
        pytest.skip(reason)
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import CustomRecipe
    from transformer_engine.pytorch.custom_recipes.reference_nvfp4 import nvfp4_ref_rht_2d_factory
    layer = linear(randn(256, 512).bfloat16()).cuda()
    theirs = te.Linear(512, 256, bias=False, params_dtype=torch.bfloat16)
    theirs.weight.data.copy_(layer.weight)
    x = randn(64, 512, seed=1).bfloat16().cuda()
    with te.autocast(enabled=True, recipe=CustomRecipe(qfactory=nvfp4_ref_rht_2d_factory)):
        expected = theirs(x)
    ours = EmulatedLinear(layer, (16, 16), True)(x)
    assert ((ours.view(torch.int16).int() - expected.view(torch.int16).int()).abs() <= 1).all()


@gpu
def test_four_bit_arithmetic_of_blackwell_equals_the_emulation():
    if reason := quant.unavailable("te"):
        pytest.skip(reason)
    model, emulated = Toy(256).cuda().bfloat16(), Toy(256).cuda().bfloat16()
    quantize_model(model, "te")
    quantize_model(emulated, "emulate", activations=True)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    assert snr(emulated(x), model(x)) > 35


# ---- Files and the command -------------------------------------------------------------------------------------------

@pytest.fixture
def packed(tmp_path):
    model = tiny()
    quantize_model(model, "packed")
    nvfp4.save(model, tmp_path / "ours.safetensors", backbone="tiny")
    return model, tmp_path


def test_a_file_holds_plain_tensors(packed):
    model, folder = packed
    with safe_open(folder / "ours.safetensors", "pt") as file:
        header = file.metadata()
        assert header == {"format": "nvfp4", "block": "16", "tile": "1x16", "nibble": "low", "scale": "amax", "backbone": "tiny"}
        name = "blocks.1.ffn.2"
        weight, scale, amax = (file.get_tensor(f"{name}.{leaf}") for leaf in ("weight", "weight_scale", "weight_amax"))
        assert (weight.dtype, scale.dtype, amax.dtype) == (torch.uint8, torch.float8_e4m3fn, torch.float32)
        assert weight.shape == (64, 64) and scale.shape == (64, 8) and amax.shape == ()
        assert file.get_tensor(f"{name}.bias").dtype == file.get_tensor("head.head.weight").dtype == torch.bfloat16
    original = tiny().get_submodule(name).weight
    assert torch.equal(dequantize(weight, scale.view(torch.uint8), amax, torch.float32), fake_quant(original).detach())


def test_loading_never_makes_a_full_weight(packed):
    from torch.utils._python_dispatch import TorchDispatchMode
    _, folder = packed
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta and out.is_floating_point():
                made.append(out.numel())
            return out
    with Watch():
        model = load("tiny", folder / "ours.safetensors", dtype=torch.bfloat16, **SMALL)
    packed_layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packed_layers) == 20 and not any(m.weight.is_meta for m in packed_layers)
    full = {p.numel() for p in model.parameters()} | {n.weight_scale.numel() for n in packed_layers}
    assert set(made) <= full | {1} and 64 * 128 not in set(made)
    assert model.time_embedding[0].weight.dtype == torch.float32 and packed_layers[0].bias.dtype == torch.bfloat16


def test_modelopt_names_and_high_nibbles_are_read(packed):
    model, folder = packed
    nvfp4.save(model, folder / "modelopt.safetensors", modelopt=True, backbone="tiny")
    tensors = load_file(folder / "modelopt.safetensors")
    two = tensors["blocks.0.ffn.0.weight_scale_2"]
    amax = model.blocks[0].ffn[0].weight_amax.view(torch.float32)
    assert torch.equal(two, amax / 2688) and not any(k.endswith("weight_amax") for k in tensors)
    tensors = {k: v.reshape(1) if k.endswith("scale_2") else v for k, v in tensors.items()}
    save_file({**tensors, "blocks.0.ffn.0.input_scale": torch.ones(1)}, folder / "theirs.safetensors")      # no header
    swapped = {k: v >> 4 | v << 4 if v.dtype == torch.uint8 else v for k, v in load_file(folder / "ours.safetensors").items()}
    save_file(swapped, folder / "high.safetensors", nvfp4.HEADER | {"nibble": "high"})
    expected = model.state_dict()
    for name in ("modelopt", "theirs", "high"):
        state = load("tiny", folder / f"{name}.safetensors", **SMALL).state_dict()
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            if key.endswith("weight_amax"):
                torch.testing.assert_close(state[key].view(torch.float32), value.view(torch.float32), rtol=2 ** -22, atol=0)
            elif not value.is_floating_point():
                assert torch.equal(state[key], value), (name, key)


def test_files_that_are_packed_otherwise_are_refused_by_name(packed):
    _, folder = packed
    good, name = load_file(folder / "ours.safetensors"), "blocks.0.ffn.0"
    bad = {"header": (good, {"backbone": "tiny"}, "packed in another way"),
           "block": (good, nvfp4.HEADER | {"block": "32"}, "packed in another way"),
           "nibble": (good, nvfp4.HEADER | {"nibble": "middle"}, "packed in another way"),
           "scale": ({**good, f"{name}.weight_scale": good[f"{name}.weight_scale"].float()}, nvfp4.HEADER, "weight_scale' is torch.float32"),
           "codes": ({**good, f"{name}.weight": good[f"{name}.weight"].char()}, nvfp4.HEADER, "weight' is torch.int8, expected torch.uint8"),
           "missing": ({k: v for k, v in good.items() if k != f"{name}.weight_amax"}, nvfp4.HEADER, f"Missing.*{name}.weight_amax"),
           "shape": ({**good, f"{name}.weight": good[f"{name}.weight"][:, :8]}, nvfp4.HEADER, f"size mismatch for {name}.weight"),
           "extra": ({**good, "blocks.9.weight_scale": good[f"{name}.weight_scale"]}, nvfp4.HEADER, "Unexpected.*blocks.9.weight_scale")}
    for file, (tensors, header, words) in bad.items():
        save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, folder / f"{file}.safetensors", header)
        with pytest.raises(ValueError, match=words):
            load("tiny", folder / f"{file}.safetensors", **SMALL)
    with pytest.raises(ValueError, match="no packed linear"):
        nvfp4.save(tiny(), folder / "plain.safetensors")


def one_core():
    """Threads that wait for each other take many times as long on a machine that is busy."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def test_the_command_packs_and_reports(tmp_path):
    out = tmp_path / "deep" / "packed.safetensors"
    checkpoint = ROOT / "assets" / PRESETS["tiny"].source
    done = subprocess.run([sys.executable, "quant.py", checkpoint, "--mode", "packed", "--out", out, "--frames", "1", "--keep", r"blocks\.0\."],
                          cwd=ROOT, capture_output=True, text=True, preexec_fn=one_core)
    assert done.returncode == 0 and "70 linears" in done.stdout, done.stdout + done.stderr
    report = json.loads(out.with_suffix(".json").read_text())
    assert len(report["layers"]) == 70 and report["velocity"] > 20 and report["bytes"][0] > 2 * report["bytes"][1]
    assert all(19 < row["weight"] < 22 and row["output"] > 12 for row in report["layers"].values())
    assert out.with_suffix(".png").stat().st_size > 20_000 and out.stat().st_size < checkpoint.stat().st_size / 2
    model = load("tiny", out)
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 70
    with safe_open(out, "np") as file, safe_open(checkpoint, "np") as original:
        notes, its = file.metadata(), original.metadata()
    assert all(notes[name] == its[name] for name in ("stage", "parent", "actions", "config", "commit", "seed"))
    assert notes["made_from"] == common.sha256(checkpoint) and notes["format"] == "nvfp4"


def test_a_packed_checkpoint_keeps_its_compressor(tmp_path):
    exact = load("tiny")
    weights.save(attach(exact, Settings.of(exact.spec, "framepack")), tmp_path / "in.safetensors")
    quant.main(quant.Config(str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), frames=1))
    packed = load("tiny", tmp_path / "out.safetensors").compress
    assert packed.settings == exact.compress.settings
    for key, value in packed.state_dict().items():
        assert torch.equal(value.float(), exact.compress.state_dict()[key].bfloat16().float())


def test_a_layer_that_does_not_fit_the_format_is_flagged(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    model = load("tiny")
    weight = model.blocks[3].ffn[0].weight
    weight.data = 5 * weight.data.sign()                                                # 5 beside a 6 becomes 4
    weight.data[:, ::16] = 6
    save(model, tmp_path / "in.safetensors")
    quant.main(common.parse(quant.Config, [str(tmp_path / "in.safetensors"), "--mode", "emulate", "--activations", "--frames", "1",
                                           "--out", str(tmp_path / "out.safetensors")]))
    printed = capsys.readouterr().out
    assert "low: blocks.3.ffn.0 has 14." in printed and printed.count("low:") == 1
    assert not (tmp_path / "out.safetensors").exists() and (tmp_path / "out.json").stat().st_size > 1000


@pytest.mark.parametrize("flags, words", [
    (["--mode", "te"], "mode te cannot run here"), (["--mode", "int4"], "unknown quantization mode 'int4'"),
    (["--keep", "nobody"], "no linear has a name with 'nobody'"), (["--activations"], "does not take"), (["--edge_blocks", "9"], "no linear is left")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may run te")
def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    checkpoint = str(ROOT / "assets" / PRESETS["tiny"].source)
    with pytest.raises(SystemExit, match=words) as error:
        quant.main(common.parse(quant.Config, [checkpoint, "--out", str(tmp_path / "x.safetensors"), *flags]))
    assert "\n" not in str(error.value)


def test_a_flag_of_the_command_that_means_nothing_is_refused(capsys):
    for flags, words in ((["x", "--out", "y.bin"], "--out ends in .safetensors"), (["x", "--frames", "0"], "above 0"),
                         (["x", "--modelopt", "--mode", "emulate"], "--modelopt is for"), ([], "required: checkpoint")):
        with pytest.raises(SystemExit):
            common.parse(quant.Config, flags)
        assert words in capsys.readouterr().err
    source = (ROOT / "quant.py").read_text()
    assert all(f"cfg.{field}" in source for field in quant.Config.__dataclass_fields__)
