"""A folder of footage of every kind becomes shards; each kind has one result, and an interruption changes nothing."""

import csv
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import camera
import common
import control
import footage
import ingest
import shards
from data import ShardStream
from encode import codec
from model import PRESETS

pytest.importorskip("av", reason="videos need the extra encode")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
ROOT, FFMPEG = Path(common.__file__).parent, imageio_ffmpeg.get_ffmpeg_exe()
PICTURE = "testsrc=size={}:rate={}:duration={}"


def ffmpeg(*words):
    subprocess.run([FFMPEG, "-v", "error", "-y", *map(str, words)], check=True)


def film(path, size="96x64", rate=8, seconds=2, codec="libx264", *words):
    ffmpeg("-f", "lavfi", "-i", PICTURE.format(size, rate, seconds), "-c:v", codec, "-g", 4, "-pix_fmt", "yuv420p",
           *words, path)


def settings(videos, out, *words):
    fixed = ["--videos", str(videos), "--out", str(out), "--label", "9", "--shard", "3"]
    return common.parse(ingest.Config, [*fixed, *words])


OK = {"plain", "odd", "turned", "ten-bit", "grey", "wide pixels", "varying", "webm", "faster", "tall", "short sound"}
KINDS = {           # what is documented in footage.py and ingest.py
    **{f"{name}.mp4": "ok" for name in OK - {"webm"}}, "webm.webm": "ok", "pictures": "ok", "avi.avi": "ok",
    "empty.mp4": "unreadable", "words.mp4": "unreadable", "headless.mp4": "unreadable", "half.mp4": "truncated",
    "cut.mkv": "truncated", "damaged.mp4": "corrupt", "sound.mp4": "no video", "short.mp4": "too short",
    "slow.mp4": "too slow", "pausing.mp4": "too slow", "interlaced.mp4": "interlaced", "hdr.mp4": "high range",
    "little.mp4": "too small", "half a picture": "unreadable",
    "deep pictures": "unreadable", "two sizes": "changing size", "cover.m4v": "no video"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One file of every kind; clips are 12 frames at 8 a second, 96x64."""
    root = tmp_path_factory.mktemp("corpus")
    film(root / "plain.mp4")
    film(root / "odd.mp4", "101x75", 8, 2, "libx264", "-pix_fmt", "yuv444p")
    film(root / "tall.mp4", "96x160")
    film(root / "faster.mp4", "96x64", 24)
    film(root / "webm.webm", "96x64", 8, 2, "libvpx")
    film(root / "avi.avi", "96x64", 8, 2, "mpeg4")
    film(root / "ten-bit.mp4", "96x64", 8, 2, "libx264", "-pix_fmt", "yuv420p10le")
    film(root / "grey.mp4", "96x64", 8, 2, "libx264", "-pix_fmt", "gray")
    film(root / "wide pixels.mp4", "48x64", 8, 2, "libx264", "-vf", "setsar=2")
    film(root / "upright.mp4", "64x96")
    ffmpeg("-display_rotation", 90, "-i", root / "upright.mp4", "-c", "copy", root / "turned.mp4")
    (root / "upright.mp4").unlink()
    some = "select='not(mod(n,4))+not(mod(n,7))'"
    film(root / "varying.mp4", "96x64", 32, 2, "libx264", "-fps_mode", "vfr", "-vf", some)
    film(root / "pausing.mp4", "96x64", 8, 4, "libx264", "-fps_mode", "vfr", "-vf", "select='lt(n,4)+gt(n,16)'")
    ffmpeg("-f", "lavfi", "-i", PICTURE.format("96x64", 8, 2), "-f", "lavfi", "-i", "sine=duration=1", "-c:v",
           "libx264", root / "short sound.mp4")
    film(root / "short.mp4", "96x64", 8, 1)
    film(root / "slow.mp4", "96x64", 4, 4)
    film(root / "little.mp4", "32x24")
    film(root / "interlaced.mp4", "96x64", 8, 2, "libx264", "-flags", "+ildct+ilme", "-x264opts", "tff=1")
    film(root / "hdr.mp4", "96x64", 8, 2, "libx264", "-pix_fmt", "yuv420p10le", "-color_trc", "smpte2084",
         "-color_primaries", "bt2020", "-colorspace", "bt2020nc", "-x264opts", "transfer=smpte2084")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=2", root / "sound.mp4")
    Image.new("RGB", (96, 64)).save(root / "cover.png")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=2", "-i", root / "cover.png", "-map", 0, "-map", 1, "-c:v", "copy",
           "-disposition:v", "attached_pic", "-f", "mp4", root / "cover.m4v")
    (root / "cover.png").unlink()
    (root / "empty.mp4").write_bytes(b"")
    (root / "words.mp4").write_text("this is no film\n" * 99)
    film(root / "long.mp4", "96x64", 8, 9)
    whole = (root / "long.mp4").read_bytes()
    (root / "headless.mp4").write_bytes(whole[:len(whole) * 2 // 3])                    # its header was at the end
    ffmpeg("-f", "lavfi", "-i", PICTURE.format("96x64", 8, 9), "-f", "lavfi", "-i", "sine=duration=12", "-c:v",
           "libx264", "-g", 4, "-pix_fmt", "yuv420p", "-movflags", "faststart", root / "long.mp4")
    whole = (root / "long.mp4").read_bytes()
    (root / "half.mp4").write_bytes(whole[:len(whole) // 2])
    film(root / "long.mp4", "96x64", 8, 9, "libx264", "-movflags", "faststart")
    whole = (root / "long.mp4").read_bytes()
    middle = len(whole) * 2 // 3
    (root / "damaged.mp4").write_bytes(whole[:middle] + bytes(400) + whole[middle + 400:])
    film(root / "long.mkv", "96x64", 8, 9)
    whole = (root / "long.mkv").read_bytes()
    (root / "cut.mkv").write_bytes(whole[:len(whole) // 2])
    (root / "long.mp4").unlink(), (root / "long.mkv").unlink()
    for name in ("pictures", "half a picture", "two sizes"):
        (root / name).mkdir()
        for i in range(12):                                     # named without zeros: 10 comes after 9
            height = 80 if name == "two sizes" and i == 7 else 64
            Image.new("RGB", (96, height), (20 * i, 0, 0)).save(root / name / f"{i}.png")
    (root / "deep pictures").mkdir()
    Image.fromarray(np.full((64, 96), 40_000, np.uint16)).save(root / "deep pictures" / "0.png")       # 16 bits
    torn = root / "half a picture" / "5.png"
    torn.write_bytes(torn.read_bytes()[:60])
    return root


@pytest.fixture(scope="module")
def encoded(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "shards"
    ingest.main(settings(corpus, out, "--tolerate", "1"))
    return out


def test_every_kind_of_file_has_its_documented_result(encoded):
    report = json.loads((encoded / "report.json").read_text())
    results = {name: "ok" for name in KINDS} | {entry["name"]: entry["result"] for entry in report["refused"]}
    assert results == KINDS and report["videos"] == len(KINDS) == report["done"]
    assert report["results"]["ok"] == sum(kind == "ok" for kind in KINDS.values())
    documented = footage.__doc__ + ingest.__doc__
    assert all(f"\n    {kind} " in documented for kind in {*KINDS.values()} - {"ok"})
    assert all(entry["detail"] for entry in report["refused"])


def latents(folder):
    """{name of the video: latents of its clips, decoded}."""
    out = {}
    for line in shards.read_index(folder):
        tensors = shards.read_shard(folder, line)
        for i, clip in enumerate(line["clips"]):
            video = codec("tiny").decode(tensors[f"{i}.x0"][None])[0]
            out.setdefault(clip["name"].rpartition("#")[0], []).append(video)
    return out


def psnr(a, b):
    return float(-10 * torch.log10(((a.float() - b.float()) / 255).square().mean()))


def test_mended_files_look_as_a_player_shows_them(corpus, encoded):
    """FFmpeg's own player turns and stretches; its pictures and ours are the same, through the same codec."""
    seen = latents(encoded)
    assert len(seen["faster.mp4"]) == 1 and len(seen["plain.mp4"]) == 1                 # 2 seconds, at 24 and at 8
    for name, shape in (("turned.mp4", ""), ("wide pixels.mp4", "scale=96:64,"), ("ten-bit.mp4", ""), ("grey.mp4", ""),
                        ("plain.mp4", ""), ("tall.mp4", "crop=96:64,"), ("odd.mp4", "crop=101:67,")):
        words = "-frames:v", "12", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"
        pixels = subprocess.run([FFMPEG, "-v", "error", "-i", corpus / name, "-vf", f"{shape}scale=96:64", *words],
                                check=True, stdout=subprocess.PIPE).stdout
        shown = torch.from_numpy(np.frombuffer(pixels, np.uint8).copy()).view(12, 64, 96, 3)
        again = codec("tiny").decode(codec("tiny").encode(shown[None]))[0]
        assert psnr(seen[name][0], again) > 26, name
        assert psnr(seen[name][0], again.flip(2)) < 20, name
    assert torch.equal(seen["pictures"][0][:, 0, 0, 0].sort().values, seen["pictures"][0][:, 0, 0, 0])    # 9 before 10


def test_frames_are_those_nearest_in_time():
    pick = lambda times, fps: [i for i, _ in footage.at_rate(((t, None) for t in times), fps)]
    third = [k / 24 for k in range(24)]
    assert pick(third, 24) == [*range(24)] and pick(third, 8) == [*range(0, 24, 3)]
    assert pick([5 + t for t in third], 16) == [round(k * 1.5 - 1e-9) for k in range(16)]       # 5 s are the beginning
    assert pick([0, 0.12, 0.26, 0.37, 0.5], 8) == [0, 1, 2, 3, 4]                       # a rate that wanders
    assert pick([0, 0.5], 8) == [0, 0, 0, 1, 1] and pick([], 8) == []                   # a repeat shows as such


def test_the_crop_is_centred_and_cameras_follow_it():
    K = torch.tensor([[[0.5, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]], dtype=torch.float64)
    for size, aspect in (((200, 90), 1.0), ((90, 200), 1.0), ((60, 100), 2.0)):         # too wide, too tall, stretched
        picture = Image.new("RGB", size)
        point = torch.tensor([0.03, -0.02, 1], dtype=torch.float64)                     # near the axis: in every crop
        u, v = ((K[0] @ point)[:2] * torch.tensor(size)).tolist()
        picture.paste((255, 255, 255), (int(u) - 2, int(v) - 2, int(u) + 3, int(v) + 3))
        pixels, crop = footage.fit(picture, aspect, 96, 64)
        u, v = ((camera.crop_K(K, *crop)[0] @ point)[:2] * torch.tensor([96, 64])).tolist()
        rows, columns = np.nonzero(pixels[..., 0] > 100)
        assert abs(rows.mean() + 0.5 - v) < 1 and abs(columns.mean() + 0.5 - u) < 1


def poses_of(actions, frames_each=3):
    """Cameras of every pixel frame of a walk whose labels last `frames_each` frames."""
    return camera.between(control.poses_from_labels(actions, 0.3, 4.0), frames_each)


def test_labels_from_cameras_are_those_of_the_walk_at_the_rate_asked_for(tmp_path):
    """24 frames a second in the file, 8 in the shards: labels and cameras are of the frames that were picked."""
    asked = torch.tensor([0] + [9] * 5 + [12] * 4 + [27] * 2)
    c2w, clips = poses_of(asked), tmp_path / "clips"
    (clips / "a").mkdir(parents=True)
    film(clips / "a" / "gen.mp4", "96x64", 24, f"{len(c2w) / 24}")
    np.save(clips / "a" / "poses.npy", c2w.numpy())
    np.save(clips / "a" / "intrinsics.npy", np.array([0.6, 0.9, 0.5, 0.5]))
    film(clips / "estate.mp4", "192x64", 24, f"{len(c2w) / 24}")                        # half of it is cut off
    rows = [f"{i} .6 .9 .5 .5 0 0 " + " ".join(map(str, w2c[:3].flatten().tolist()))
            for i, w2c in enumerate(camera.invert(c2w))]
    (clips / "estate.txt").write_text("https://a.video\n" + "\n".join(rows) + "\n")
    film(clips / "wrong.mp4", "96x64", 24, 2)
    (clips / "wrong.txt").write_text("\n".join(rows[:-1]) + "\n")
    ingest.main(settings(clips, tmp_path / "out", "--tolerate", "0.4", "--held_out", "0", "--no-smooth"))
    (bad,) = json.loads((tmp_path / "out" / "report.json").read_text())["refused"]
    assert bad["result"] == "bad cameras" and "cameras for" in bad["detail"]
    batch = ShardStream(tmp_path / "out", PRESETS["tiny"], codec("tiny").fingerprint(), 0).batch(0, 16, 12)
    far = float(c2w[:, :3, 3].norm(dim=-1).max())
    assert {round(float(fx), 4) for fx in batch.condition.control.K[:, 0, 0, 0]} == {0.6, 1.2}
    for actions, cameras in zip(batch.condition.control.actions, batch.condition.control.c2w):
        assert torch.equal(actions, asked)
        true = c2w[::3].clone()
        true[:, :3, 3] /= far
        torch.testing.assert_close(cameras, true.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, text, words", [
    ("a.json", "{}", "is not a JSON list"), ("a.json", "[1]", "row 1 is not a JSON object"), ("a.json", "[", "row 1: "),
    ("a.jsonl", '{"video": "a.mp4"}\n{"video"', "row 2: "), ("a.jsonl", '{"video": "a.mp4"}\n[]', "row 2 is not a JSON object"),
    ("a.csv", "video,action_label\na.mp4,forward\n", "row 1: action_label is a number, got 'forward'"),
    ("a.csv", "video,colour\na.mp4,red\n", "row 1: the columns are")])
def test_a_wrong_row_is_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}.*{words}"):
        footage.find(str(tmp_path), str(tmp_path / name))


def test_lists_of_videos(tmp_path):
    """BiWM's list, csv and jsonl say caption and actions of every video; a wrong row is named."""
    clips = tmp_path / "clips"
    for name in ("000000_w-11", "000001_d-11"):
        (clips / name).mkdir(parents=True)
        film(clips / name / "gen.mp4")
    reference = [{"caption": "a red castle", "action_frames": "w-1, w+right-2"}, {"caption": "", "action_label": 27},
                 {"caption": "a gold castle", "action_frames": "w-9"}]
    (tmp_path / "train.json").write_text(json.dumps(reference))
    ingest.main(settings(clips, tmp_path / "one", "--metadata", str(tmp_path / "train.json"), "--tolerate", "0.4"))
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert [(bad["name"], bad["result"]) for bad in report["refused"]] == [("000002", "missing")]
    (line,) = shards.read_index(tmp_path / "one")
    tensors = shards.read_shard(tmp_path / "one", line)
    assert tensors["0.actions"].tolist() == [0] + [9] * 4 + [12] * 7
    assert tensors["1.actions"].tolist() == [0] + [27] * 11
    assert [caption for caption, _ in line["texts"]] == ["a red castle", ""]
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([("video", "caption", "action_label", "scene"),
                                    ("000000_w-11/gen.mp4", "", 9, "house"),
                                    ("000001_d-11/gen.mp4", "a blue castle", 80, "house")])
    row = {"video": "000000_w-11/gen.mp4", "action_frames": "w-2, up-6"}
    (tmp_path / "list.jsonl").write_text(json.dumps(row) + "\n")
    (first, second), (only,) = (footage.find(clips, str(tmp_path / name)) for name in ("list.csv", "list.jsonl"))
    assert (first.actions, second.actions, second.caption, second.scene) == (9, 80, "a blue castle", "house")
    assert only.actions == "w-2, up-6" and only.path.exists()
    (tmp_path / "list.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"captoin": "x"}) + "\n")
    with pytest.raises(ValueError, match="row 2: the columns are video, .*captoin"):
        footage.find(clips, str(tmp_path / "list.jsonl"))


@pytest.mark.parametrize("actions, rate, result", [
    ("w-40", 8, None), ("w-40", 16, "are for 16.00 frames"), ("w-1", 8, "they reach 5 of 12"),
    ("w+s-40", 8, "contradict"), (81, 8, "label 81"), (80, 16, None)])
def test_actions_that_do_not_fit_their_video_are_refused(actions, rate, result):
    cfg = ingest.Config(frames=12, fps=8)
    item = footage.Item("a", Path("a"), "a", actions=actions)
    labels = lambda: ingest.labels_of(item, cfg, [k / rate for k in range(30)], 2, 1)
    if result:
        with pytest.raises(footage.Refused, match=result):
            labels()
    else:
        wanted = [0] + [9 if isinstance(actions, str) else actions] * 11
        assert [part.tolist() for part in labels()] == [wanted] * (1 if isinstance(actions, str) else 2)


def test_labels_of_the_reference_reach_backbones_of_another_stride():
    """Labels of 4 frames each, for a codec of 8 frames a latent: 77 frames hold 73, and half w, half d is w+d."""
    cfg = ingest.Config(backbone="ltx2.3-22b", frames=73, fps=24)
    item = footage.Item("a", Path("a"), "a", actions="w-3, d-3, up-13")
    (labels,) = ingest.labels_of(item, cfg, [k / 24 for k in range(77)], 1, 8)
    assert labels.tolist() == [0, 9, 45, 27] + [1] * 6
    with pytest.raises(ValueError, match=r"ltx2.3-22b wants --frames 1 \+ 8 k, got 77"):
        ingest.Config(backbone="ltx2.3-22b", frames=77)


def files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())
            if path.name != "settings.json"}


def test_a_share_of_refused_videos_stops_the_run_and_more_tolerance_goes_on(corpus, encoded, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"of \d+ videos are refused, more than --tolerate 0.05"):
        ingest.main(settings(corpus, tmp_path / "a"))
    assert not (tmp_path / "a" / "index.jsonl").exists()
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["done"] < report["videos"]
    assert all((tmp_path / "a" / bad["shard"]).exists() for bad in report["refused"])
    with pytest.raises(SystemExit, match="other settings .*fps 8.0 -> 7.0"):
        ingest.main(settings(corpus, tmp_path / "a", "--fps", "7", "--tolerate", "1"))
    ingest.main(settings(corpus, tmp_path / "a", "--tolerate", "1"))
    assert files(tmp_path / "a") == files(encoded)


def test_two_kills_and_two_processes_make_the_same_shards(corpus, encoded, tmp_path):
    out = tmp_path / "shards"
    words = [sys.executable, "encode.py", "--videos", str(corpus), "--out", str(out), "--label", "9", "--shard", "3",
             "--tolerate", "1"]
    for workers, wanted in (("1", 1), ("2", 4)):
        process = subprocess.Popen([*words, "--workers", workers], cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while len([*out.glob("*.safetensors")]) < wanted:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not (out / "index.jsonl").exists()
    missing = next(name for name in files(encoded) if not (out / name).exists() and name.endswith("safetensors"))
    (out / missing).with_suffix(".partial").write_bytes(b"half of a shard")             # what a kill may leave
    ingest.main(settings(corpus, out, "--tolerate", "1"))
    assert files(out) == files(encoded)
