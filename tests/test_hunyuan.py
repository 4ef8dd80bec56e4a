"""HunyuanVideo-1.5 against its independent implementation in diffusers, and against a slow one here, token by token."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from block import Group, sights
from control import Control
from model import build, load

KEYS = [(r"^img_in\.", "x_embedder."), (r"^final_layer\.linear\.", "proj_out."),     # official name -> diffusers name
        (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
        (r"^time_in\.mlp\.0\.", "time_embed.timestep_embedder.linear_1."),
        (r"^time_in\.mlp\.2\.", "time_embed.timestep_embedder.linear_2."),
        (r"^txt_in\.t_embedder\.mlp\.0\.", "context_embedder.time_text_embed.timestep_embedder.linear_1."),
        (r"^txt_in\.t_embedder\.mlp\.2\.", "context_embedder.time_text_embed.timestep_embedder.linear_2."),
        (r"^txt_in\.c_embedder\.", "context_embedder.time_text_embed.text_embedder."),
        (r"^txt_in\.input_embedder\.", "context_embedder.proj_in."),
        (r"^txt_in\.individual_token_refiner\.blocks\.", "context_embedder.token_refiner.refiner_blocks."),
        (r"\.self_attn_proj\.", ".attn.to_out.0."), (r"(refiner_blocks\.\d+)\.mlp\.fc1\.", r"\1.ff.net.0.proj."),
        (r"(refiner_blocks\.\d+)\.mlp\.fc2\.", r"\1.ff.net.2."), (r"\.adaLN_modulation\.1\.", ".norm_out.linear."),
        (r"^byt5_in\.layernorm\.", "context_embedder_2.norm."), (r"^byt5_in\.fc", "context_embedder_2.linear_"),
        (r"^vision_in\.proj\.0\.", "image_embedder.norm_in."), (r"^vision_in\.proj\.1\.", "image_embedder.linear_1."),
        (r"^vision_in\.proj\.3\.", "image_embedder.linear_2."), (r"^vision_in\.proj\.4\.", "image_embedder.norm_out."),
        (r"^cond_type_embedding\.", "cond_type_embed."), (r"^double_blocks\.", "transformer_blocks."),
        (r"\.img_mod\.", ".norm1."), (r"\.txt_mod\.", ".norm1_context."),
        (r"\.img_attn_([qkv])\.", r".attn.to_\1."), (r"\.img_attn_([qk])_norm\.", r".attn.norm_\1."),
        (r"\.img_attn_proj\.", ".attn.to_out.0."), (r"\.txt_attn_([qkv])\.", r".attn.add_\1_proj."),
        (r"\.txt_attn_([qk])_norm\.", r".attn.norm_added_\1."), (r"\.txt_attn_proj\.", ".attn.to_add_out."),
        (r"\.img_mlp\.fc1\.", ".ff.net.0.proj."), (r"\.img_mlp\.fc2\.", ".ff.net.2."),
        (r"\.txt_mlp\.fc1\.", ".ff_context.net.0.proj."), (r"\.txt_mlp\.fc2\.", ".ff_context.net.2.")]
TINY = dict(dim=32, heads=2, ffn=112, layers=2, channels=4, text_dim=24, glyph_dim=10, vision_dim=20, refiner=3, rope_dims=(2, 8, 6))
UNIFORM = torch.tensor([[0.731], [0.0125]]).expand(2, 3)                                # another noise level per sample
MIXED = torch.tensor([[0.0, 0.0, 0.731], [0.2, 0.0, 1.0]])                              # and per frame; only one start is clean


def to_diffusers(state):
    out = {}
    for key, value in state.items():
        name = key
        for pattern, new in KEYS:
            name = re.sub(pattern, new, name)
        if "self_attn_qkv" in name:
            out.update({name.replace("self_attn_qkv", f"attn.to_{c}"): part for c, part in zip("qkv", value.chunk(3))})
        elif key.startswith("final_layer.adaLN"):                                       # theirs is scale, then shift
            out[name] = torch.cat(value.chunk(2)[::-1])
        else:
            out[name] = value
    return out


def random_model(control=None, **fields):
    """Every parameter random, those that start at zero included."""
    torch.manual_seed(1)
    model = build("hunyuan1.5-8b", control, **{**TINY, **fields})
    for key, p in model.named_parameters():
        is_gain = p.ndim == 1 and key.endswith("weight")
        p.data.normal_(1.0 if is_gain else 0.0, 0.1 if p.ndim == 1 else 0.8 / p[0].numel() ** 0.5)
    return model.eval()


def inputs(S=9, G=6, V=0, patch=1, channels=4):
    """Latents [2, C, 3, H, W] with H != W, and text of unequal lengths with NaN where it is padding."""
    torch.manual_seed(2)
    text = {"text": torch.randn(2, S, 24), "text_mask": torch.ones(2, S).bool(),
            "glyph": torch.randn(2, G, 10), "glyph_mask": torch.zeros(2, G).bool()}
    text["text_mask"][0, S // 2:], text["glyph_mask"][1, :G // 2] = False, True         # sample 0 has no glyph at all
    text["text"][0, S // 2:], text["glyph"][0] = math.nan, math.nan
    if V:
        text["vision"] = torch.randn(2, V, 20)
    return torch.randn(2, channels, 3, 4 * patch, 6 * patch), text


def sample(text, i):
    """Sample i of `text` without padding and without masks."""
    out = {}
    for key in set(text) & {"text", "glyph", "vision"}:
        states = text[key][i]
        out[key] = (states[text[f"{key}_mask"][i]] if f"{key}_mask" in text else states)[None]
    return {**out, **({"image": text["image"][i:i + 1]} if "image" in text else {})}


# ---- A slow implementation: one sample, one modulation vector per token, no masks, the official order of types --------

def slow(model, x, sigma, text, i=0, frames=(0, 1, 2), control=None):
    """Velocity [C, T, H, W] of sample i, written from the equations. Under autocast its types are the official run's."""
    w, p, text = model.state_dict(), model.spec, sample(text, i)
    d, (C, T, H, W) = p.dim // p.heads, x[i].shape

    def linear(h, name):
        return F.linear(h, w[f"{name}.weight"].flatten(1), w[f"{name}.bias"])

    def norm(h, name=None, eps=1e-6):
        return F.layer_norm(h.float(), h.shape[-1:], *((w[f"{name}.weight"], w[f"{name}.bias"]) if name else ()), eps=eps)

    def rms(h, name):
        y = h.float()
        return (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()).to(h.dtype) * w[f"{name}.weight"]

    def time(s, name):
        f = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        e = torch.cat([torch.cos(1000 * s[..., None] * f), torch.sin(1000 * s[..., None] * f)], -1)
        return linear(F.silu(linear(e, f"{name}.mlp.0")), f"{name}.mlp.2")

    def attend(q, k, v):                                                                # [N, heads, d] each
        scores = torch.einsum("qhd,khd->hqk", q.to(v.dtype), k.to(v.dtype)).float() / d ** 0.5
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(v.dtype), v).flatten(1)

    # Condition tokens
    states, top = text["text"][0], sigma[i].max()[None]
    mean = F.silu(linear(states.mean(0, keepdim=True), "txt_in.c_embedder.linear_1"))
    c = time(top, "txt_in.t_embedder") + linear(mean, "txt_in.c_embedder.linear_2")
    h = linear(states, "txt_in.input_embedder")
    for b in range(p.refiner):
        name = f"txt_in.individual_token_refiner.blocks.{b}"
        gate_attn, gate_mlp = linear(F.silu(c), f"{name}.adaLN_modulation.1").chunk(2, -1)
        q, k, v = (y.unflatten(-1, (p.heads, d)) for y in linear(norm(h, f"{name}.norm1"), f"{name}.self_attn_qkv").chunk(3, -1))
        h = h + gate_attn * linear(attend(q, k, v), f"{name}.self_attn_proj")
        h = h + gate_mlp * linear(F.silu(linear(norm(h, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    kinds = w["cond_type_embedding.weight"]
    tokens = [h + kinds[0]]
    if "glyph" in text:
        h = norm(text["glyph"][0], "byt5_in.layernorm", 1e-5)
        h = F.gelu(linear(F.gelu(linear(h, "byt5_in.fc1")), "byt5_in.fc2"))
        tokens.append(linear(h, "byt5_in.fc3") + kinds[1])
    if "vision" in text:
        h = F.gelu(linear(norm(text["vision"][0], "vision_in.proj.0", 1e-5), "vision_in.proj.1"))
        tokens.append(norm(linear(h, "vision_in.proj.3"), "vision_in.proj.4", 1e-5) + kinds[2])
    txt = torch.cat(tokens[::-1])

    # Image tokens: condition and mask channels, positions, one time embedding per token
    full = torch.zeros(2 * C + 1, T, H, W)
    full[:C] = x[i]
    if "image" in text or sigma[i, 0] == 0:
        full[C:2 * C, 0], full[2 * C, 0] = text["image"][0, :, 0] if "image" in text else x[i, :, 0], 1
    q_, r_ = p.patch[1:]
    cells = [(t, y, z) for t in range(T) for y in range(H // q_) for z in range(W // r_)]
    img = linear(torch.stack([full[:, t, y * q_:(y + 1) * q_, z * r_:(z + 1) * r_].flatten() for t, y, z in cells]), "img_in.proj")
    turn = torch.tensor([[a * 256 ** (-2 * j / n) for a, n in zip((frames[t], y, z), p.rope_dims) for j in range(n // 2)] for t, y, z in cells])
    turn = torch.polar(torch.ones_like(turn), turn)[:, None]                            # [N, 1, d / 2] complex

    def rope(y):
        return torch.view_as_real(torch.view_as_complex(y.float().unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    vec = time(torch.stack([sigma[i, t] for t, _, _ in cells]), "time_in")              # [N, D]
    if control is not None:
        vec = vec + torch.stack([control[t] for t, _, _ in cells])
    vec, vec_txt = F.silu(vec), F.silu(time(top, "time_in"))

    for b in range(p.layers):
        name = f"double_blocks.{b}"
        s1, c1, g1, s2, c2, g2 = linear(vec, f"{name}.img_mod.linear").chunk(6, -1)
        S1, C1, G1, S2, C2, G2 = linear(vec_txt, f"{name}.txt_mod.linear").chunk(6, -1)
        a, t = norm(img) * (1 + c1) + s1, norm(txt) * (1 + C1) + S1
        q, k, v = (linear(a, f"{name}.img_attn_{n}").unflatten(-1, (p.heads, d)) for n in "qkv")
        Q, K, V = (linear(t, f"{name}.txt_attn_{n}").unflatten(-1, (p.heads, d)) for n in "qkv")
        q, k = rope(rms(q, f"{name}.img_attn_q_norm")).to(v.dtype), rope(rms(k, f"{name}.img_attn_k_norm")).to(v.dtype)
        Q, K = rms(Q, f"{name}.txt_attn_q_norm").to(v.dtype), rms(K, f"{name}.txt_attn_k_norm").to(v.dtype)
        y = attend(torch.cat([q, Q]), torch.cat([k, K]), torch.cat([v, V]))
        img = img + g1 * linear(y[:len(cells)], f"{name}.img_attn_proj")
        txt = txt + G1 * linear(y[len(cells):], f"{name}.txt_attn_proj")
        img = img + g2 * linear(F.gelu(linear(norm(img) * (1 + c2) + s2, f"{name}.img_mlp.fc1"), approximate="tanh"), f"{name}.img_mlp.fc2")
        txt = txt + G2 * linear(F.gelu(linear(norm(txt) * (1 + C2) + S2, f"{name}.txt_mlp.fc1"), approximate="tanh"), f"{name}.txt_mlp.fc2")

    shift, scale = linear(vec, "final_layer.adaLN_modulation.1").chunk(2, -1)
    v, out = linear(norm(img) * (1 + scale) + shift, "final_layer.linear").float(), torch.zeros(C, T, H, W)
    for n, (t, y, z) in enumerate(cells):
        out[:, t, y * q_:(y + 1) * q_, z * r_:(z + 1) * r_] = v[n].reshape(C, q_, r_)
    return out


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def model():
    return random_model()


# ---- Parity ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=[1, 2], ids=["official patch", "patch 2"])
def pair(request):
    diffusers = pytest.importorskip("diffusers")
    ours = random_model(patch=(1, request.param, request.param))
    theirs = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_refiner_layers=3, mlp_ratio=3.5,
        patch_size=request.param, text_embed_dim=24, text_embed_2_dim=10, image_embed_dim=20, rope_axes_dim=(2, 8, 6))
    theirs.load_state_dict(to_diffusers(ours.state_dict()), strict=True)
    return ours, theirs.eval(), request.param


def oracle(theirs, x, sigma, text, V=1):
    """diffusers on the condition, mask and padding that its pipelines would build; zero image states mean none."""
    B, C, T, H, W = x.shape
    given = torch.zeros(B, C + 1, T, H, W)
    if "image" in text:
        given[:, :C, :1], given[:, C, 0] = text["image"], 1
    return theirs(torch.cat([x, given], 1), 1000 * sigma[:, 0], text["text"].nan_to_num(), text["text_mask"],
                  encoder_hidden_states_2=text["glyph"].nan_to_num(), encoder_attention_mask_2=text["glyph_mask"],
                  image_embeds=text.get("vision", torch.zeros(B, 5, 20)), return_dict=False)[0]


@torch.no_grad()
def test_text_to_video_equals_diffusers(pair):
    ours, theirs, patch = pair
    x, text = inputs(patch=patch)
    expected = oracle(theirs, x, UNIFORM, text)
    assert expected.std() > 0.3
    close(ours(x, UNIFORM, text), expected)


@torch.no_grad()
def test_image_to_video_equals_diffusers(pair):
    ours, theirs, patch = pair
    x, text = inputs(V=7, patch=patch)
    text["image"] = torch.randn(2, 4, 1, *x.shape[3:])
    close(ours(x, UNIFORM, text), oracle(theirs, x, UNIFORM, text))


@pytest.mark.parametrize("V", [0, 5], ids=["no vision", "vision"])
@torch.no_grad()
def test_one_noise_level_per_frame_equals_one_per_token(V):
    model = random_model("adaln", patch=(1, 1, 2))
    x, text = inputs(V=V, patch=2)
    actions, frames = torch.tensor([[0, 12, 80], [-1, 9, 4]]), torch.tensor([2.5, 7, 1234])
    control = model.inject(Control(actions), x.shape).time
    v = model(x, MIXED, text, Control(actions), frames=frames)
    for i in range(2):
        close(v[i], slow(model, x, MIXED, text, i, frames.tolist(), control[i]))


# ---- What must not change the output, and what must -------------------------------------------------------------------

@torch.no_grad()
def test_padding_changes_nothing_and_costs_no_mask(model, monkeypatch):
    x, text = inputs(V=5)
    masks, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, attn_mask=None: masks.append(attn_mask) or attention(*a, attn_mask=attn_mask))
    both = model(x, MIXED, text)
    refiner, blocks = masks[:3], masks[3:]
    assert all(m.shape == (2, 1, 1, 9) for m in refiner) and all(m is blocks[0] for m in blocks)    # ragged: built once
    assert blocks[0].shape == (2, 1, 1, 3 * 24 + 9 + 3 + 5)                             # glyph rows that no sample uses are gone
    masks.clear()
    for i in range(2):
        one = {k: v[i:i + 1] for k, v in text.items()}
        padded, trimmed = model(x[i:i + 1], MIXED[i:i + 1], one), model(x[i:i + 1], MIXED[i:i + 1], sample(text, i))
        assert torch.equal(padded, trimmed)
        close(both[i:i + 1], trimmed)
    equal = {k: v[1:].expand(2, *v.shape[1:]) for k, v in text.items()}                 # padded alike: still no mask
    close(model(x, MIXED, equal)[1], both[1])
    assert masks and all(m is None for m in masks)


@torch.no_grad()
def test_condition_tokens_have_no_order_but_a_kind(model):
    x, text = inputs(V=5)
    shuffled = {k: v.roll(2, 1) for k, v in text.items()}                               # masks with holes among them
    base = model(x, MIXED, text)
    close(model(x, MIXED, shuffled), base)
    model.cond_type_embedding.weight.data = model.cond_type_embedding.weight.roll(1, 0)
    other = model(x, MIXED, text)
    model.cond_type_embedding.weight.data = model.cond_type_embedding.weight.roll(-1, 0)
    assert (other - base).abs().amax() > 1e-2


@torch.no_grad()
def test_absent_kinds_of_tokens_are_dropped_exactly(model):
    x, text = inputs(V=5)
    text["glyph_mask"], text["vision_mask"] = torch.zeros(2, 6), torch.zeros(2, 5)
    assert torch.equal(model(x, MIXED, text), model(x, MIXED, {k: text[k] for k in ("text", "text_mask")}))


@torch.no_grad()
def test_a_clean_first_frame_is_also_the_condition(model):
    x, text = inputs()
    almost, given = MIXED.clone(), {**text, "image": x[:, :, :1]}
    almost[0, 0] = 1e-9                                                                 # the same time embedding
    v = model(x, MIXED, text)
    assert torch.equal(v[0], model(x, MIXED, given)[0])                                 # sample 0 is clean: frame 0 itself
    assert (v - model(x, almost, text)).abs().amax((1, 2, 3, 4)).tolist() > [1e-2, 0] and torch.equal(v[1], model(x, almost, text)[1])
    assert not torch.allclose(v[1], model(x, MIXED, given)[1], atol=1e-2)               # sample 1 is not: nothing unless given
    later = x.clone()
    later[0, :, 1] += 1                                                                 # clean, but no first frame: a token only
    close(model(later, MIXED, text)[0], slow(model, later, MIXED, text))


@torch.no_grad()
def test_untrained_control_is_bit_identical(model):
    x, text = inputs()
    controlled = build("hunyuan1.5-8b", "adaln", **TINY).eval()
    controlled.load_state_dict(model.state_dict(), strict=False)
    actions = torch.tensor([[0, 12, 80], [3, 9, 4]])
    assert torch.equal(controlled(x, MIXED, text, Control(actions)), model(x, MIXED, text))


def test_blocks_share_one_compilation_without_graph_breaks(model):
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    x, txt, c = torch.randn(1, 3, 24, 32), torch.randn(1, 1, 5, 32), torch.randn(1, 3, 1, 32)
    groups = [Group("frames", x, (torch.rand(72, 8), torch.rand(72, 8)), (0, 3), told=(c,)), Group("text", txt, None, told=(c[:, :1],))]
    args = groups, sights(groups, "joint")
    for block in model.double_blocks:
        close(torch.compile(block, dynamic=False, fullgraph=True, backend="eager")(*args), block(*args))
    assert graphs["unique_graphs"] == before + 1


# ---- Precision -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_bf16_is_as_exact_as_the_official_precision_flow():
    model = random_model(layers=12, dim=128, heads=4, ffn=512, rope_dims=(8, 12, 12))
    x, text = inputs(V=5)
    half = random_model(layers=12, dim=128, heads=4, ffn=512, rope_dims=(8, 12, 12))
    half.load_state_dict({k: v if model.fp32.search(k) else v.bfloat16() for k, v in model.state_dict().items()}, assign=True)
    ours, official, types = [], [], set()
    half.double_blocks[-1].register_forward_hook(lambda block, args, out: types.add(tuple(x.dtype for x in out[0])))
    for i in range(2):
        exact, one = slow(model, x, UNIFORM, text, i), slice(i, i + 1)
        with torch.autocast("cpu", torch.bfloat16):
            official.append((slow(model, x, UNIFORM, text, i) - exact).norm() / exact.norm())
            for m in (model, half):
                v = m(x[one], UNIFORM[one], sample(text, i))
                assert v.dtype == torch.float32
                ours.append((v[0] - exact).norm() / exact.norm())
    assert max(ours) < 1.2 * max(official)
    assert types == {(torch.bfloat16, torch.float32)}                                   # image and text stream, as official


# ---- Files -----------------------------------------------------------------------------------------------------------

def test_official_size():
    with torch.device("meta"):
        model = build("hunyuan1.5-8b", control=None)
    assert sum(p.numel() for p in model.parameters()) == 8_326_608_160 and len(model.state_dict()) == 1_793


@torch.no_grad()
def test_official_files_load_strictly(model, tmp_path):
    path, state = tmp_path / "diffusion_pytorch_model.safetensors", model.state_dict()
    save_file(state, path)
    loaded = load("hunyuan1.5-8b", path, **TINY).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)
    half = load("hunyuan1.5-8b", path, dtype=torch.bfloat16, **TINY)
    kept = {k.split(".")[0] if not k.startswith("double") else k.split(".")[2] for k, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {"time_in", "txt_in", "byt5_in", "vision_in", "cond_type_embedding", "final_layer",
                    "img_attn_q_norm", "img_attn_k_norm", "txt_attn_q_norm", "txt_attn_k_norm"}
    for key, words in (("time_r_in.mlp.0.weight", "time_r_in"), ("double_blocks.2.img_mod.linear.weight", "double_blocks.2")):
        save_file({**state, key: torch.zeros(1)}, path)
        with pytest.raises(ValueError, match=words):
            load("hunyuan1.5-8b", path, **TINY)


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match=r"rope_dims \(2, 8, 4\) must add up to dim / heads = 16"):
        build("hunyuan1.5-8b", **{**TINY, "rope_dims": (2, 8, 4)})
    x, text = inputs()
    for change, words in (({"glyphs": text["glyph"]}, "knows no .'glyphs'"), ({"text": torch.randn(2, 9, 25)}, r"text\['text'\] is \[2, tokens, 24\]"),
                          ({"text_mask": torch.zeros(2, 9)}, r"got \[2, 0, 24\]"), ({"vision": torch.randn(1, 5, 20)}, r"text\['vision'\]")):
        with pytest.raises(ValueError, match=words):
            model(x, MIXED, {**text, **change})
