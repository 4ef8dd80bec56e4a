"""Each metric on a case whose value is known."""

import math
from types import SimpleNamespace

import pytest
import torch

import metrics as m
import world
from control import parse_actions
from data import Trips
from evaluate import held_out
from probe import load_probe

S = m.START


class Told:
    """A probe that reads prepared classes and, as features, brightness: for what does not depend on the real one."""
    head = torch.nn.Linear(1, 1)

    def __init__(self, labels):
        self.labels = labels

    def read(self, video):
        labels = self.labels[:, 1:video.shape[1]]
        light = video[:, 1:].double().mean((2, 3))                                      # [N, T-1, 3]
        return torch.stack([labels // 9, labels % 9], -1), light + torch.rand(light.shape, generator=torch.Generator())


def trip(text, blocked=(), N=3):
    """N equal walks in free space that obey `text` behind START still frames."""
    actions = torch.cat([torch.zeros(S - 1, dtype=torch.long), parse_actions(text)])
    states = torch.zeros(1, len(actions), 4, dtype=torch.float64)
    for t in range(1, len(actions)):
        states[:, t] = m.travel(actions[None, t:t + 1], states[:, t - 1])
    wall = torch.zeros(len(actions), dtype=torch.bool)
    wall[[*blocked]] = True
    labels, walls = (x.expand(N, -1) for x in (actions, wall))
    return Trips(torch.zeros(N, dtype=torch.long), states.repeat(N, 1, 1), labels, walls, labels)


def grey(levels):
    """Video [3, T, 16, 16, 3] of a coloured pattern that brightens by `levels` [T]."""
    pattern = torch.randint(99, (16, 16, 3), generator=torch.Generator().manual_seed(0))
    return (torch.tensor(levels)[None, :, None, None, None] + pattern).expand(3, -1, -1, -1, -1).to(torch.uint8)


def test_psnr_of_a_known_error():
    a = torch.full((1, 1, 8, 8, 3), 100, dtype=torch.uint8)
    assert m.psnr(a, a + 5).item() == pytest.approx(10 * math.log10(255 ** 2 / 25))


def test_ssim_of_known_pictures():
    noise = torch.randint(60, 196, (2, 3, 24, 24, 1), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    noise = noise.expand(-1, -1, -1, -1, 3)
    assert torch.allclose(m.ssim(noise, noise), torch.ones(2, 3))
    assert (m.ssim(noise, 255 - noise) < -0.8).all()                                    # the opposite structure
    a, b = (torch.full((1, 1, 16, 16, 3), level, dtype=torch.uint8) for level in (100, 150))
    c1 = (0.01 * 255) ** 2
    assert m.ssim(a, b).item() == pytest.approx((2 * 100 * 150 + c1) / (100 ** 2 + 150 ** 2 + c1), rel=1e-4)


def test_frechet_distance_of_known_gaussians():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 4, generator=g, dtype=torch.float64)
    b = 2 * torch.randn(20000, 4, generator=g, dtype=torch.float64) + torch.tensor([3.0, 0, 0, 0])
    assert m.frechet(a, b) == pytest.approx(9 + 4 * (1 - 2) ** 2, rel=0.03)               # |m|^2 + sum (s - s')^2
    assert m.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_intervals_cover_the_mean():
    g = torch.Generator().manual_seed(1)
    values = torch.randn(400, generator=g)
    value, low, high = m.bootstrap(lambda i: float(values[i].mean()), 400)
    assert value == pytest.approx(float(values.mean())) and low < value < high
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.3)
    part, whole = torch.tensor([9.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 1.0])
    assert m.ratio(part, whole)[0] == 2.0                                               # the first has nothing of it


def test_obedience_by_class_and_by_turn():
    trips = trip("w-4, right-4, s+up-2", blocked=[S + 9])                               # the last frame meets a wall
    labels = trips.actions.clone()
    labels[:, S:S + 4] = 0                                                              # w is not obeyed
    labels[:, S + 9] = 5                                                                # read in the blocked frame
    read, _ = Told(labels).read(grey([0] * (S + 10)))
    rows = {k: round(v[0], 6) for k, v in m.obedience(read, trips).items()}
    assert rows["move: w"] == 0 and rows["move: w, cells off"] == world.STEP and rows["move: s"] == 100
    assert rows["turn: right"] == rows["turn: up"] == rows["turn: none"] == 100 and "turn: left" not in rows
    assert [rows[f"both turn {k}"] for k in (1, 2, 3)] == [0, 100, 100] and "both turn 4" not in rows
    assert rows["translation all"] == pytest.approx(500 / 9) and rows["translation with blocked"] == 50
    assert rows["rotation all"] == 100 and rows["rotation with blocked"] == 90 and rows["both 1s"] == 50
    assert rows["degrees off with blocked"] == pytest.approx(world.ANGLE / 10) and rows["degrees off all"] == 0


def test_relative_pose_error_of_known_dreams():
    trips = trip("w-8, w+right-8")
    video = grey([0] * (S + 16))
    exact = m.pose_error(Told(trips.actions).read(video)[0], trips)
    assert exact["cells off in 1s"][0] < 1e-9 and exact["degrees off in 1s"][0] < 1e-9
    still = m.pose_error(Told(torch.zeros_like(trips.actions)).read(video)[0], trips)
    arc = [sum(f(math.radians(world.ANGLE * k)) for k in range(8)) * world.STEP for f in (math.sin, math.cos)]
    assert still["cells off in 1s"][0] == pytest.approx((8 * world.STEP + math.hypot(*arc)) / 2)
    assert still["degrees off in 1s"][0] == pytest.approx(8 * world.ANGLE / 2)
    walled = trip("w-8, w+right-8", blocked=[S + 3])                                    # that second does not count
    rest = m.pose_error(Told(0 * trips.actions).read(video)[0], walled)
    assert rest["cells off in 1s"][0] == pytest.approx(math.hypot(*arc))


def test_travel_is_the_worlds_own_motion():
    trips = held_out(40, 3, 12)
    free = ~trips.blocked.any(1)
    end = m.travel(trips.actions[free, 1:], trips.states[free, 0])
    off = end - trips.states[free, -1]
    off[:, 2] = (off[:, 2] + 180) % 360 - 180
    exact = off.abs().amax(1) < 1e-9                                                    # but where a wall was brushed
    assert exact.sum() > 5 and exact.double().mean() > 0.8 and off.abs().max() < world.STEP


def test_motion_seam_and_likeness_of_a_known_clip():
    """Truth brightens by 2 a frame; the dream by 6 into a chunk and by 2 inside."""
    steps = [0] + [2] * (S - 1) + [6, 2, 2, 2] * 2
    made = torch.tensor(steps).cumsum(0).tolist()
    truth, video = grey([2 * t for t in range(S + 8)]), grey(made)
    trips = trip("still-8")
    rows = {k: v[0] for k, v in m.measure(video, truth, trips, Told(trips.actions)).items()}
    assert rows["motion"] == pytest.approx((2 * 6 + 6 * 2) / (8 * 2)) and rows["seam"] == pytest.approx(3)
    assert rows["drift of motion"] == pytest.approx(2)                                  # 6 / 2 at first, 2 / 2 at last
    assert rows["psnr 0.5s"] == pytest.approx(10 * math.log10(255 ** 2 / 4 ** 2))       # one border behind
    assert rows["psnr 1s"] == pytest.approx(10 * math.log10(255 ** 2 / 8 ** 2)) and "psnr 2s" not in rows
    assert rows["ssim 1s"] < rows["ssim 0.5s"] < 1 and rows["frechet"] > 1
    soon = truth.clone()
    soon[:, S:S + 4] += 50                                                              # it looks later
    assert abs(m.measure(soon, truth, trips, Told(trips.actions))["frechet"][0]) < 1e-6


def test_sharpness_and_saturation_are_relative_to_real_video():
    trips, probe = held_out(3, 5, 8), Told(torch.zeros(3, S + 8, dtype=torch.long))
    truth = trips.video()
    dull = truth.clone()
    dull[:, S:] = (truth[:, S:].float() * 0.5 + 64).byte()
    rows = m.measure(dull, truth, trips, probe)
    for name in ("sharpness", "saturation"):
        assert rows[name][0] == pytest.approx(0.5, abs=0.02) and rows[f"drift of {name}"][0] < 0.03
    late = truth.clone()
    late[:, -1:] = dull[:, -1:]                                                         # only the last 15 %
    assert m.measure(late, truth, trips, probe)["drift of saturation"][0] == pytest.approx(0.5, abs=0.02)


def test_each_ten_seconds_is_measured_by_itself(monkeypatch):
    monkeypatch.setattr(m, "TEN", 16)
    monkeypatch.setattr(m, "bootstrap", lambda figure, count, draws=0: [figure(torch.arange(count))] * 3)
    trips, probe = held_out(4, 5, 32), load_probe("cpu")
    truth = trips.video()
    video = truth.clone()
    video[:, 20:] = (video[:, 20:].float() * 0.5 + 64).byte()                           # half as colourful
    early, late = m.drift(video, truth, trips, probe).values()
    assert early["saturation"][0] == early["motion"][0] == early["sharpness"][0] == 1
    assert early["both all"][0] > 75 and late["both all"][0] > 40                       # labels of the same seconds
    assert late["saturation"][0] == pytest.approx(0.5, abs=0.02)
    assert early["frechet"][0] < 1e-6 < 0.01 < late["frechet"][0]
    cut = m.measure(video[:, 16:], truth[:, 16:], trips.frames(16, S + 32), probe)      # read again, not cut
    assert {name: late[name] for name in cut if name != "frechet"} == {k: v for k, v in cut.items() if k != "frechet"}
    seen = probe.read(truth), probe.read(truth)                                         # what is told is believed
    assert m.drift(video, truth, trips, probe, seen)["2-4 s"]["frechet"][0] < 1e-6
    assert m.measure(dark := truth // 2, truth, trips, probe, seen)["frechet"][0] < 1e-6
    assert m.measure(dark, truth, trips, probe)["frechet"][0] > 0.01


def test_revisits_are_earlier_frames_of_the_same_pose():
    trips = trip("right-8, left-8")
    back = m.revisits(trips.states)[0]
    assert back.tolist()[S + 12:] == [S + 2, S + 1, S, 0]
    assert (back[:S + 11] == -1).all()                                                  # a second apart or more
    turned = trip("right-48")                                                           # all around: 0 and 360 degrees
    assert m.revisits(turned.states)[0, -1] == 0 and (m.revisits(turned.states)[0, S:-1] == -1).all()


def test_consistency_tells_memory_from_truth():
    """One who remembers rightly; one who always dreams the same wrong place; one who forgets on the way."""
    actions = torch.cat([torch.zeros(S - 1, dtype=torch.long), parse_actions("right-8, left-8")]).expand(2, -1)
    start = world.spawn(torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    states, labels, blocked = world.walk(torch.tensor([0, 1]), start, actions)
    trips = Trips(torch.tensor([0, 1]), states, labels, blocked, actions)
    truth = trips.video()
    right = {k: v[0] for k, v in m.consistency(truth, truth, states).items()}
    assert right["recognised"] == 100 and right["psnr to truth"] > 70 and right["psnr to itself"] > 70
    assert right["ssim to itself"] == pytest.approx(1) and 10 < right["recognised by chance"] < 90
    wrong = {k: v[0] for k, v in m.consistency(truth.roll(1, 0), truth, states).items()}       # the other's place
    assert wrong["psnr to itself"] > 70 and wrong["psnr to truth"] < 20 and wrong["recognised"] < 90
    lost = truth.clone()
    lost[:, S + 12:] = truth[:, S + 7:S + 8]                                            # returns to the far end
    lost = {k: v[0] for k, v in m.consistency(lost, truth, states).items()}
    assert lost["recognised"] < 50 and lost["psnr to itself"] < 35


def test_diversity_is_the_spread_over_seeds_of_what_the_start_does_not_show():
    """A turn by 60 degrees: rays beyond -20.2 degrees from the middle, 72 % of the columns, are past the old view;
    those beyond 9.8 degrees, 40 %, are past that of a start frame which had turned by 30 as well."""
    yaw = torch.full((3, 8), -130.0)
    yaw[:, :4] = 170.0                                                                  # across the seam of the circle
    assert m.unseen(yaw, 1000)[0, 4].float().mean() == pytest.approx(0.5 + 0.6 * 0.368, abs=0.002)
    yaw[:, 0] = -160.0
    new = m.unseen(yaw, 1000)
    assert not new[:, :4].any() and new[0, 4].float().mean() == pytest.approx(0.5 - 0.6 * 0.173, abs=0.002)
    assert not new[0, 4, :600].any() and new[0, 4, 610:].all()
    for hidden, spread in ((new, 1.0), (~new, 0.0)):                                    # two seeds, 2^0.5 apart: std 1
        dreams = torch.full((2, 3, 8, 2, 1000, 3), 99.0)
        dreams[1] += 2 ** 0.5 * hidden[:, :, None, :, None]
        assert m.spread(dreams, yaw)[0][0] == pytest.approx(spread, abs=1e-4)
    assert m.spread(dreams, torch.zeros(3, 8)) == []                                    # no turn shows anything new


def test_seeds_are_averaged_with_the_interval_of_a_mean():
    seeds = [{"a": {"x": [1.0, 0.7, 1.3], "y": [5.0, 5.0, 5.0]}}, {"a": {"x": [3.0, 2.6, 3.4], "y": [6.0, 6.0, 6.0]}}]
    value, low, high = m.over_seeds(seeds)["a"]["x"]
    assert value == 2 and (high - low) / 2 == pytest.approx((0.3 ** 2 + 0.4 ** 2) ** 0.5 / 2)
    assert m.table(m.over_seeds(seeds), ["y", "z"]).splitlines()[-1] == "| a | 5.5 | - |"
    assert SimpleNamespace(**m.over_seeds(seeds)["a"]).y == [5.5, 5.5, 5.5]
