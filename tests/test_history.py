"""The past of a rollout: what is kept of it, what a chunk is shown, and that neither grows; training behind pasts."""

import random
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import common
import history as history_of
import horizon
import model as models
import rollout as rollouts
import train_stage1 as one
import train_stage2 as two
import world
from compress import Settings, attach
from control import Condition, Control
from flow import schedule
from history import History, behind, budget, clean_frames, configure, content, draw_past, overlap, room, select
from model import build, load, preset
from parallel import compile_blocks
from rollout import WorldModel, guided, rollout, velocity_of
from scales import part
from weights import save

SIGMAS, SMALL = schedule(2, 3.0), dict(layers=2, dim=48, heads=2, ffn=64)


def network(kind=None, **fields):
    torch.manual_seed(0)
    model = build("tiny", **SMALL)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return attach(model, kind and Settings.of(model.spec, kind, **fields))


def frames_of(T, seed=0, B=1):
    return torch.randn(B, 24, T, 4, 6, generator=torch.Generator().manual_seed(seed))


def condition(T, B=1, cameras=False):
    eye = torch.eye(4).expand(B, T, 4, 4), torch.eye(3).expand(B, T, 3, 3)
    actions = torch.arange(T).expand(B, -1) % 9
    return Condition({"text": torch.ones(B, 3, 64)}, Control(actions, *eye) if cameras else Control(actions))


def roll(model, prefix, frames, velocity=None, seed=1, told=None):
    g = torch.Generator().manual_seed(seed)
    return rollout(velocity or velocity_of(model), told or condition(frames, len(prefix)), prefix, frames, SIGMAS, 4, 12,
                   lambda shape: torch.randn(shape, generator=g), model=model)


# ---- What is kept and shown ------------------------------------------------------------------------------------------

KINDS = [("none", {}), ("window", {}), ("framepack", {}), ("framepack", {"recent": 5}), ("f1", {}), ("pyramid", {}),
         ("packforcing", {"top": 3, "choose": "recency"})]


@pytest.mark.parametrize("kind, fields", KINDS)
@pytest.mark.parametrize("steps", [[4] * 40, [1] + [4] * 30, [3, 1, 2, 7, 4, 90, 1, 1, 300, 4, 4]], ids=["text", "image", "odd"])
def test_a_history_kept_in_pieces_shows_what_the_whole_one_would(kind, fields, steps):
    model, x = network(kind, **fields), frames_of(sum(steps))
    history, n = History(x[:, :, :0], 8, model), 0
    for step in steps:
        history.append(x[:, :, n:n + step])
        n += step
        clean, start, past = history.view(4)
        s = model.compress.settings
        shown = range(max(0, n - s.sink - s.recent) // 4)[-s.top:]
        begin, older = part(s.plan(n, shown))
        assert (start, list(past.segments), past.start, past.now) == (begin, older, begin, n)
        assert torch.equal(clean, x[:, :, begin:n])
        for segment, latents in zip(past.segments, past.latents):
            exact = x[:, :, segment.start:segment.end]
            if segment.role == "tail":
                torch.testing.assert_close(latents, exact.mean((2, 3, 4), keepdim=True), atol=1e-5, rtol=0)
            else:                                       # PackForcing's blocks are stored in half precision
                assert torch.equal(latents, exact.half().float() if kind == "packforcing" and segment.role == "mid" else exact)


def test_what_is_kept_stops_growing():
    for kind, most in (("window", 7), ("framepack", 360), ("f1", 19), ("packforcing", 4), (None, 8)):
        model = network(kind)
        history = History(frames_of(0), 8, model)
        for _ in range(3):
            history.append(frames_of(400))
            for kept in (history.latents, history.first):                               # and no view of something larger
                assert kept.shape[2] <= most and kept.untyped_storage().size() == kept.nbytes
        if kind == "packforcing":                       # all else is stored, once, and by default where the latents are
            assert sum(block.shape[2] for block in history.blocks) == 1200 - 4 - 4
            assert all(block.untyped_storage().size() == block.nbytes for block in history.blocks)


def test_blocks_are_chosen_by_score_and_stay_unless_clearly_beaten():
    scores = torch.tensor([0.0, 10.0, 5.0, 5.0, 4.0, 9.0])
    assert select(scores, set(), 3) == [1, 3, 5]                                        # of equal ones the newer
    assert select(scores, set(), 9) == [0, 1, 2, 3, 4, 5]
    assert select(scores, {1, 4, 5}, 3) == [1, 4, 5]                                    # 5 is within the margin of 4
    assert select(scores, {0, 4, 5}, 3) == [1, 4, 5]
    assert select(scores, {0, 2, 4}, 3, swaps=1) == [1, 2, 4]
    assert select(scores, {0, 2, 4}, 3) == [1, 2, 5]                                    # two go, 3 does not beat 2
    assert select(torch.arange(9.0), {0, 1, 2, 3, 4}, 5, swaps=2) == [2, 3, 4, 7, 8]
    assert select(torch.zeros(5), {0, 1}, 2) == [0, 1] and select(torch.zeros(5), set(), 2) == [3, 4]
    many, order = torch.randn(40), torch.randperm(40)
    assert sorted(int(order[i]) for i in select(many[order], set(), 7)) == select(many, set(), 7)


@torch.no_grad()
@pytest.mark.parametrize("name, fields", [("tiny", {}), ("wan2.1-1.3b", dict(text_dim=16)), ("hunyuan1.5-8b", dict(
    text_dim=24, rope_dims=(4, 10, 10))), ("ltx2.3-22b", dict(text_dim=48))])
def test_affinity_is_the_sum_over_all_pairs_of_queries_and_keys(name, fields):
    torch.manual_seed(0)
    model = build(name, None, channels=4, **SMALL, **fields)
    for p in model.parameters():
        p.normal_(1.0 if p.ndim == 1 else 0.0, 0.2)
    patch = model.spec.patch
    blocks = [torch.randn(2, 4, 4, 2 * patch[1], 3 * patch[2]) for _ in range(2)]
    (q, _), (_, k) = (content(model, model.embed(x, 1).flatten(1, 2)) for x in blocks)
    first = getattr(model, model.block_list)[0]
    asked = []
    for x in blocks:                                    # what the block itself makes of clean frames without any control
        hook = first.before
        first.before = lambda g: asked.append(hook(g)[:2]) or hook(g)
        text = {"text": torch.zeros(2, 4, fields.get("text_dim", 64))}
        model(x, torch.zeros(2, 4), text)
        del first.before
    frames = [pair for pair in asked if pair[0].shape[2] == 24]
    pairs = (frames[0][0] @ frames[1][1].mT).mean((2, 3)).sum(1)                        # [B]: mean over pairs, all heads
    if name != "hunyuan1.5-8b":                         # whose blocks are also told which frame is the video's first
        torch.testing.assert_close((q * k).sum(1), pairs, rtol=1e-4, atol=1e-5)
    assert q.shape == k.shape == (2, 48)


@torch.no_grad()
def test_a_long_past_is_scored_in_pieces(monkeypatch):
    model, scores = network("packforcing", top=2), []
    for most in (100, 2):
        monkeypatch.setattr(history_of, "MOST", most)
        history = History(frames_of(0), 8, model)
        history.append(frames_of(60))
        scores.append(history.affinity())
    assert len(scores[0]) > 9
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


def test_fields_of_view_overlap_as_far_as_cameras_look_the_same_way():
    def turned(degrees):
        c2w, a = torch.eye(4), torch.deg2rad(torch.tensor(float(degrees)))
        c2w[0, 0] = c2w[2, 2] = a.cos()
        c2w[0, 2], c2w[2, 0] = a.sin(), -a.sin()
        return c2w
    K = world.K[None] if world.K.ndim == 2 else world.K[:1]
    seen = torch.stack([turned(d) for d in (0, 10, 30, 180)])[None, :, None]            # four blocks of one camera
    shares = overlap(seen, turned(0)[None, None], K.float())
    assert shares[0] == 1 and shares[3] == 0 and 1 > shares[1] > shares[2] > 0
    both = torch.stack([turned(180), turned(0)])[None, None]                            # a block that looks both ways
    assert overlap(both, turned(0)[None, None], K.float()) == 1


@torch.no_grad()
def test_every_way_of_choosing_shows_so_many_blocks_and_is_deterministic():
    for choose in ("affinity", "recency", "fov"):
        model, x = network("packforcing", top=2, choose=choose), frames_of(40, B=2)
        told = condition(48, 2, cameras=True).control
        views = []
        for cuts in ((40,), (13, 27)):
            history = History(x[:, :, :0], 8, model)
            for piece in x.split(cuts if len(cuts) > 1 else 40, 2):
                history.append(piece)
            views.append([s.start for s in history.view(4, told)[2].segments])
        assert views[0] == views[1] and len(views[0]) == 3 and views[0] == sorted(views[0])
    with pytest.raises(ValueError, match="cameras of all frames"):
        history.view(4, Control(told.actions))


# ---- Rollouts --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_short_histories_are_bit_for_bit_those_of_a_network_without_memory():
    plain = roll(network(), frames_of(4), 12)
    for kind, fields in (("none", {}), ("window", {}), ("framepack", {"recent": 8}), ("packforcing", {})):
        model = network(kind, **fields)
        assert torch.equal(roll(model, frames_of(4), 12), plain), kind
    assert not torch.equal(roll(network("framepack"), frames_of(4), 12), plain)         # one frame is whole, by default


@torch.no_grad()
@pytest.mark.parametrize("kind", ["window", "framepack", "packforcing"])
def test_memory_is_seen_and_without_it_nothing_beyond_the_window(kind):
    x = frames_of(40)
    y = x.clone()
    y[:, :, 0] += 3
    before, after = (roll(network(kind), prefix, 44)[:, :, 40:] for prefix in (x, y))
    assert (before - after).abs().max() > 1e-6
    assert torch.equal(roll(network(), x, 44)[:, :, 40:], roll(network(), y, 44)[:, :, 40:])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["self", "segment"])
@pytest.mark.parametrize("kind, fields", [("window", {}), ("framepack", {}), ("packforcing", {"top": 2, "choose": "recency"})])
def test_cached_history_gives_the_rollout_of_the_whole_forward(kind, fields, attention, monkeypatch):
    """With guidance, whose branches have caches of their own, over several chunks with segments that go on living."""
    model = network(kind, attention=attention, **fields)
    null, calls, prefill = {"text": torch.zeros(1, 3, 64)}, [], model.prefill
    model.prefill = lambda *args: calls.append(args) or prefill(*args)
    velocity = guided(velocity_of(model), 2.0, null)
    cached = roll(model, frames_of(20), 32, velocity)
    assert len(calls) == 3 * 2 and (attention == "self" or all(args[-1] for args in calls[2:]))     # chunks x branches
    monkeypatch.setattr(models.compress.Past, "reusable", lambda self, settings: False)
    whole = roll(model, frames_of(20), 32, velocity)
    torch.testing.assert_close(cached, whole, atol=1e-5, rtol=0)
    model.compress.settings = replace(model.compress.settings, attention="joint")
    assert (roll(model, frames_of(20), 32, velocity) - whole).abs().max() > 1e-3        # it is another function


@torch.no_grad()
def test_a_prompt_that_is_the_negative_text_still_has_two_branches(monkeypatch):
    """The same tensors, once with control and once without."""
    model, told = network("framepack", attention="self"), condition(28)
    velocity = guided(velocity_of(model), 2.0, told.text)
    cached = roll(model, frames_of(20), 28, velocity, told=told)
    monkeypatch.setattr(models.compress.Past, "reusable", lambda self, settings: False)
    torch.testing.assert_close(cached, roll(model, frames_of(20), 28, velocity, told=told), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_segment_that_lives_on_is_not_computed_again():
    model = network("packforcing", attention="segment", top=3, choose="recency")
    history = History(frames_of(48), 8, model)
    velocity, lengths, prefill = velocity_of(model), [], model.prefill
    model.prefill = lambda x, text, control, memory, frames, past: lengths.append(
        memory.without(past.memory).tokens.shape[1] if past else memory.tokens.shape[1]) or prefill(x, text, control, memory, frames, past)
    told = condition(60)
    for n in (48, 52, 56):
        clean, start, past = history.view(4)
        levels = torch.tensor([[0.0] * clean.shape[2] + [1.0] * 4])
        for _ in range(2):
            velocity(torch.cat([clean, frames_of(4)], 2), levels, replace(told.frames(start, n + 4), past=past))
        history.append(frames_of(4))
    assert lengths == [4 * 6 + 3 * 2 * 2, 4, 4]          # the sink's 4 frames of 2 x 3 patches, blocks of 2 x 1 x 2 cells


def operations(world_model, n):
    """Operations of a chunk behind n frames."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        world_model.step([9] * 4)
    return counter.get_total_flops()


@torch.no_grad()
@pytest.mark.parametrize("kind, fields", [("window", {}), ("framepack", {}), ("packforcing", {"top": 2})])
def test_a_chunk_costs_the_same_whatever_came_before(kind, fields):
    """Behind 400 and 912 frames, which are on the same place of the ladder's grid. Choosing blocks is all that grows."""
    player, costs, kept = WorldModel(network(kind, **fields), steps=1), [], []
    player.reset(world.CAPTIONS[0], world.World(0).step([0] * 4))
    for n in (400, 912):
        latents = torch.randn(1, 24, n - player.history.n, 8, 12)
        player.actions = torch.cat([player.actions, torch.zeros(1, latents.shape[2], dtype=torch.long)], 1)
        player.history.append(latents)
        player.actions = player.actions[:, -(player.history.n - player.history.begin()):]
        player.step([0] * 4)                            # keys of all these blocks are made here
        costs.append(operations(player, n))
        kept.append(player.history.latents.nbytes + player.history.first.nbytes + player.actions[:, :40].nbytes)
    assert kept[0] == kept[1] and costs[0] == pytest.approx(costs[1], rel=1e-3 if kind == "packforcing" else 0)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["joint", "self", "segment"])
@pytest.mark.parametrize("kind, frames", [("none", 12), ("window", 60), ("framepack", 60), ("packforcing", 100)])
def test_the_operations_of_a_chunk_are_those_that_are_planned(kind, frames, attention):
    model = network(kind, attention=attention, **{"choose": "recency"} if kind == "packforcing" else {})
    history = horizon.filled(model, frames - 4, (24, 8, 12))
    velocity, text = rollouts.launched(model), condition(1).text
    told = lambda: Condition(text, condition(history.n + 4 - history.begin()).control)
    once = lambda: rollouts.chunks(velocity, told(), history, history.n + 4, SIGMAS, 4, torch.randn, rollouts.few_step, lambda n: {},
                                   history.begin())
    once()                                              # segments of the chunk before are cached
    seen, planned = horizon.expected(model, frames, (4, 6), 2)
    clean, _, past = history.copy().view(4)
    with FlopCounterMode(display=False) as counter:
        memory, _ = model.compress.remember(model, past)
    encoding = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        once()
    assert seen == memory.tokens.shape[1] + clean.shape[2] * 24
    counts = counter.get_flop_counts()["Global"]
    attention_only = counts.pop(torch.ops.aten.bmm)
    assert attention_only == pytest.approx(planned["self_attention"] + planned["text_attention"], rel=0.01)
    assert sum(counts.values()) - encoding == pytest.approx(planned["linear"], rel=0.08)    # a prefill has no head


@pytest.mark.parametrize("compiled, skipped", [(False, 1), (True, 5)])
def test_chunks_that_warm_up_or_compile_are_not_counted(compiled, skipped, monkeypatch):
    model, taken = network("window"), iter([9000.0] * skipped + [3.0, 1.0, 2.0])
    monkeypatch.setattr(horizon, "timed", lambda go, device: (next(taken), go()))
    cfg = horizon.Config("tiny", steps=1, chunks=3, compile=compiled)
    found = horizon.measure(model, horizon.filled(model, 48, (24, 8, 12)), condition(1).text, cfg)
    assert found["ms"] == 2 and len(found["times"]) == skipped + 3 and next(taken, None) is None


QUICK = [("window", "self"), ("framepack", "joint"), ("framepack", "self"), ("packforcing", "segment")]


@pytest.mark.parametrize("kind, attention", QUICK + [pytest.param(kind, attention, marks=pytest.mark.slow)
                         for kind in ("window", "framepack", "packforcing") for attention in ("joint", "self", "segment")
                         if (kind, attention) not in QUICK])
def test_compiled_blocks_serve_all_chunks(kind, attention):
    fields = {"choose": "recency", "top": 3} if kind == "packforcing" else {}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, counts = compile_blocks(network(kind, attention=attention, **fields), backend="eager", fullgraph=True), []
    velocity, history = velocity_of(model), History(frames_of(401), 8, model)           # all of the ladder
    for _ in range(9):
        told = replace(condition(history.n + 4 - history.begin()), begins=False)
        with torch.no_grad():
            rollouts.chunks(velocity, told, history, history.n + 4, SIGMAS, 4, torch.randn, rollouts.few_step, lambda n: {}, history.begin())
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    settled = 4 if (kind, attention) == ("framepack", "segment") else 2                 # what enters repeats so often
    assert counts[0] == (1 if attention == "joint" else 2) and len({*counts[settled - 1:]}) == 1, counts


def test_a_world_with_memory_can_be_gone_back_to_and_told_apart():
    player = WorldModel(network("framepack", attention="segment"), steps=1)
    player.reset(world.CAPTIONS[1], world.World(1).step([0] * 4), seed=5)
    for _ in range(3):
        player.step([9] * 4)
    here, futures = player.state(), []
    for actions in ([9] * 4, [3] * 4, [9] * 4):
        futures.append(torch.cat([player.step(actions), player.step([0, 12, 4, 4, 1])]))
        player.restore(here)
    assert torch.equal(futures[0], futures[2]) and not torch.equal(futures[0], futures[1])
    with pytest.raises(ValueError, match="kept for .*framepack.*not for none"):
        WorldModel(network(), steps=1).restore(here)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["window", "framepack", "packforcing"])
def test_ten_minutes_of_the_tiny_world(kind):
    """4,800 frames: operations and what is kept are those of the first minute, but for PackForcing's stored blocks."""
    player, costs = WorldModel(network(kind), steps=1), {}
    player.reset(world.CAPTIONS[0], world.World(0).step([0] * 4))
    for n in range(4, 4800, 4):
        if n % 512 == 4:
            costs[n] = operations(player, n), player.history.latents.nbytes
        else:
            player.step([9, 9, 3, 3])
    late = [cost for n, cost in costs.items() if n > 480]
    assert max(flops for flops, _ in late) == pytest.approx(min(flops for flops, _ in late), rel=0.01)
    assert max(size for _, size in late) == min(size for _, size in late)
    stored = sum(block.nbytes for block in player.history.blocks)
    assert stored <= 4800 * 24 * 8 * 12 * 4


# ---- Settings and weights --------------------------------------------------------------------------------------------

def test_a_checkpoint_carries_its_compressor_and_how_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setitem(models.PRESETS, "tiny", replace(models.TINY, **SMALL))
    model = network("packforcing", attention="self", top=5)
    save(model, tmp_path / "a.safetensors", dtype=torch.float32)
    again = load("tiny", tmp_path / "a.safetensors")
    assert again.compress.settings == model.compress.settings
    assert {k for k in again.state_dict() if k.startswith("compress.")} >= {"compress.kernels.2x2x2.weight", "compress.detail.out.bias"}
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    kept = again.compress.kernels["2x2x2"].weight
    attach(again, replace(again.compress.settings, attention="joint"))                  # the same kernels, used otherwise
    assert again.compress.settings.attention == "joint" and torch.equal(again.compress.kernels["2x2x2"].weight, kept)
    state = load_file(tmp_path / "a.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith("compress.")}, tmp_path / "b.safetensors", {"backbone": "tiny"})
    assert load("tiny", tmp_path / "b.safetensors").compress is None                    # an older file has none
    save_file({k: v for k, v in state.items() if "detail" not in k}, tmp_path / "c.safetensors",
              {"backbone": "tiny", "history": str(model.compress.settings)})
    with pytest.raises(ValueError, match="no tensor .*compress.detail"):
        load("tiny", tmp_path / "c.safetensors")


def test_a_budget_is_told_before_it_is_spent():
    line = budget(network("framepack"), 4, 4797)
    assert "of 4800 frames (115,200 tokens) a chunk sees at most 90 tokens; " in line and "latent frames are kept" in line
    assert "on the host 21.1 MiB" in budget(network("packforcing"), 4, 4797)
    assert "the latest 8 of 99 frames" in budget(network(), 4, 96)
    with torch.device("meta"):
        large = build("wan2.1-1.3b")
        lines = [budget(attach(large, Settings.of(large.spec, "window", attention=mode)), 4, 96)
                 for mode in ("self", "segment")]
    one, two = (float(re.search(r"([0-9.]+) GiB in bf16", line)[1]) for line in lines)
    assert two == pytest.approx(2 * one, abs=0.01) and one > 4                          # of old and new segments


# ---- Training --------------------------------------------------------------------------------------------------------

def test_pasts_are_log_uniform_and_reach_every_level():
    shared = random.Random(0)
    drawn = [draw_past(shared, 400, 4, 0.2) for _ in range(4000)]
    assert min(drawn) == 0 and max(drawn) > 380 and max(drawn) <= 401 and {n % 4 for n in drawn} == {0, 1}
    share = lambda a, b: sum(a <= n < b for n in drawn) / 4000
    assert share(0, 4) == pytest.approx(share(12, 28), abs=0.05)                        # 1 and 4..7 chunks and one: doublings
    assert share(28, 60) == pytest.approx(share(124, 252), abs=0.05)
    segments = [s for n in set(drawn) for s in Settings.of(models.TINY, "framepack").plan(n)]
    assert {(k,) * 3 for k in (1, 2, 4, 8, 16)} < {s.level for s in segments} and any(s.role == "tail" for s in segments)
    assert {draw_past(shared, 0, 4, 0.5) for _ in range(20)} == {0}


def test_training_windows_show_what_a_rollout_shows():
    for kind in ("window", "framepack", "packforcing"):
        model, x = network(kind), frames_of(60)
        start, past = behind(model, x, 40)
        clean, begin, seen = History(x[:, :, :40], 8, model).view(4)
        assert (start, past.segments, past.now) == (begin, seen.segments, 40) and past.kept is None
        assert all(torch.equal(a, b) for a, b in zip(past.latents, seen.latents))
        assert clean_frames(model, 40) == 40 - start == clean.shape[2]
        assert room(model, model.spec).window + clean.shape[2] <= 12 or room(model, model.spec).window == 8
    assert behind(network(), x, 40) == (40, None) == (40, behind(network("none"), x, 0)[1])


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(models.PRESETS, "tiny", replace(models.TINY, layers=2, dim=24, heads=2, ffn=32))
    for script in (one, two):
        monkeypatch.setattr(script, "setup", lambda: torch.device("cpu"))
    monkeypatch.setattr(two, "curves", lambda folder: None)
    return tmp_path


STAGE1 = ["--steps", "3", "--batch", "2", "--pool", "4", "--save_every", "9", "--log_every", "1", "--warmup", "1", "--lr", "0.01"]


@pytest.mark.parametrize("history", [("framepack", "joint"), ("packforcing", "self")])
def test_both_stages_learn_a_compressor_and_pass_it_on(tiny, history):
    kind, attention = history
    flags = ["--history", kind, "--attention", attention, "--recent", "2" if kind == "framepack" else "0"]
    one.main(common.parse(one.Config, [*STAGE1, "--out", str(tiny / "one"), "--past", "32", *flags]))
    teacher = load("tiny", tiny / "one" / "teacher.safetensors")
    assert teacher.compress.settings.attention == attention and teacher.compress.settings.kind == kind
    two.main(common.parse(two.Config, [
        "--out", str(tiny / "two"), "--teacher", str(tiny / "one" / "teacher.safetensors"), "--batch", "1", "--pool", "2", "--steps", "2",
        "--critic_warmup", "0", "--critic_steps", "1", "--preview", "0", "--t2v", "0", "--i2v", "0", "--past", "32", "--frames", "12",
        "--lr", "0.01", "--ema", "0.5", "--gan", "0.1", "--sft", "0.1", "--denoise", "2"]))
    a, b = (load_file(tiny / name) for name in ("one/teacher.safetensors", "two/student.safetensors"))
    moved = [k for k in a if k.startswith("compress.") and not torch.equal(a[k], b[k])]
    assert a.keys() == b.keys() and moved
    assert load("tiny", tiny / "two" / "student.safetensors").compress.settings == teacher.compress.settings


def test_teacher_and_critic_are_given_the_past_that_the_student_had(tiny, monkeypatch):
    torch.manual_seed(0)
    model = attach(build("tiny"), Settings.of(preset("tiny"), "framepack"))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save(model, tiny / "teacher.safetensors")
    clips, student = [], two.student_gradients
    monkeypatch.setattr(two, "student_gradients", lambda nets, recipe, clip, *rest: clips.append(clip) or student(nets, recipe, clip, *rest))
    two.main(common.parse(two.Config, [
        "--out", str(tiny / "run"), "--teacher", str(tiny / "teacher.safetensors"), "--batch", "2", "--pool", "2", "--steps", "2",
        "--critic_warmup", "0", "--critic_steps", "1", "--preview", "0", "--t2v", "0", "--i2v", "0", "--past", "40", "--frames", "12", "--denoise", "1"]))
    for clip in clips:
        past, T = clip.cond.past, clip.x0.shape[2]
        assert clip.null.past is past and clip.past.segments == past.segments
        clean = past.now - past.start
        assert T == clean + 8 and not clip.mask[:, :clean].any() and clip.mask[:, -4:].all()
        assert not any(x.requires_grad for x in past.latents)
        assert clip.cond.control.actions.shape[1] == T


def test_flags_that_contradict_each_other_are_named(capsys):
    for script, flags, words in ((one, ["--past", "8"], "--past"), (one, ["--past", "-1", "--history", "window"], "--past"),
                                 (one, ["--history", "framepack"], "behind --past frames"),
                                 (two, ["--tune", "lora", "--history", "framepack"], "--tune lora trains no compressor")):
        with pytest.raises(SystemExit):
            common.parse(script.Config, flags)
        assert words in capsys.readouterr().err
    with pytest.raises(ValueError, match="--attention: these weights have no history"):
        configure(network(), "", "self")
    for kind, recent, choose, words in (("none", 2, "", "leave out --recent"), ("framepack", 0, "fov", "leave out --choose")):
        with pytest.raises(ValueError, match=words):
            configure(network(), kind, "", recent, choose)
    with pytest.raises(ValueError, match="choose none, window"):
        configure(network(), "all")
