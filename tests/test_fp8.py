"""8-bit linears: the three products against their equations, inside compiled and checkpointed blocks, frozen and not."""

import pytest
import torch
from torch import nn

import fp8
import quant
from lora import Adapters
from model import build
from parallel import checkpoint_blocks, compile_blocks
from quant import choose, full_precision, snr

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(K=64, N=48):
    torch.manual_seed(0)
    return nn.Linear(K, N)


def eight(model):
    """What quantize_model does on a GPU that has the product."""
    for name in choose(model, "fp8"):
        model.set_submodule(name, fp8.replace(model.get_submodule(name)))
    return model


def tiny():
    torch.manual_seed(0)
    model = build("tiny", layers=2, dim=64, heads=2, ffn=128, text_dim=32, text_len=4)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def velocity(model):
    with torch.autocast("cpu", torch.bfloat16):
        return model(randn(1, 24, 3, 4, 6), torch.full((1, 3), 0.7), {"text": randn(1, 4, 32)}).float()


def exact(q, scale):
    return q.double() * scale.double()


def test_rows_are_rounded_to_the_range_of_e4m3():
    x = randn(5, 64) * torch.tensor([1e-30, 1.0, 1e4, 0.0, 1e-20])[:, None]
    q, scale = fp8.to_fp8(x)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (5, 1)
    assert (q.float().abs().amax(1)[[1, 2, 4]] == 448).all() and (q[3].float() == 0).all()
    for i in (1, 2, 4):
        size = float(x[i].abs().max())                                                  # squares of 1e-20 are no floats
        assert 29 < snr(x[i] / size, exact(q, scale)[i] / size) < 34                    # 3 bits of fraction
    assert torch.isfinite(exact(q, scale)).all()


def test_rounded_rows_lie_one_after_the_other_as_the_product_wants_them():
    x = randn(32, 48)
    for other in (x.T.contiguous().T, x[:1].expand(32, 48), x.repeat(1, 2)[:, ::2]):
        q, scale = fp8.to_fp8(other)
        assert q.is_contiguous() and torch.equal(q.float(), fp8.to_fp8(other.contiguous())[0].float())


def test_a_frozen_weight_costs_no_product_and_keeps_no_input():
    for frozen, products in ((False, 2), (True, 1)):
        layer, kept = fp8.FP8Linear(linear()).requires_grad_(not frozen), []
        x = randn(5, 64).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            y = layer(x)
        assert ((5, 64) in kept) == (not frozen) and (48, 64) in kept
        with torch.profiler.profile() as trace:
            y.sum().backward()
        assert sum(event.count for event in trace.key_averages() if event.key == "aten::mm") == products


def test_what_is_not_finite_stays_so():
    layer = fp8.FP8Linear(linear())
    for bad in (float("nan"), float("inf")):
        x = randn(3, 64)
        x[1, 5] = bad
        y = layer(x)
        assert not torch.isfinite(y[1]).any() and torch.isfinite(y[[0, 2]]).all()
    with pytest.raises(ValueError, match="NaN or infinity"):
        broken = linear().requires_grad_(False)
        broken.weight[0, 0] = float("nan")
        fp8.replace(broken)


def test_forward_and_gradients_are_those_of_the_equations():
    plain, x, g = linear(), randn(2, 7, 64).bfloat16(), randn(2, 7, 48, seed=1).bfloat16()
    layer, x = fp8.FP8Linear(plain), x.requires_grad_()
    y = layer(x)
    (qx, sx), (qw, sw) = fp8.to_fp8(x.detach().reshape(14, 64)), fp8.to_fp8(plain.weight.detach())
    w, flat = exact(qw, sw), g.reshape(14, 48)
    expected = exact(qx, sx) @ w.T + plain.bias.detach().bfloat16().double()
    torch.testing.assert_close(y.double().reshape(14, 48), expected, rtol=2 ** -8, atol=1e-3)
    assert 25 < snr(plain(x.float()), y) < 35

    y.backward(g)
    h, s = fp8.to_fp8(flat * sw.T)
    torch.testing.assert_close(x.grad.double().reshape(14, 64), exact(h, s) @ qw.double(), rtol=2 ** -8, atol=1e-3)
    assert 25 < snr(flat.double() @ w, x.grad.reshape(14, 64)) < 35
    torch.testing.assert_close(plain.weight.grad, (flat.T @ x.detach().reshape(14, 64)).float())
    torch.testing.assert_close(plain.bias.grad, flat.sum(0).float())
    assert plain.weight.grad.dtype == torch.float32 and layer.weight is plain.weight


def test_a_frozen_layer_keeps_only_its_rounded_weight():
    plain, x = linear().requires_grad_(False), randn(3, 64).requires_grad_()
    trained = fp8.FP8Linear(plain)(x)
    layer = fp8.replace(plain)
    assert isinstance(layer, fp8.StoredLinear) and isinstance(fp8.replace(linear()), fp8.FP8Linear)
    assert sum(t.nbytes for t in layer.buffers()) == 64 * 48 + 4 * 48
    assert torch.equal(layer(x), trained)
    assert torch.equal(layer.to(torch.bfloat16)(x.bfloat16()), trained.bfloat16())      # its numbers are not rounded again
    layer.float()(x).sum().backward()
    assert snr(plain.weight.sum(0).expand(3, 64), x.grad) > 20


def test_blocks_compile_whole_and_once_for_all_layers():
    model, reference = eight(tiny()), velocity(eight(tiny()))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    y = velocity(compile_blocks(model, fullgraph=True, backend="aot_eager"))             # all but the writing of kernels
    assert counters["stats"]["unique_graphs"] == 1
    assert snr(reference, y) > 30                       # a sum in another order turns a few codes
    y.square().mean().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())
    assert 15 < snr(velocity(tiny()), y) < 60


def test_checkpointing_computes_the_same_gradients():
    gradients = []
    for model in (eight(tiny()), checkpoint_blocks(eight(tiny()))):
        velocity(model).square().mean().backward()
        gradients.append([p.grad for p in model.blocks.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_adapters_learn_on_a_rounded_base_that_does_not():
    model = eight(tiny())
    adapters = Adapters(model, ("student",), 4)
    with adapters.using("student"):
        velocity(model).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad.abs().sum() > 0 for p in adapters.sets["student"].parameters() if p.grad is not None)


def test_full_precision_is_for_layers_that_kept_their_weights():
    model, plain = eight(tiny()), velocity(tiny())
    assert not torch.equal(velocity(model), plain)
    with full_precision(model):
        assert torch.equal(velocity(model), plain)
    stored = eight(tiny().requires_grad_(False))
    for none in (stored, nn.ModuleList([model, stored])):                               # some would stay rounded
        with pytest.raises(ValueError, match="stored ones cannot"):
            with full_precision(none):
                pass
    with pytest.raises(ValueError, match="quantized already"):
        quant.quantize_model(eight(tiny().requires_grad_(False)), "emulate")


@gpu
@pytest.mark.parametrize("M, K, N", [(4096, 3072, 14336), (195, 256, 64), (1, 64, 64)])
def test_layers_on_a_gpu_equal_those_of_dequantised_operands(monkeypatch, M, K, N):
    if reason := quant.unavailable("fp8"):
        pytest.skip(reason)
    results, x = [], randn(M, K).cuda().bfloat16().T.contiguous().T                     # in an unusual layout
    for product in (fp8.product, fp8.reference):
        monkeypatch.setattr(fp8, "product", product)
        layer, leaf = fp8.FP8Linear(linear(K, N).cuda()), x.detach().requires_grad_()
        y = layer(leaf)
        y.backward(randn(N, M, seed=2).cuda().bfloat16().T)
        results.append([y, leaf.grad, layer.weight.grad])
        with torch.no_grad():
            bad = torch.zeros(32, K, device="cuda", dtype=torch.bfloat16)
            bad[3, 5], bad[4, 5] = torch.nan, torch.inf
            assert layer(bad).isfinite().all(1).tolist() == [i not in (3, 4) for i in range(32)]
    assert all(snr(b, a) > 40 for a, b in zip(*results))


@gpu
@pytest.mark.parametrize("shape", [(195, 256, 512), (16, 64, 48), (4096, 3072, 3072)])
def test_the_product_on_a_gpu_equals_the_reference(shape):
    if reason := quant.unavailable("fp8"):
        pytest.skip(reason)
    M, K, N = shape
    a, b = (fp8.to_fp8(randn(n, K, seed=n).cuda()) for n in (M, N))
    bias = randn(N).bfloat16().cuda()
    y, expected = fp8.product(*a, *b, bias), fp8.reference(*a, *b, bias)
    assert snr(expected, y) > 45                        # sums of fast accumulation have 14 bits; a result has 8
    layer = nn.Linear(K, N, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    assert snr(layer(x := randn(M, K).bfloat16().cuda()), fp8.replace(layer)(x)) > 24
