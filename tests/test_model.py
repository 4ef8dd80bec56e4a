"""The Wan architecture against its independent implementation in diffusers."""

import re

import pytest
import torch

from model import build, preset

KEYS = [(r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),       # official name -> diffusers name
        (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
        (r"^time_projection\.1\.", "condition_embedder.time_proj."),
        (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
        (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
        (r"^head\.head\.", "proj_out."), (r"^head\.modulation$", "scale_shift_table"),
        (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
        (r"^(blocks\.\d+)\.self_attn\.([qkv])\.", r"\1.attn1.to_\2."), (r"^(blocks\.\d+)\.self_attn\.o\.", r"\1.attn1.to_out.0."),
        (r"^(blocks\.\d+)\.self_attn\.norm_([qk])\.", r"\1.attn1.norm_\2."),
        (r"^(blocks\.\d+)\.cross_attn\.([qkv])\.", r"\1.attn2.to_\2."), (r"^(blocks\.\d+)\.cross_attn\.o\.", r"\1.attn2.to_out.0."),
        (r"^(blocks\.\d+)\.cross_attn\.norm_([qk])\.", r"\1.attn2.norm_\2."),
        (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."), (r"^(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
        (r"^(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2.")]
TINY = dict(dim=64, heads=4, ffn=112, layers=2, text_dim=24, freq_dim=32)         # head dim 16: axes 8 / 4 / 4, unequal


def to_diffusers(name):
    for pattern, new in KEYS:
        if re.match(pattern, name):
            return re.sub(pattern, new, name)
    return name


def random_model(name="wan2.1-1.3b", **fields):
    """Every parameter random, norms and the zero-initialised head included."""
    torch.manual_seed(1)
    model = build(name, control=None, **{**TINY, **fields})
    for key, p in model.named_parameters():
        p.data.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.1)  # larger gains amplify fp32 rounding
    return model.eval()


@pytest.fixture(scope="module", params=[("wan2.1-1.3b", 16), ("wan2.2-5b", 48)], ids=["wan2.1", "wan2.2"])
def pair(request):
    diffusers = pytest.importorskip("diffusers")
    name, channels = request.param
    ours = random_model(name)
    theirs = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=channels, out_channels=channels, text_dim=24,
        freq_dim=32, ffn_dim=112, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=1024)
    theirs.load_state_dict({to_diffusers(k): v for k, v in ours.state_dict().items()}, strict=True)
    x = torch.randn(2, channels, 3, 8, 12)                                              # h != w
    text = torch.zeros(2, 512, 24)
    text[0, :7], text[1, :31] = torch.randn(7, 24), torch.randn(31, 24)
    return ours, theirs.eval(), x, text


@torch.no_grad()
def test_one_noise_level_per_sample_equals_diffusers(pair):
    ours, theirs, x, text = pair
    sigma = torch.tensor([0.731, 0.0125])
    expected = theirs(x, 1000 * sigma, text, return_dict=False)[0]
    torch.testing.assert_close(ours(x, sigma[:, None].expand(2, 3), {"text": text}), expected, atol=1e-5, rtol=0)
    shorter = ours(x, sigma[:, None].expand(2, 3), {"text": text[:, :40]})                # the model pads to 512 itself
    torch.testing.assert_close(shorter, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_one_noise_level_per_frame_equals_diffusers_per_token(pair):
    ours, theirs, x, text = pair
    sigma = torch.tensor([[0.0, 0.0, 0.731], [0.0, 0.5, 1.0]])
    tokens = (1000 * sigma).repeat_interleave(4 * 6, dim=1)                             # [B, T * 24]
    expected = theirs(x, tokens, text, return_dict=False)[0]
    torch.testing.assert_close(ours(x, sigma, {"text": text}), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_batch_of_two_equals_two_batches_of_one(pair):
    ours, _, x, text = pair
    sigma = torch.tensor([[0.0, 0.0, 0.731], [0.2, 0.5, 1.0]])
    both = ours(x, sigma, {"text": text})
    for i in range(2):
        one = ours(x[i:i + 1], sigma[i:i + 1], {"text": text[i:i + 1]})
        torch.testing.assert_close(both[i:i + 1], one, atol=1e-5, rtol=0)


@torch.no_grad()
def test_time_positions_are_relative_unbounded_and_fractional(pair):
    ours, _, x, text = pair
    sigma, f = torch.full((2, 3), 0.5), torch.arange(3)
    base = ours(x, sigma, {"text": text})
    for offset in (7, 5000, 0.25):
        torch.testing.assert_close(ours(x, sigma, {"text": text}, frames=f + offset), base, atol=1e-5, rtol=0)
    assert not torch.allclose(ours(x, sigma, {"text": text}, frames=2.0 * f), base, atol=1e-3)


@torch.no_grad()
def test_bf16_is_as_exact_as_the_official_precision():
    """Eight layers under autocast: the official flow, with its fp32 residual stream and time path, is 0.39 % off on a
    random model; diffusers' bf16, whose stream is bf16, 0.7 to 0.9 %."""
    diffusers = pytest.importorskip("diffusers")
    ours = random_model(dim=256, ffn=1024, layers=8)
    for p in ours.parameters():
        p.data = (p * (0.5 if p.ndim > 1 else 1)).bfloat16().float()                    # both flows start from bf16
    theirs = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=64, text_dim=24, freq_dim=32, ffn_dim=1024,
        num_layers=8, cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=1024).eval()
    theirs.load_state_dict({to_diffusers(k): v for k, v in ours.state_dict().items()}, strict=True)
    for key, p in theirs.named_parameters():
        if not any(part in key for part in theirs._keep_in_fp32_modules):
            p.data = p.bfloat16()
    x, text = torch.randn(1, 16, 3, 8, 12).bfloat16(), torch.randn(1, 512, 24).bfloat16()
    run = lambda: ours(x.float(), torch.full((1, 3), 0.7), {"text": text.float()})
    exact = run()
    with torch.autocast("cpu", torch.bfloat16):
        half = run()
    official = theirs(x, torch.tensor([700.0]), text, return_dict=False)[0]
    error, bound = ((y.float() - exact).norm() / exact.norm() for y in (half, official))
    assert half.dtype == torch.float32 and 0 < error < 1.2 * 0.0039 and error < 0.6 * bound


@pytest.mark.parametrize("name, count, keys", [("wan2.1-1.3b", 1_418_996_800, 825), ("wan2.2-5b", 4_999_787_712, 825)])
def test_official_sizes(name, count, keys):
    with torch.device("meta"):
        model = build(name, control=None)
    assert sum(p.numel() for p in model.parameters()) == count and len(model.state_dict()) == keys


def test_bad_shapes_are_named():
    model = random_model()
    x, sigma, text = torch.randn(1, 16, 3, 8, 12), torch.rand(1, 3), {"text": torch.randn(1, 9, 24)}
    for args, words in (((x[:, :5], sigma, text), "latents"), ((x, sigma[:, :2], text), "one noise level per frame"),
                        ((x[..., :11], sigma, text), "divisible"), ((x, sigma, {"text": torch.randn(1, 9, 25)}), "text states")):
        with pytest.raises(ValueError, match=words):
            model(*args)
    with pytest.raises(ValueError, match="unknown backbone 'wan3'; choose tiny"):
        preset("wan3")
