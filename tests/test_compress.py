"""History compression: plans in whole numbers, kernels that begin as means, positions, and how blocks are chosen."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress
from compress import Detail, Past, Settings, name_of, own_kernel
from model import PRESETS, build
from scales import FINE, SIZES, WHOLE, cells, packed, part, places, plan, tokens

GRIDS = (30, 52), (15, 26)
ALL = range(6001)


# ---- Plans -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, frames", [
    ("none", ALL), ("framepack", ALL), ("pyramid", ALL), ("packforcing", range(1200)),
    pytest.param("packforcing", ALL, marks=pytest.mark.slow)])
def test_every_frame_is_in_one_segment_and_the_older_is_never_finer(kind, frames):
    for T in frames:
        segments = plan(kind, T)
        assert [0, *(s.end for s in segments)] == [*(s.start for s in segments), T]     # no gap, no overlap
        assert all(s.start < s.end for s in segments)
        volumes = [math.prod(s.level) for s in segments if s.role != "sink"]
        assert all(a >= b for a, b in pairwise(volumes))
        if T:                                                                           # frame 0 is alone, or whole
            assert segments[0].start == 0 and (segments[0].end == 1 or segments[0].level == FINE)
            assert (segments[0].level == FINE) == (kind != "pyramid" or T <= 86)
            assert segments[-1].end - segments[-1].start >= 1 and segments[-1].level == FINE


@pytest.mark.parametrize("kind, shown", [("window", 16), ("f1", 20)])
def test_plans_that_drop_keep_the_first_frame_and_the_latest(kind, shown):
    for T in ALL:
        covered = [t for s in plan(kind, T) for t in range(s.start, s.end)]
        assert covered == [*range(min(T, 1)), *range(max(1, T - shown + 1), T)]


@pytest.mark.parametrize("kind, top, bounds", [                                         # K-aligned, behind one frame, any T
    ("framepack", None, ((4411, 5971, 6361), (1129, 1519, 1623))), ("f1", None, ((3926,) * 3, (996,) * 3)),
    ("window", None, ((24960,) * 3, (6240,) * 3)), ("packforcing", 16, ((22048, 23608, 26728), (5576, 5966, 6746)))])
def test_the_tokens_of_a_history_have_a_bound_that_no_length_exceeds(kind, top, bounds):
    frames = range(200) if top else ALL                 # from 72 frames on, PackForcing shows the same number of blocks
    plans = [plan(kind, T) for T in frames]
    for grid, bound in zip(GRIDS, bounds):
        counts = [tokens(segments, grid, top) for segments in plans]
        assert (max(counts[::4]), max(counts[1::4]), max(counts)) == bound
        assert tokens(plan(kind, 10 ** 6), grid, top) <= bound[0]
    if top:         # the paper's 21,632 counts the rows and columns of whole kernels alone: the last 4 of 60 rows unseen
        assert bounds[0][0] - 21632 == 16 * 2 * (8 * 13 - 7 * 13)


def test_the_pyramid_of_the_public_code_outgrows_any_bound_beyond_1366_frames():
    count = lambda T: tokens(plan("pyramid", T), (30, 52))
    assert [count(T) for T in (6, 22, 86, 342, 1366)] == [4680, 8684, 10476, 11354, 15450]     # the ends of its stages
    assert max(map(count, range(1367))) == 15450
    assert all(count(T + 2) == count(T) + 8 for T in range(1366, 6000, 2)) and count(10 ** 6) > 4_000_000
    assert count(86) > count(87)                                                        # nor is it monotone


@pytest.mark.parametrize("kind, most", [("framepack", 2091), ("packforcing", 6240 + 208)])
def test_a_chunk_changes_few_tokens_of_the_ladder_and_of_the_blocks(kind, most):
    """The literal F1 plan may change all of them: its cells are counted from the present."""
    fresh = lambda kind, T: set(plan(kind, T + 4)) - set(plan(kind, T))
    assert max(tokens(fresh(kind, T), (30, 52)) for T in range(100, 1600, 4)) == most
    if kind == "framepack":
        mean = sum(tokens(fresh(kind, T), (30, 52)) for T in range(1024, 2048, 4)) / 256
        assert mean == pytest.approx(2070, abs=30)
        coarse = lambda segments: {s for s in segments if s.level > (2, 2, 2)}
        assert coarse(fresh("f1", 400)) == coarse(plan("f1", 404)) and len(coarse(fresh(kind, 400))) == 4      # a cell a level


@pytest.mark.parametrize("kind", SIZES)
def test_a_short_history_is_left_as_it_is(kind):
    assert plan(kind, 0) == [] and part([]) == (0, [])
    assert [s[:3] for s in plan(kind, 1)] == [(0, 1, FINE)]                             # once, not as two ends
    sink, recent = SIZES[kind]
    for T in range(1, 3 if kind == "pyramid" else sink + min(recent, 2) + 1):
        segments = plan(kind, T)
        assert all(s.level == FINE for s in segments) and tokens(segments, (30, 52)) == 1560 * T
        assert part(segments) == (0, [])                                                # no memory: all is in front


def test_frames_beside_the_chunk_stay_in_front_of_it_and_the_others_become_memory():
    for kind, start, roles in (("window", 85, ["sink"]), ("framepack", 99, ["sink"] + ["mid"] * 14),
                               ("packforcing", 96, ["sink"] + ["mid"] * 22)):
        first, older = part(plan(kind, 100))
        assert first == start and [s.role for s in older] == roles


def test_a_plan_names_what_is_wrong():
    for arguments, words in ((("fancy", 3), "unknown history 'fancy'; choose none"), (("window", -1), "frames >= 0"),
                             (("framepack", 9, 0), "sink >= 1"), (("window", 9, 1, 0), "recent >= 1")):
        with pytest.raises(ValueError, match=words):
            plan(*arguments)


# ---- Frames to tokens ------------------------------------------------------------------------------------------------

SMALL = {"wan2.1-1.3b": dict(channels=4, text_dim=16), "wan2.2-5b": dict(channels=6, text_dim=16), "tiny": dict(channels=4),
         "hunyuan1.5-8b": dict(channels=4, text_dim=24, glyph_dim=10, vision_dim=20, rope_dims=(4, 10, 10)),
         "ltx2.3-22b": dict(channels=8, text_dim=48)}


@pytest.fixture(scope="module", params=SMALL)
def backbone(request):
    torch.manual_seed(0)
    model = build(request.param, None, layers=1, dim=48, heads=2, ffn=64, **SMALL[request.param])
    for p in own_kernel(model):
        nn.init.normal_(p, std=0.2)
    return model


def remember(model, kind, T, grid=(15, 26), latents=None, **fields):
    """A compressor for `model`, and a `Past` of all segments of T frames: random ones unless told."""
    compressor = compress.build(kind, model, **fields)
    settings = compressor.settings
    H, W = (n * p for n, p in zip(grid, model.spec.patch[1:]))
    x = torch.randn(2, model.spec.channels, T, H, W, generator=torch.Generator().manual_seed(T)) if latents is None else latents
    return compressor, past_of(settings.plan(T), x)


def past_of(segments, x):
    parts = [x[:, :, s.start:s.end] if s.role != "tail" else x[:, :, s.start:s.end].mean((2, 3, 4), keepdim=True) for s in segments]
    T = segments[-1].end
    return Past(tuple(segments), tuple(parts), T, T)


def plain(model, x, start=0):
    """The backbone's own patchify as a convolution: [B, T, rows, columns, D] in fp64."""
    if model.spec.arch == "hunyuan":        # a mask channel and a clean copy tell which frame is the video's first
        known = torch.cat([x, torch.ones_like(x[:, :1])], 1) * (torch.arange(start, start + x.shape[2]) == 0)[:, None, None]
        x = torch.cat([x, known], 1)
    weight, bias = own_kernel(model)
    return F.conv3d(x.double(), weight.double(), bias.double(), model.spec.patch).movedim(1, -1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["window", "framepack", "f1", "pyramid", "packforcing"])
@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_a_fresh_compressor_is_the_patch_embedding_of_means(backbone, kind, grid):
    """Init identity, step-0 identity of PackForcing's two branches, replication at odd edges, and token counts."""
    T, p = 31, backbone.spec.patch
    compressor, past = remember(backbone, kind, T, grid)
    x = torch.randn(2, backbone.spec.channels, T, grid[0] * p[1], grid[1] * p[2])
    past = past_of(past.segments, x)
    memory, _ = compressor.remember(backbone, past)
    at = 0
    for segment in past.segments:
        part, sides = x[:, :, segment.start:segment.end], [n * q for n, q in zip(segment.level, p)]
        part = F.pad(part, [m for n, side in zip(reversed(part.shape[2:]), reversed(sides)) for m in (0, -n % side)], "replicate")
        mean = F.avg_pool3d(part.double(), segment.level)                                # to the latents of one patch a token
        shape = cells(segment, grid)
        want = plain(backbone, mean.float(), segment.start if segment.level == FINE else 1)[:, :shape[0]].flatten(1, 3)
        torch.testing.assert_close(memory.tokens[:, at:at + math.prod(shape)].double(), want, atol=2e-5, rtol=0)
        at += math.prod(shape)
    assert at == memory.tokens.shape[1] == tokens(past.segments, grid)


@torch.no_grad()
def test_a_constant_gives_every_level_and_edge_the_token_of_a_patch(backbone):
    color = torch.randn(2, backbone.spec.channels, 1, 1, 1)
    for kind in ("framepack", "pyramid", "packforcing"):
        H, W = 5 * backbone.spec.patch[1], 7 * backbone.spec.patch[2]
        T = 420 if kind == "framepack" else 30                                           # all levels, and a tail
        compressor, past = remember(backbone, kind, T, (5, 7), color.expand(-1, -1, T, H, W))
        assert any(s.role == "tail" for s in past.segments) == (kind == "framepack")
        memory, _ = compressor.remember(backbone, past)
        want = plain(backbone, color.expand(-1, -1, 1, *backbone.spec.patch[1:]), 1).flatten(1, 3)
        known = sum(math.prod(cells(s, (5, 7))) for s in past.segments if s.start == 0) if backbone.spec.arch == "hunyuan" else 0
        torch.testing.assert_close(memory.tokens[:, known:].double(), want.expand(-1, memory.tokens.shape[1] - known, -1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["framepack", "packforcing"])
def test_a_frame_changes_the_tokens_that_cover_it_and_no_others(backbone, kind):
    T = 30
    compressor, past = remember(backbone, kind, T, (4, 6))
    nn.init.normal_(compressor.detail.out.weight) if kind == "packforcing" else None
    x = torch.cat(past.latents, 2)
    before, _ = compressor.remember(backbone, past)
    for frame in (3, 12, 20, 29):
        y = x.clone()
        y[:, :, frame] += 1
        after, _ = compressor.remember(backbone, past_of(past.segments, y))
        changed = (before.tokens != after.tokens).any(-1).any(0)
        covers = (before.bounds[:, 0, 0] <= frame) & (frame < before.bounds[:, 0, 1])
        block = next(s for s in past.segments if s.start <= frame < s.end)
        if block.role == "mid" and kind == "packforcing":                                # its convolutions see a block
            assert (changed & covers).any()
            covers = (before.bounds[:, 0, 0] >= block.start) & (before.bounds[:, 0, 1] <= block.end)
            assert not (changed & ~covers).any()
        else:
            assert torch.equal(changed, covers)


def test_every_level_that_is_used_learns_and_no_other_does(backbone):
    for kind, T in (("framepack", 30), ("framepack", 90), ("framepack", 420), ("packforcing", 30)):
        compressor, past = remember(backbone, kind, T, (4, 6))
        compressor.remember(backbone, past)[0].tokens.square().sum().backward()
        used = {name_of(s.level) for s in past.segments if s.level != FINE and s.level[1] < WHOLE}
        used |= {name_of(compressor.settings.levels()[-1])} if past.segments[1].role == "tail" else set()
        for name, kernel in compressor.kernels.items():
            assert (kernel.weight.grad is not None and kernel.weight.grad.isfinite().all() and kernel.weight.grad.any()) == (name in used)
        if kind == "packforcing":                       # the zero layer has gradient at once, those before it after a step
            assert compressor.detail.out.weight.grad.any()
        assert not any(x.requires_grad for x in past.latents)


@torch.no_grad()
def test_blocks_encoded_one_by_one_are_those_encoded_together(backbone):
    compressor, past = remember(backbone, "packforcing", 40, (5, 7))
    nn.init.normal_(compressor.detail.out.weight)
    together, _ = compressor.remember(backbone, past)
    single = [compressor.remember(backbone, Past((s,), (x,), s.end, s.end))[0].tokens for s, x in zip(past.segments, past.latents)]
    torch.testing.assert_close(torch.cat(single, 1), together.tokens, atol=1e-5, rtol=0)


def test_the_second_branch_halves_what_the_kernel_halves():
    for kernel in ((2, 8, 8), (2, 4, 4), (1, 2, 2)):
        x = torch.randn(3, 4, 2 * kernel[0], 3 * kernel[1], 5 * kernel[2])
        assert Detail(4, 16, kernel)(x).shape == (3, 2 * 3 * 5, 16)


# ---- Where tokens stand ----------------------------------------------------------------------------------------------

def stand(T, kind="framepack", grid=(4, 6)):
    """Centres, bounds and ids of the memory of T frames, and the place of the first frame that is left as it is."""
    settings = Settings.of(PRESETS["tiny"], kind)
    start, older = part(settings.plan(T))
    return settings, start, older, places(older, grid, T, start, settings.near, settings.far, settings.dense)


def test_a_cell_is_centred_at_the_mean_of_what_it_covers_and_cells_tile_the_grid():
    for kind, grid in (("framepack", (30, 52)), ("packforcing", (30, 52)), ("pyramid", (15, 26))):
        _, start, older, (centres, bounds, _, _) = stand(87, kind, grid)
        covered = torch.zeros(87, *grid)
        for (time, row, column), ((a, b), (c, d), (e, f)) in zip(centres.tolist(), bounds.tolist()):
            covered[a:b, c:d, e:f] += 1
            assert row == sum(range(c, d)) / (d - c) and column == sum(range(e, f)) / (f - e)
        assert (covered[:start] == 1).all() and (covered[start:] == 0).all()


def test_recent_time_is_true_and_old_time_is_in_order_and_within_a_range():
    for T in (4, 9, 13, 50, 86, 340, 400, 6000, 10 ** 6):
        settings, start, older, (centres, bounds, _, first) = stand(T)
        time, chunk = centres[:, 0].unique(), first + T - start
        assert time[0] == 0 and (centres[:, 0].diff() >= 0).all()                       # oldest first
        assert chunk <= max(settings.far, 2 * settings.near, 2 * (T - start + 2)) + 1e-9
        true = bounds[:, 0].double().sum(-1).sub(1) / 2
        near = T - true <= settings.near
        assert near.any() or T > 400
        torch.testing.assert_close(chunk - centres[near, 0], T - true[near], atol=1e-9, rtol=0)
        if T <= 400:
            assert (time.diff() > 0).all() and len(time) == len(bounds[:, 0].unique(dim=0))
        if T <= settings.near:
            torch.testing.assert_close(centres[:, 0], true, atol=1e-9, rtol=0)
            assert first == start
    _, _, older, (centres, _, _, first) = stand(400, "packforcing")
    assert centres[:, 0].unique().tolist() == [*range(int(first))]                      # one place a cell
    assert first == 4 + 2 * len([s for s in older if s.role == "mid"])


def test_memory_ends_one_step_before_the_frames_behind_it():
    time, at = packed(torch.tensor([[0, 1], [5, 7], [7, 9], [9, 10]]).double(), 14, 10, 8, 12, False)
    assert at - time[-1] == 1 and time[-1] - time[-2] == 1.5                            # half a cell and half a frame
    time, at = packed(torch.tensor([[0, 1], [85, 87], [87, 89], [89, 91]]).double(), 100, 91, 4, 12, False)     # recent=9
    assert at - time[-1] == 1.5 and at - time[-2] > 1.5
    assert packed(torch.tensor([[0, 2], [2, 4]]).double(), 4, 4, 8, 12, True)[1] == 2


def test_an_id_names_the_same_frames_for_as_long_as_they_live():
    lives = {}
    for T in range(4, 500, 4):
        _, _, _, (centres, bounds, ids, _) = stand(T)
        for i in ids.unique().tolist():
            mine = bounds[ids == i]
            assert torch.equal(lives.setdefault(i, mine), mine) and len(mine[:, 0].unique(dim=0)) == 1
    for T in range(16, 100, 4):                                                         # a block keeps its inner distances
        _, _, _, (centres, bounds, ids, _) = stand(T, "packforcing")
        for i in ids.unique().tolist():
            assert torch.equal(centres[ids == i, 0].diff(), lives.setdefault(("block", i), centres[ids == i, 0].diff()))


def test_settings_fit_the_backbone_and_survive_being_written_down():
    for name, window, forcing in (("wan2.1-1.3b", (1, 15), (8, 4)), ("tiny", (1, 7), (4, 4)), ("ltx2.3-22b", (1, 11), (8, 4))):
        for kind, sizes in (("window", window), ("packforcing", forcing)):
            settings = Settings.of(PRESETS[name], kind, attention="self")
            assert (settings.sink, settings.recent) == sizes and Settings.read(str(settings)) == settings
    with pytest.raises(ValueError, match="unknown history 'all'"):
        Settings.of(PRESETS["tiny"], "all")
    with pytest.raises(ValueError, match="attention is joint, self or segment"):
        Settings(attention="cross")
