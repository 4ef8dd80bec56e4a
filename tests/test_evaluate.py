"""The evaluation as a command: sequences, rows, what it writes and says; figures of the shipped probe on real video."""

import json

import pytest
import torch
from PIL import Image

import evaluate as ev
import metrics
import plots
import probe
from common import parse
from encode import codec
from model import build


@pytest.fixture(scope="module")
def scene():
    trips = ev.held_out(24, 7, 12)
    coder = codec("tiny")
    return trips, coder.decode(coder.encode(trips.video())), probe.load_probe("cpu")


def test_the_shipped_probe_reads_real_video(scene):
    trips, video, probe = scene
    figures = metrics.measure(video, video, trips, probe)
    assert figures["translation all"][0] > 85 and figures["rotation all"][0] > 85
    assert figures["frechet"][0] == pytest.approx(0, abs=1e-6)
    assert figures["sharpness"][0] == figures["motion"][0] == figures["seam"][0] == 1


def test_a_frozen_picture_does_not_move_and_obeys_only_stillness(scene):
    trips, video, probe = scene
    frozen = torch.cat([video[:, :4], video[:, 3:4].expand(-1, 12, -1, -1, -1)], 1)
    figures = metrics.measure(frozen, video, trips, probe)
    still = ((trips.actions[:, 4:] // 9 == 0) & ~trips.blocked[:, 4:]).sum() / (~trips.blocked[:, 4:]).sum()
    assert figures["motion"][0] == 0 and "seam" not in figures
    assert figures["translation all"][0] == pytest.approx(100 * float(still), abs=8)
    assert figures["frechet"][0] > 0.5


def test_another_commands_video_is_not_obedient(scene):
    trips, video, probe = scene
    assert metrics.measure(video.roll(1, 0), video, trips, probe)["both all"][0] < 40


@pytest.mark.parametrize("walk", ev.WALKS)
def test_walks_return_to_where_they_began(walk):
    trips = ev.returning(walk, 6, 1000)
    assert not trips.blocked.any() and torch.equal(trips.actions, trips.asked) and len(trips.maps.unique()) > 1
    away = (trips.states - trips.states[:, :1])[..., 2]
    assert ((away + 180) % 360 - 180).abs().amax() >= 60
    back = metrics.revisits(trips.states)
    assert (back[:, -4:] >= 0).all() and (back[:, -4:].diff(dim=1) != 0).all()          # pose by pose
    assert not torch.equal(trips.states, ev.returning(walk, 6, 1001).states)


def test_a_walk_without_room_is_refused(monkeypatch):
    monkeypatch.setitem(ev.WALKS, "far", "w-90, s-90")
    with pytest.raises(ValueError, match="only 0 of 600 places leave room for the walk 'far', not 3"):
        ev.returning("far", 3, 0)


@pytest.fixture
def small(monkeypatch):
    """A very small teacher and student, intervals without draws."""
    torch.manual_seed(0)
    net = build("tiny", layers=1, dim=24, heads=2, ffn=32)
    monkeypatch.setattr(ev, "load", lambda *a: net)
    monkeypatch.setattr(ev, "setup", lambda: torch.device("cpu"))
    monkeypatch.setattr(metrics, "bootstrap", lambda figure, count, draws=0: [figure(torch.arange(count))] * 3)
    monkeypatch.setattr(ev, "bootstrap", metrics.bootstrap)


def test_everything_is_measured_and_says_what_made_it(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(metrics, "TEN", 16)
    monkeypatch.setattr(ev, "TEN", 16)
    out = tmp_path / "x.json"
    flags = "--clips 2 --seconds 3 --revisit 2 --dreams 2 --teacher_steps 1 --out".split() + [str(out)]
    monkeypatch.setattr(ev, "HORIZON", 8)
    ev.main(parse(ev.Config, flags))
    report = json.loads(out.read_text())
    assert report["settings"]["seed"] == 1000 and {"commit", "torch", "device"} <= report.keys()
    assert {len(sha) for sha in report["weights"].values()} == {64}
    assert {name.split("/")[-1] for name in report["weights"]} == {"probe.safetensors", "tiny-stage1.safetensors",
                                                                   "tiny-student.safetensors"}
    row = report["seeds"][0]["student, 4 steps"]
    assert row.keys() >= {*ev.COLUMNS} - {"psnr 4s"} | {
        "ms a frame", "ssim 2s", "diversity", "full turn: recognised", "loop: psnr to itself", "frechet 0-2 s",
        "seam 2-3 s", "cells off in 1s", "drift of motion", "both turn 1", "move: none"}
    stamp = {key: value for key, value in report.items() if key != "seeds"}
    text = out.with_suffix(".md").read_text()
    assert json.loads(text.splitlines()[0].removeprefix("<!-- ").removesuffix(" -->")) == stamp
    assert "| full turn: recognised | - | - |" in text
    pictures = {file.stem.removeprefix("x-"): Image.open(file) for file in tmp_path.glob("*.png")}
    assert pictures.keys() == plots.PICTURES.keys()
    assert all(json.loads(picture.text["Description"]) == stamp for picture in pictures.values())


def test_an_evaluation_goes_on_with_the_seeds_that_are_missing(small, monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(ev, "evaluate", lambda rows, clips, seed, *a, **k: asked.append(seed) or (
        {"student, 4 steps": {"frechet": [seed, seed, seed]}}, None, None))
    flags = ["--clips", "2", "--out", str(tmp_path / "x.json"), "--seeds", "3"]

    def dying(report, seeds, out, write=ev.write):
        write(report, seeds, out)
        if len(seeds) == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ev, "write", dying)
        ev.main(parse(ev.Config, flags))
    ev.main(parse(ev.Config, flags))
    assert asked == [1000, 1001, 1002] and "seed 1001" in capsys.readouterr().out
    seeds = json.loads((tmp_path / "x.json").read_text())["seeds"]
    assert [seed["student, 4 steps"]["frechet"][0] for seed in seeds] == asked
    ev.main(parse(ev.Config, [*flags, "--guidance", "3"]))                              # another command begins anew
    assert asked[3:] == [1000, 1001, 1002]


def test_rows_without_references_and_bad_settings(small):
    rows, files = ev.rows_of(ev.Config(references=False, student="a,b"), "cpu")
    assert [row.name for row in rows] == ["student 0, 4 steps", "student 1, 4 steps"] and files[1:] == ["a", "b"]
    for wrong in ({"references": False, "student": "none"}, {"dreams": 1}, {"revisit": -1}):
        with pytest.raises(ValueError):
            ev.Config(**wrong)


def test_a_chunks_time_is_that_of_one_player_when_all_is_warm(monkeypatch):
    trips, told = ev.held_out(3, 5, 12), []
    times = iter([10_000.0, 2_000.0])
    monkeypatch.setattr(ev, "timed", lambda function, device: (next(times), function()))
    monkeypatch.setattr(ev, "dream", lambda sampler, coder, trips, video, seed: told.append((len(trips.maps), video.shape)))
    ms = ev.latency(None, codec("tiny"), trips, torch.zeros(3, 16, 8, 8, 3, dtype=torch.uint8))
    assert told == [(1, (1, 12, 8, 8, 3))] * 2 and ms == 1000                           # two seconds for two chunks


def test_a_still_world_is_compared_with_its_reconstruction(small):
    sampler = ev.Sampler("student", ev.load(), 1, 1.0, False)
    assert ev.still(sampler, codec("tiny"), 2, 0)[0] < 40                               # an untrained one cannot copy
    trips = ev.held_out(1, 0, 8)
    assert ev.latency(sampler, codec("tiny"), trips, trips.video()) > 0


def test_every_sampler_is_in_the_legend_and_every_axis_has_a_unit(monkeypatch, tmp_path):
    """Also where one of them lacks a figure: it keeps its colour in all pictures."""
    figures = {f"{kind} {s}s": [1, 0.5, 2] for kind in ("psnr", "ssim") for s in (1, 2)}
    rows = {"a": {}, "b": figures, "c": figures}
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *a, **k: drawn.append(figure))
    plots.draw(rows, tmp_path / "x", "{}")
    figure, = drawn
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b", "c"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["PSNR to the truth, dB", "SSIM to the truth"]
    assert all("seconds" in axis.get_xlabel() and axis.lines[0].get_color() == "C1" for axis in figure.axes)


def test_a_probe_is_trained_on_real_video_as_it_is_and_through_the_codec(tmp_path, monkeypatch):
    seen, probe_of = [], probe.learnt
    monkeypatch.setattr(probe, "learnt", lambda clips, steps, device: probe_of(
        lambda step: seen.append(clips(step)) or seen[-1], steps, device))
    probe.train_probe(4, tmp_path / "p.safetensors", "cpu", batch=8, length=5)
    for step, (video, labels) in enumerate(seen):
        assert video.shape == (4, 3, 64, 96, 3) and labels.shape == (4, 3)
        lost = (video.float() - codec("tiny").decode(codec("tiny").encode(video)).float()).abs().mean()
        assert lost < 0.3 if step % 2 else lost > 1                                     # what was coded loses no more
    made, fresh = probe.load_probe("cpu", tmp_path / "p.safetensors").state_dict(), probe.Probe().state_dict()
    assert made.keys() == fresh.keys() and not made["head.weight"].equal(fresh["head.weight"])


def test_a_probe_learns_the_label_of_the_second_of_two_frames():
    """Labels 0 and 80 are the brightness of their frame."""
    def clips(step):
        bright = torch.randint(2, (24, 2), generator=torch.Generator().manual_seed(step))
        return (bright[..., None, None, None] * 200).to(torch.uint8).expand(-1, -1, 64, 96, 3), 80 * bright
    net = probe.learnt(clips, 30, "cpu")
    video, labels = clips(99)
    read = net.read(video)[0][:, 0]                                                     # [B, 2]
    assert (9 * read[:, 0] + read[:, 1] == labels[:, 1]).float().mean() > 0.9
