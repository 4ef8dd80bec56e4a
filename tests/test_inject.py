"""Injections: without effect until trained, able to learn everywhere, and true to their equations."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import inject
import train_stage1
import world
from camera import between, pluecker, projections, relative
from checkpoint import Run, load_checkpoint, save_checkpoint
from common import EMA, descend
from control import NO_ACTION, Control, attach, poses_from_labels
from data import WorldStream
from encode import codec
from flow import velocity_to_x0
from model import ARCHITECTURES, Attention, build, load, preset
from parallel import Layout
from weights import ASSETS, save
from rollout import WorldModel

KINDS = ["adaln", "text", "plucker", "prope", "adaln+prope", "adaln+text+plucker+prope"]
SILENT = [kind for kind in KINDS if "text" not in kind]                                 # a sentence is heard untrained
# preset, its small fields, and text of a batch of 2
BACKBONES = {
    "tiny": (dict(dim=48, heads=4, ffn=64, layers=2), lambda: {"text": torch.randn(2, 5, 64)}),
    "wan2.1-1.3b": (dict(dim=64, heads=4, ffn=96, layers=2, text_dim=24, text_len=9, freq_dim=32, channels=4),
                    lambda: {"text": torch.randn(2, 7, 24)}),
    "wan2.2-5b": (dict(dim=64, heads=4, ffn=96, layers=2, text_dim=24, text_len=9, freq_dim=32, channels=4),
                  lambda: {"text": torch.randn(2, 7, 24)}),
    "hunyuan1.5-8b": (dict(dim=32, heads=2, ffn=64, layers=2, channels=4, text_dim=24, glyph_dim=10, vision_dim=20, refiner=1,
                           rope_dims=(4, 6, 6)), lambda: {"text": torch.randn(2, 7, 24), "text_mask": torch.arange(7) < torch.tensor([[7], [4]])}),
    "ltx2.3-22b": (dict(dim=64, heads=4, ffn=96, layers=2, channels=4, text_dim=64), lambda: {"text": torch.randn(2, 7, 64)})}
each = pytest.mark.parametrize("name", BACKBONES)
T = 41                                                                                  # two clips hold all 81 labels


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(inject.PlueckerAdapter, "WIDTH", 16)                            # speed


def sentences(width, S=6):
    """Random states [81, S, width], 2 to S rows of them before the zeros."""
    return torch.randn(81, S, width) * (torch.arange(S) < torch.randint(2, S + 1, (81, 1)))[..., None]


def random_model(name, kind, trained=False, **changes):
    """Every parameter of the network random, its control as it is attached or (trained) random too; and its inputs."""
    refused = {*ARCHITECTURES[preset(name).arch].refuses} & {*kind.split("+")}
    if refused:
        pytest.skip(f"{name} has no place for {refused}, and says why")
    torch.manual_seed(0)
    fields, text = BACKBONES[name]
    fields = {**fields, **changes}
    model = build(name, kind, sentences(fields.get("text_dim", 64)), **fields)
    for key, p in model.named_parameters():
        if trained or not key.startswith("control."):
            p.data.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.1)
    actions = torch.cat([torch.arange(81), torch.zeros(1).long()])[torch.randperm(82)].view(2, T)
    c2w = poses_from_labels(actions, 0.02, 7.5).float()                                 # farther off, fp32 would show
    K = world.K.repeat(2, T, 1, 1) * torch.tensor([[1.1], [0.9], [1]])
    _, q, r = model.spec.patch
    return model, (torch.randn(2, model.spec.channels, T, q, 2 * r), torch.rand(2, T), text()), Control(actions, c2w, K)


# ---- Beginning and learning ------------------------------------------------------------------------------------------

@each
@pytest.mark.parametrize("kind", SILENT)
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@torch.no_grad()
def test_an_untrained_control_leaves_every_bit_as_it_was(name, kind, half):
    model, inputs, control = random_model(name, kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        told, silent = model(*inputs, control), model(*inputs)
        model.control = None
        assert torch.equal(told, model(*inputs)) and torch.equal(silent, told) and told.std() > 0.01


@each
@torch.no_grad()
def test_without_its_camera_sentence_text_is_the_plain_model(name):
    model, inputs, control = random_model(name, "text")
    silent, told = model(*inputs), model(*inputs, control)
    none = model(*inputs, Control(torch.full((2, T), NO_ACTION)))
    model.control = None
    assert torch.equal(silent, model(*inputs))
    torch.testing.assert_close(none, silent, atol=1e-5, rtol=0)                         # a mask adds in another order
    assert (told - silent).abs().mean() > 1e-3


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@torch.no_grad()
def test_keys_of_sentences_are_made_once_a_rollout(half):
    model, (x, sigma, text), control = random_model("wan2.1-1.3b", "adaln+text")
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        told, heard, made = model(x, sigma, text, control), model.heard(text), []
        for block in model.blocks:
            block.cross_attn.k.register_forward_hook(lambda *call: made.append(call))
        assert torch.equal(model(x, sigma, heard, control), told) and not made
        assert torch.equal(model(x, sigma, heard), model(x, sigma, text))


@each
@pytest.mark.parametrize("kind", KINDS)
def test_after_one_step_every_control_tensor_has_a_gradient(name, kind):
    model, inputs, control = random_model(name, kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(*inputs, control).square().mean().backward()
        grads = {key: p.grad for key, p in model.control.named_parameters()}
        optimizer.step()
    assert len(grads) == {"text": 0}.get(kind, len(grads)) and all(torch.isfinite(g).all() for g in grads.values())
    for key, grad in grads.items():                                                     # rows: labels, or outputs
        assert (grad.flatten(1).abs().amax(1) > 0).all() if key in ("translation", "rotation") else grad.abs().max() > 0, key


@each
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_trained_control_acts_but_not_where_it_is_withheld(name, kind):
    model, inputs, control = random_model(name, kind, trained=True)
    withheld = torch.stack([control.actions[0], torch.full((T,), NO_ACTION)])
    plain, told, half = model(*inputs), model(*inputs, control), model(*inputs, Control(withheld, control.c2w, control.K))
    torch.testing.assert_close(half[1], plain[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(half[0], told[0], atol=1e-5, rtol=0)
    assert ((told - plain).abs().mean((1, 2, 3, 4)) > 1e-3).all()


SIDES = torch.zeros(4, 2, 2)                    # forward, back, right, left: the half of a patch that lights up
SIDES[0, 0], SIDES[1, 1], SIDES[2, :, 1], SIDES[3, :, 0] = 1, 1, 1, 1


@pytest.mark.parametrize("kind", KINDS[:5])
def test_the_commanded_direction_comes_out(kind):
    """A one-block network denoises a second frame whose patches light up on the side to which the camera moved."""
    torch.manual_seed(0)
    model = build("tiny", kind, codec("tiny").sentences(), layers=1, dim=32, heads=2, ffn=32, channels=4, freq_dim=32)
    optimizer, direction = torch.optim.Adam(model.parameters(), 5e-3), torch.arange(8) % 4
    actions = torch.stack([torch.zeros(8).long(), 9 * direction + 9], 1)
    control = Control(actions, poses_from_labels(actions, 1.0, 30.0).float(), torch.eye(3).expand(8, 2, 3, 3))
    target = SIDES[direction].repeat(1, 2, 2)[:, None]                                  # [8, 1, 4, 4]

    def predict(control):
        x, sigma = torch.randn(8, 4, 2, 4, 4), torch.tensor([0.0, 1.0]).expand(8, 2)
        x[:, :, 0] = 0
        return velocity_to_x0(model(x, sigma, {"text": torch.zeros(8, 1, 64)}, control), x, sigma)[:, :, 1]

    for _ in range(200):
        optimizer.zero_grad()
        (predict(control) - target).square().mean().backward()
        optimizer.step()
    seen = lambda x: torch.einsum("bchw,dhw->bd", x, SIDES.repeat(1, 2, 2)).argmax(1)
    assert torch.equal(seen(predict(control)), direction)
    turned = Control(*(part.roll(1, 0) for part in vars(control).values()))             # other commands, same inputs
    assert torch.equal(seen(predict(turned)), direction.roll(1))


# ---- text ------------------------------------------------------------------------------------------------------------

@each
@torch.no_grad()
def test_a_frame_is_told_what_a_longer_caption_would_tell_it(name):
    """In a network of one block nothing that other frames heard has reached a frame yet."""
    model, (x, sigma, text), control = random_model(name, "text", layers=1)
    told, states = model(x, sigma, text, control), model.control.sentences
    caption = text["text"] if name[:3] == "ltx" else F.pad(text["text"], (0, 0, 0, model.spec.text_len - text["text"].shape[1]))
    for b, t in ((0, 0), (0, 17), (1, 5), (1, 40)):
        sentence = states[control.actions[b, t]]
        context = torch.cat([caption[b], sentence[(sentence != 0).any(-1)]])[None]
        model.spec = replace(model.spec, text_len=context.shape[1])                     # or Wan would pad it
        expected = model(x[b:b + 1], sigma[b:b + 1], {"text": context})[0, :, t]
        torch.testing.assert_close(told[b, :, t], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_each_frame_hears_its_own_sentence_beside_the_caption():
    torch.manual_seed(0)
    attention, x, caption, states = Attention(32, 4, 1e-6), torch.randn(2, 15, 32), torch.randn(2, 7, 32), sentences(32)
    labels, words = torch.tensor([[3, 80, -1], [0, 41, 3]]), (states != 0).any(-1)
    said = inject.Sentences(states, labels, words[labels] & (labels >= 0)[..., None])
    y, calls = attention(x, caption, sentences=said).unflatten(1, (3, 5)), []
    for b in range(2):
        for t, a in enumerate(labels[b].tolist()):
            context = torch.cat([caption[b], states[a][words[a]] if a >= 0 else states[0][:0]])[None]
            torch.testing.assert_close(y[b:b + 1, t], attention(x[b:b + 1, 5 * t:5 * t + 5], context), atol=1e-5, rtol=0)
    attention.k.register_forward_hook(lambda module, args, out: calls.append(tuple(args[0].shape)))
    attention(x, caption, sentences=said)
    assert calls == [(2, 7, 32), (81, 6, 32)]                                           # once each, not once a frame


@each
@torch.no_grad()
def test_the_zeros_after_a_sentence_are_not_heard(name):
    model, inputs, control = random_model(name, "text")
    told = model(*inputs, control)
    model.control.sentences = F.pad(model.control.sentences, (0, 0, 0, 3))
    torch.testing.assert_close(model(*inputs, control), told, atol=1e-5, rtol=0)


def test_the_tiny_codec_encodes_all_sentences_apart_from_each_other():
    states = codec("tiny").sentences()
    assert states.shape == (81, 10, 64) and len(states.flatten(1).unique(dim=0)) == 81 == len(set(inject.SENTENCES))
    assert inject.SENTENCES[12] == "Camera moves forward. Camera yaws right." and (states != 0).any(-1).sum(1).min() == 6


# ---- prope -----------------------------------------------------------------------------------------------------------

def prope_inputs(seed=0):
    """q, k, v [2, 3, 12, 8] of three frames with four tokens each, and their cameras."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, 3, 12, 8, generator=g)
    c2w = poses_from_labels(torch.randint(81, (2, 3), generator=g), 0.7, 20.0).float()
    K = torch.eye(3).repeat(2, 3, 1, 1)
    K[..., 0, 0], K[..., 1, 1] = 0.5 + torch.rand(2, 3, generator=g), 0.5 + torch.rand(2, 3, generator=g)
    return q, k, v, K, c2w


def attend(q, k, v, K, c2w, attend=F.scaled_dot_product_attention):
    P, inverse = projections(K, c2w)
    return inject.prope(q, k, v, inject.Branch(P.mT, inverse, P, torch.nn.Identity()), attend)          # [2, 12, 24]


def test_prope_sees_relative_projections_alone():
    q, k, v, K, c2w = prope_inputs()
    P, seen = projections(K, c2w)[0].double(), {}

    def spy(q, k, v):
        seen["logits"], out = q @ k.mT, F.scaled_dot_product_attention(q, k, v)
        return out
    y = attend(q, k, v, K, c2w, attend=spy)
    full = torch.linalg.inv(P)[:, None, :]                                              # [2, 1, 3, 4, 4]: of frame j
    R = (P[:, :, None] @ full).repeat_interleave(4, 1).repeat_interleave(4, 2)          # P_i P_j^-1 [2, 12, 12, 4, 4]
    split = lambda x: x.double().unflatten(-1, (2, 4))
    logits = torch.einsum("bhncx,bnmxy,bhmcy->bhnm", split(q), R, split(k))
    torch.testing.assert_close(seen["logits"].double(), logits, atol=1e-4, rtol=0)
    out = torch.einsum("bhnm,bnmxy,bhmcy->bnhcx", (logits / 8 ** 0.5).softmax(-1), R, split(v)).flatten(2)
    torch.testing.assert_close(y.double(), out, atol=1e-4, rtol=0)


def test_prope_does_not_know_where_the_world_begins():
    q, k, v, K, c2w = prope_inputs()
    y = attend(q, k, v, K, c2w)
    moved = poses_from_labels(torch.tensor([0, 46]), 1.5, 50.0)[1].float() @ c2w        # one rigid motion of all cameras
    torch.testing.assert_close(attend(q, k, v, K, moved), y, atol=1e-5, rtol=0)
    own = c2w.clone()
    own[:, 1] = moved[:, 1]                                                             # of one camera alone
    assert (attend(q, k, v, K, own) - y).abs().max() > 0.1


@each
@torch.no_grad()
def test_a_network_with_prope_does_not_know_it_either(name):
    model, inputs, control = random_model(name, "prope", trained=True)
    moved = poses_from_labels(torch.tensor([0, 46]), 0.5, 50.0)[1].float() @ control.c2w
    told, again = model(*inputs, control), model(*inputs, Control(control.actions, moved, control.K))
    torch.testing.assert_close(again, told, atol=1e-4, rtol=0)                          # fp32, through two blocks
    assert (told - model(*inputs)).abs().max() > 0.01


def test_prope_with_one_camera_is_plain_attention():
    q, k, v, K, c2w = prope_inputs()
    plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(q, k, v, torch.eye(3).expand_as(K), torch.eye(4).expand_as(c2w)), plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(attend(q, k, v, K[:, :1].expand_as(K), c2w[:, 1:2].expand_as(c2w)), plain, atol=1e-5, rtol=0)


def test_geometry_stays_in_fp32_under_autocast():
    q, k, v, K, c2w = prope_inputs()
    P, rays = projections(K, c2w)[0], pluecker(K, c2w, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(projections(K, c2w)[0], P) and torch.equal(pluecker(K, c2w, 4, 4), rays)
        same = lambda q, k, v: v                                                        # no attention: P P^-1 alone
        torch.testing.assert_close(attend(q, k, v, K, c2w, same), v.transpose(1, 2).flatten(2), atol=1e-4, rtol=0)


# ---- plucker ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stride, action", [(1, 12), (4, 9), (8, 9), (4, 4), (8, 4)])
@torch.no_grad()
def test_the_rays_of_all_pixel_frames_are_folded_into_latent_frames(stride, action):
    spec = build("tiny", None, **BACKBONES["tiny"][0], stride=(stride, 8, 8)).spec
    adapter, seen = inject.PlueckerAdapter(spec), []
    adapter.conv.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    pixels = poses_from_labels(torch.tensor([[0] + [action] * 2 * stride]), 0.1, 1.0).float()   # at pixel rate
    latents = pixels[:, ::stride]                                                       # [1, 3, 4, 4]
    K = world.K.expand(1, 3, 3, 3)
    assert adapter(K, latents, 2, 3).shape == (1, 3, 6, spec.dim)
    rays = pluecker(K[:, :1], pixels, 32, 48)                                           # [1, 1 + 2 stride, 6, 32, 48]
    folded = F.pixel_shuffle(seen[0], 8).unflatten(1, (stride, 6)).flatten(0, 1)        # [3 * stride, 6, 32, 48]
    assert torch.equal(folded[:1].expand(stride, -1, -1, -1), folded[:stride])          # latent 0 is one frame
    torch.testing.assert_close(folded[stride - 1:], rays[0], atol=1e-4, rtol=0)         # straight, or turning: blended axes
    torch.testing.assert_close(between(latents, stride)[:, ::stride], latents, atol=1e-6, rtol=0)


# ---- Attaching, files, secondary fine-tuning -------------------------------------------------------------------------

def test_attach_adds_and_refuses():
    model = build("tiny", "adaln", **BACKBONES["tiny"][0])
    table = model.control.translation
    attach(model, "adaln+prope")
    assert model.control.kinds == ["adaln", "prope"] and model.control.translation is table
    assert all(key.startswith("control.") for key in dict(model.named_parameters()) if "prope" in key)
    with pytest.raises(ValueError, match="unknown control 'adaln.joystick'; choose adaln, text"):
        attach(model, "adaln+joystick")
    with pytest.raises(ValueError, match="needs the 81 camera sentences"):
        attach(model, "text")
    x, sigma, text = torch.randn(1, 24, 2, 4, 4), torch.rand(1, 2), {"text": torch.randn(1, 5, 64)}
    with pytest.raises(ValueError, match=r"takes (c2w|K) of every frame \[1, 2, ...\], got None"):
        model(x, sigma, text, Control(torch.zeros(1, 2).long()))
    with pytest.raises(ValueError, match=r"takes actions of every frame \[1, 2, ...\], got \[1, 3\]"):
        build("tiny", "adaln", **BACKBONES["tiny"][0])(x, sigma, text, Control(torch.zeros(1, 3).long()))
    model.refuses = {"plucker": "it has no patches"}
    with pytest.raises(ValueError, match="tiny cannot take control plucker: it has no patches"):
        attach(model, "plucker")


@each
@pytest.mark.parametrize("kind", KINDS)
def test_files_bring_their_control_with_them(name, kind, tmp_path):
    model, inputs, control = random_model(name, kind, trained=True)
    save(model, tmp_path / "a.safetensors", torch.float32)
    again = load(name, tmp_path / "a.safetensors", **BACKBONES[name][0])
    assert again.control.kinds == kind.split("+") and torch.equal(again(*inputs, control), model(*inputs, control))


def test_another_control_begins_where_the_file_ended(tmp_path, capsys):
    model, inputs, control = random_model("tiny", "adaln", trained=True)
    state, fields = model.state_dict(), BACKBONES["tiny"][0]
    save(model, tmp_path / "a.safetensors", torch.float32)
    with pytest.raises(ValueError, match="a.safetensors has surplus 'control.rotation', 'control.translation'.*--init_partial"):
        load("tiny", tmp_path / "a.safetensors", control="prope", **fields)
    other = attach(load("tiny", tmp_path / "a.safetensors", control="prope", partial=True, **fields), "prope")
    assert "has surplus 'control.rotation', 'control.translation'" in capsys.readouterr().out
    assert torch.equal(other(*inputs, control), model(*inputs))                         # new at zero effect, old gone
    more = attach(load("tiny", tmp_path / "a.safetensors", control="adaln+prope", **fields), "adaln+prope")
    assert torch.equal(more(*inputs, control), model(*inputs, control))                 # nothing lost: no flag needed

    odd = {**{k: v for k, v in state.items() if "blocks.1.ffn" not in k}, "blocks.0.extra": torch.zeros(1)}
    save(model, tmp_path / "b.safetensors", torch.float32, odd)
    with pytest.raises(ValueError, match="has no tensor 'blocks.1.ffn.0.weight', .*has surplus 'blocks.0.extra'"):
        load("tiny", tmp_path / "b.safetensors", **fields)
    loaded = load("tiny", tmp_path / "b.safetensors", partial=True, **fields).state_dict()
    assert loaded.keys() == state.keys() and torch.equal(loaded["blocks.0.ffn.0.weight"], state["blocks.0.ffn.0.weight"])
    assert loaded["blocks.1.ffn.0.weight"].std() > 0


def test_stage_1_has_the_presets_control_unless_init_or_the_flag_say_another(tmp_path):
    cpu, name = torch.device("cpu"), "tiny"
    def kinds(**flags):
        return train_stage1.initial_model(train_stage1.Config(**flags), codec("tiny"), Layout(cpu), cpu).control.kinds
    save(build(name, "adaln"), tmp_path / "a.safetensors", backbone=name)
    assert kinds() == ["prope"] and kinds(control="plucker") == ["plucker"] and kinds(init="random") == ["prope"]
    assert kinds(init=str(tmp_path / "a.safetensors")) == ["adaln"]
    assert kinds(init=str(tmp_path / "a.safetensors"), control="adaln+prope") == ["adaln", "prope"]


def test_stage_1_trains_a_new_control_on_a_frozen_network_and_saves_it_alone(tmp_path):
    coder, shipped = codec("tiny"), str(ASSETS / "tiny-stage1.safetensors")
    cfg = train_stage1.Config(control="adaln+prope", init=shipped, train="control", save_trained=True, out=str(tmp_path))
    model = train_stage1.initial_model(cfg, coder, Layout(torch.device("cpu")), torch.device("cpu"))
    optimizer, ema = train_stage1.adamw(model, cfg.lr, (0.9, 0.99), torch.device("cpu"), cfg.decay), EMA(model, 0.0)
    state = {"model": model}, {"model": optimizer}, {"model": ema}
    batch = WorldStream(coder, 0, pool=2, length=8).batch(0, 2, 8)
    loss = train_stage1.stage1_loss(train_stage1.velocity_of(model), batch.x0, batch.condition, cfg, model.spec)
    loss.backward()
    descend(optimizer, 1.0)
    ema.update(model)
    run = Run(tmp_path, cfg, 1, cfg.init)
    train_stage1.save_teacher(model, ema, cfg, run, 1)
    save_checkpoint(tmp_path, 1, *state)
    assert load_checkpoint(tmp_path, 1, *state) == 1                                    # frozen weights and all

    base, saved = load("tiny", shipped).state_dict(), load("tiny", tmp_path / "teacher.safetensors")
    assert (tmp_path / "teacher.safetensors").stat().st_size < 1e6 and saved.control.kinds == ["adaln", "prope"]
    for key, value in saved.state_dict().items():
        assert torch.equal(value, base.get(key)) == (not key.startswith("control.")) if key in base else value.abs().max() > 0
    full = train_stage1.Config(control="adaln+prope", init=shipped, train="control", out=str(tmp_path))
    train_stage1.save_teacher(model, ema, full, run, 1)
    assert (tmp_path / "teacher.safetensors").stat().st_size > 1e7                      # whole, and needs no --init
    again = load("tiny", tmp_path / "teacher.safetensors").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in saved.state_dict().items())


@pytest.mark.parametrize("flags, words", [
    (dict(save_trained=True), "--save_trained needs --train control"), (dict(train="control"), "control needs --init"),
    (dict(train="control", init="x", control="text"), "text has none"), (dict(train="head"), "--train is all or control"),
    (dict(train="control", init="x", save_trained=True, init_partial=True), "fits without --init_partial")])
def test_settings_that_do_not_go_together_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        train_stage1.Config(**flags)


@torch.no_grad()
def test_a_world_driven_by_keys_gives_cameras_to_a_network_that_wants_them():
    torch.manual_seed(0)
    model = build("tiny", "prope", layers=1, dim=48, heads=2, ffn=64)
    for p in (model.head.head.weight, *model.control.parameters()):
        torch.nn.init.normal_(p, std=0.3)
    dreams = []
    for action in (9, 18):
        player = WorldModel(model)
        player.reset(world.CAPTIONS[0])
        dreams.append(player.step([action] * 10))
    assert dreams[0].shape == (10, 64, 96, 3) and not torch.equal(*dreams)
    c2w, K = codec("tiny").cameras(torch.tensor([[0, 9, 12]]))
    assert torch.equal(relative(c2w), c2w) and torch.equal(K[0, 2], world.K) and c2w[0, 1, 2, 3] == pytest.approx(world.STEP)
