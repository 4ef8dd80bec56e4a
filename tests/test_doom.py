"""Doom through an exact pinhole camera: pictures agree with poses, labels with both, and walks are repeatable."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import world
from common import parse
from control import labels_from_poses, parse_actions
from data import ShardStream
from encode import codec
from model import PRESETS
from shards import read_index, read_shard

pytest.importorskip("vizdoom", reason="Doom needs the extra doom")
import doom             # noqa: E402: only where ViZDoom is
import walker           # noqa: E402

H, W = world.FRAME


@pytest.fixture(scope="module")
def player():
    return walker.Walker("my_way_home.wad")


def rays(focal=1.0):
    """Of the pixels of a frame, in camera axes: float64 [H, W, 3]."""
    v, u = torch.meshgrid((torch.arange(H) + 0.5) / H - 0.5, (torch.arange(W) + 0.5) / W - 0.5, indexing="ij")
    return torch.stack([u / world.K[0, 0] / focal, v / world.K[1, 1] / focal, torch.ones_like(u)], -1).double()


def error(view, other, points, where):
    """Mean square error of `other` [H, W, 3] and `view` seen at `points` [H, W, 3] of its camera's axes."""
    at = 2 * torch.stack([world.K[0, 0] * points[..., 0], world.K[1, 1] * points[..., 1]], -1) / points[..., 2:]
    picture, other = (torch.from_numpy(x).permute(2, 0, 1)[None].double() / 255 for x in (view, other))
    where = where & (at.abs() < 0.97).all(-1) & (points[..., 2] > 0)
    seen = F.grid_sample(picture, at[None].double(), align_corners=False)
    return float((seen - other)[0, :, where].square().mean())


@pytest.mark.parametrize("keys", ["right", "up", "down+left"])
def test_a_turned_view_is_the_homography_of_the_one_before(player, keys):
    """Camera, angles, their signs and the projection of pitch are right: no other focal length explains a turn."""
    label, errors = int(parse_actions(keys + "-1")[1]), {0.93: [], 1.0: [], 1.07: []}
    for seed in range(3):
        (before, c0), (after, c1) = player.begin(seed), player.step(label)
        turn = c0[:3, :3].T @ c1[:3, :3]
        for focal, found in errors.items():
            points = rays(focal) @ turn.T * torch.tensor([focal, focal, 1])
            found.append(error(before, after, points, torch.tensor(True)))
    wide, right, narrow = (np.mean(found) for found in errors.values())
    assert right < 10 ** -2.7 and right < 0.85 * min(wide, narrow)


def test_the_floor_moves_as_poses_say_where_heights_are_tall(player):
    """Floors are planes 41 units, times TALL, below the eyes: the view of a step aside, warped by it, is the next."""
    errors = {1.0: [], walker.TALL: [], 1.4: []}
    for seed in range(10):
        player.begin(seed)
        (before, c0), _, (after, c1) = player.step(2), player.step(27), player.step(27)
        if (c1 - c0)[:3, 3].norm() < 1.9 * world.STEP:                                  # stopped by a wall
            continue
        down = rays() @ c1[:3, :3].T
        for tall, found in errors.items():
            depth = 41 * tall * world.STEP / walker.UNITS / down[..., 1:2].clamp(min=1e-3)
            points = (down * depth + c1[:3, 3] - c0[:3, 3]) @ c0[:3, :3]
            found.append(error(before, after, points, down[..., 1] > 0.45))
    low, right, high = (np.median(found) for found in errors.values())
    assert len(errors[1.0]) > 3 and right < 0.5 * min(low, high)


def test_all_labels_can_be_walked_and_read_back_and_nothing_glides():
    arena = walker.Walker("deathmatch.wad")
    for label in range(81):
        c2w = torch.stack([arena.begin(5)[1], *(arena.step(a)[1] for a in (label, label, 0))])
        assert labels_from_poses(c2w, world.STEP).tolist() == [0, label, label, 0]
        steps = (c2w[1:, :3, 3] - c2w[:-1, :3, 3]).norm(dim=-1) / world.STEP
        wanted = 1.0 if label >= 9 else 0.0
        assert (steps - torch.tensor([wanted, wanted, 0], dtype=torch.float64)).abs().max() < 0.02


def test_walks_are_shards_whose_labels_agree_with_their_poses_and_can_be_made_again(tmp_path):
    for name in ("one", "two"):
        doom.main(parse(doom.Config, ["--out", str(tmp_path / name), "--walks", "4", "--frames", "10", "--shard", "2",
                                      "--held_out", "0.25"]))
    one, two = ((tmp_path / name / "index.jsonl").read_text() for name in ("one", "two"))
    assert one == two                                                                   # sha256 and all
    clips = [clip for line in one.splitlines() for clip in json.loads(line)["clips"]]
    walks = [read_shard(tmp_path / "one", line)[f"{i}.x0"] for line in read_index(tmp_path / "one") for i in range(2)]
    assert not any(torch.equal(a, b) for a, b in combinations(walks, 2))
    assert len(clips) == 4 and sum(clip["split"] == "test" for clip in clips) == 1
    batch = ShardStream(tmp_path / "one", PRESETS["tiny"], codec("tiny").fingerprint(), 0).batch(0, 8, 8)
    control = batch.condition.control
    assert torch.equal(labels_from_poses(control.c2w, world.STEP)[:, 1:], control.actions[:, 1:])
    assert (control.actions > 0).float().mean() > 0.5 and torch.equal(control.K[0, 0], world.K)
    assert codec("tiny").decode(batch.x0).float().std() > 10                            # there is something to see


def test_maps_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="no scenario home.wad; it has .*deathmatch.wad"):
        walker.Walker("home.wad")
