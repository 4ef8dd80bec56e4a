"""Metrics against cases whose answer is known."""

import math

import pytest
import torch

import evaluate as ev
from encode import codec


@pytest.fixture(scope="module")
def scene():
    trips = ev.held_out(24, 7, 12)
    coder = codec("tiny")
    return trips, coder.decode(coder.encode(trips.video())), ev.load_probe("cpu")


def test_the_shipped_probe_reads_real_video(scene):
    trips, video, probe = scene
    figures = ev.measure(video, video, trips, probe)
    assert figures["translation all"][0] > 85 and figures["rotation all"][0] > 85
    assert figures["frechet"][0] == pytest.approx(0, abs=1e-6)
    assert figures["sharpness"][0] == figures["motion"][0] == figures["seam"][0] == 1


def test_a_frozen_picture_does_not_move_and_obeys_only_stillness(scene):
    trips, video, probe = scene
    frozen = torch.cat([video[:, :4], video[:, 3:4].expand(-1, 12, -1, -1, -1)], 1)
    figures = ev.measure(frozen, video, trips, probe)
    still = ((trips.actions[:, 4:] // 9 == 0) & ~trips.blocked[:, 4:]).sum() / (~trips.blocked[:, 4:]).sum()
    assert figures["motion"][0] == 0
    assert figures["translation all"][0] == pytest.approx(100 * float(still), abs=8)
    assert figures["frechet"][0] > 0.5


def test_another_commands_video_is_not_obedient(scene):
    trips, video, probe = scene
    assert ev.measure(video.roll(1, 0), video, trips, probe)["both all"][0] < 40


def test_the_figure_at_a_horizon_is_that_frames_psnr_to_the_truth(scene):
    trips, video, probe = scene
    worse = video.clone()
    worse[:, 4 - 1 + 8] = 255 - worse[:, 4 - 1 + 8]                                     # one second after the start
    figures = ev.measure(worse, video, trips, probe)
    assert figures["psnr 1s"][0] == pytest.approx(float(ev.psnr(worse, video)[:, 11].mean()))
    assert figures["psnr 0.5s"][0] > 70 > 20 > figures["psnr 1s"][0]


def test_psnr_of_a_known_error():
    a = torch.full((1, 1, 8, 8, 3), 100, dtype=torch.uint8)
    assert ev.psnr(a, a + 5).item() == pytest.approx(10 * math.log10(255 ** 2 / 25))


def test_frechet_distance_of_known_gaussians():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 4, generator=g, dtype=torch.float64)
    b = 2 * torch.randn(20000, 4, generator=g, dtype=torch.float64) + torch.tensor([3.0, 0, 0, 0])
    assert ev.frechet(a, b) == pytest.approx(9 + 4 * (1 - 2) ** 2, rel=0.03)               # |m|^2 + sum (s - s')^2
    assert ev.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_intervals_cover_the_mean():
    g = torch.Generator().manual_seed(1)
    values = torch.randn(400, generator=g)
    value, low, high = ev.bootstrap(lambda i: float(values[i].mean()), 400)
    assert value == pytest.approx(float(values.mean())) and low < value < high
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.3)
