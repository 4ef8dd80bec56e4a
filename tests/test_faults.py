"""What can go wrong while training does: kills, signals, damage, full disks, NaN and errors on one rank only.

Processes are forked from this one: no start-up, and each is killed for real. None may hang: 60 s, then the test fails.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import checkpoint
import common
import data
import dmd
import export
import faults
import model
import train_stage1 as one
import train_stage2 as two
from checkpoint import Run, load_checkpoint, save_checkpoint
from control import ACTION_SPEC, Condition
from weights import save

ROOT = Path(common.__file__).parent
FLAGS = {one: ["--batch", "2", "--pool", "2", "--frames", "8", "--save_every", "2", "--log_every", "1", "--steps", "4"],
         two: ["--batch", "1", "--pool", "2", "--frames", "8", "--save_every", "2", "--steps", "3", "--preview", "0",
               "--critic_steps", "2", "--critic_warmup", "2"]}
LORA = ("--tune", "lora", "--rank", "2")


# ---- Processes -------------------------------------------------------------------------------------------------------

class Processes:
    """`work()` in forked processes, which are the ranks of a gloo group when there are several."""

    def __init__(self, folder, work, ranks=1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.files = [folder / f"said-by-{rank}.txt" for rank in range(ranks)]
        self.codes, self.pids = {}, []
        for rank, file in enumerate(self.files):
            if pid := os.fork():
                self.pids.append(pid)
                continue
            code = 99
            try:
                said = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(said, 1)
                os.dup2(said, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                torch.set_num_threads(1)                    # a forked pool of threads would never answer
                torch.cuda.is_available = lambda: False
                work()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else print(stop.code) or 1
            except BaseException:
                traceback.print_exc(file=sys.stdout)
            finally:
                os._exit(code)

    def alive(self):
        return [pid for pid in self.pids if pid not in self.codes]

    def wait(self, timeout=60):
        """Exit codes by rank, minus the signal for who was killed by one."""
        end = time.time() + timeout
        while self.alive():
            for pid in self.alive():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
            if time.time() > end:
                for pid in self.alive():
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                pytest.fail(f"hangs: {self.said()}")
            time.sleep(0.01)
        return [self.codes[pid] for pid in self.pids]

    def said(self):
        return [file.read_text() if file.exists() else "" for file in self.files]


def until(what, timeout=60):
    end = time.time() + timeout
    while not what():
        assert time.time() < end, "waited in vain"
        time.sleep(0.005)


# ---- Runs of a very small network ------------------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch, tmp_path):
    """Both scripts at a size where a step takes milliseconds; the folder has a teacher for stage 2."""
    monkeypatch.setitem(model.PRESETS, "tiny", replace(model.TINY, layers=1, dim=24, heads=2, ffn=32))
    monkeypatch.setattr(two, "curves", lambda folder: None)
    for module in (one, two):
        monkeypatch.setattr(module, "setup", setup)
    torch.manual_seed(0)
    teacher = model.build("tiny")
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.1)
    save(teacher, tmp_path / "teacher.safetensors")
    return tmp_path


def setup():
    """As common.setup, but one thread: the forked ones cannot have more."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        common.setup()
    return torch.device("cpu")


def train(module, out, *flags):
    teacher = ["--teacher", out.parent / "teacher.safetensors"] if module is two else []
    module.main(common.parse(module.Config, [*map(str, [*FLAGS[module], *teacher, "--out", out, *flags])]))


def logged(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def assert_same_run(a, b):
    """Logs, and all tensors of the weights and of the newest checkpoint, are the same bits."""
    assert logged(a) == logged(b)
    files = [sorted(folder.glob("*.safetensors")) for folder in (a, b)]
    assert [f.name for f in files[0]] == [f.name for f in files[1]] != []
    for x, y in zip(*files):
        assert_equal(load_file(x), load_file(y))
    assert checkpoints(a)[-1] == checkpoints(b)[-1]
    assert_equal(*(everything(folder / checkpoints(folder)[-1]) for folder in (a, b)))


def everything(path):
    reader = dcp.FileSystemReader(path)
    metadata = reader.read_metadata()
    state = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in metadata.state_dict_metadata.items()
             if hasattr(m, "size")}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@contextmanager
def interrupted(monkeypatch, owner, name, count, how):
    """Within it call number `count` (from 1) of owner.name first does `how()`."""
    calls, usual = [], getattr(owner, name)

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            how()
        return usual(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        yield
    assert len(calls) >= count


def power_cut():
    raise KeyboardInterrupt("power cut")


def send(number):
    return lambda: os.kill(os.getpid(), number)


# ---- Resume ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [(), (*LORA, "--gan", 0.1)], ids=["full", "lora, GAN"])
def test_stage_2_interrupted_twice_ends_with_the_bits_of_a_whole_run(small, monkeypatch, flags):
    flags = [*flags, "--accumulate", 2, "--steps", 3]
    train(two, small / "whole", *flags)
    with interrupted(monkeypatch, data.WorldStream, "batch", 2, send(signal.SIGTERM)):  # mid-accumulation of step 0
        with pytest.raises(SystemExit) as stop:
            train(two, small / "parts", *flags)
    assert stop.value.code == 143
    assert checkpoints(small / "parts") == ["checkpoint-00000001"]                      # between critic-only steps
    with interrupted(monkeypatch, data.WorldStream, "batch", 6, power_cut):             # mid-accumulation of step 3
        with pytest.raises(KeyboardInterrupt):
            train(two, small / "parts", *flags)
    assert checkpoints(small / "parts")[-1] == "checkpoint-00000002" and len(logged(small / "parts")) == 3
    with interrupted(monkeypatch, two, "critic_gradients", 6, power_cut):               # between its critic updates
        with pytest.raises(KeyboardInterrupt):
            train(two, small / "parts", *flags)
    train(two, small / "parts", *flags)
    assert_same_run(small / "whole", small / "parts")


@pytest.mark.parametrize("flags", [(), pytest.param(("--train", "control"), marks=pytest.mark.slow)], ids=["", "part"])
def test_stage_1_interrupted_twice_ends_with_the_bits_of_a_whole_run(small, monkeypatch, flags):
    flags = [*flags, "--init", small / "teacher.safetensors", "--accumulate", 2]
    train(one, small / "whole", *flags)
    for call, how, error in ((1, send(signal.SIGINT), SystemExit), (3, power_cut, KeyboardInterrupt)):
        with interrupted(monkeypatch, one, "stage1_loss", call, how), pytest.raises(error):
            train(one, small / "parts", *flags)
    train(one, small / "parts", *flags)
    assert_same_run(small / "whole", small / "parts")


def test_settings_that_matter_are_refused_with_a_diff_and_harmless_ones_noted(small, capsys, monkeypatch):
    train(one, small / "run", "--steps", 2)
    before = (small / "run" / "config.json").read_bytes()
    with pytest.raises(SystemExit, match=r"other settings \(--seed 0 -> 1, --lr 0.001 -> 0.1\); choose another --out$"):
        train(one, small / "run", "--seed", 1, "--lr", 0.1)
    with pytest.raises(SystemExit, match=r"\(--batch 2 -> 4\)"):
        train(one, small / "run", "--batch", 4)
    assert (small / "run" / "config.json").read_bytes() == before
    capsys.readouterr()
    train(one, small / "run", "--steps", 3, "--keep", 3)
    assert "goes on with --steps 2 -> 3, --keep 2 -> 3" in capsys.readouterr().out
    config = json.loads((small / "run" / "config.json").read_text())
    (small / "run" / "config.json").write_text(json.dumps(config | {"processes": 2}))
    with pytest.raises(SystemExit, match=r"\(processes 2 -> 1\).*keep the clips per update"):
        train(one, small / "run", "--steps", 4, "--keep", 3)
    train(one, small / "run", "--steps", 4, "--keep", 3, "--batch", 4)                  # 2 x 2 clips are 1 x 4
    assert "--batch 2 -> 4, processes 2 -> 1" in capsys.readouterr().out
    assert checkpoints(small / "run") == [f"checkpoint-0000000{step}" for step in (2, 3, 4)]


def test_weights_that_changed_since_are_refused(small):
    train(two, small / "run", "--steps", 1, "--critic_warmup", 0)
    teacher = model.build("tiny")
    save(teacher, small / "teacher.safetensors")
    with pytest.raises(SystemExit, match="parent [0-9a-f]{64} -> [0-9a-f]{64}"):
        train(two, small / "run", "--steps", 2, "--critic_warmup", 0)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------

def state_of(step):
    """A small state that is a function of `step`, as save_checkpoint takes it."""
    torch.manual_seed(step)
    net = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(net.parameters(), 0.1)
    ema = common.EMA(net, 0.5)
    net(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    ema.update(net)
    return {"net": net}, {"net": optimizer}, {"net": ema}


def numbers(state):
    return {f"{a}.{b}.{c}": v for a, part in checkpoint._state(*state).items() if a != "optimizers"
            for b, values in part.items() for c, v in values.items()} | {
                f"{k}.{c}": v for k, values in checkpoint._state(*state)["optimizers"]["net"]["state"].items()
                for c, v in values.items()}


def load(folder):
    """(step, its state is what was saved at that step)"""
    state = state_of(99)
    step = load_checkpoint(folder, 100, *state)
    assert_equal(numbers(state), numbers(state_of(step)))
    return step


def kill_at(folder, n):
    """From now on the process dies just before it touches something in `folder` for the nth time."""
    seen, fsync = [], os.fsync

    def touch(*args):
        if any(isinstance(x, str | Path) and str(folder) in str(x) for x in args):
            seen.append(1)
            if len(seen) > n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(lambda event, args: touch(*args))                                  # open, rename, mkdir, remove
    os.fsync = lambda handle: (touch(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))


@pytest.mark.parametrize("keep", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_9_at_each_point_of_a_save_leaves_a_complete_checkpoint(tmp_path, keep):
    def work():
        kill_at(folder, n)
        save_checkpoint(folder, 3, *state_of(3), keep=keep)
    n, found = 0, []
    (tmp_path / "before").mkdir()
    for step in range(1, keep + 1):
        save_checkpoint(tmp_path / "before", step, *state_of(step), keep=keep)
    while True:
        folder = tmp_path / str(n)
        shutil.copytree(tmp_path / "before", folder)
        code, = Processes(tmp_path, work).wait()
        found.append(load(folder))
        assert code == -signal.SIGKILL or found[-1] == 3
        assert checkpoints(folder)[-1] != "checkpoint-00000003" or found[-1] == 3
        if n % 8 == 0 or code == 0:                                                     # and the next save goes well
            save_checkpoint(folder, 4, *state_of(4), keep=keep)
            assert load(folder) == 4 and len(checkpoints(folder)) == keep
        if code == 0:
            break
        n += 1
    assert n > 20 and found == sorted(found) and set(found) == {keep, 3}                # first the old, then the new


def test_all_is_on_the_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename

    def noted(path, target):
        events.append(("name", target.name))
        return rename(path, target)

    def synced(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", noted)
    save_checkpoint(tmp_path, 1, *state_of(1))
    named = events.index(("name", "checkpoint-00000001"))
    before = {path.name for path in events[:named] if isinstance(path, Path)}
    assert {"__0_0.distcp", ".metadata.tmp", "manifest.json.partial", "checkpoint-00000001.partial"} <= before
    assert tmp_path in events[named:]


def test_a_small_file_has_its_name_once_it_is_on_the_disk_and_then_that_is_too(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda h: events.append(os.readlink(f"/proc/self/fd/{h}")) or fsync(h))
    monkeypatch.setattr(Path, "rename", lambda path, to: events.append(f"name {to}") or rename(path, to))
    common.write_text(tmp_path / "x.json", "new")
    assert events == [f"{tmp_path}/x.json.partial", f"name {tmp_path}/x.json", str(tmp_path)]
    assert (tmp_path / "x.json").read_text() == "new"


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGE = {"flipped byte": (lambda p: flip(p / "__0_0.distcp"), "__0_0.distcp has other bytes"),
          "flipped byte of the index": (lambda p: flip(p / ".metadata"), ".metadata has other bytes"),
          "truncated shard": (lambda p: os.truncate(p / "__0_0.distcp", 100), "__0_0.distcp has 100 bytes, not"),
          "lost shard": (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
          "no manifest": (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
          "torn manifest": (lambda p: os.truncate(p / "manifest.json", 50), "manifest.json is not one")}


@pytest.mark.parametrize("break_it, words", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, break_it, words):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, *state_of(step), keep=3)
    break_it(tmp_path / "checkpoint-00000003")
    assert load(tmp_path) == 2
    said = capsys.readouterr().out
    assert "checkpoint-00000003 is damaged" in said and words in said and "goes on from checkpoint-00000002" in said
    assert checkpoints(tmp_path) == ["checkpoint-00000001", "checkpoint-00000002", "checkpoint-00000003.damaged"]
    save_checkpoint(tmp_path, 4, *state_of(4), keep=1)
    assert load(tmp_path) == 4                                                          # it does not count as one kept
    break_it(tmp_path / "checkpoint-00000004")
    with pytest.raises(OSError, match="no checkpoint is left: .*checkpoint-00000004 is damaged"):
        load(tmp_path)
    assert (tmp_path / "checkpoint-00000004").exists()                                  # no run starts anew by itself


def test_a_checkpoint_of_other_networks_is_no_damage(tmp_path):
    save_checkpoint(tmp_path, 1, *state_of(1))
    other = nn.Linear(8, 9)
    with pytest.raises(ValueError, match="does not fit these networks"):
        load_checkpoint(tmp_path, 9, {"net": other}, {"net": torch.optim.AdamW(other.parameters())}, {})


def sharded(step, shard):
    """`state_of` for a network of two layers and one that is whole on every rank, the first sharded over all ranks."""
    torch.manual_seed(step)
    net, whole = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), nn.Linear(3, 3)
    data = torch.randn(5, 8)
    if shard:
        from torch.distributed.fsdp import fully_shard
        for layer in [*net, net]:
            fully_shard(layer)
    optimizers = {"net": torch.optim.AdamW(net.parameters(), 0.1), "whole": torch.optim.AdamW(whole.parameters(), 0.1)}
    ema = common.EMA(net, 0.5)
    if step:
        whole(net(data)).square().mean().backward()
        for optimizer in optimizers.values():
            optimizer.step()
        ema.average = {k: v * 2 for k, v in ema.average.items()}
    return {"net": net, "whole": whole, "finite": faults.Finite(".", ["net"])}, optimizers, {"net": ema}


def full(state):
    return {k: getattr(v, "full_tensor", lambda: v)() for k, v in flat(state).items()}


def flat(state):
    tree, out = checkpoint._state(*state), {}

    def walk(node, name):
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{name}.{key}")
        elif isinstance(node, torch.Tensor):
            out[name] = node
    walk(tree, "")
    return out


def test_a_checkpoint_moves_from_two_ranks_to_one_and_back(tmp_path):
    def on_two(first):
        common.setup()
        if first:
            state = sharded(1, True)
        else:
            state = sharded(0, True)
            assert load_checkpoint(tmp_path / "b", 9, *state) == 7
        values = full(state)
        if common.rank() == 0:
            torch.save(values, tmp_path / f"values-{first}.pt")
        if first:
            save_checkpoint(tmp_path / "a", 7, *state)
    for name in "ab":
        (tmp_path / name).mkdir()
    assert Processes(tmp_path, lambda: on_two(True), 2).wait() == [0, 0]
    files = json.loads((tmp_path / "a" / "checkpoint-00000007" / "manifest.json").read_text())["files"]
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} == files.keys()                # each rank wrote its part
    state = sharded(0, False)
    assert load_checkpoint(tmp_path / "a", 9, *state) == 7
    wanted = torch.load(tmp_path / "values-True.pt")
    assert_equal(full(state), wanted)
    save_checkpoint(tmp_path / "b", 7, *state)
    two_again = Processes(tmp_path, lambda: on_two(False), 2)
    assert two_again.wait() == [0, 0], two_again.said()
    assert_equal(torch.load(tmp_path / "values-False.pt"), wanted)
    assert len(wanted) > 20


def test_weights_can_be_taken_out_at_any_time(small, monkeypatch):
    for name, module, flags in (("one", one, ()), ("full", two, ()), ("lora", two, LORA)):
        with interrupted(monkeypatch, Run, "log", 3, send(signal.SIGTERM)), pytest.raises(SystemExit):
            train(module, small / name, *flags)
        own = next((small / name).glob("[st][te][ua]*.safetensors"))                    # what the script wrote itself
        export.export(export.Config(str(small / name), str(small / "out.safetensors")))
        assert_equal(load_file(small / "out.safetensors"), load_file(own))
        with safe_open(small / "out.safetensors", "pt") as file, safe_open(own, "pt") as other:
            notes, its = file.metadata(), other.metadata()
        for note in {"stage", "backbone", "parent", "actions", "config", "commit", "seed"}:
            assert notes[note] == its[note] and notes[note], note
        assert notes["actions"] == ACTION_SPEC and notes["step"] == "3" and json.loads(notes["config"])["pool"] == 2
        assert notes["parent"] == ("random" if module is one else common.sha256(small / "teacher.safetensors"))
        if module is two:
            export.export(export.Config(str(small / name), str(small / "critic.safetensors"), "critic"))
            critic = model.load("tiny", small / "critic.safetensors").state_dict()
            assert any(not torch.equal(v, load_file(small / "out.safetensors")[k].float()) for k, v in critic.items())
    with pytest.raises(ValueError, match="stage 2 has no teacher of its own; it began from .*teacher.safetensors"):
        export.export(export.Config(str(small / "lora"), "x", "teacher"))
    with pytest.raises(OSError, match="no run folder"):
        export.export(export.Config(str(small), "x"))
    (small / "causal").mkdir()
    (small / "causal" / "config.json").write_text(json.dumps({"stage": "causal", "settings": {}}))
    with pytest.raises(ValueError, match="is a run of causal, whose .safetensors are all it has"):
        export.export(export.Config(str(small / "causal"), "x"))


# ---- Disks and folders -----------------------------------------------------------------------------------------------

@contextmanager
def full_disk(bytes=2000):
    """No file may grow beyond that: the system refuses to write on, as on a full disk."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_full_disk_on_one_rank_is_an_error_on_both_and_spares_the_checkpoint_before(tmp_path):
    save_checkpoint(tmp_path, 1, *state_of(1))

    @faults.together()
    def work():
        common.setup()
        if common.rank() == 0:
            return save_checkpoint(tmp_path, 2, *state_of(2))
        with full_disk(500):
            save_checkpoint(tmp_path, 2, *state_of(2))
    ranks = Processes(tmp_path, work, 2)
    assert ranks.wait() == [1, 1]
    assert any("checkpoint-00000002 could not be written (File too large)" in said for said in ranks.said())
    assert checkpoints(tmp_path) == ["checkpoint-00000001"] and load(tmp_path) == 1


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device", str(args[0]) if args else None)


def limit(bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def full_log(out, patch):
    (out / "log.jsonl").unlink()
    (out / "log.jsonl").symlink_to("/dev/full")


# A run goes on from its checkpoint of step 2; then, at call n of something, what happens, and what the one line says.
TROUBLE = {
    "disk full, weights": (one, "save_teacher", 1, lambda out, patch: limit(2000), "teacher.safetensors could not be"),
    "disk full, checkpoint": (dcp, "save", 1, lambda out, patch: limit(2000), "4 could .* .File too large"),
    "disk full, log": (Run, "log", 2, full_log, "No space left on device"),
    "disk full, manifest": (checkpoint, "_state", 2, lambda out, patch: patch.setattr(checkpoint, "write_text", no_space),
                            "checkpoint-00000004 could not be written .No space left on device"),
    "data gone": (data.WorldStream, "batch", 2, lambda out, patch: no_space("clips/7.safetensors"), "clips/7.safet")}


@pytest.mark.parametrize("owner, name, count, how, words", TROUBLE.values(), ids=TROUBLE)
def test_a_disk_in_trouble_ends_the_run_with_one_line_and_the_checkpoint_before(
        small, monkeypatch, owner, name, count, how, words):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    train(one, small / "run", "--steps", 2)
    try:
        with interrupted(monkeypatch, owner, name, count, lambda: how(small / "run", monkeypatch)):
            with pytest.raises(SystemExit, match=words) as stop:
                train(one, small / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        monkeypatch.undo()
    assert "\n" not in stop.value.code
    assert checkpoints(small / "run") == ["checkpoint-00000002"]
    assert checkpoint.damage(small / "run" / "checkpoint-00000002") is None


@pytest.mark.parametrize("name", ["save_teacher", "save_checkpoint"])
def test_a_run_folder_that_goes_away_ends_the_run_and_stays_away(small, monkeypatch, name):
    with interrupted(monkeypatch, one, name, 2, lambda: shutil.rmtree(small / "run")):
        with pytest.raises(SystemExit, match="could not be written") as stop:
            train(one, small / "run")
    assert "\n" not in stop.value.code and not (small / "run").exists()


def test_two_runs_in_one_folder(small):
    def hold():
        Run(small / "run", common.parse(one.Config, []), 1)
        (small / "held").touch()
        time.sleep(60)
    first = Processes(small, hold)
    until((small / "held").exists)
    before = (small / "run" / "config.json").read_bytes()
    with pytest.raises(SystemExit, match=f"in use by process {first.pids[0]} on .*; choose another folder"):
        train(one, small / "run", "--steps", 1)
    assert (small / "run" / "config.json").read_bytes() == before
    os.kill(first.pids[0], signal.SIGKILL)
    assert first.wait() == [-signal.SIGKILL]
    train(one, small / "run", "--steps", 1)                                             # the lock died with it


# ---- One rank alone --------------------------------------------------------------------------------------------------

def spoilt(steps, rank=1):
    """WorldStream.batch whose first clip is NaN at these steps on one rank."""
    usual = data.WorldStream.batch

    def batch(self, step, size, frames):
        clips = usual(self, step, size, frames)
        if step in steps and common.rank() == rank:
            clips.x0[0] = torch.nan
        return clips
    return batch


def test_nan_on_one_rank_moves_no_rank_and_is_named(small, monkeypatch):
    monkeypatch.setattr(data.WorldStream, "batch", spoilt({1, 2}))
    ranks = Processes(small, lambda: train(one, small / "run", "--steps", 4, "--save_every", 1, "--keep", 4), 2)
    assert ranks.wait() == [0, 0], ranks.said()
    assert [line["skipped"] for line in logged(small / "run")] == [0, 1, 2, 2]
    before, skipped, after = (everything(small / "run" / f"checkpoint-0000000{step}") for step in (1, 3, 4))
    names = [k for k in before if not k.startswith("modules.finite")]
    assert {k.split(".")[0] for k in names} == {"modules", "averages", "optimizers"}
    assert all(torch.equal(before[k], skipped[k]) for k in names)
    assert not all(torch.equal(before[k], after[k]) for k in names) and all(after[k].isfinite().all() for k in names)
    for rank in (0, 1):
        lines = [json.loads(line) for line in (small / "run" / f"nonfinite-{rank}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
        for line in lines:
            assert len(line["samples"]) == 2 and all(f"rank {rank}" in i for i in line["samples"])
            assert line["not_finite_themselves"] == line["samples"][:rank]              # the first clip of rank 1
            assert (line["loss"] != line["loss"]) == bool(rank)


def test_nan_that_goes_on_ends_both_ranks(small, monkeypatch):
    monkeypatch.setattr(data.WorldStream, "batch", spoilt({2, 3, 4, 5}))
    ranks = Processes(small, lambda: train(one, small / "run", "--steps", 9), 2)
    assert ranks.wait() == [1, 1]
    assert "gradients of model were not finite for 3 updates in a row; they changed no" in "".join(ranks.said())
    assert len(logged(small / "run")) == 4 and checkpoint.damage(small / "run" / checkpoints(small / "run")[-1]) is None


def test_nan_in_stage_2_spares_all_networks_and_the_judgement(small, monkeypatch):
    flags = ["--steps", 4, "--critic_warmup", 0, "--save_every", 1, "--keep", 4, "--gan", 0.1, "--critic_steps", 1,
             "--t2v", 0]
    with monkeypatch.context() as patch:
        patch.setattr(data.WorldStream, "batch", spoilt({2}, 0))
        train(two, small / "run", *flags)
    a, b, c = (everything(small / "run" / f"checkpoint-0000000{step}") for step in (2, 3, 4))
    names = [k for k in a if not k.startswith("modules.finite")]
    assert {k.split(".")[1] for k in names} == {"student", "critic", "head", "health"}
    assert all(torch.equal(a[k], b[k]) for k in names) and not all(torch.equal(b[k], c[k]) for k in names)
    assert [line["skipped"] for line in logged(small / "run")] == [0, 0, 3, 3]          # student, critic, head
    lines = [json.loads(line) for line in (small / "run" / "nonfinite-0.jsonl").read_text().splitlines()]
    assert [line["network"] for line in lines] == ["student", "critic", "head"]
    train(two, small / "run", *flags, "--steps", 5)
    assert logged(small / "run")[-1]["skipped"] == 3                                    # a resumed run knows of them


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_shows_in_every_gradient(bad):
    p = torch.ones(3, requires_grad=True)
    loss = p[0] * 2 + torch.tensor(bad)                                                 # with a finite gradient
    loss.backward(common.alarm(loss))
    assert p.grad[0].isnan() and common.alarm(torch.tensor(3.0)) == 1


@pytest.mark.parametrize("bad", ["dmd", "sft", "critic", ""])
def test_each_loss_of_stage_2_that_is_not_finite_shows_in_its_gradients(monkeypatch, bad):
    def lost(name):
        return torch.tensor(torch.inf if bad == name else 0.0)
    monkeypatch.setattr(dmd, "dmd_loss", lambda t, c, x0, *rest: (x0.sum() + lost("dmd"), {}))
    monkeypatch.setattr(dmd, "sft_loss", lambda student, *rest: student.sum() + lost("sft"))
    monkeypatch.setattr(dmd, "critic_error", lambda critic, *rest: critic.expand(2, 3, 4, 2, 2) + lost("critic"))
    student, critic = (torch.ones((), requires_grad=True) for _ in range(2))
    x = torch.ones(2, 3, 4, 2, 2)
    nets = dmd.Networks(None, student, critic, None, lambda name: nullcontext())
    recipe, mask = dmd.Recipe(1.0, 3.0, 0.02, 0.98, 4, 0, 0, 0, 0.1), torch.ones(2, 4, dtype=torch.bool)
    clip = dmd.Clip(x * student, x, Condition({}), Condition({}), mask)
    dmd.student_gradients(nets, recipe, clip, 4, 4)
    dmd.critic_gradients(nets, recipe, clip._replace(x0=x))
    assert student.grad.isfinite() == (bad not in ("dmd", "sft")) and critic.grad.isfinite() == (bad != "critic")


def test_an_error_on_one_rank_ends_the_other_at_once_with_its_message(small, monkeypatch):
    usual = data.WorldStream.batch

    def batch(self, step, size, frames):
        if step == 1 and common.rank() == 1:
            (small / "failed").touch()
            raise ValueError("clip 7 has 3 actions for 8 frames")
        return usual(self, step, size, frames)
    monkeypatch.setattr(data.WorldStream, "batch", batch)
    ranks = Processes(small, lambda: train(one, small / "run"), 2)
    until((small / "failed").exists)
    begin = time.time()
    assert ranks.wait() == [1, 1] and time.time() - begin < 10
    zero, one_ = ranks.said()
    assert "rank 0: stopped, because of rank 1: ValueError: clip 7 has 3 actions for 8 frames" in zero
    assert "Traceback" not in zero and "Traceback" in one_ and "in batch" in one_


def test_ranks_that_hang_in_a_collective_are_ended_too(tmp_path):
    @faults.together()
    def work():
        common.setup()
        if common.rank() == 1:
            time.sleep(0.3)
            common.fail("nothing to do")
        time.sleep(300)                                 # as in a collective of GPUs, which notices nothing
    ranks = Processes(tmp_path, work, 2)
    assert ranks.wait() == [1, 1]
    zero, one_ = ranks.said()
    assert zero.startswith("rank 0: stopped, because of rank 1") and "error: nothing to do" in zero
    assert "Traceback" not in zero + one_


# ---- Signals ---------------------------------------------------------------------------------------------------------

def steps_logged(folder):
    return len((folder / "log.jsonl").read_text().splitlines()) if (folder / "log.jsonl").exists() else 0


def test_sigterm_to_one_rank_stops_both_at_the_same_step(small):
    flags = ["--steps", 500, "--save_every", 500]
    ranks = Processes(small, lambda: train(one, small / "run", *flags), 2)
    until(lambda: steps_logged(small / "run") > 2)
    os.kill(ranks.pids[1], signal.SIGTERM)
    assert ranks.wait() == [143, 143], ranks.said()
    done = steps_logged(small / "run")
    assert checkpoints(small / "run") == [f"checkpoint-{done:08d}"] and done < 500
    assert f"after step {done} and left, as a signal asked" in ranks.said()[0]


def test_sigusr1_saves_and_goes_on(small, monkeypatch):
    with interrupted(monkeypatch, one, "stage1_loss", 1, send(signal.SIGUSR1)):
        train(one, small / "run", "--steps", 3, "--save_every", 3)
    assert checkpoints(small / "run") == ["checkpoint-00000001", "checkpoint-00000003"]


def test_sigint_twice_leaves_at_once(small, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    monkeypatch.setattr(one, "stage1_loss", lambda *args: twice())
    code, = Processes(small, lambda: train(one, small / "run")).wait(30)
    assert code == -signal.SIGINT and not checkpoints(small / "run")


def test_signals_are_the_usual_ones_outside_of_the_loop(small, monkeypatch):
    def handlers():
        return [signal.getsignal(number) for number in faults.ASKS]
    usual, seen = handlers(), []
    with interrupted(monkeypatch, one, "stage1_loss", 1, lambda: seen.append(handlers())):
        with interrupted(monkeypatch, one, "shutdown", 1, lambda: seen.append(handlers())):     # what follows the loop
            train(one, small / "run", "--steps", 1)
        with interrupted(monkeypatch, one, "save_teacher", 1, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
            train(one, small / "run", "--steps", 2)
    assert seen[0] != usual and seen[1] == usual == handlers()


def cut(small, ranks, rng):
    """Run to the end, with two ends by SIGTERM at random times; exit codes of each start."""
    ends = []
    while not ends or ends[-1] != {0}:
        run = Processes(small, lambda: train(one, small / "cut", "--steps", 8, "--save_every", 3), ranks)
        time.sleep(rng.uniform(0.05, 1.5) * (len(ends) < 2))
        for pid in run.pids * (len(ends) < 2):
            os.kill(pid, signal.SIGTERM)                                                # what torchrun does
        ends.append(set(run.wait()))
        assert ends[-1] <= {0, 143} or -signal.SIGTERM in ends[-1], run.said()          # the last: before the loop
        for path in (small / "cut").glob("checkpoint-????????"):
            assert checkpoint.damage(path) is None
    return ends


@pytest.mark.parametrize("trial", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 20))])
def test_sigterm_at_random_times_loses_nothing(small, trial):
    Processes(small, lambda: train(one, small / "whole", "--steps", 8, "--save_every", 3), 1 + trial % 2).wait()
    print(cut(small, 1 + trial % 2, random.Random(trial)))
    assert_same_run(small / "whole", small / "cut")


TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_leaves(tmp_path):
    command = [*TORCHRUN, "train_stage1.py", *FLAGS[one], "--steps", "5000", "--save_every", "5000", "--out",
               str(tmp_path / "run")]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    try:
        until(lambda: steps_logged(tmp_path / "run") > 2)
        run.send_signal(signal.SIGTERM)
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    done = steps_logged(tmp_path / "run")
    assert checkpoints(tmp_path / "run") == [f"checkpoint-{done:08d}"] and run.returncode != 0
    assert f"after step {done} and left" in said
    assert checkpoint.damage(tmp_path / "run" / f"checkpoint-{done:08d}") is None
