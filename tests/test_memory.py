"""Memory: positions, who sees whom, and caches that are the function that was trained. Strides are small, for speed."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import inject
import world
from block import Group, attention, meet, sights
from control import Control, poses_from_labels
from memory import EMPTY, Memory, enter, through
from model import ARCHITECTURES, build, chunk_flops, preset
from parallel import checkpoint_blocks, compile_blocks

# preset and its small fields; one row for each architecture
BACKBONES = {
    "tiny": dict(dim=48, heads=4, ffn=64, layers=3, channels=4),
    "wan2.1-1.3b": dict(dim=48, heads=4, ffn=64, layers=3, channels=4, text_dim=24, text_len=9, freq_dim=32),
    "hunyuan1.5-8b": dict(dim=32, heads=2, ffn=64, layers=3, channels=4, text_dim=24, glyph_dim=10, vision_dim=20,
                          rope_dims=(4, 6, 6), stride=(4, 8, 8)),
    "ltx2.3-22b": dict(dim=64, heads=4, ffn=64, layers=3, channels=4, text_dim=64, stride=(8, 16, 16))}
each = pytest.mark.parametrize("name", BACKBONES)
cached = pytest.mark.parametrize("mode", ["self", "segment"])
KINDS = [None, "adaln+text+plucker+prope", "prope"]
B, T, CLEAN, ROWS, COLUMNS = 2, 5, 2, 2, 3
L = ROWS * COLUMNS
LENGTHS = (6, 4, 4, 3)                                                                  # of segments: two are alike
PLACES = torch.tensor([30.0, 31, 32, 33, 34])                                           # of the frames


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(inject.PlueckerAdapter, "WIDTH", 16)                            # speed


def network(name, kind=None):
    """A network with every parameter random; `kind` without what the architecture refuses."""
    torch.manual_seed(0)
    kind = kind and "+".join(k for k in kind.split("+") if k not in ARCHITECTURES[preset(name).arch].refuses)
    states = torch.randn(81, 4, BACKBONES[name].get("text_dim", 64)) * (torch.arange(4) < torch.randint(2, 5, (81, 1)))[..., None]
    model = build(name, kind or None, states, **BACKBONES[name])
    for key, p in model.named_parameters():
        p.data.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.02 if key.endswith("bias") else 0.15)
    return model.eval()


def words(name, seed=0):
    """Text of a batch of 2, with padding where the architecture knows it."""
    g = torch.Generator().manual_seed(seed)
    text = {"text": torch.randn(B, 7, BACKBONES[name].get("text_dim", 64), generator=g)}
    if name[:3] == "hun":
        text |= {"text_mask": torch.arange(7) < torch.tensor([[7], [4]]), "glyph": torch.randn(B, 3, 10, generator=g)}
    return text


def memory_of(model, mode="joint", clean=CLEAN, lengths=LENGTHS, names=None, seed=1):
    """Segments of random tokens at fractional places, older than all frames."""
    g, N = torch.Generator().manual_seed(seed), sum(lengths)
    centres = torch.rand(N, 3, generator=g).double() * torch.tensor([4.0, ROWS - 1, COLUMNS - 1])
    segment = torch.tensor([*(names or range(5, 5 + len(lengths)))]).repeat_interleave(torch.tensor(lengths))
    centres[:, 0] += 5.0 * (segment - 4)
    start = centres.floor().long() + (torch.arange(N) > 0)[:, None]                     # the first alone has latent 0
    start[0] = 0
    return Memory(torch.randn(B, N, model.spec.dim, generator=g), centres, torch.stack([start, start + 2], -1), segment, mode, clean)


def window(model, seed=2):
    """Latents [B, C, T, H, W] and noise levels: two clean frames, then a chunk at another level for each sample."""
    _, q, r = model.spec.patch
    g = torch.Generator().manual_seed(seed)
    sigma = torch.tensor([[0.7], [0.3]]).repeat(1, T)
    sigma[:, :CLEAN] = 0
    return torch.randn(B, 4, T, q * ROWS, r * COLUMNS, generator=g), sigma


def told(seed=3):
    """Actions and cameras of the window."""
    g = torch.Generator().manual_seed(seed)
    actions = torch.randint(81, (B, T), generator=g)
    return Control(actions, poses_from_labels(actions, 0.2, 10.0).float(), world.K.repeat(B, T, 1, 1))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def layers_of(model, x, sigma, text, control, memory, frames=PLACES):
    """Keys and values that history has in every block of the forward that training uses."""
    groups, branches = enter(model, x, sigma, text, control, memory, frames, memory)
    return through(model, groups, branches, memory, keep=True)[1]


def flat(layers):
    return [x for layer in layers for pair in layer for x in pair]


def equal(a, b):
    return len(flat(a)) == len(flat(b)) > 0 and all(torch.equal(x, y) for x, y in zip(flat(a), flat(b)))


# ---- What memory is --------------------------------------------------------------------------------------------------

@each
@torch.no_grad()
def test_without_memory_a_forward_is_what_it_was(name):
    model = network(name)
    x, sigma = window(model)
    plain = model(x, sigma, words(name))
    assert torch.equal(model(x, sigma, words(name), None, EMPTY), plain)
    assert torch.equal(model(x, sigma, words(name), None, memory_of(model).without(memory_of(model))), plain)
    assert not torch.allclose(model(x, sigma, words(name), None, memory_of(model)), plain, atol=1e-2)


@each
@torch.no_grad()
def test_frames_as_memory_are_the_frames(name):
    """The oldest clean frames, embedded and placed where they were, at full scale: the same function as frames."""
    model = network(name)
    x, sigma = window(model)
    if name[:3] == "ltx":       # whose text differs: memory reads it at sigma 0, frames at that of the noisiest
        model.prompt_adaln_single.linear.weight.zero_()
    H, W = x.shape[3:]

    def split_at(n, shift=0.0):
        centres = model.centres(torch.arange(n).double(), H, W)
        start = torch.cat([centres, centres + 1]).view(2, -1, 3).permute(1, 2, 0).long()
        tokens, segment = model.embed(x[:, :, :n]).flatten(1, 2), torch.zeros(len(centres)).long()
        memory = Memory(tokens, centres + torch.tensor([shift, 0, 0]), start, segment)
        return model(x[:, :, n:], sigma[:, n:], words(name), None, memory, torch.arange(n, T))[:, :, CLEAN - n or None:]
    whole = model(x, sigma, words(name))[:, :, CLEAN:]
    close(split_at(1), split_at(2))
    error = (split_at(2) - whole).abs().max()
    assert error < (5e-3 if name[:3] == "ltx" else 1e-5)                                # LTX's official angles are fp32
    assert (split_at(2, 1.0) - whole).abs().max() > 10 * error + 1e-3


@torch.no_grad()
def test_the_frame_that_begins_a_video_keeps_its_start_in_ltx():
    """It is one pixel frame where others are eight: packed to any time, its middle is 3.5 pixel frames later."""
    model = network("ltx2.3-22b")
    memory = memory_of(model)
    moved = model.places(memory) - memory.centres
    assert moved[0].tolist() == [3.5 / 8, 0, 0] and not moved[1:].any()
    first = replace(memory, centres=torch.zeros_like(memory.centres))                   # at time 0: [0, 1) pixels
    cos, sin = model.rope(model.places(first)[:1], True)
    exact = model.rope(torch.zeros(1, 3).double(), False)                               # as a frame, where it is clamped
    close(cos, exact[0], 5e-3), close(sin, exact[1], 5e-3)


@torch.no_grad()
def test_hunyuans_memory_is_made_of_all_its_channels():
    model = network("hunyuan1.5-8b")
    x, _ = window(model)
    seen, middle = model.inputs(x, torch.zeros(B, T), {}, True), model.inputs(x, torch.zeros(B, T), {}, False)
    assert torch.equal(seen[:, 4:8, 0], x[:, :, 0]) and (seen[:, 8, 0] == 1).all() and not seen[:, 4:, 1:].any()
    assert torch.equal(middle[:, :4], x) and not middle[:, 4:].any()
    assert torch.equal(model.embed(x)[:, 1:], model.embed(x, 7)[:, 1:])
    assert not torch.allclose(model.embed(x)[:, 0], model.embed(x, 7)[:, 0])


@each
@torch.no_grad()
def test_memory_by_itself_knows_neither_noise_nor_action_nor_camera(name):
    """With self-attention's output silenced, what memory says in later blocks is its own: the caption acts, no more."""
    model = network(name, KINDS[1])
    for key, p in model.named_parameters():
        if any(part in key for part in ("self_attn.o", "img_attn_proj", "txt_attn_proj", "attn1.to_out", "prope")):
            p.zero_()
    x, sigma = window(model)
    base, memory = partial(layers_of, model, x), memory_of(model)
    alone = [layer[:1] for layer in base(sigma, words(name), told(), memory)]
    for change in ((sigma / 2, words(name), told()), (sigma, words(name), told(9)), (sigma, words(name), None)):
        assert equal([layer[:1] for layer in base(*change, memory)], alone)
    if name[:3] != "hun":                                                               # its text is heard in self-attention
        assert not equal([layer[:1] for layer in base(sigma, words(name, 1), told(), memory)], alone)


# ---- Positions -------------------------------------------------------------------------------------------------------

@each
@pytest.mark.parametrize("delta", [0.25, 7, 900, 2400])
def test_positions_add_up(name, delta):
    """Turned to p and then on by delta is turned to p + delta; a move in time leaves the channels of space alone."""
    model = network(name)
    block, heads, d = getattr(model, model.block_list)[0], model.spec.heads, model.spec.dim // model.spec.heads
    places = torch.tensor([[3.0, 1, 2], [0.5, 1.5, 0], [40.25, 0, 7]]).double()
    x = F.normalize(torch.randn(1, heads, 3, d), dim=-1)
    at = lambda p: torch.complex(*(y.double() for y in model.rope(p, True)))
    zero, move = torch.zeros(1, 3).double(), torch.tensor([[delta, 0, 0]]).double()
    step = at(zero + move) * at(zero).conj()                                            # LTX counts from the middle of its range
    same = (step.imag == 0) & (step.real > 0)                                           # squares add up to 1 nearly
    step = torch.where(same, 1.0, step.real).float(), step.imag.float()
    turned = block.turn(x, model.rope(places, True))
    moved = block.turn(turned, step)
    close(moved, block.turn(x, model.rope(places + move, True)))
    assert (moved - turned).abs().max() > 0.1
    still = same.expand(heads, 1, d // 2)
    still = torch.cat([still, still], -1) if name[:3] == "ltx" else still.repeat_interleave(2, -1)
    still = still.expand_as(moved[0])
    assert still.any() and torch.equal(moved[0][still], turned[0][still])


@each
def test_keys_turned_when_they_are_read_do_not_wear_out(name):
    """120 moves of the past by a block: cached keys, bf16 and without positions, are turned once; turned on in place
    they would be rounded 120 times. Relative errors."""
    model = network(name)
    block, heads, d = getattr(model, model.block_list)[0], model.spec.heads, model.spec.dim // model.spec.heads
    places = torch.stack([130 * torch.rand(400), torch.arange(400) % 7, torch.arange(400) % 5], 1).double()
    at = lambda p: torch.complex(*(y.double() for y in model.rope(p, True)))
    exact, move = torch.randn(1, heads, 400, d), torch.tensor([[-4.0, 0, 0]]).double()
    step = at(places[:1] + move) * at(places[:1]).conj()
    step = step / step.abs()
    worn, off = block.turn(exact, model.rope(places, True)).bfloat16(), lambda x, y: float((x - y).norm() / y.norm())
    for _ in range(120):
        worn = block.turn(worn.float(), (step.real.float(), step.imag.float())).bfloat16()
    now = model.rope(places + 120 * move, True)
    read, wanted = block.turn(exact.bfloat16().float(), now), block.turn(exact, now)
    assert off(read, wanted) < 0.002 < 5 * off(read, wanted) < off(worn.float(), wanted)


@each
@pytest.mark.parametrize("mode", ["joint", "self", "segment"])
@torch.no_grad()
def test_only_differences_of_time_matter(name, mode):
    """But in HunyuanVideo, whose text takes part in self-attention without a position."""
    model = network(name, "prope")
    x, sigma = window(model)
    memory = memory_of(model, mode)
    run = lambda memory, frames: model(x, sigma, words(name), told(), memory, frames)
    later = replace(memory, centres=memory.centres + torch.tensor([2400, 0, 0]))
    base = run(memory, PLACES)
    moved = (run(later, PLACES + 2400) - base).abs().max()
    assert moved > 1e-2 if name[:3] == "hun" else moved < 1e-5
    assert (run(later, PLACES) - base)[:, :, CLEAN:].abs().max() > 1e-3


# ---- Who sees whom ---------------------------------------------------------------------------------------------------

ROLES = ("memory", "clean", "caption", "frames", "text")
SIZES = dict(zip(ROLES, (sum(LENGTHS), 5, 3, 7, 3)))


def visible(mode, asking, i, seen, j):
    """May token i of the kind `asking` attend to token j of the kind `seen`? Written token by token, from the paper."""
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    segment = lambda kind, n: (kind, sum(n >= end for end in ends)) if kind == "memory" else kind
    if mode == "joint":
        return True
    if asking in ("frames", "text"):
        return seen != "caption"
    if mode == "self":
        return seen in ("memory", "clean", "caption")
    return seen == "caption" or (asking != "caption" and segment(asking, i) == segment(seen, j))


@pytest.mark.parametrize("padding", [False, True], ids=["", "padding"])
@pytest.mark.parametrize("mode", ["joint", "self", "segment"])
def test_attention_without_masks_is_one_softmax_under_a_mask(mode, padding):
    torch.manual_seed(0)
    roles = [role for role in ROLES if mode != "joint" or role in ("memory", "frames", "text")]
    valid = torch.tensor([[True, True, True], [True, False, True]]) if padding else None
    groups = [Group(role, torch.zeros(B, 1, SIZES[role], 8), None, words=valid if role in ("caption", "text") else None) for role in roles]
    q, k, v = ([torch.randn(B, 2, SIZES[role], 4) for role in roles] for _ in range(3))
    found = meet(sights(groups, mode, LENGTHS), q, k, v, attention)
    mask = torch.tensor([[visible(mode, a, i, s, j) for s in roles for j in range(SIZES[s])] for a in roles for i in range(SIZES[a])])
    keys = torch.cat([valid if padding and role in ("caption", "text") else torch.ones(B, SIZES[role]).bool() for role in roles], 1)
    whole = F.scaled_dot_product_attention(*(torch.cat(x, 2) for x in (q, k, v)), attn_mask=mask & keys[:, None, None])
    close(torch.cat(found, 1), whole.transpose(1, 2).flatten(2), 1e-6)
    if mode == "self":                                                                  # two softmaxes do not add up to one
        parts = [attention(q[3], *(torch.cat(x[part], 2) for x in (k, v))) for part in (slice(2), slice(3, None))]
        assert (sum(parts).transpose(1, 2).flatten(2) - found[3]).abs().max() > 0.1


@each
@torch.no_grad()
def test_in_one_block_the_chunk_hears_the_same_in_all_modes(name, monkeypatch):
    """Modes differ in what history becomes; what a chunk sees of it, cameras included, is all of it in each."""
    monkeypatch.setitem(BACKBONES, name, {**BACKBONES[name], "layers": 1})
    model = network(name, KINDS[1])
    x, sigma = window(model)
    joint, own, segment = (model(x, sigma, words(name), told(), memory_of(model, mode), PLACES)[:, :, CLEAN:]
                           for mode in ("joint", "self", "segment"))
    close(own, joint), close(segment, joint)


@each
@cached
@torch.no_grad()
def test_history_is_deaf_to_the_chunk_but_under_joint_it_is_not(name, mode):
    """Keys and values of all blocks, bit for bit, for other noise, another level, other actions of the chunk."""
    model = network(name, KINDS[1])
    x, sigma = window(model)
    other, louder, control, elsewhere = x.clone(), sigma.clone(), told(), told()
    other[:, :, CLEAN:], louder[:, CLEAN:] = torch.randn(B, 4, T - CLEAN, *x.shape[3:]), 0.9
    pairs = zip(vars(control).values(), vars(told(7)).values())
    elsewhere = Control(*(torch.cat([a[:, :CLEAN], b[:, CLEAN:]], 1) for a, b in pairs))
    changes = (other, sigma, control), (x, louder, control), (x, sigma, elsewhere)
    run = lambda x, sigma, control, mode: layers_of(model, x, sigma, words(name), control, memory_of(model, mode))
    base, joint = run(x, sigma, control, mode), run(x, sigma, control, "joint")
    for change in changes:
        assert equal(run(*change, mode), base)
        leaks = [not torch.equal(x, y) for x, y in zip(flat(run(*change, "joint")), flat(joint))]
        assert not any(leaks[:2]) and all(leaks[2:])                                    # block 0 has heard nothing yet


@each
@cached
def test_what_hears_what_in_history(name, mode):
    """By gradients: of a segment's last values with respect to all tokens; and the chunk hears everything."""
    model = network(name)
    x, sigma = window(model)
    memory = memory_of(model, mode)
    tokens, x = memory.tokens.requires_grad_(), x.requires_grad_()
    groups, branches = enter(model, x, sigma, words(name), None, memory, PLACES, memory)
    groups, layers = through(model, groups, branches, memory, keep=True)
    (_, v), (_, v_clean) = layers[-1]
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    for start, end in zip([0, *ends], ends):
        grad, frames = torch.autograd.grad(v[:, :, start:end].square().sum(), (tokens, x), retain_graph=True, allow_unused=True)
        reached = grad.abs().sum((0, 2)) > 0
        own = torch.zeros(sum(LENGTHS)).bool()
        own[start:end] = True
        assert torch.equal(reached, own if mode == "segment" else torch.ones_like(own))
        assert (frames is None or not frames.any()) == (mode == "segment") and (frames is None or not frames[:, :, CLEAN:].any())
    grad = torch.autograd.grad(v_clean.square().sum(), tokens, retain_graph=True, allow_unused=True)[0]
    assert (grad is None or not grad.any()) == (mode == "segment")
    out = model(x, sigma, words(name), None, memory, PLACES)[:, :, CLEAN:]
    grad, frames = torch.autograd.grad(out.square().sum(), (tokens, x))
    assert (grad.abs().sum((0, 2)) > 0).all() and (frames.abs().sum((0, 1, 3, 4)) > 0).all()
    assert grad.isfinite().all()


# ---- Caches ----------------------------------------------------------------------------------------------------------

@each
@cached
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_a_cache_is_the_function_that_was_trained(name, mode, kind):
    """One prefill, then steps of the chunk alone: the masked forward at each noise level, with and without memory, with
    and without clean frames."""
    model = network(name, kind)
    x, sigma = window(model)
    control = told() if model.control else None
    for memory, clean in ((memory_of(model, mode), CLEAN), (memory_of(model, mode), 0), (replace(EMPTY, mode=mode), CLEAN)):
        whole, (a, b) = replace(memory, clean=clean), (CLEAN - clean, T)
        z, s, places, cut = x[:, :, a:b], sigma[:, a:b], PLACES[a:b], control and control.frames(a, b)
        cache = model.prefill(z[:, :, :clean], words(name), cut and clean and cut.frames(0, clean) or None, memory, places[:clean])
        for level in (1.0, 0.6, 0.05):
            s = torch.cat([torch.zeros(B, clean), torch.tensor([[level], [level / 2]]).expand(B, b - a - clean)], 1)
            trained = model(z, s, words(name), cut, whole, places)[:, :, clean:]
            close(model(z[:, :, clean:], s[:, clean:], words(name), cut, cache, places), trained)
        joint = model(z, s, words(name), cut, replace(memory, mode="joint"), places)[:, :, clean:]
        if clean or len(memory.segment):
            assert (joint - trained).abs().max() > 1e-4                                 # another function, to be trained


@each
@cached
@torch.no_grad()
def test_branches_of_guidance_do_not_mix(name, mode):
    """Two conditions in one batch are two caches of one; a cache of the other text gives another answer."""
    model = network(name)
    x, sigma = window(model)
    memory, text = memory_of(model, mode), words(name)
    one = lambda i: {key: value[i:i + 1] for key, value in text.items()}
    both = model.prefill(x[:, :, :CLEAN], text, None, memory, PLACES[:CLEAN])
    v = model(x[:, :, CLEAN:], sigma[:, CLEAN:], text, None, both, PLACES)
    for i in range(B):
        alone = replace(memory, tokens=memory.tokens[i:i + 1])
        cache = model.prefill(x[i:i + 1, :, :CLEAN], one(i), None, alone, PLACES[:CLEAN])
        mixed = model.prefill(x[i:i + 1, :, :CLEAN], one(1 - i), None, alone, PLACES[:CLEAN])
        step = lambda cache: model(x[i:i + 1, :, CLEAN:], sigma[i:i + 1, CLEAN:], one(i), None, cache, PLACES)
        close(step(cache), v[i:i + 1])
        assert (step(mixed) - step(cache)).abs().max() > 1e-4


@each
@torch.no_grad()
def test_segments_outlive_their_chunk(name):
    """Kept keys and values, re-placed, among other segments, behind other clean frames: those of a fresh encoding."""
    model = network(name, KINDS[1])
    x, sigma = window(model)
    first = memory_of(model, "segment")                                                 # segments 5 to 8
    cache = model.prefill(x[:, :, :CLEAN], words(name), told().frames(0, CLEAN), first, PLACES[:CLEAN])
    new = memory_of(model, "segment", lengths=(5,), names=(20,), seed=8)
    part = lambda i: first.without(first.without(memory_of(model, lengths=(1,), names=(i,))))
    moved = [replace(part(i), centres=part(i).centres - torch.tensor([days, 0, 0])) for i, days in ((8, 3.75), (5, 120.0))]
    packed = [moved[0], new, moved[1]]                                                  # another order; 6 and 7 have gone
    places = (torch.cat([getattr(m, k) for m in packed]) for k in ("centres", "bounds", "segment"))
    second = Memory(torch.cat([m.tokens for m in packed], 1), *places, "segment")
    later, control = window(model, 6)[0], told(11)
    prefill = partial(model.prefill, later[:, :, :CLEAN], words(name), control.frames(0, CLEAN), second, PLACES[:CLEAN])
    tokens = []
    count = lambda block, args: tokens.append([g.x.shape[2] for g in args[0] if g.role == "memory"])
    hook = getattr(model, model.block_list)[0].register_forward_pre_hook(count)
    kept, fresh = prefill(past=cache), prefill()
    hook.remove()
    assert tokens == [[5], [3 + 5 + 6]]                                                 # of the kept ones nothing is computed
    for a, b in zip(flat(kept.layers), flat(fresh.layers), strict=True):
        close(a, b)
    k, old = kept.layers[-1][0][0], cache.layers[-1][0][0]
    assert torch.equal(k[:, :, :3], old[:, :, -3:]) and torch.equal(k[:, :, -6:], old[:, :, :6])
    step = lambda cache: model(later[:, :, CLEAN:], sigma[:, CLEAN:], words(name), control, cache, PLACES)
    close(step(kept), step(fresh))
    close(step(kept), model(later, sigma, words(name), control, replace(second, clean=CLEAN), PLACES)[:, :, CLEAN:])
    again = prefill(past=kept)                                                          # and once more, nothing new
    assert equal(again.layers, kept.layers) and tokens == [[5], [14]]


@each
@torch.no_grad()
def test_a_cache_has_the_bytes_it_should(name):
    model = network(name)
    x, _ = window(model)
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            cache = model.prefill(x[:, :, :CLEAN], words(name), None, memory_of(model, "self"))
        assert {x.dtype for x in flat(cache.layers)} == {dtype}
        assert cache.bytes == B * 2 * size * model.spec.dim * model.spec.layers * (sum(LENGTHS) + CLEAN * L)


@each
@pytest.mark.parametrize("mode", ["joint", "self", "segment"])
@torch.no_grad()
def test_operations_of_a_chunk_agree_with_a_counter(name, mode):
    model = network(name)
    x, sigma = window(model)
    x, sigma, text, memory = x[:1], sigma[:1], {"text": words(name)["text"][:1]}, memory_of(model, mode)
    memory = replace(memory, tokens=memory.tokens[:1])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if mode == "joint":
            for _ in range(3):
                model(x, sigma, text, None, memory)
        else:
            cache = model.prefill(x[:, :, :CLEAN], text, None, memory)
            for _ in range(3):
                model(x[:, :, CLEAN:], sigma[:, CLEAN:], text, None, cache)
    counted = counter.get_flop_counts()["Global"]
    pairs = counted.pop(torch.ops.aten.bmm)
    S = 7 if name[:3] in ("ltx", "hun") else model.spec.text_len
    ours = chunk_flops(model.spec, mode, 3, T - CLEAN, CLEAN, ROWS, COLUMNS, sum(LENGTHS), LENGTHS, S)
    assert abs(ours["self_attention"] + ours["text_attention"] - pairs) < 0.01 * pairs
    assert abs(ours["linear"] - sum(counted.values())) < 0.01 * sum(counted.values())


# ---- Training and running --------------------------------------------------------------------------------------------

def everything(model, mode):
    """Velocity and gradients of a forward that trains, and under a cached mode that of a step behind a prefill."""
    x, sigma = window(model)
    memory, control = memory_of(model, mode), told() if model.control else None
    tokens, text = memory.tokens.requires_grad_(), words(model.spec.name)
    v = model(x, sigma, text, control, memory, PLACES)
    v[:, :, CLEAN:].square().mean().backward()
    steps = []
    if mode != "joint":
        with torch.no_grad():
            cache = model.prefill(x[:, :, :CLEAN], text, control and control.frames(0, CLEAN), memory, PLACES[:CLEAN])
            steps = [model(x[:, :, CLEAN:], sigma[:, CLEAN:], text, control, cache, PLACES)]
    return v.detach(), tokens.grad, *steps, *(p.grad for p in model.parameters() if p.grad is not None)


@each
def test_blocks_under_checkpointing_have_the_same_gradients(name):
    plain, again = (everything(change(network(name, KINDS[1])), "segment") for change in (lambda model: model, checkpoint_blocks))
    for a, b in zip(again, plain, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name[:3] == "hun" else pytest.mark.slow) for name in BACKBONES])
def test_blocks_share_one_compilation_per_pass_without_graph_breaks(name):
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before, plain = graphs["unique_graphs"], everything(network(name), "segment")
    for a, b in zip(everything(compile_blocks(network(name), fullgraph=True, backend="eager"), "segment"), plain, strict=True):
        close(a, b)
    assert graphs["unique_graphs"] == before + 3                                        # training, prefill, step


@pytest.mark.slow
@each
@pytest.mark.parametrize("mode", ["joint", "self", "segment"])
def test_checkpointed_and_compiled_blocks_are_the_same(name, mode):
    torch._dynamo.reset()
    model = compile_blocks(checkpoint_blocks(network(name, KINDS[1])), fullgraph=True, backend="eager")
    for a, b in zip(everything(model, mode), everything(network(name, KINDS[1]), mode), strict=True):
        close(a, b)


def test_what_does_not_fit_is_named():
    model = network("tiny")
    (x, sigma), text = window(model), words("tiny")
    memory, past = memory_of(model, "self"), model.prefill(window(model)[0][:, :, :2], words("tiny"), None, memory_of(model, "self"))
    m = memory_of(model)
    for call, said in (
            (lambda: replace(m, mode="causal"), "unknown attention 'causal'; choose joint, self, segment"),
            (lambda: replace(m, centres=m.centres[1:]), r"17 memory tokens need centres \[17, 3\], got \[16, 3\]"),
            (lambda: replace(m, segment=m.segment.roll(1)).segments(), "must be neighbours, got the order"),
            (lambda: model.prefill(x, text, None, m), "joint attention has no cache"),
            (lambda: model.prefill(x, text, None, replace(m, mode="segment"), past=past), "only segments outlive"),
            (lambda: model(x, sigma, text, None, replace(memory, clean=6)), "counts 6 clean frames, but there are only 5"),
            (lambda: model(x, sigma, text, None, replace(m, tokens=m.tokens[:1])), r"memory tokens are \[2, N, 48\]"),
            (lambda: model(x[:, :, 2:], sigma[:, 2:], text, None, past, PLACES[2:]), "positions of 3 frames for 5")):
        with pytest.raises(ValueError, match=said):
            call()
