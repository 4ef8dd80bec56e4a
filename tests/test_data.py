"""Batches are functions of (seed, step): the same for any interruption, and true to the world."""

import pytest
import torch

import world
from common import generator
from control import relative
from data import RandomStream, Trips, WorldStream
from encode import codec
from metrics import travel
from model import PRESETS


@pytest.fixture(scope="module")
def coder():
    return codec("tiny")


def stream(coder, **options):
    return WorldStream(coder, **{**dict(seed=3, pool=4, length=10, refresh=2), **options})


def equal(a, b):
    return torch.equal(a.x0, b.x0) and torch.equal(a.condition.control.actions, b.condition.control.actions)


def test_a_batch_depends_on_seed_and_step_alone(coder):
    a, b = stream(coder), stream(coder)
    wanted = [a.batch(step, 3, 8) for step in range(5)]
    assert equal(b.batch(4, 3, 8), wanted[4]) and equal(b.batch(1, 3, 8), wanted[1])    # any order, across pools
    assert not equal(wanted[0], wanted[1]) and not equal(stream(coder, seed=4).batch(0, 3, 8), wanted[0])


def test_clips_are_what_the_world_shows(coder):
    s = stream(coder, pool=2, length=8)
    batch = s.batch(0, 2, 8)                                                            # the whole trajectories
    trips = Trips(*world.explore(2, 8, generator(3, "train", "pool", 0, 0)))
    for x0, actions, text in zip(batch.x0, batch.condition.control.actions, batch.condition.text["text"]):
        i = next(i for i in range(2) if torch.equal(trips.actions[i], actions) or torch.equal(trips.asked[i], actions))
        torch.testing.assert_close(x0, coder.encode(trips.part(i, i + 1).video())[0])
        assert torch.equal(text, coder.text([world.CAPTIONS[int(trips.maps[i])]])["text"][0])


def test_windows_are_random_crops_with_their_own_labels(coder):
    s = stream(coder)
    batch, starts = s.batch(0, 32, 4), set()
    for x0, actions in zip(batch.x0, batch.condition.control.actions):
        found = {t for i in range(4) for t in range(7) if torch.equal(s.latents[i, :, t:t + 4], x0)
                 and any(torch.equal(labels[i, t:t + 4], actions) for labels in s.labels)}
        assert found
        starts |= found if len(found) == 1 else set()                                   # a still walk fits many places
    assert len(starts) >= 4


def test_cameras_are_the_windows_own_and_begin_at_its_first_frame(coder):
    """Those of what happened; where a wall was in the way the other half have those of the keys: see below."""
    s = stream(coder, pool=4, length=10)
    batch, exact = s.batch(0, 32, 4), Trips(*world.explore(4, 10, generator(3, "train", "pool", 0, 0)))
    c2w, control = world.pose(exact.states), batch.condition.control                    # [4, 10, 4, 4]
    torch.testing.assert_close(control.c2w[:, 0], torch.eye(4).expand(32, 4, 4))
    assert torch.equal(control.K, world.K.expand(32, 4, 3, 3))
    for x0, cameras in zip(batch.x0, control.c2w):
        assert any(torch.equal(s.latents[i, :, t:t + 4], x0)
                   and torch.allclose(c2w[i, t].inverse() @ c2w[i, t:t + 4], cameras, atol=1e-5)
                   for i in range(4) for t in range(7))


def test_half_of_the_windows_are_told_the_keys_that_were_pressed(coder):
    s = stream(coder, pool=64, length=24)
    batch = s.batch(0, 256, 24)                                                         # the whole trajectories
    happened, asked = ((batch.condition.control.actions[:, None] == labels).all(2).any(1) for labels in s.labels)
    assert (happened | asked).all() and 0.3 < (asked & ~happened).sum() / (asked ^ happened).sum() < 0.7


def test_those_windows_have_the_cameras_of_one_whom_no_wall_stops(coder):
    s = stream(coder, pool=64, length=24)
    batch, exact = s.batch(0, 256, 24), Trips(*world.explore(64, 24, generator(3, "train", "pool", 0, 0)))
    stopped = 0
    for actions, c2w in zip(batch.condition.control.actions, batch.condition.control.c2w):
        asked, happened = (((labels == actions).all(1)).nonzero() for labels in (exact.asked, exact.actions))
        if not len(asked):
            i = int(happened[0])
            torch.testing.assert_close(c2w, relative(world.pose(exact.states[i])), atol=1e-5, rtol=0)
        if len(asked) and not len(happened):
            stopped, state = stopped + 1, exact.states[asked[0]]                        # [1, 24, 4]
            path = torch.stack([travel(actions[None, 1:t + 1], state[:, 0]) for t in range(24)], 1)
            torch.testing.assert_close(c2w, relative(world.pose(path[0])), atol=1e-5, rtol=0)
            assert (world.pose(path) - world.pose(state)).abs().max() > 0.1             # through a wall, or too far up
    assert stopped > 20


def test_held_out_trajectories_are_others(coder):
    from evaluate import held_out
    train, test = stream(coder, pool=64).seed, held_out(64, 1000, 6)
    pool = Trips(*world.explore(64, 10, generator(train, "train", "pool", 0, 0)))
    assert not (test.states[:, None, 0] == pool.states[None, :, 0]).all(-1).any()
    assert (test.states[:, None, 0] == held_out(64, 1000, 6).states[None, :, 0]).all(-1).any(1).all()


def test_bad_lengths_are_named(coder):
    with pytest.raises(ValueError, match="do not fit trajectories of 10"):
        stream(coder).batch(0, 1, 11)
    with pytest.raises(ValueError, match="a pool needs"):
        stream(coder, pool=0)


def test_random_clips_have_the_shape_of_the_backbone_and_differ_by_step():
    spec = PRESETS["wan2.1-1.3b"]
    stream = RandomStream(spec, 0, "cpu")
    first, again, other = (stream.batch(step, 2, 3) for step in (0, 0, 1))
    assert first.x0.shape == (2, 16, 3, 60, 104) and torch.equal(first.x0, again.x0)
    assert not torch.equal(first.x0, other.x0)
    assert first.condition.text["text"].shape == (2, 512, 4096)
    assert 0 <= first.condition.control.actions.min() and first.condition.control.actions.max() < 81
