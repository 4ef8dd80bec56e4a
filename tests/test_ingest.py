"""A folder of footage of every kind becomes shards; each kind has one result, and an interruption changes nothing."""

import csv
import hashlib
import json
import os
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
    return common.parse(ingest.Config, ["--videos", str(videos), "--out", str(out), "--label", "9", "--shard", "3", *words])


OK = {"plain", "odd", "turned", "ten-bit", "grey", "wide pixels", "varying", "webm", "faster", "tall", "gone sound"}
KINDS = {           # what is documented in footage.py and ingest.py
    **{f"{name}.mp4": "ok" for name in OK - {"webm"}}, "webm.webm": "ok", "pictures": "ok", "avi.avi": "ok",
    "empty.mp4": "unreadable", "words.mp4": "unreadable", "headless.mp4": "unreadable", "half.mp4": "truncated",
    "cut.mkv": "truncated", "damaged.mp4": "corrupt", "sound.mp4": "no video", "short.mp4": "too short",
    "slow.mp4": "too slow", "pausing.mp4": "too slow", "interlaced.mp4": "interlaced", "hdr.mp4": "high range",
    "little.mp4": "too small", "half a picture": "unreadable", "two sizes": "changing size", "cover.m4v": "no video"}


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
    film(root / "varying.mp4", "96x64", 32, 2, "libx264", "-vf", "select='not(mod(n,4))+not(mod(n,7))'", "-fps_mode", "vfr")
    film(root / "pausing.mp4", "96x64", 8, 4, "libx264", "-vf", "select='lt(n,4)+gt(n,16)'", "-fps_mode", "vfr")
    ffmpeg("-f", "lavfi", "-i", PICTURE.format("96x64", 8, 2), "-f", "lavfi", "-i", "sine=duration=1", "-c:v", "libx264",
           root / "gone sound.mp4")
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
    film(root / "long.mp4", "96x64", 8, 9, "libx264", "-movflags", "faststart")
    whole = (root / "long.mp4").read_bytes()
    (root / "half.mp4").write_bytes(whole[:len(whole) // 2])
    middle = len(whole) * 2 // 3
    (root / "damaged.mp4").write_bytes(whole[:middle] + bytes(400) + whole[middle + 400:])
    film(root / "long.mkv", "96x64", 8, 9)
    whole = (root / "long.mkv").read_bytes()
    (root / "cut.mkv").write_bytes(whole[:len(whole) // 2])
    (root / "long.mp4").unlink(), (root / "long.mkv").unlink()
    for name in ("pictures", "half a picture", "two sizes"):
        (root / name).mkdir()
        for i in range(12):                                     # named without zeros: 10 comes after 9
            Image.new("RGB", (96, 64 + 16 * (name == "two sizes" and i == 7)), (20 * i, 0, 0)).save(root / name / f"{i}.png")
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
