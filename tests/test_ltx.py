"""LTX-2.3's video tower against its independent implementation in diffusers, and loading it out of the official file."""

import math
import re

import pytest
import torch
from safetensors.torch import save_file

import control
from flow import schedule
from model import LTX, build, load, preset

KEYS = [(r"^(audio_)?patchify_proj\.", r"\1proj_in."),                                   # official name -> diffusers name
        (r"^(audio_)?adaln_single\.", r"\1time_embed."), (r"^(audio_)?prompt_adaln_single\.", r"\1prompt_adaln."),
        (r"^av_ca_(video|audio)_scale_shift_adaln_single\.", r"av_cross_attn_\1_scale_shift."),
        (r"^av_ca_a2v_gate_adaln_single\.", "av_cross_attn_video_a2v_gate."),
        (r"^av_ca_v2a_gate_adaln_single\.", "av_cross_attn_audio_v2a_gate."),
        (r"\.scale_shift_table_a2v_ca_(video|audio)$", r".\1_a2v_cross_attn_scale_shift_table"),
        (r"\.q_norm\.", ".norm_q."), (r"\.k_norm\.", ".norm_k.")]
BACK = [(r"^(audio_)?proj_in\.", r"\1patchify_proj."),                                   # and the other way
        (r"^(audio_)?time_embed\.", r"\1adaln_single."), (r"^(audio_)?prompt_adaln\.", r"\1prompt_adaln_single."),
        (r"^av_cross_attn_(video|audio)_scale_shift\.", r"av_ca_\1_scale_shift_adaln_single."),
        (r"^av_cross_attn_(?:video_(a2v)|audio_(v2a))_gate\.", r"av_ca_\1\2_gate_adaln_single."),
        (r"\.(video|audio)_a2v_cross_attn_scale_shift_table$", r".scale_shift_table_a2v_ca_\1"),
        (r"\.norm_q\.", ".q_norm."), (r"\.norm_k\.", ".k_norm.")]
TINY = dict(dim=64, heads=2, ffn=256, layers=2, channels=8, text_dim=64)                # 32 slots to turn: 3 * 10 and 2 left over
H, W = 3, 5


def rename(name, table):
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name


def random_model(**fields):
    """Every parameter random: a bias, gain or table at its initial value hides what it does."""
    torch.manual_seed(1)
    model = build("ltx2.3-22b", control=None, **{**TINY, **fields})
    for key, p in model.named_parameters():
        p.data.normal_(1.0 if "norm" in key else 0.0, 0.1)
    return model.eval()


def oracle(ours):
    """The whole audio-video transformer of diffusers, its video half with our weights."""
    diffusers, s = pytest.importorskip("diffusers"), ours.spec
    theirs = diffusers.LTX2VideoTransformer3DModel(
        in_channels=s.channels, out_channels=s.channels, num_attention_heads=s.heads, attention_head_dim=s.dim // s.heads,
        cross_attention_dim=s.dim, num_layers=s.layers, gated_attn=True, cross_attn_mod=True, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=s.heads, audio_attention_head_dim=8, audio_cross_attention_dim=8 * s.heads, audio_gated_attn=True,
        audio_cross_attn_mod=True, rope_type="split", use_prompt_embeddings=False, perturbed_attn=True)
    _, unexpected = theirs.load_state_dict({rename(k, KEYS): v for k, v in ours.state_dict().items()}, strict=False)
    assert not unexpected
    return theirs.eval()


@torch.no_grad()
def expected(theirs, x, sigma, text, fps, coordinates=None, timestep=None):
    """Velocity of diffusers; `sigma` per frame becomes a timestep per token, and the text is told the largest."""
    B, C, T, h, w = x.shape
    tokens = 1000 * sigma.repeat_interleave(h * w, 1) if timestep is None else timestep
    dtype, width = x.dtype, theirs.config.audio_cross_attention_dim
    v = theirs(x.flatten(2).mT, torch.zeros(B, 1, 4, dtype=dtype), text, torch.zeros(B, 1, width, dtype=dtype), timestep=tokens,
               audio_timestep=1000 * sigma[:, 0], sigma=1000 * sigma.amax(1), num_frames=T, height=h, width=w, fps=fps,
               audio_num_frames=1, video_coords=coordinates, isolate_modalities=True, return_dict=False)[0]
    return v.mT.reshape(x.shape)


@pytest.fixture(scope="module")
def pair():
    ours = random_model()
    return ours, oracle(ours)


def inputs(T, clean=0, B=2, channels=8, dim=64):
    torch.manual_seed(2)
    sigma = torch.tensor([[0.731], [0.0125]])[:B].repeat(1, T)
    sigma[:, :clean] = 0
    return torch.randn(B, channels, T, H, W), sigma, torch.randn(B, 11, dim)


# ---- The forward -----------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("T, clean, fps", [(1, 0, 24), (4, 0, 24), (4, 1, 60), (4, 2, 24), (5, 3, 16)])
def test_clean_prefixes_and_frame_rates_equal_diffusers(pair, T, clean, fps, monkeypatch):
    ours, theirs = pair
    monkeypatch.setattr(ours, "fps", fps)
    x, sigma, text = inputs(T, clean)
    torch.testing.assert_close(ours(x, sigma, {"text": text}), expected(theirs, x, sigma, text, fps), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_noise_level_of_its_own_per_frame_and_one_per_sample_equal_diffusers(pair):
    ours, theirs = pair
    x, sigma, text = inputs(4)
    torch.testing.assert_close(ours(x, sigma, {"text": text}), expected(theirs, x, sigma, text, 24, timestep=1000 * sigma[:, 0]),
                               atol=1e-5, rtol=0)
    sigma = torch.tensor([[0.0, 0.2, 0.9, 0.4], [1.0, 0.5, 0.0, 0.25]])                 # the noisiest frame is not the last
    torch.testing.assert_close(ours(x, sigma, {"text": text}), expected(theirs, x, sigma, text, 24), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_batch_of_two_equals_two_batches_of_one(pair):
    ours, _ = pair
    x, sigma, text = inputs(4, clean=2)
    both = ours(x, sigma, {"text": text})
    for i in range(2):
        one = ours(x[i:i + 1], sigma[i:i + 1], {"text": text[i:i + 1]})
        torch.testing.assert_close(both[i:i + 1], one, atol=1e-5, rtol=0)


@torch.no_grad()
def test_frames_are_positions_late_ones_and_fractions_included(pair):
    """Bounds written out token by token: time from max(0, 8f - 7) to 8f + 1 pixel frames, space 32 pixels a token."""
    ours, theirs = pair
    x, sigma, text = inputs(4, clean=1)
    frames = [0.0, 0.5, 2.25, 900.0]                                                    # 900 is five minutes, past any table
    bounds = [[[max(0, 8 * f - 7) / 24, (8 * f + 1) / 24], [32 * i, 32 * i + 32], [32 * j, 32 * j + 32]]
              for f in frames for i in range(H) for j in range(W)]
    coordinates = torch.tensor(bounds).movedim(0, 1)[None].repeat(2, 1, 1, 1)           # [B, 3, N, 2]
    v = ours(x, sigma, {"text": text}, frames=torch.tensor(frames))
    torch.testing.assert_close(v, expected(theirs, x, sigma, text, 24, coordinates), atol=1e-5, rtol=0)
    default = ours(x, sigma, {"text": text})
    assert torch.equal(default, ours(x, sigma, {"text": text}, frames=torch.arange(4))) and not torch.allclose(default, v, atol=1e-2)


@torch.no_grad()
def test_control_acts_as_a_change_of_the_frames_time_embedding():
    """The same label on every frame is a change of that embedding's last bias; its tables at zero change no bit."""
    model = random_model()
    x, sigma, text = inputs(3)
    plain = model(x, sigma, {"text": text})
    told = control.Control(torch.full((2, 3), 9 * 4 + 7))
    control.attach(model)
    assert torch.equal(model(x, sigma, {"text": text}, told), plain)
    model.control.translation.normal_(), model.control.rotation.normal_()
    controlled = model(x, sigma, {"text": text}, told)
    model.adaln_single.emb.timestep_embedder.linear_2.bias += model.control.translation[4] + model.control.rotation[7]
    torch.testing.assert_close(model(x, sigma, {"text": text}), controlled, atol=1e-5, rtol=0)
    assert not torch.allclose(plain, controlled, atol=1e-2)


@torch.no_grad()
def test_bf16_is_no_further_from_fp32_than_the_official_precision():
    """At three layers the official flow, all of it in bf16, is some 0.8 to 0.9 % off; ours has fp32 islands."""
    fields = dict(dim=256, heads=4, ffn=1024, layers=3, channels=16, text_dim=256)
    ours = random_model(**fields)
    for p in ours.parameters():
        p.data = p.bfloat16().float()                                                   # as stored: both flows start from bf16
    x, sigma, text = (y.bfloat16().float() for y in inputs(3, clean=1, channels=16, dim=256))
    exact = ours(x, sigma, {"text": text})
    official = expected(oracle(ours).to(torch.bfloat16), x.bfloat16(), sigma, text.bfloat16(), 24).float()
    with torch.autocast("cpu", torch.bfloat16):
        v = ours(x, sigma, {"text": text})
    error, theirs = ((y - exact).norm() / exact.norm() for y in (v, official))
    assert v.dtype == torch.float32 and 0 < error < theirs < 0.02


def test_a_block_compiles_whole():
    model = random_model()
    x, sigma, text = inputs(3)
    plain = model(x, sigma, {"text": text})
    for block in getattr(model, model.block_list):
        block.compile(backend="eager", fullgraph=True, dynamic=False)                   # fullgraph: a graph break is an error
    torch.testing.assert_close(model(x, sigma, {"text": text}), plain, atol=1e-5, rtol=0)
    model(x, sigma, {"text": text}).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


# ---- Sizes and settings ----------------------------------------------------------------------------------------------

def test_official_size():
    with torch.device("meta"):
        model = build("ltx2.3-22b", control=None)
    assert sum(p.numel() for p in model.parameters()) == 13_124_316_288 and len(model.state_dict()) == 1457
    assert sum(p.numel() for p in model.transformer_blocks[0].parameters()) == 268_812_352
    assert (model.spec.latent_frames(121), model.spec.grid(480, 832), model.fps) == (16, (15, 26), 24)


def test_the_shift_stands_for_the_official_schedule():
    """sigma = e^mu / (e^mu + 1/s - 1) with mu = 2.05, then stretched away from 1 until the last step is at 0.1."""
    official = [math.exp(2.05) / (math.exp(2.05) + 1 / s - 1) for s in (1 - i / 30 for i in range(30))]
    official = [1 - (1 - s) * 0.9 / (1 - official[-1]) for s in official]
    assert abs(official[15] - 0.8699) < 1e-4
    assert max(abs(a - b) for a, b in zip(official[:28], schedule(30, preset("ltx2.3-22b").shift))) < 0.017


def test_a_fresh_model_starts_silent_with_open_gates():
    torch.manual_seed(0)
    model = build("ltx2.3-22b", control=None, **TINY)
    x, sigma, text = inputs(3)
    assert not model(x, sigma, {"text": text}).any() and not model.transformer_blocks[1].attn2.to_gate_logits.weight.any()
    model.proj_out.weight.data.normal_()
    assert all(p.isfinite().all() for p in model.parameters()) and 0.1 < model(x, sigma, {"text": text}).std() < 100


def test_bad_shapes_are_named():
    model = random_model()
    x, sigma, text = inputs(3)
    for states in (text[..., :60], text[:1]):
        with pytest.raises(ValueError, match=r"text states are \[2, S, 64\], got"):
            model(x, sigma, {"text": states})
    with pytest.raises(ValueError, match="text_dim 4096 is not dim 64"):
        build("ltx2.3-22b", **{**TINY, "text_dim": 4096})


# ---- The official file -----------------------------------------------------------------------------------------------

def official_file(model):
    """Tensors under every prefix of the official single file: names of the transformer from diffusers, both its halves."""
    prefix = "model.diffusion_model."
    whole = {rename(k, BACK): torch.zeros(1) for k in oracle(model).state_dict()}
    connector = ("learnable_registers", "transformer_1d_blocks.0.attn1.to_gate_logits.bias", "transformer_1d_blocks.7.ff.net.2.weight")
    rest = ["text_embedding_projection.video_aggregate_embed.weight", "text_embedding_projection.audio_aggregate_embed.bias",
            "vae.encoder.conv_in.conv.weight", "vae.per_channel_statistics.mean-of-means", "audio_vae.decoder.conv_in.conv.weight",
            "vocoder.bwe_generator.conv_pre.weight", *(f"{prefix}{kind}_embeddings_connector.{name}" for kind in ("video", "audio") for name in connector)]
    assert len(whole) == 230
    return {**{prefix + k: v for k, v in {**whole, **model.state_dict()}.items()}, **{k: torch.zeros(1) for k in rest}}


def test_the_video_tower_comes_out_of_the_official_file(tmp_path):
    model, path = random_model(), tmp_path / "ltx-2.3-22b-dev.safetensors"
    tensors, state = official_file(model), model.state_dict()
    assert len(tensors) == 242 and {LTX.official(k) for k in tensors} == {None, *state}     # 77 are ours, 165 recognised
    save_file(tensors, path)
    loaded = load("ltx2.3-22b", path, **TINY).state_dict()
    assert len(loaded) == 77 and list(loaded) == list(state) and all(torch.equal(loaded[k], state[k]) for k in state)


@pytest.mark.parametrize("key", ["model.diffusion_model.keyframes_abs_pos_embedding", "model.diffusion_model.transformer_blocks.0.attn3.audio",
                                 "model.diffusion_model.vae.encoder", "decoder.vae.weight", "text_encoder.weight"])
def test_what_the_official_file_does_not_have_is_refused_by_name(tmp_path, key):
    model, path = random_model(), tmp_path / "other.safetensors"
    save_file({**official_file(model), key: torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=re.escape(key.removeprefix("model.diffusion_model."))) as error:
        load("ltx2.3-22b", path, **TINY)
    assert "other.safetensors" in str(error.value)


def test_bf16_weights_keep_the_fp32_islands(tmp_path):
    save_file(random_model().state_dict(), tmp_path / "model.safetensors")
    half = load("ltx2.3-22b", tmp_path / "model.safetensors", dtype=torch.bfloat16, **TINY)
    kept = {k for k, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {k for k in dict(half.named_parameters()) if re.search("adaln|table|norm|proj_out", k)}
    x, sigma, text = inputs(3)
    with torch.autocast("cpu", torch.bfloat16):
        v = half(x, sigma, {"text": text})
    assert v.dtype == torch.float32 and v.isfinite().all()
