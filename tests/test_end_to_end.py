"""From a folder of videos to a video that plays, through the shipped commands, for each official backbone in small."""

import json
import os
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

import common
import official

pytest.importorskip("av")
pytest.importorskip("ftfy")
CONTROL = {"wan2.1-1.3b": "adaln+text", "wan2.2-5b": "plucker", "hunyuan1.5-8b": "adaln", "ltx2.3-22b": "text+adaln"}


def run(script, *arguments, ok=True):
    """A command of this project with the presets small."""
    done = subprocess.run([sys.executable, "tests/official.py", script, *map(str, arguments)], cwd=common.ROOT,
                          capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": f"{common.ROOT}:{os.environ.get('PYTHONPATH', '')}"})
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def film(folder, spec, latents, shade):
    """gen.mp4 of a square that wanders, so many latent frames long, and the cameras of one who walks straight on."""
    frames = np.zeros((1 + spec.stride[0] * (latents - 1), 64, 128, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[:, :, shade % 3] = 60 + i
        frame[20:44, 2 * i % 100:2 * i % 100 + 24] = 255 - 20 * shade
    folder.mkdir(parents=True)
    iio.imwrite(folder / "gen.mp4", frames, fps=spec.fps, codec="libx264", macro_block_size=8)
    poses = np.tile(np.eye(4), (len(frames), 1, 1))
    poses[:, 2, 3] = 0.1 * np.arange(len(frames))
    np.save(folder / "poses.npy", poses)
    np.save(folder / "intrinsics.npy", np.tile([[0.9, 0, 0.5], [0, 1.8, 0.5], [0, 0, 1]], (len(frames), 1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", official.TINY)
def test_videos_become_a_world_that_plays(name, tmp_path):
    spec, shards = official.spec_of(name), ["--data", tmp_path / "shards"]
    for shade in range(4):
        film(tmp_path / "videos" / str(shade), spec, 4, shade)
    base = ["--backbone", name, "--codec", official.make_codec(name, tmp_path / "codec")]
    train = [*base, *shards, "--steps", 2, "--batch", 2, "--frames", 4]

    out = run("encode.py", *base, "--videos", tmp_path / "videos", "--caption", "A \"white\" square.", "--out", shards[1])
    assert "4 clips of 4 videos" in out
    run("train_stage1.py", *train, "--init", official.make_checkpoint(name, tmp_path / "official"), "--control", CONTROL[name],
        "--drop", 0.3, "--log_every", 1, "--out", tmp_path / "one")
    run("train_stage2.py", *train, "--teacher", tmp_path / "one" / "teacher.safetensors", "--preview", 0, "--critic_steps", 1,
        "--critic_warmup", 1, "--out", tmp_path / "two")
    for stage, steps in (("one", 2), ("two", 3)):
        lines = [json.loads(line) for line in (tmp_path / stage / "log.jsonl").read_text().splitlines()]
        assert len(lines) == steps and all(np.isfinite(value) for line in lines for value in line.values())

    Image.new("RGB", (100, 90), "teal").save(tmp_path / "start.png")
    drive = [*base, "--weights", tmp_path / "two" / "student.safetensors", "--actions", "w-4, right-3"]
    for start, before in ((["--prompt", "A square."], 2), (["--image", tmp_path / "start.png"], 1),
                          (["--video", tmp_path / "videos" / "0" / "gen.mp4"], 2)):
        out = run("rollout.py", *drive, *start, "--out", tmp_path / "walk.mp4")
        frames = 1 + spec.stride[0] * (before + 7 - 1)
        assert f"walk.mp4: {frames} frames, {frames / spec.fps:.1f} s" in out
        video = iio.imread(tmp_path / "walk.mp4")
        assert video.shape == (frames, 256, 512, 3) and video[0].std() > 1              # enlarged, with keys drawn
    out = run("rollout.py", *drive, "--start", "clip", "--out", tmp_path / "walk.mp4", ok=False)
    assert f"{name} knows no exact world" in out and "Traceback" not in out
    out = run("train_stage1.py", *base, "--steps", 1, "--out", tmp_path / "no", ok=False)
    assert "--data" in out and "Traceback" not in out
