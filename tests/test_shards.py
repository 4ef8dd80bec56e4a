"""Shards give back what was put in, name what does not fit, and their batches are functions of (seed, step)."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import common
import data
import shards
import train_stage1
import train_stage2
import world
from control import labels_from_poses, poses_from_labels
from data import ShardStream, open_stream
from encode import codec
from model import PRESETS
from shards import Recording, write_index, write_shard

ROOT, SPEC = Path(common.__file__).parent, PRESETS["tiny"]
HEADER = {"backbone": "tiny", "fps": 8}


def recording(number, frames=10, scene=None, cameras=True, caption=""):
    """Latents whose values say which frame of which clip they are, with labels of their own and true cameras."""
    g = common.generator(number, "test clip")
    actions = torch.randint(81, (frames,), generator=g)
    actions[0] = 0
    c2w = poses_from_labels(actions, 0.2, 7.5)
    x0 = torch.full((24, frames, 8, 12), float(number))
    x0[1] = torch.arange(frames)[:, None, None]
    text = {key: part[0] for key, part in codec("tiny").text([caption]).items()}
    K = torch.eye(3).expand(frames, 3, 3)
    return Recording(f"clip {number}", scene or f"scene {number}", caption, x0, text, actions,
                     *((c2w, K) if cameras else ()))


def make(folder, recordings, size=3, held_out=0.0, **header):
    folder.mkdir(exist_ok=True)
    header = {**HEADER, "codec": codec("tiny").fingerprint(), **header}
    for i in range(0, len(recordings), size):
        write_shard(folder / f"shard-{i // size:05d}.safetensors", header, recordings[i:i + size])
    write_index(folder, held_out)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    frames = (6, 10, 14, 9, 30, 8, 12)
    return make(tmp_path_factory.mktemp("clips"), [recording(i, f) for i, f in enumerate(frames)])


def stream(folder, seed=3, split="train", spec=SPEC, fingerprint=None):
    return ShardStream(folder, spec, fingerprint or codec("tiny").fingerprint(), seed, split=split)


def whereabouts(x0):
    """(clip, first frame) of windows of `recording`."""
    return [(int(x[0, 0, 0, 0]), int(x[1, 0, 0, 0])) for x in x0]


def test_a_window_has_its_own_latents_labels_cameras_and_caption(tmp_path):
    spoken = "a red brick castle"
    clips = [recording(i, 12, caption=spoken if i % 2 else "") for i in range(5)]
    batch = stream(make(tmp_path / "a", clips)).batch(0, 24, 4)
    assert batch.x0.shape == (24, 24, 4, 8, 12) and batch.x0.dtype == torch.float32
    control, texts = batch.condition.control, codec("tiny").text(["", spoken])["text"].bfloat16().float()
    for (clip, start), x0, actions, c2w, text in zip(whereabouts(batch.x0), batch.x0, control.actions, control.c2w,
                                                     batch.condition.text["text"]):
        cut = slice(start, start + 4)
        assert torch.equal(x0, clips[clip].x0[:, cut].bfloat16().float())
        assert torch.equal(actions, clips[clip].actions[cut]) and torch.equal(text, texts[clip % 2])
        true = clips[clip].c2w[cut]
        torch.testing.assert_close(c2w, (true[0].inverse() @ true).float(), atol=1e-5, rtol=0)
        assert torch.equal(labels_from_poses(c2w, 0.2)[1:], actions[1:])


def test_every_window_is_equally_likely_whatever_the_length_of_its_clip(folder):
    counts = {}
    for step in range(40):
        for place in whereabouts(stream(folder).batch(step, 64, 8).x0):
            counts[place] = counts.get(place, 0) + 1
    windows = {(clip, start) for clip, frames in enumerate((6, 10, 14, 9, 30, 8, 12)) for start in range(frames - 7)}
    assert {*counts} == windows and max(counts.values()) < 3 * min(counts.values())     # 41 windows, 62 draws of each


def test_where_a_latent_is_several_frames_windows_begin_with_the_clip(folder):
    places = whereabouts(stream(folder, spec=replace(SPEC, stride=(4, 8, 8))).batch(0, 64, 8).x0)
    assert {start for _, start in places} == {0} and len({*places}) == 6                # all but the clip of 6 frames


def test_a_batch_depends_on_seed_and_step_alone(folder):
    a, b = stream(folder), stream(folder)
    wanted = [a.batch(step, 4, 8).x0 for step in range(4)]
    assert torch.equal(b.batch(3, 4, 8).x0, wanted[3]) and torch.equal(b.batch(1, 4, 8).x0, wanted[1])
    assert not torch.equal(wanted[0], wanted[1])
    assert not torch.equal(stream(folder, seed=4).batch(0, 4, 8).x0, wanted[0])


def test_two_ranks_see_together_what_one_would(folder, monkeypatch):
    whole = stream(folder).batch(5, 8, 6).x0
    monkeypatch.setattr(data, "data_ranks", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(data, "data_rank", lambda: rank)
        assert torch.equal(stream(folder).batch(5, 4, 6).x0, whole[4 * rank:][:4])


def test_scenes_are_held_out_whole(tmp_path):
    folder = make(tmp_path / "a", [recording(i, 8, f"scene {i // 3}") for i in range(18)], held_out=0.3)
    scenes = {split: {clip["scene"] for *_, clip in stream(folder, split=split).clips} for split in ("train", "test")}
    assert len(scenes["test"]) == 2 and len(scenes["train"]) == 4 and not scenes["test"] & scenes["train"]
    train = {clip for step in range(9) for clip, _ in whereabouts(stream(folder).batch(step, 16, 8).x0)}
    assert {f"scene {clip // 3}" for clip in train} == scenes["train"]
    one = make(tmp_path / "b", [recording(0)], held_out=0.5)                            # no scene to spare
    assert len(stream(one).clips) == 1


def test_shards_of_other_codecs_and_labels_are_refused_by_name(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"codec \[tiny .*\], this run has \[other\]"):
        stream(folder, fingerprint="other")
    mixed = make(tmp_path / "a", [recording(0)])
    other = make(tmp_path / "b", [recording(1)], codec="wan 123")
    shutil.copy(other / "shard-00000.safetensors", mixed / "shard-00001.safetensors")   # folders merge, codecs do not
    write_index(mixed, 0)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors was made with codec \[wan 123\]"):
        stream(mixed)
    monkeypatch.setattr(data, "ACTION_SPEC", "81 actions, yaw first")
    with pytest.raises(ValueError, match=r"actions \[81 actions, .*\], this run has \[81 actions, yaw first\]"):
        stream(folder)


@pytest.mark.parametrize("fields, words", [(dict(fps=30), r"has fps 30, shard-00000.safetensors has 8"),
                                           (dict(size=(6, 12)), r"has latent size \[6, 12\], .* has \[8, 12\]")])
def test_shards_of_other_rates_and_sizes_are_refused_together(tmp_path, fields, words):
    mixed = make(tmp_path / "a", [recording(0)])
    other, size = recording(1), fields.pop("size", (8, 12))
    other = replace(other, x0=other.x0[:, :, :size[0], :size[1]])
    shutil.copy(make(tmp_path / "b", [other], **fields) / "shard-00000.safetensors", mixed / "shard-00001.safetensors")
    write_index(mixed, 0)
    with pytest.raises(ValueError, match=f"shard-00001.safetensors {words}"):
        stream(mixed)


def test_the_fingerprint_follows_the_scale_of_the_latents(monkeypatch):
    import encode
    before = codec("tiny").fingerprint()
    monkeypatch.setattr(encode, "GAIN", encode.GAIN * 1.01)
    assert codec("tiny").fingerprint() != before


def test_damaged_and_missing_shards_are_named(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shard = broken / "shard-00001.safetensors"
    bytes_ = bytearray(shard.read_bytes())
    bytes_[-1] ^= 1                                                                     # one bit
    shard.write_bytes(bytes_)
    with pytest.raises(ValueError, match="shard-00001.safetensors is corrupt: its sha256"):
        stream(broken).batch(0, 64, 6)
    with pytest.raises(ValueError, match="corrupt shards in .*: shard-00001.safetensors"):
        shards.main(broken)
    shard.write_bytes(bytes_[:-10])
    with pytest.raises(ValueError, match="shard-00001.safetensors is missing or not of"):
        stream(broken)
    (broken / "index.jsonl").unlink()
    with pytest.raises(ValueError, match="has no index.jsonl"):
        stream(broken)


def test_a_shard_is_there_completely_or_not_at_all(tmp_path, monkeypatch):
    def torn(tensors, path, metadata):
        Path(path).write_bytes(b"half of a shard")
        raise OSError("No space left on device")

    monkeypatch.setattr(shards, "save_file", torn)
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path / "a", [recording(0)])
    assert not [*(tmp_path / "a").glob("shard-*.safetensors")]


def test_what_training_asks_for_must_be_there(folder):
    with pytest.raises(ValueError, match="has 31 latent frames, the longest has 30"):
        open_stream(str(folder), codec("tiny"), SPEC, 0, 31, 1, 1, 1)
    with pytest.raises(ValueError, match="no clips of the split 'test'"):
        stream(folder, split="test")


def test_clips_without_cameras_take_them_from_nobody_else(tmp_path):
    folder = make(tmp_path / "a", [recording(0), recording(1, cameras=False)])
    control = stream(folder).batch(0, 4, 6).condition.control
    assert control.c2w is None and control.K is None and control.actions.shape == (4, 6)


def test_a_run_gives_clips_without_cameras_those_of_their_labels(tmp_path):
    make(tmp_path / "a", [recording(0), recording(1, cameras=False)])
    control = open_stream(tmp_path / "a", codec("tiny"), SPEC, 0, 6, 1, 1, 1).batch(0, 8, 6).condition.control
    torch.testing.assert_close(control.c2w, poses_from_labels(control.actions, world.STEP, world.ANGLE).float())
    assert torch.equal(control.K, world.K.expand(8, 6, 3, 3)) and control.c2w[:, -1, :3, 3].abs().max() > 0.1


def test_text_states_come_back_with_the_zeros_they_had_and_batch_with_longer_ones(tmp_path):
    long = torch.randn(5, 3, generator=common.generator(0)).bfloat16().float()
    short = torch.cat([long[:2], torch.zeros(2, 3)])                                    # four rows, two of them zeros
    mask = torch.tensor([1, 1, 1, 0, 0, 0])
    clips = [replace(recording(0), caption="long", text={"text": long, "mask": mask}),
             replace(recording(1), caption="short", text={"text": short, "mask": mask[:4]})]
    text = stream(make(tmp_path / "a", clips)).batch(0, 16, 6).condition.text
    assert text["text"].shape == (16, 5, 3) and text["mask"].shape == (16, 6) and text["mask"].dtype == mask.dtype
    assert {tuple(row.flatten().tolist()) for row in text["text"]} == {
        tuple(long.flatten().tolist()), tuple(torch.cat([short, torch.zeros(1, 3)]).flatten().tolist())}


@pytest.mark.slow
def test_training_on_shards_is_the_same_with_an_interruption(folder, tmp_path):
    """Killed after a checkpoint and started again, both stages end with the bits of a run that was not."""
    flags = ["--data", folder, "--batch", 2, "--frames", 8, "--save_every", 2]
    one = ["train_stage1.py", *flags, "--steps", 4, "--log_every", 1]
    weights = [tmp_path / name / "teacher.safetensors" for name in ("whole", "cut")]
    run(*one, "--out", tmp_path / "whole")
    killed = subprocess.Popen(command(*one, "--out", tmp_path / "cut"), cwd=ROOT, stderr=subprocess.DEVNULL)
    while not [*(tmp_path / "cut").glob("checkpoint-????????")]:
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    run(*one, "--out", tmp_path / "cut")
    assert weights[0].read_bytes()[-10_000:] == weights[1].read_bytes()[-10_000:]
    out = run("train_stage2.py", *flags, "--out", tmp_path / "two", "--teacher", weights[0], "--steps", 2,
              "--preview", 0, "--critic_steps", 1, "--critic_warmup", 0)
    lines = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and (tmp_path / "two" / "student.safetensors").exists(), out


def command(*words):
    return [sys.executable, *map(str, words)]


def run(*words):
    done = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_table_of_the_embedded_world_is_not_made_for_other_data():
    with pytest.raises(ValueError, match="with --data say --preview 0"):
        train_stage2.Config(data="somewhere")
    assert train_stage1.Config(data="somewhere").data == "somewhere"


def test_both_stages_learn_from_shards_and_never_from_the_embedded_world(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "WorldStream", None)
    flags = ["--data", str(folder), "--batch", "1", "--frames", "8", "--steps", "1", "--out", str(tmp_path / "one")]
    train_stage1.main(common.parse(train_stage1.Config, flags))
    assert (tmp_path / "one" / "teacher.safetensors").exists()
    cfg = train_stage2.Config(data=str(folder), preview=0, frames=16, past=4)
    assert isinstance(train_stage2.data(cfg, SPEC, torch.device("cpu"))[1], ShardStream)
    with pytest.raises(ValueError, match="has 36 latent frames, the longest has 30"):
        train_stage2.data(replace(cfg, past=20), SPEC, torch.device("cpu"))


def test_what_a_probe_reads_is_compared_with_what_was_told(folder, tmp_path):
    import judge
    actions = torch.tensor([[0, 9, 12, 80], [0, 0, 3, 44]])

    class Reader:
        def read(self, video):
            wrong = torch.tensor([[[0, 1], [0, 0], [0, 0]], [[1, 1], [0, 0], [0, 0]]])  # both | translation
            return (torch.stack([actions[:, 1:] // 9, actions[:, 1:] % 9], -1) + wrong) % 9, None

    wanted = {"translation": 0.8333, "rotation": 0.6667, "both": 0.6667}
    assert judge.obeyed(Reader(), torch.zeros(2, 4, 64, 96, 3), actions) == wanted
