"""The embedded world: exact pictures, exact labels, and walls that hold."""

import pytest
import torch

import control
import world
from world import ANGLE, BODY, FOCAL, FRAME, MAPS, PITCH, STEP, World, explore, free, pose, render, spawn, tables, walk

ALL = torch.arange(81)


@pytest.fixture(scope="module")
def trips():
    """maps [64], states [64, 32, 4], labels, blocked, asked [64, 32]."""
    return explore(64, 32, torch.Generator().manual_seed(1))


def project(c2w, point):
    """Pixel (x, y), from the corner of the picture, of a point [3] in a camera c2w [4, 4], and its depth."""
    x, y, z = (c2w[:3, :3].double().T @ (torch.tensor(point).double() - c2w[:3, 3].double())).tolist()
    H, W = FRAME
    return W / 2 + FOCAL * W * x / z, H / 2 + FOCAL * W * y / z, z


def shift(before, after):
    """Whole pixels by which content moved right between two frames [H, W, 3], from the middle of the picture."""
    a, b = before.double()[24:40], after.double()[24:40]
    costs = {d: (b[:, 30 + d:66 + d] - a[:, 30:66]).abs().mean().item() for d in range(-25, 26)}
    return min(costs, key=costs.get)


def test_the_shape_of_the_world():
    assert len(MAPS) == len(world.CAPTIONS) == 4 and world.FRAME == (64, 96)
    assert set(world.WORDS) == set(" ".join(world.CAPTIONS).split()) and list(world.WORDS) == sorted(world.WORDS)
    torch.testing.assert_close(world.K, torch.tensor([[0.6, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]))
    for m in range(4):                                              # every room can be reached from every other
        open_, seen = ~tables().solid[m], torch.zeros(world.N, world.N, dtype=torch.bool)
        seen[tuple(open_.nonzero()[0])] = True
        for _ in range(world.N ** 2):
            seen |= open_ & (seen.roll(1, 0) | seen.roll(-1, 0) | seen.roll(1, 1) | seen.roll(-1, 1))
        assert torch.equal(seen, open_)


def test_a_frame_has_the_same_bits_alone_and_in_any_batch(trips):
    maps, states, *_ = trips
    maps, c2w = maps[:48], pose(states[:48, ::8])                                       # [48, 4, 4, 4]
    frames = render(c2w, maps[:, None])
    assert frames.shape == (48, 4, *FRAME, 3) and frames.dtype == torch.uint8
    assert torch.equal(frames, render(c2w, maps[:, None]))
    shuffled = torch.randperm(192, generator=torch.Generator().manual_seed(0))
    other = render(c2w.flatten(0, 1)[shuffled], maps.repeat_interleave(4)[shuffled])
    assert torch.equal(other, frames.flatten(0, 1)[shuffled])
    for n, t in ((0, 0), (5, 3), (47, 1)):
        assert torch.equal(render(c2w[n, t], maps[n]), frames[n, t])
        assert torch.equal(render(c2w[n, t:t + 1], int(maps[n]))[0], frames[n, t])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same_trajectories_and_the_same_pictures(trips):
    for here, there in zip(trips, explore(64, 32, torch.Generator().manual_seed(1), "cuda")):
        torch.testing.assert_close(there.cpu(), here)
    maps, states = trips[0][:, None], trips[1]
    difference = render(pose(states).cuda(), maps).cpu().int() - render(pose(states), maps).int()
    assert (difference.abs() > 1).float().mean() < 1e-3                                # rounding at edges, nothing else


def test_trajectories_repeat_and_replay(trips):
    maps, states, labels, blocked, asked = trips
    for first, again in zip(trips, explore(64, 32, torch.Generator().manual_seed(1))):
        assert torch.equal(first, again)
    assert not torch.equal(maps, explore(64, 32, torch.Generator().manual_seed(2))[0])
    assert states.dtype == torch.float64 and labels.dtype == torch.int64 and labels[:, 0].eq(0).all()
    n = int((~blocked).all(1).int().argmax())                                           # one that touched nothing
    replayed, seen, _ = walk(maps[n], states[n, :1], labels[n:n + 1])
    assert torch.equal(seen[0], labels[n])
    torch.testing.assert_close(replayed[0], states[n], atol=1e-9, rtol=0)


@pytest.mark.parametrize("yaw", [3.75, 48.75, -131.25])
@pytest.mark.parametrize("pitch", [-15.0, 0.0, 15.0])
def test_the_81_moves_read_back_from_the_poses(yaw, pitch):
    start = torch.tensor([3.5, 5.5, yaw, pitch]).expand(81, 4)                          # amid a room, beside a door
    states, labels, blocked = walk(1, start, torch.stack([torch.zeros_like(ALL), ALL], 1))
    assert torch.equal(labels[:, 1], ALL) and not blocked.any()
    assert torch.equal(control.labels_from_poses(pose(states), step=STEP)[:, 1], ALL)
    way = (states[:, 1, :2] - states[:, 0, :2]).norm(dim=1)
    torch.testing.assert_close(way, (ALL >= 9) * torch.tensor(STEP).double(), atol=1e-6, rtol=0)


def test_free_moves_are_those_of_control():
    actions = torch.tensor([[0, 9, 12, 45, 3, 30, 2, 73, 1, 18]])
    states, _, blocked = walk(1, torch.tensor([[3.2, 5.9, 93.75, 0]]), actions)
    assert not blocked.any()
    expected = control.poses_from_labels(actions, STEP, ANGLE)
    torch.testing.assert_close(control.relative(pose(states)), expected.float(), atol=1e-5, rtol=0)


def test_turning_right_moves_content_left_by_the_pinhole():
    frames = World(0).frames([1.7, 1.7, 41.25, 0], [0, 3, 3, 4, 4])
    moved = FOCAL * FRAME[1] * torch.tensor(ANGLE).deg2rad().tan()                      # 7.6 pixels
    for before, after, sign in ((0, 1, -1), (1, 2, -1), (2, 3, 1), (3, 4, 1)):
        assert abs(shift(frames[before], frames[after]) - sign * moved) < 1.1


def test_a_full_turn_returns_to_the_same_picture():
    place = World(2)
    first = place.reset(seed=3)
    frames = place.step([3] * 48)
    assert torch.equal(frames[-1], first[0]) and not torch.equal(frames[23], first[0])


@pytest.mark.parametrize("m", range(4))
def test_landmarks_are_where_the_pinhole_says(m):
    """The middle of every landmark shows its colour at its projection, from above, below and aside."""
    g, marks, checked = torch.Generator().manual_seed(m), tables().marks[m, :4], 0
    states = spawn(torch.full((64,), m), g)
    frames, c2w = render(pose(states), m), pose(states)
    for x, y, z, radius, _, *colour in marks.tolist():
        for n in range(len(states)):
            px, py, depth = project(c2w[n], (x, y, z))
            path = states[n, None, :2] + torch.linspace(0, 1, 99)[:, None] * (torch.tensor([x, z]) - states[n, :2])
            near = (path[:, None] + 0.1 * torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]])).long()    # a thick ray
            others = marks[marks[:, 0] + 99 * marks[:, 2] != x + 99 * z]
            apart = (path[:, None] - others[None, :, [0, 2]]).norm(dim=-1) - others[:, 3]
            hidden = tables().solid[m, near[..., 1], near[..., 0]].any() or apart.min() < 0.1
            if hidden or depth < 0.1 or not (2 < px < FRAME[1] - 2 and 2 < py < FRAME[0] - 2):
                continue
            seen, ideal = frames[n, int(py), int(px)].double() + 1, torch.tensor(colour).double() + 1
            seen, ideal = seen / seen.norm(), ideal / ideal.norm()                      # hue: shading and haze apart
            assert seen @ ideal > 0.97, (m, states[n].tolist(), colour, frames[n, int(py), int(px)].tolist())
            checked += 1
    assert checked >= 10


def test_walking_into_a_wall_is_still_and_sliding_is_labelled_as_it_happened():
    states, labels, blocked = walk(0, torch.tensor([[1.5, 1.5, -93.75, 0.0]]), torch.tensor([[0] + [9] * 6]))
    assert labels[0, -1] == 0 and blocked[0, -1] and states[0, -1, 0] >= 1 + BODY       # west: a wall at x = 1
    states, labels, blocked = walk(0, torch.tensor([[1.35, 1.5, -41.25, 0.0]]), torch.tensor([[0] + [9] * 3]))
    assert labels[0, 1:].eq(45).all() and blocked[0, 1:].all()                          # north-west becomes north
    assert states[0, :, 0].eq(states[0, 0, 0]).all() and states[0, -1, 1] > 1.9
    states, labels, blocked = walk(0, torch.tensor([[1.5, 1.5, 3.75, PITCH]]), torch.tensor([[0, 1, 5]]))
    assert labels[0].tolist() == [0, 0, 3] and blocked[0].tolist() == [False, True, True]


def test_no_one_is_ever_inside_a_wall_and_few_frames_are_blocked(trips):
    maps, states, labels, blocked, asked = trips
    x, z = states[..., :2].flatten(0, 1).unbind(-1)
    assert free(maps.repeat_interleave(32), x, z).all()
    assert states[..., 3].abs().max() == PITCH
    assert torch.equal(labels, control.labels_from_poses(pose(states), step=STEP))
    assert 0.02 < blocked[:, 1:].float().mean() < 0.16 and (blocked | (labels == asked)).all()
    assert len(labels.unique()) > 70 and maps.unique().tolist() == [0, 1, 2, 3]
    share = torch.stack([labels[:, 1:] // 9, labels[:, 1:] % 9]).flatten(1)
    assert 0.15 < (share[0] == 1).float().mean() < 0.4 and 0.3 < (share[1] == 0).float().mean() < 0.55


def test_step_and_frames_agree():
    place = World(3)
    first, start = place.reset(seed=5), place.state.clone()
    actions = torch.tensor([9, 9, 12, 3, 45, 1])
    future = place.frames(start, actions)
    assert torch.equal(place.state, start)                                              # looking ahead moves no one
    assert torch.equal(torch.cat([place.step(actions[:2]), place.step(actions[2:])]), future)
    assert torch.equal(place.reset(seed=5), first) and first.shape == (1, *FRAME, 3)
    assert torch.equal(place.reset(start), first)
    assert torch.equal(place.render(pose(start[None])), first)
    assert World(3, size=(32, 48)).reset(seed=5).shape == (1, 32, 48, 3)


def test_a_place_from_a_seed_is_level_as_a_players_cameras_suppose():
    place = World(0)
    for seed in range(5):
        place.reset(seed=seed)
        assert place.state[3] == 0 and not (place.state[:3] == 0).any()


@pytest.mark.parametrize("call, words", [
    (lambda: World(4), "maps are integers 0..3"), (lambda: World(-1), "maps are integers 0..3"),
    (lambda: World([0, 1]), "maps are integers 0..3"), (lambda: World(0).step([81]), "labels 0..80"),
    (lambda: World(0).step([-1]), "0..80"), (lambda: World(0).step([]), "actions"),
    (lambda: World(0).step([[9]]), "actions"), (lambda: World(0).frames([1.5, 1.5, 0.0], [0]), "state"),
    (lambda: World(0).frames([0.5, 0.5, 0.0, 0.0], [0]), "wall"),
    (lambda: World(0).reset([1.5, 1.5, 0.0, 30.0]), "tilts"), (lambda: World(0).render(torch.eye(3)), "c2w"),
    (lambda: walk(torch.tensor([0, 1]), torch.zeros(3, 4), torch.zeros(3, 2).long()), "broadcast")])
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
