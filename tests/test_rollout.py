"""The rollout: causal in actions, one gradient step a chunk, none through history, the same for training and inference."""

import random
import zlib
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import world
from control import Condition, Control
from encode import codec
from flow import schedule
from model import build
from rollout import WorldModel, few_step, guided, ode, rollout, velocity_of, walk
from selfforcing import Plan, draw_plan, self_rollout
from video import read_picture

SIGMAS = schedule(4, 3.0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build("tiny", layers=2, dim=48, heads=2, ffn=64)
    for p in (model.head.head.weight, model.control.translation, model.control.rotation):
        torch.nn.init.normal_(p, std=0.3)                                              # the official init would be deaf
    return model


def noise_from(seed):
    g = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=g)


def roll(model, actions, n=0, seed=0, **options):
    condition = Condition({"text": torch.ones(actions.shape[0], 3, 64)}, Control(actions))
    prefix = noise_from(99)((actions.shape[0], 24, n, 4, 6))
    return rollout(velocity_of(model), condition, prefix, actions.shape[1], SIGMAS, 4, 12, noise_from(seed), **options)


@torch.no_grad()
def test_later_actions_cannot_change_earlier_chunks(model):
    a = torch.zeros(1, 12, dtype=torch.long)                                         # three chunks of four still frames
    b = a.clone()
    b[:, 8:] = 9                                                                        # the last chunk walks forward
    x, y = roll(model, a), roll(model, b)
    assert torch.equal(x[:, :, :8], y[:, :, :8]) and not torch.equal(x[:, :, 8:], y[:, :, 8:])


@torch.no_grad()
@pytest.mark.parametrize("n, frames", [(0, 8), (1, 9), (4, 12), (4, 26), (0, 3)])
def test_any_start_and_length(model, n, frames):
    x = roll(model, torch.zeros(2, frames, dtype=torch.long), n)
    assert x.shape == (2, 24, frames, 4, 6) and torch.isfinite(x).all()
    assert torch.equal(x[:, :, :n], noise_from(99)((2, 24, n, 4, 6)))                     # the start is kept as it is


def spy_on(model):
    """The model's velocity, and the list of what it was given."""
    seen, velocity = [], velocity_of(model)

    def spy(x, sigma, condition):
        seen.append((x, sigma, condition.control.actions))
        return velocity(x, sigma, condition)
    return spy, seen


def test_history_is_clean_detached_and_within_the_window(model):
    spy, seen = spy_on(model)
    actions = torch.arange(20)[None] % 9
    rollout(spy, Condition({"text": torch.ones(1, 3, 64)}, Control(actions)), torch.randn(1, 24, 4, 4, 6), 20, SIGMAS, 4, 12,
            noise_from(0), grad_step=1)
    assert [x.shape[2] for x, _, _ in seen] == [8] * 4 + [12] * 12
    for call, (x, sigma, labels) in enumerate(seen):
        chunk, step = divmod(call, 4)
        assert not x.requires_grad                                                # no gradient through history or noise
        assert (sigma[:, :-4] == 0).all() and torch.allclose(sigma[:, -4:], torch.tensor(SIGMAS[step]))
        end = 8 + 4 * chunk
        assert torch.equal(labels, actions[:, end - x.shape[2]:end])


@pytest.mark.parametrize("grad_step", range(4))
def test_one_denoising_step_builds_a_graph_and_history_is_what_inference_makes(model, grad_step):
    history, condition = torch.randn(1, 24, 4, 4, 6), Condition({"text": torch.ones(1, 3, 64)}, Control(torch.zeros(1, 8, dtype=torch.long)))
    graphs = []

    def spy(x, sigma, c):
        v = velocity_of(model)(x, sigma, c)
        graphs.append(v.requires_grad)
        return v
    sample, finished = few_step(spy, history, (1, 24, 4, 4, 6), SIGMAS, condition, noise_from(0), grad_step)
    assert graphs == [i == grad_step for i in range(4)]
    assert sample.requires_grad and not finished.requires_grad
    with torch.no_grad():
        plain, _ = few_step(velocity_of(model), history, (1, 24, 4, 4, 6), SIGMAS, condition, noise_from(0))
    assert torch.equal(finished, plain)
    if grad_step == 3:
        assert torch.equal(sample.detach(), plain)


def test_under_no_grad_nothing_builds_a_graph(model):
    with torch.no_grad():
        assert not roll(model, torch.zeros(1, 8, dtype=torch.long), grad_step=2).requires_grad


@torch.no_grad()
def test_guidance_of_one_is_free_and_the_ode_recovers_a_known_flow(model):
    velocity = velocity_of(model)
    assert guided(velocity, 1, {}) is velocity
    target = torch.randn(1, 24, 4, 4, 6)
    exact = lambda x, sigma, c: (x - torch.cat([torch.zeros_like(target), target], 2)) / sigma.clamp_min(1e-9)[:, None, :, None, None]
    condition = Condition({}, Control(torch.zeros(1, 8, dtype=torch.long)))
    for sampler in (ode, few_step):                                                # both end at the x0 that v points to
        x, _ = sampler(exact, torch.zeros(1, 24, 4, 4, 6), target.shape, SIGMAS, condition, noise_from(0))
        torch.testing.assert_close(x, target, atol=1e-5, rtol=0)


def test_a_batch_of_two_equals_two_batches_of_one(model):
    actions = torch.tensor([[0, 9, 9, 9, 3, 3, 3, 3], [0, 0, 18, 18, 4, 4, 4, 4]])
    shared = torch.randn(100, 1, 24, 4, 4, 6)

    def draws():
        queue = iter(shared)
        return lambda shape: next(queue).expand(shape)
    text = {"text": torch.ones(2, 3, 64)}
    with torch.no_grad():
        run = lambda i: rollout(velocity_of(model), Condition({"text": text["text"][i]}, Control(actions[i])),
                                torch.zeros(len(actions[i]), 24, 0, 4, 6), 8, SIGMAS, 4, 12, draws())
        both = run(slice(0, 2))
        for i in range(2):
            torch.testing.assert_close(both[i:i + 1], run(slice(i, i + 1)), atol=1e-5, rtol=0)


# ---- Training rollouts -----------------------------------------------------------------------------------------------

SPEC = SimpleNamespace(chunk=4, window=12)


def plans(n=2000, **options):
    shared = random.Random(0)
    return [draw_plan(shared, SPEC, **{"frames": 12, "t2v": 0.15, "i2v": 0.25, **options}) for _ in range(n)]


def test_starts_are_text_image_and_video_in_whole_chunks_of_one_window():
    drawn = plans()
    assert set(drawn) == {Plan(0, 12, 0), Plan(1, 9, 0), Plan(4, 12, 0)}
    for start, share in ((0, 0.15), (1, 0.25)):
        assert sum(plan.start == start for plan in drawn) / 2000 == pytest.approx(share, abs=0.03)


def test_the_curriculum_bounds_the_chunks_and_a_share_of_rollouts_is_short():
    assert set(plans(most=1)) == {Plan(0, 4, 0), Plan(1, 5, 0), Plan(4, 8, 0)}
    assert set(plans(most=9)) == set(plans())
    drawn = [plan.frames for plan in plans(t2v=1.0, i2v=0.0, short=0.6)]
    assert set(drawn) == {4, 8, 12}
    assert sum(frames == 12 for frames in drawn) / 2000 == pytest.approx(0.4 + 0.2, abs=0.03)
    assert sum(frames == 4 for frames in drawn) / 2000 == pytest.approx(0.2, abs=0.03)


def test_a_rollout_longer_than_the_window_is_judged_on_any_window_of_it():
    for t2v, i2v, n in ((0.0, 0.0, 4), (1.0, 0.0, 0), (0.0, 1.0, 1)):
        drawn = plans(frames=32, t2v=t2v, i2v=i2v)
        assert {plan.frames for plan in drawn} == set(range(n + 4 * ((12 - n) // 4), 33, 4))
        for plan in drawn:
            assert plan.first == max(0, plan.frames - 12) and plan.start == n
            assert plan.made == plan.mask(1, "cpu").sum() == plan.frames - max(n, plan.first)
    counts = [sum(plan.frames == frames for plan in drawn) for frames in (9, 29)]
    assert min(counts) / 2000 == pytest.approx(1 / 6, abs=0.03)                         # every window as often


def test_a_stored_past_lies_before_the_window_and_what_the_window_holds_of_it_is_no_target():
    drawn = plans(past=40, t2v=0.0, i2v=0.0)
    assert {plan.start for plan in drawn} == set(range(4, 41, 4))
    for plan in drawn:
        assert plan.frames == plan.start + 8 and plan.first == plan.start - 4
        assert plan.mask(2, "cpu").tolist() == [[False] * 4 + [True] * 8] * 2


@pytest.mark.parametrize("complete", [True, False])
def test_gradient_is_in_the_loss_window_alone_and_history_is_what_inference_makes(model, complete):
    plan, actions = Plan(4, 24, 12), torch.arange(24)[None] % 9
    condition, prefix = Condition({"text": torch.ones(1, 3, 64)}, Control(actions)), torch.randn(1, 24, 4, 4, 6)
    graphs, shapes = [], []

    def spy(x, sigma, c):
        v = velocity_of(model)(x, sigma, c)
        assert not x.requires_grad                                                      # none through history
        graphs.append(v.requires_grad)
        shapes.append(x.shape[2])
        return v
    samples, finished = self_rollout(spy, condition, prefix, plan, SPEC, SIGMAS, noise_from(0), 1, complete)
    before, within = [False] * 4, [False, True] + [False] * 2 * complete
    assert graphs == before * 2 + within * 3                                            # chunks at 4, 8 | 12, 16, 20
    assert max(shapes) == SPEC.window and samples.shape == finished.shape == (1, 24, 24, 4, 6)
    assert torch.equal(samples[:, :, :12], finished[:, :, :12]) and not finished.requires_grad
    assert torch.equal(samples[:, :, 12:], finished[:, :, 12:]) == (not complete)
    if complete:
        with torch.no_grad():
            plain = rollout(velocity_of(model), condition, prefix, 24, SIGMAS, 4, 12, noise_from(0))
        assert torch.equal(finished, plain)
    grad, = torch.autograd.grad(samples[:, :, 12:].square().sum(), model.head.head.weight)
    assert grad.abs().sum() > 0


# ---- WorldModel ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = build("tiny", layers=1)
    for p in (network.head.head.weight, network.control.translation, network.control.rotation):
        torch.nn.init.normal_(p, std=0.3)
    return network


@pytest.fixture(scope="module")
def playable(network):
    return WorldModel(network)


def test_same_seed_and_actions_give_the_same_frames(playable):
    first = world.World(1).step([0, 9, 9, 9])
    runs = []
    for seed in (5, 5, 6):
        start = playable.reset(world.CAPTIONS[1], first, seed, actions=[0, 9, 9, 9])
        assert start.shape == (4, 64, 96, 3) and start.dtype == torch.uint8
        runs.append(torch.cat([playable.step([9, 9, 12, 12]), playable.step([3])]))
    assert runs[0].shape == (5, 64, 96, 3)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_world_can_be_dreamt_from_words_alone(playable):
    assert playable.reset(world.CAPTIONS[0]).shape == (4, 64, 96, 3)
    for _ in range(4):
        playable.step([9] * 4)
    assert playable.history.latents.shape[2] <= playable.spec.window                            # memory does not grow


def test_a_state_can_be_gone_back_to_as_often_as_one_likes(playable):
    playable.reset(world.CAPTIONS[1], world.World(1).step([0]), seed=5)
    playable.step([9] * 4)
    here = playable.state()
    futures = []
    for actions in ([9] * 4, [3] * 4, [9] * 4):
        futures.append(torch.cat([playable.step(actions), playable.step([0, 12])]))
        playable.restore(here)
    assert torch.equal(futures[0], futures[2]) and not torch.equal(futures[0], futures[1])
    other = WorldModel(build("tiny", layers=1), steps=4)                                # a teacher dreams on, say
    other.restore(here)
    assert other.step([9] * 4).shape == (4, 64, 96, 3) and torch.equal(playable.step([9] * 4), futures[0][:4])


def test_world_models_over_one_network_do_not_disturb_each_other(network, playable):
    first, other = world.World(1).step([0]), WorldModel(network, steps=2)

    def frames(disturbed):
        playable.reset(world.CAPTIONS[1], first, seed=5)
        out = []
        for actions in ([9] * 4, [3] * 4):
            if disturbed:
                other.reset(world.CAPTIONS[2], seed=len(out))
            out.append(playable.step(actions))
        return torch.cat(out)
    assert torch.equal(frames(False), frames(True))


def test_a_refused_start_leaves_the_dream_as_it_was(playable):
    first = world.World(1).step([0])

    def frames(*refused):
        playable.reset(world.CAPTIONS[1], first, seed=5)
        for prompt, start, actions in refused:
            with pytest.raises(ValueError):
                playable.reset(prompt, start, 7, actions)
        return playable.step([9] * 4)
    assert torch.equal(frames(), frames(("a red dragon", None, None), ("", first[:, :32], None), ("", first, [0, 0]), ("", first, [81])))


def test_a_picture_starts_a_dream_if_it_fits(playable, tmp_path):
    frame = world.World(2).step([0])[0].numpy()
    for size, name in (((96, 64), "right.png"), ((64, 96), "turned.png")):
        Image.fromarray(frame).resize(size).save(tmp_path / name)
    assert torch.equal(read_picture(tmp_path / "right.png", playable.spec)[0], torch.tensor(frame))
    with pytest.raises(ValueError, match="96x64 pixels, not 64x96"):
        read_picture(tmp_path / "turned.png", playable.spec)
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + bytes([0, 0, 0, 13]) + header + zlib.crc32(header).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb + bytes([0, 0, 0, 0]) + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big"))
    with pytest.raises(ValueError, match="not a picture: Image size"):
        read_picture(tmp_path / "bomb.png", playable.spec)


def test_the_exact_world_is_walked_by_the_keys_and_told_of_as_it_happened():
    place, asked = world.World(0), torch.full((12,), 9)
    place.reset(seed=3)
    start = place.state.clone()
    happened, views = walk(place, asked)
    assert happened.tolist() == [9] * 2 + [36] * 10                                     # it slid along a wall
    assert torch.equal(views, place.frames(start, asked)) and torch.equal(place.render(world.pose(place.state)[None])[0], views[-1])


def test_bad_input_is_named(playable):
    with pytest.raises(ValueError, match="does not know the word 'dragon'"):
        playable.reset("a red dragon")
    playable.reset(world.CAPTIONS[0])
    for actions, words in (([81], "0..80"), ([], "at least one"), ([0.5], "integer")):
        with pytest.raises(ValueError, match=words):
            playable.step(actions)
    with pytest.raises(ValueError, match="1 start frames need 1 labels, got 2"):
        playable.reset(world.CAPTIONS[0], world.World(0).step([0]), actions=[0, 0])


def test_codec_is_an_orthonormal_projection_and_keeps_30_db():
    coder = codec("tiny")
    maps, states, *_ = world.explore(300, 2, torch.Generator().manual_seed(0))
    video = world.render(world.pose(states), maps[:, None])
    x = coder.encode(video)
    assert x.shape == (300, 24, 2, 8, 12) and abs(x.var((0, 2, 3, 4)).mean() - 1) < 0.25
    torch.testing.assert_close(coder.analysis.T.double() @ coder.synthesis.T.double(), torch.eye(24).double(), atol=1e-6, rtol=0)
    error = (coder.decode(x).double() - video.double()).square().mean((2, 3, 4))
    assert (10 * torch.log10(255 ** 2 / error)).mean() > 30
    with pytest.raises(ValueError, match="uint8 video"):
        coder.encode(video[:, :, :60])
