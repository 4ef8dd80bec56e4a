"""Cameras: rays that hit what they show, intrinsics that follow the picture, and files that are read or refused by name."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import control
import world
from camera import (Cameras, between, check_direction, check_poses, crop_K, intrinsics, invert, pluecker, pose, projections,
                    read_cameras, relative)
from control import poses_from_labels

WALK = poses_from_labels(torch.tensor([0, 9, 12, 46, 3, 18, 1, 13, 30]), 0.3, 9.0)     # float64 [9, 4, 4], pitch and yaw
K = torch.tensor([[0.7, 0, 0.45], [0, 1.1, 0.6], [0, 0, 1]], dtype=torch.float64)


def project(K, c2w, point):
    """Place of `point` [3] in pictures of cameras [..., 4, 4], from 0 to 1: x, y [...]."""
    x = K @ (c2w[..., :3, :3].mT @ (point - c2w[..., :3, 3])[..., None])
    return (x[..., :2, 0] / x[..., 2:, 0]).unbind(-1)


# ---- Rays ------------------------------------------------------------------------------------------------------------

def test_rays_have_unit_length_and_moments_at_right_angles():
    rays = pluecker(K.expand(2, 9, 3, 3), WALK.expand(2, 9, 4, 4), 6, 8)
    assert rays.shape == (2, 9, 6, 6, 8)
    moment, d = rays.split(3, 2)
    torch.testing.assert_close(d.norm(dim=2), torch.ones(2, 9, 6, 8).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close((moment * d).sum(2), torch.zeros(2, 9, 6, 8).double(), atol=1e-12, rtol=0)


def test_a_pixels_ray_hits_the_point_it_came_from():
    """Points in front of each camera fall into a pixel, and that pixel's ray passes within half a pixel of the point."""
    H, W, g = 40, 60, torch.Generator().manual_seed(0)
    for camera in WALK:
        rays = pluecker(K[None], camera[None], H, W)[0]                                 # [6, H, W]
        for _ in range(20):
            own = torch.rand(3, generator=g).double() * torch.tensor([0.4, 0.4, 1]) + torch.tensor([-0.2, -0.2, 1])
            point = camera[:3, :3] @ own + camera[:3, 3]
            x, y = project(K, camera, point)
            moment, d = rays[:, int(y * H), int(x * W)].split(3)
            missed = (torch.linalg.cross(point, d) - moment).norm()                     # distance of a point from a line
            assert missed < 0.5 * own.norm() * math.hypot(1 / W / 0.7, 1 / H / 1.1)
    assert missed > 0


def test_between_keeps_rotations_and_ends():
    cameras = between(WALK, 4)
    assert cameras.shape == (33, 4, 4)
    torch.testing.assert_close(cameras[::4], WALK)
    check_poses(cameras)
    turn = between(poses_from_labels(torch.tensor([0, 3]), 1.0, 20.0), 4)               # a turn at constant speed
    torch.testing.assert_close(turn, poses_from_labels(torch.tensor([0, 3, 3, 3, 3]), 1.0, 5.0), atol=2e-3, rtol=0)


def test_projections_are_lifted_intrinsics_after_w2c():
    P, inverse = projections(K.expand(9, 3, 3), WALK)
    torch.testing.assert_close(P @ inverse, torch.eye(4).double().expand(9, 4, 4))
    torch.testing.assert_close(P, torch.diag(torch.tensor([0.7, 1.1, 1, 1])).double() @ torch.linalg.inv(WALK))


# ---- Intrinsics ------------------------------------------------------------------------------------------------------

def test_intrinsics_follow_the_picture_through_resize_and_crop():
    pixels = torch.tensor([[700.0, 0, 500], [0, 680, 300], [0, 0, 1]]).double()         # of 640 x 1000
    point = torch.tensor([0.2, 0.1, 3.0]).double()
    x, y = project(pixels, WALK[0], point)
    normal = intrinsics(pixels, 1, (640, 1000))[0]
    torch.testing.assert_close(torch.stack(project(normal, WALK[0], point)), torch.stack([x / 1000, y / 640]))
    small = intrinsics(pixels * torch.tensor([[0.5], [0.25], [1]]), 1, (160, 500))[0]   # resized: the same K
    torch.testing.assert_close(small, normal)
    left, top, width, height = 200, 40, 600, 480                                        # of the 640 x 1000 picture
    cropped = crop_K(normal, left / 1000, top / 640, width / 1000, height / 640)
    torch.testing.assert_close(torch.stack(project(cropped, WALK[0], point)), torch.stack([(x - left) / width, (y - top) / height]))


@pytest.mark.parametrize("values, words", [
    (torch.ones(3, 4), r"intrinsics of 9 cameras are \[9, 3, 3\] or \[9, 4\], not \[3, 4\]"), (torch.ones(9, 5), r"not \[9, 5\]"),
    (torch.ones(9, 4).index_fill(0, torch.tensor(4), math.nan), "camera 4 has intrinsics"),
    (torch.ones(9, 4) - 2 * F.one_hot(torch.tensor([9] * 7 + [0] + [9]), 10)[:, :4], "camera 7 has intrinsics"),
    (100 * torch.ones(4), "in pixels: tell the size")])
def test_bad_intrinsics_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        intrinsics(values.double(), 9)


# ---- Files -----------------------------------------------------------------------------------------------------------

def write(folder, form, c2w, K=K):
    """`c2w` [T, 4, 4] as a file of one of the forms; absolute poses, intrinsics in pixels of 480 x 640 where usual."""
    rows, pixels = (torch.tensor([K[0, 0], K[1, 1], K[0, 2], K[1, 2]]).expand(len(c2w), 4), torch.diag(torch.tensor([640, 480, 1.0])).double() @ K)
    if form == "txt":
        data = torch.cat([torch.arange(len(c2w))[:, None], rows, torch.zeros(len(c2w), 2), torch.linalg.inv(c2w)[:, :3].flatten(1)], 1)
        text = "\n".join(" ".join(f"{x:.9f}" for x in row) for row in data.tolist())
        (folder / "a.txt").write_text("https://www.youtube.com/watch?v=x\n" + text + "\n")
    elif form == "json":
        centred = torch.tensor([[448.0, 0, 320], [0, 528, 240], [0, 0, 1]])
        data = {str(i): {"extrinsic": camera.tolist(), "K": centred.tolist()} for i, camera in enumerate(c2w)}
        (folder / "a.json").write_text(json.dumps(data))
    else:
        np.save(folder / "a.npy", c2w[:, :3].numpy())
        np.save(folder / "intrinsics.npy", {"npy": rows, "pixels": pixels}[form].numpy())
    return folder / f"a.{'npy' if form == 'pixels' else form}"


@pytest.mark.parametrize("form", ["txt", "npy", "pixels", "json"])
def test_the_common_forms_are_read_alike(form, tmp_path):
    start = pose(torch.tensor([3.0, -1, 5]).double(), torch.tensor(0.4).double(), torch.tensor(0.1).double())
    cameras = read_cameras(write(tmp_path, form, start @ WALK), frames=9, size=(480, 640))
    torch.testing.assert_close(cameras.c2w, WALK, atol=1e-7, rtol=0)                    # relative to the first
    expected = K if form != "json" else torch.tensor([[0.7, 0, 0.5], [0, 1.1, 0.5], [0, 0, 1]]).double()
    torch.testing.assert_close(cameras.K, expected.expand(9, 3, 3), atol=1e-7, rtol=0)
    unit = cameras.normalised()
    assert unit.c2w[:, :3, 3].norm(dim=1).max() == pytest.approx(1) and cameras.scale == 1
    torch.testing.assert_close(unit.c2w[:, :3, 3] * unit.scale, WALK[:, :3, 3], atol=1e-7, rtol=0)
    assert unit.normalised().scale == pytest.approx(unit.scale)
    assert Cameras(torch.eye(4).repeat(3, 1, 1).double(), None).normalised().scale == 1


def spoil(frame, change):
    c2w = WALK.clone()
    change(c2w[frame])
    return c2w


REFUSED = [(spoil(4, lambda c: c[0].fill_(math.nan)), "camera 4 is not finite"),
           (spoil(2, lambda c: c[1, 3].fill_(math.inf)), "camera 2 is not finite"),
           (spoil(3, lambda c: c[:, 0].neg_()), "camera 3 is a reflection"),
           (spoil(5, lambda c: c[:3, 1].mul_(1.1)), "camera 5 has axes that are not orthonormal"),
           (spoil(1, lambda c: c[3, 0].fill_(1)), "camera 1 has a last row"),
           (WALK[:0], r"cameras are c2w \[..., T, 4, 4\], got \[0, 4, 4\]"), (WALK[0], r"got \[4, 4\]"),
           (WALK[..., :3, :3], r"got \[9, 3, 3\]")]


@pytest.mark.parametrize("c2w, words", REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_no_camera_is_refused_with_its_frame(c2w, words, tmp_path):
    np.save(tmp_path / "a.npy", c2w.numpy())
    for call in (lambda: check_poses(c2w), lambda: control.labels_from_poses(c2w), lambda: read_cameras(tmp_path / "a.npy")):
        with pytest.raises(ValueError, match=words) as error:
            call()
    assert "a.npy" in str(error.value)


def test_rounded_files_are_accepted_and_wrong_counts_are_not(tmp_path):
    check_poses(WALK.float().mul(1e4).round() / 1e4)
    with pytest.raises(ValueError, match="a.npy: there are 9 cameras for 10 frames"):
        read_cameras(write(tmp_path, "npy", WALK), frames=10)
    np.save(tmp_path / "intrinsics.npy", np.ones((8, 4)))
    with pytest.raises(ValueError, match="intrinsics of 9 cameras"):
        read_cameras(tmp_path / "a.npy")
    write(tmp_path, "pixels", WALK)
    with pytest.raises(ValueError, match="in pixels: tell the size"):
        read_cameras(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="a.csv: cameras are read from .txt, .npy, .json"):
        read_cameras("a.csv")


def test_w2c_passed_as_c2w_is_seen_where_it_shows():
    maps, states, *_ = world.explore(64, 40, torch.Generator().manual_seed(0))
    walks, caught = world.pose(states).double(), 0
    for c2w in walks:
        check_direction(c2w)                                                            # none of them refused
        check_direction(relative(c2w))
        try:
            check_direction(invert(c2w))
        except ValueError as error:
            caught += "look like w2c, not c2w" in str(error) and "camera" in str(error)
    assert caught >= 0.8 * len(walks)
    level, away = poses_from_labels(torch.tensor([0] + [3, 9] * 8), 0.3, 9.0), torch.eye(4).double()
    away[:3, 3] = torch.tensor([5, 0, -7])                                              # the world begins elsewhere
    for walk in (WALK, away @ level):               # pitch and yaw: read as w2c it rolls; yaw alone: it jumps
        check_direction(walk)
        with pytest.raises(ValueError, match="look like w2c, not c2w .as c2w they jump at camera"):
            check_direction(invert(walk))
    check_direction(poses_from_labels(torch.tensor([0] + [40] * 30), 0.3, 9.0))         # an orbit, from its first camera


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", "http://x\n0 1 1 .5 .5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n1 1 1\n", "camera 1 is not the 19 numbers"),
    ("a.txt", "http://x\n" + "7\n", "camera 0 is not the 19 numbers"), ("a.txt", "", "got .0, 4, 4."),
    ("a.txt", "0 1 1 .5 .5 0 0 1 0 0 0 0 1 0 0 0 0 1 nix\n", "camera 0 is not the 19 numbers"),
    ("a.json", '{"0": {"extrinsic": 1}}', "camera 0 is not"), ("a.json", "[" * 100_000, "camera 0 is not"), ("a.json", "{}", "camera 0"),
    ("a.json", json.dumps({k: {"extrinsic": np.eye(4).tolist(), "K": np.eye(3).tolist()} for k in ("0", "2")}), "camera 1 is not"),
    ("a.npy", "no array", "a.npy"), ("a.npy", "", "a.npy")])
def test_broken_files_name_file_and_frame(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        read_cameras(tmp_path / name)
    assert name in str(error.value)


numbers = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, 0.0, 1.0])
json_values = st.recursive(st.none() | st.booleans() | st.integers() | numbers | st.text(max_size=4), lambda inner: st.lists(inner, max_size=4)
                           | st.dictionaries(st.sampled_from(["0", "1", "extrinsic", "K"]), inner, max_size=3), max_leaves=30)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(["a.txt", "a.json", "a.npy"]))
def test_readers_either_read_or_say_why(data, name, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / name
    if name == "a.json":
        path.write_text(json.dumps(data.draw(json_values)))
    elif name == "a.txt":
        path.write_text("\n".join(" ".join(map(str, row)) for row in data.draw(st.lists(st.lists(numbers, min_size=18, max_size=20), max_size=3))))
    elif data.draw(st.booleans()):
        shape = data.draw(st.sampled_from([(2, 4, 4), (2, 3, 4), (4, 4), (0, 4, 4), (2,), ()]))
        np.save(path, np.array(data.draw(st.lists(numbers, min_size=32, max_size=32)))[:int(np.prod(shape))].reshape(shape))
    else:
        path.write_bytes(data.draw(st.sampled_from([b"", b"\x93NUMPY\x01\x00"])) + data.draw(st.binary(max_size=80)))
    try:
        assert check_poses(read_cameras(path).c2w).shape[1:] == (4, 4)
    except ValueError as error:
        assert name in str(error)


def test_the_command_prints_labels_and_draws_the_way(tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "poses.npy", poses_from_labels(control.parse_actions("w-8, w+right-12, d-5"), 0.2, 5.0).numpy())
    control.main(str(tmp_path / "poses.npy"))
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["0"] + ["9"] * 8 + ["12"] * 12 + ["27"] * 5 and out[1] == "w-8, w+right-12, d-5"
    assert (tmp_path / "poses.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "poses.png").stat().st_size > 10_000


def test_the_command_loses_no_short_motion_and_needs_no_intrinsics(tmp_path, capsys):
    labels = control.parse_actions("w-2, d-1, w-2, right-1, s-3")
    jitter = 1e-3 * torch.tensor([1.0, -1.0] * 5)[:, None] * torch.tensor([0.0, 0.0, 1.0])
    for name, poses in (("exact", poses_from_labels(labels, 0.2, 5.0)), ("jitter", torch.eye(4).repeat(10, 1, 1))):
        poses[:, :3, 3] += jitter * (name == "jitter")
        np.save(tmp_path / f"{name}.npy", poses.numpy())
    np.save(tmp_path / "intrinsics.npy", np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]]))       # in pixels
    told = {"exact": {}, "jitter": {"step": 0.2}}
    for name in told:
        control.main(str(tmp_path / f"{name}.npy"), **told[name])
    exact, _, still = capsys.readouterr().out.splitlines()[1:4]
    assert exact == "w-2, d-1, w-2, right-1, s-3" and still.split() == ["0"] * 10
    control.main(str(tmp_path / "exact.npy"), smooth=True)
    assert capsys.readouterr().out.splitlines()[1] == "w-5, still-1, s-3"
