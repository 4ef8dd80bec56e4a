"""The shipped commands at tiny sizes, in real processes; bad input; interruption; two processes."""

import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import checkpoint
import common
import evaluate
import networks
import play
import rollout
import reproduce
import train_causal
import train_stage1
import train_stage2

ROOT = Path(common.__file__).parent
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone"]
STAGE1 = ["--steps", "4", "--batch", "2", "--pool", "4", "--frames", "8", "--save_every", "2", "--log_every", "1"]
STAGE2 = ["--steps", "3", "--batch", "1", "--pool", "4", "--frames", "8", "--save_every", "2", "--critic_steps", "2",
          "--critic_warmup", "1", "--preview", "0"]


def run(*command, ok=True, timeout=240):
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"})
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def stage1(out, *flags):
    return common.parse(train_stage1.Config, [*STAGE1, "--out", str(out), *flags])


def stage2(out, *flags):
    return common.parse(train_stage2.Config, [*STAGE2, "--out", str(out), *flags])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole run of both stages under torchrun, from the teacher that stage 1 made."""
    folder = tmp_path_factory.mktemp("runs")
    run(*TORCHRUN, "train_stage1.py", *STAGE1, "--out", folder / "one")
    run(*TORCHRUN, "train_stage2.py", *STAGE2, "--out", folder / "two", "--teacher", folder / "one" / "teacher.safetensors")
    return folder


def test_run_folders_are_complete(trained):
    for name, weights in (("one", "teacher"), ("two", "student")):
        folder = trained / name
        config = json.loads((folder / "config.json").read_text())
        assert config["settings"]["out"] == str(folder) and {"commit", "torch", "device"} <= config.keys()
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(4))
        with safe_open(folder / f"{weights}.safetensors", "pt") as file:
            assert file.metadata()["backbone"] == "tiny" and file.metadata()["commit"] == config["commit"]
            assert file.get_tensor("head.head.weight").dtype == torch.bfloat16
        assert [path.name[-1] for path in sorted(folder.glob("checkpoint-*"))] == ["2", "4"]    # --keep 2
    assert (trained / "two" / "curves.png").stat().st_size > 10_000
    assert lines[-1]["student_updates"] == 3 and lines[-1]["critic_updates"] == 8


def test_evaluate_and_rollout_commands(trained):
    student, teacher = trained / "two" / "student.safetensors", trained / "one" / "teacher.safetensors"
    out = run(sys.executable, "evaluate.py", "--clips", 2, "--seconds", 1, "--teacher_steps", 1, "--student", student, "--teacher", teacher,
              "--quant", "packed", "--out", trained / "figures.json")
    assert "student, 4 steps" in out and "real video" in out
    figures = json.loads((trained / "figures.json").read_text())["seeds"][0]
    assert {"real video", "copy the last frame", "student, 4 steps", "teacher, 4 steps"} <= figures.keys()
    for start, suffix in (("frame", "mp4"), ("dream", "gif")):
        run(sys.executable, "rollout.py", "--weights", student, "--actions", "w-3, w+right-2", "--start", start, "--steps", 2,
            "--out", trained / f"walk.{suffix}")
    import imageio.v3 as iio
    assert iio.imread(trained / "walk.mp4").shape == (6, 256, 384, 3)                 # one start frame and five actions


def interrupt(monkeypatch, module, step):
    """Make a training script die just before it logs `step`."""
    log = checkpoint.Run.log

    def dying(self, now, **metrics):
        if now == step:
            raise KeyboardInterrupt
        log(self, now, **metrics)
    monkeypatch.setattr(checkpoint.Run, "log", dying)


def losses(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("module, config, weights", [(train_stage1, stage1, "teacher"), (train_stage2, stage2, "student")])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(trained, tmp_path, monkeypatch, module, config, weights):
    flags = ["--teacher", str(trained / "one" / "teacher.safetensors")] if module is train_stage2 else []
    module.main(config(tmp_path / "whole", *flags))
    with monkeypatch.context() as patch:
        interrupt(patch, module, 3)
        with pytest.raises(KeyboardInterrupt):
            module.main(config(tmp_path / "parts", *flags))
    module.main(config(tmp_path / "parts", *flags))
    whole, parts = (load_file(tmp_path / name / f"{weights}.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_a_run_folder_is_not_continued_with_other_settings(tmp_path):
    train_stage1.main(stage1(tmp_path))
    with pytest.raises(SystemExit, match="other settings .--seed 0 -> 1.; choose another --out"):
        train_stage1.main(stage1(tmp_path, "--seed", "1"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "processes": 2}))
    with pytest.raises(SystemExit, match="processes 2 -> 1"):
        train_stage1.main(stage1(tmp_path))


def test_a_half_written_checkpoint_is_not_used(trained, tmp_path):
    train_stage1.main(stage1(tmp_path))
    partial = tmp_path / "checkpoint-00000009.partial"
    partial.mkdir()
    (partial / "junk").write_text("half")
    train_stage1.main(stage1(tmp_path))                                         # complete: nothing left to do, no error
    assert len(losses(tmp_path)) == 4


def test_two_processes_average_their_gradients(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import torch, common, faults\n"
        "common.setup()\n"
        "layer = torch.nn.Linear(3, 1, bias=False); layer.weight.data.zero_()\n"
        "opt = torch.optim.SGD(layer.parameters(), 1.0)\n"
        "(layer.weight * (common.rank() + 1)).sum().backward()\n"
        "norm = common.descend(opt, 100.0)\n"
        "assert torch.allclose(layer.weight, torch.full((1, 3), -1.5)), layer.weight\n"
        "assert abs(float(norm) - 1.5 * 3 ** 0.5) < 1e-6\n"
        "assert common.mean_over_ranks({'x': common.rank()}) == {'x': 0.5}\n"
        "layer.weight.grad = torch.full((1, 3), float('nan') if common.rank() else 0.0)\n"
        "assert common.descend(opt, 1.0).isnan(), 'a NaN on one rank must be seen on both'\n"
        "assert torch.allclose(layer.weight, torch.full((1, 3), -1.5)) and layer.weight.grad is None\n"
        "faults.SIGNALS.install(); faults.SIGNALS.restore(); common.shutdown()\n"
        "import gc, os; gc.collect()\n"
        "left = [open(f'/proc/self/task/{t}/comm').read() for t in os.listdir('/proc/self/task')]\n"
        "assert not any('gloo' in name for name in left), 'a thread that outlives the interpreter may abort it'\n")
    run(*TORCHRUN, "--nproc_per_node", 2, script)


def test_two_processes_train(trained, tmp_path):
    run(*TORCHRUN, "--nproc_per_node", 2, "train_stage2.py", *STAGE2, "--out", tmp_path / "run", "--teacher",
        trained / "one" / "teacher.safetensors", "--tune", "lora", "--gan", 0.01)
    assert len(losses(tmp_path / "run")) == 4


BAD = [("train_stage1.py", ["--stepz", "3"], "--stepz"), ("train_stage1.py", ["--step", "3"], "--step"),
       ("train_stage1.py", ["--steps", "0"], "--steps must be above 0"), ("train_stage1.py", ["--frames", "-4"], "--frames"),
       ("train_stage1.py", ["--batch", "two"], "--batch"), ("train_stage1.py", ["--backbone", "wan3"], "unknown backbone 'wan3'"),
       ("train_stage2.py", ["--sigma_low", "0.99"], "--sigma_low"), ("train_stage2.py", ["--frames", "7"], "--frames"),
       ("train_stage2.py", ["--quant", "int4"], "--quant is none or nvfp4 or nvfp4-w4a4 or fp8, got 'int4'"),
       ("train_stage1.py", ["--quant", "nvfp4"], "--quant is none or fp8"), ("evaluate.py", ["--quant", "int4"], "packed or te"),
       ("train_stage2.py", ["--quant_loss", "-1"], "--quant_loss must not"),
       ("train_stage2.py", ["--tune", "half"], "--tune is full or lora"), ("train_stage2.py", ["--gan", "-1"], "--gan must not"),
       ("train_stage2.py", ["--teacher_fkl", "1", "--denoise", "1"], "--denoise 2"),
       ("train_stage2.py", ["--teacher", "random"], "--preview 0"), ("train_stage2.py", ["--cooldown", "2"], "--cooldown 2.0"),
       ("train_stage2.py", ["--teacher", "/nowhere.safetensors"], "/nowhere.safetensors does not exist"),
       ("train_stage2.py", ["--teacher", "README.md"], "not a complete safetensors file"),
       ("train_stage2.py", ["--out", "/proc/nothing"], "cannot write to --out /proc/nothing"),
       ("rollout.py", ["--actions", "w-3, q-2"], "column 6"), ("rollout.py", ["--out", "walk.txt"], ".mp4 or .gif"),
       ("rollout.py", ["--weights", "/gone.safetensors"], "/gone.safetensors"), ("rollout.py", ["--steps", "0"], "--steps"),
       ("rollout.py", ["--out", "/proc/walk.mp4"], "/proc/walk.mp4"),
       ("evaluate.py", ["--student", "/gone.safetensors"], "/gone.safetensors does not exist"),
       ("evaluate.py", ["--clips", "0"], "--clips must be above 0"), ("evaluate.py", ["--dreams", "1"], "2 or more"),
       ("reproduce.py", ["10"], "1, 2, 3, 4, 5, 6, 7, 8, 9, all or report"), ("reproduce.py", ["3", "--row", "x"], "no row 'x'"),
       ("train_causal.py", ["--forcing", "-1"], "--forcing"), ("rollout.py", ["--map", "7"], "0..3"), ("rollout.py", ["--image", "/gone.png"], "/gone.png"),
       ("rollout.py", ["--image", "assets/play.png", "--truth"], "no --image")]


@pytest.mark.parametrize("script, flags, words", BAD, ids=[f"{s} {' '.join(f)}" for s, f, _ in BAD])
def test_bad_input_is_one_line_that_names_it(script, flags, words, monkeypatch, capsys, tmp_path):
    import importlib
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        module.main(common.parse(module.Config))
    message = capsys.readouterr().err + (stop.value.code if isinstance(stop.value.code, str) else "")
    assert stop.value.code not in (0, None)
    assert words in message and message.strip().count("\n") == 0, message


def test_a_checkpoint_of_another_preset_is_refused(trained, tmp_path, monkeypatch, capsys):
    done = run(*TORCHRUN, "train_stage2.py", "--backbone", "small", "--teacher", trained / "one" / "teacher.safetensors", "--out",
               tmp_path, ok=False)
    assert "was made for the backbone tiny, not small; give --backbone tiny" in done
    assert not list(tmp_path.iterdir())                                                 # before anything was written


@pytest.mark.parametrize("module", [train_stage1, train_stage2, train_causal, evaluate, reproduce, rollout, play])
def test_every_setting_is_read_and_there_are_not_too_many(module):
    assert len(module.Config.__dataclass_fields__) <= 53
    source = Path(module.__file__).read_text() + inspect.getsource(networks) * (module is train_stage2)
    for field in module.Config.__dataclass_fields__:
        assert re.search(rf"cfg\.{field}\b", source), f"{module.__name__}.Config.{field} is read nowhere"


@pytest.mark.parametrize("flags", [[], ["--seed", "7", "--truth", "--prompt", "a b"], ["--steps", "9", "--guidance", "2.5", "--ode"]])
def test_a_command_line_can_be_told_from_its_settings(flags):
    config = common.parse(rollout.Config, flags)
    assert common.parse(rollout.Config, common.command_line(config)) == config
    assert common.command_line(play.Config(browser=False)) == ["--no-browser"]
    assert set(common.command_line(config)) == set(flags)


@pytest.mark.parametrize("command", ["control.py w-2,w+right-3", "model.py wan2.1-1.3b"])
def test_small_commands(command):
    assert run(sys.executable, *command.split())


def test_readme_snippet_and_driving_with_truth(tmp_path):
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    names = {}
    exec(snippet, names)
    assert names["frames"].shape == (12, 64, 96, 3)
    run(sys.executable, "rollout.py", "--truth", "--actions", "w-4", "--out", tmp_path / "truth.gif")
    assert (tmp_path / "truth.gif").stat().st_size > 10_000


def test_a_damaged_checkpoint_and_a_torn_log_line(tmp_path):
    train_stage1.main(stage1(tmp_path))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "los')
    train_stage1.main(stage1(tmp_path))                                                 # the torn line is dropped
    assert len(losses(tmp_path)) == 4
    with pytest.raises(SystemExit, match="already beyond step 2; raise --steps"):
        train_stage1.main(stage1(tmp_path, "--steps", "2"))
    for path in tmp_path.glob("checkpoint-*"):
        (path / ".metadata").write_bytes(b"not a checkpoint")
    with pytest.raises(SystemExit, match="no checkpoint is left: .*checkpoint-00000004 is damaged"):
        train_stage1.main(stage1(tmp_path))


def test_ema_is_the_formula():
    layer = torch.nn.Linear(2, 1, bias=False)
    start = layer.weight.detach().clone()
    ema = common.EMA(layer, 0.9)
    layer.weight.data.add_(1.0)
    ema.update(layer)
    torch.testing.assert_close(ema.average["weight"], start + 0.1)
    ema.update(layer, 0.5)
    torch.testing.assert_close(ema.average["weight"], start + 0.55)


@pytest.mark.slow
def test_the_main_job_within_ten_minutes(tmp_path):
    """The default command: time, and the student between the four-step and the guided teacher on what it prints."""
    begin = time.time()
    run(*TORCHRUN, "train_stage2.py", "--out", tmp_path, timeout=1200)
    assert time.time() - begin < 600
    rows = json.loads((tmp_path / "preview.json").read_text())
    student, teacher = rows["student, 4 steps"], rows["teacher, 4 steps"]
    assert student["frechet"][0] < teacher["frechet"][0]
    assert abs(student["sharpness"][0] - 1) < 0.15 < abs(teacher["sharpness"][0] - 1)
    assert abs(student["motion"][0] - 1) < 0.15 < abs(teacher["motion"][0] - 1)
