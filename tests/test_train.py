"""What the training scripts feed their losses; stage 2's whole runs: state, its best student, why it stops."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import checkpoint
import common
import dmd
import health
import model
import quant
import qat
import train_stage1 as one
import train_stage2 as two
from control import NO_ACTION, Condition, Control
from flow import schedule
from parallel import Layout
from nvfp4 import EmulatedLinear, fake_quant
from rollout import velocity_of
from weights import save

B, T = 400, 12
SPEC = SimpleNamespace(chunk=4, shift=3.0)
x0 = torch.randn(B, 2, T, 1, 2, generator=torch.Generator().manual_seed(0))
CONDITION = Condition({"text": torch.ones(B, 3, 5)}, Control(torch.full((B, T), 9)))


def test_biases_and_norms_are_not_decayed_and_what_is_frozen_is_not_trained():
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    net[2].requires_grad_(False)
    optimizer = common.adamw(net, 0.1, (0.0, 0.9), torch.device("cpu"), decay=0.5)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)                                                    # decay alone moves anything
    optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.weight"}
    torch.testing.assert_close(net[0].weight, (1 - 0.1 * 0.5) * before["0.weight"])


def test_prefixes_are_clean_at_sigma_zero_and_outside_the_loss():
    torch.manual_seed(0)
    seen = {}

    def velocity(x, sigma, condition):
        seen.update(x=x, sigma=sigma)
        noisy = sigma[:, None, :, None, None] > 0
        exact = (x - x0) / sigma[:, None, :, None, None].clamp_min(1e-9)                # = noise - x0
        return torch.where(noisy, exact, 1e6)                                           # nonsense on the prefix must not count
    loss = one.stage1_loss(velocity, x0, CONDITION, one.Config(), SPEC)
    clean = seen["sigma"] == 0
    assert loss < 1e-4 and torch.equal(seen["x"].transpose(1, 2)[clean], x0.transpose(1, 2)[clean])
    n = clean.sum(1)
    assert (clean == (torch.arange(T) < n[:, None])).all()                              # prefixes, not scattered frames
    assert sorted(n.unique().tolist()) == [0, 4, 8]
    assert abs((n == 0).float().mean() - 0.2) < 0.07 and abs((n == 4).float().mean() - 0.4) < 0.07
    noisy = torch.where(clean, torch.nan, seen["sigma"])
    assert (noisy.nan_to_num(-1).amax(1, keepdim=True) == noisy)[~clean].all()          # one level per clip


def test_stage_1_sees_the_windows_that_rollouts_meet():
    shared, cfg = random.Random(0), one.Config()
    lengths = [one.draw_frames(cfg, 4, shared) for _ in range(4000)]
    assert set(lengths) == {4, 5, 8, 9, 12}
    assert sum(length % 4 for length in lengths) / 4000 == pytest.approx(cfg.i2v, abs=0.03)
    prefixes = {T: set(one.draw_prefix(cfg, 4, 200, T, "cpu").tolist()) for T in set(lengths)}
    assert prefixes == {4: {0}, 5: {1}, 8: {0, 4}, 9: {1, 5}, 12: {0, 4, 8}}


def test_captions_and_actions_are_dropped_together_and_apart():
    torch.manual_seed(0)
    cfg = one.Config(drop=0.2, drop_text=0.1, drop_actions=0.3)
    out = one.drop(CONDITION, {"text": torch.zeros(1, 3, 5)}, cfg)
    no_text, no_actions = (out.text["text"] == 0).all((1, 2)), (out.control.actions == NO_ACTION).all(1)
    assert abs(no_text.float().mean() - 0.3) < 0.07 and abs(no_actions.float().mean() - 0.5) < 0.07
    assert abs((no_text & no_actions).float().mean() - 0.2) < 0.06
    kept = out.control.actions[~no_actions]
    assert (kept[:, 1:] == 9).all() and abs((kept[:, 0] == 0).float().mean() - 0.5) < 0.1
    assert (CONDITION.control.actions == 9).all()                                       # the batch itself is untouched


def test_the_learning_rate_warms_up_and_falls_to_zero():
    cfg = one.Config(steps=1000, warmup=100, lr=1e-3)
    rates = [one.learning_rate(s, cfg) for s in range(1000)]
    assert rates[0] == pytest.approx(1e-5) and max(rates) == pytest.approx(1e-3, rel=0.05) and rates[-1] < 1e-8


def test_the_students_rate_stays_and_then_falls_in_a_line_to_zero(stage2, monkeypatch):
    cfg = two.Config(steps=10, lr=1e-3, cooldown=0.4)
    rates = [1e3 * two.learning_rate(update, cfg) for update in range(10)]
    assert rates == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])
    assert {two.learning_rate(update, two.Config(steps=7)) for update in range(7)} == {two.Config.lr}
    used, descend = [], two.descend
    monkeypatch.setattr(two, "descend", lambda o, clip: used.append([g["lr"] for g in o.param_groups]) or descend(o, clip))
    stage2("falls", "--steps", 2, "--cooldown", 1, "--lr", 1e-3, "--critic_lr", 5e-3, "--critic_warmup", 1)
    assert used == [[5e-3] * 2, [1e-3] * 2, [5e-3] * 2, [5e-4] * 2, [5e-3] * 2]         # the critic's first and always


# ---- Stage 2, whole runs of a very small network ---------------------------------------------------------------------

@pytest.fixture
def stage2(monkeypatch, tmp_path):
    """stage2(name, *flags) runs the script into tmp_path / name and returns what it logged."""
    monkeypatch.setitem(model.PRESETS, "tiny", replace(model.TINY, layers=2, dim=32, heads=2, ffn=48))
    monkeypatch.setattr(two, "setup", lambda: torch.device("cpu"))                      # one thread is enough
    monkeypatch.setattr(two, "curves", lambda folder: None)
    torch.manual_seed(0)
    teacher = model.build("tiny")
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.1)
    save(teacher, tmp_path / "teacher.safetensors")

    def run(name, *flags):
        two.main(common.parse(two.Config, [
            "--out", str(tmp_path / name), "--teacher", str(tmp_path / "teacher.safetensors"), "--batch", "2",
            "--pool", "4", "--critic_warmup", "0", "--critic_steps", "1", "--preview", "0", "--steps", "1",
            *map(str, flags)]))
        return lines(name)

    def lines(name):
        logged = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in logged]
    run.folder, run.lines = tmp_path, lines
    return run


EVERYTHING = ("--tune", "lora", "--rank", 4, "--quant", "nvfp4-w4a4", "--gan", 0.1, "--teacher_fkl", 0.1, "--real_fkl", 0.1, "--sft", 0.1,
              "--accumulate", 2, "--past", 8, "--frames", 32, "--grow", 1, "--short", 0.1, "--cooldown", 1)


@pytest.mark.parametrize("flags", [EVERYTHING, ("--gan", 0.1, "--no-complete", "--history", "framepack", "--past", 12,
                                                "--quant", "nvfp4")], ids=["lora, all", "full, GAN, memory, 4 bits"])
def test_a_run_cut_in_two_ends_with_the_bits_of_a_whole_one(stage2, flags, monkeypatch):
    whole = stage2("whole", "--steps", 4, "--save_every", 2, *flags)
    log = checkpoint.Run.log

    def dying(self, step, **metrics):
        if step == 3:
            raise KeyboardInterrupt
        log(self, step, **metrics)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Run, "log", dying)
        with pytest.raises(KeyboardInterrupt):
            stage2("parts", "--steps", 4, "--save_every", 2, *flags)
    assert len(stage2.lines("parts")) == 3                                              # one line is to be made again
    assert stage2("parts", "--steps", 4, "--save_every", 2, *flags) == whole
    for file in {"student", "adapter"} if "lora" in flags else {"student"}:
        a, b = (load_file(stage2.folder / name / f"{file}.safetensors") for name in ("whole", "parts"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert {"dmd", "gan", "gan_critic", "head_norm", "motion", "saturation", "std", "quant_snr"} <= whole[-1].keys()
    assert any(k.startswith("critic_0.") for k in whole[-1])
    assert whole[-1]["student_updates"] == whole[-1]["critic_updates"] == 4
    assert whole[-1]["rollouts"] == (8 if "--accumulate" in flags else 4)


def test_adapters_and_full_tuning_agree_at_the_first_step(stage2):
    full, lora = (stage2(tune, "--tune", tune, "--lr", 0.01, "--ema", 0.5)[0] for tune in ("full", "lora"))
    for name in ("dmd", "dmd_gradient", "critic", "std", "motion"):                     # all from before any update
        assert full[name] == lora[name], name
    before = load_file(stage2.folder / "teacher.safetensors")
    for tune in ("full", "lora"):                                                       # and both have learnt by its end
        after = load_file(stage2.folder / tune / "student.safetensors")
        assert after.keys() == before.keys()
        assert not torch.equal(after["blocks.0.self_attn.o.weight"], before["blocks.0.self_attn.o.weight"])


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("quant", ["nvfp4", "nvfp4-w4a4"])
def test_the_rounding_is_the_students_alone(stage2, tune, quant):
    """Teacher and critic begin as the checkpoint is; the student as its rounding, its gradient reaches full weights."""
    file = stage2.folder / "teacher.safetensors"
    cfg = two.Config(teacher=str(file), tune=tune, quant=quant, rank=4)
    nets, _, learning, _ = two.networks(cfg, Layout(torch.device("cpu")), torch.device("cpu"))
    plain, x, sigma = model.load("tiny", file), torch.randn(2, 24, 4, 8, 12), torch.full((2, 4), 0.5)
    rounded = qat.apply(model.load("tiny", file), quant)
    condition = Condition({"text": torch.ones(2, 3, 64)}, Control(torch.ones(2, 4, dtype=torch.long)))
    expected = velocity_of(plain)(x, sigma, condition)
    for net in (nets.teacher, nets.critic, nets.exact):
        assert torch.equal(net(x, sigma, condition), expected)
    student = nets.student(x, sigma, condition)
    assert torch.equal(student, velocity_of(rounded)(x, sigma, condition)) and not torch.allclose(student, expected)
    student.square().sum().backward()
    linear = "blocks.0.ffn.0" + (".lora_B" if tune == "lora" else "") + ".weight"
    weight = learning["student"].get_parameter(linear)
    assert weight.grad.abs().sum() > 0 and weight.dtype == torch.float32


def test_a_rounded_student_learns_is_judged_rounded_and_saved_whole(stage2, monkeypatch):
    judged = {}

    def table(folder, coder, rows, *rest):
        judged.update({row.name: any(isinstance(m, EmulatedLinear) and m.quantized for m in row.model.modules())
                       for row in rows})
    monkeypatch.setattr(two, "load_probe", lambda device: None)
    monkeypatch.setattr(two, "side_by_side", lambda *rest: None)
    monkeypatch.setattr(two, "final_table", table)
    for tune in ("full", "lora"):
        logged = stage2(tune, "--quant", "nvfp4", "--tune", tune, "--steps", 2, "--lr", 1e-2, "--preview", 2)
        assert logged[0]["quant"] > 0 and 10 < logged[0]["quant_snr"] < 60
        assert list(judged.values()) == [False, False, True]                            # teacher, teacher, student
        weights = load_file(stage2.folder / tune / "student.safetensors")
        w = weights["blocks.0.ffn.0.weight"].float()
        assert not torch.equal(w, load_file(stage2.folder / "teacher.safetensors")["blocks.0.ffn.0.weight"].float())
        assert not torch.equal(w, fake_quant(w)) and not any("scale" in key for key in weights)


def test_the_imitation_can_be_left_out_and_takes_both_forms(stage2):
    plain, none = (stage2(name, "--quant", "nvfp4", *flags) for name, flags in (("a", ()), ("b", ("--quant_loss", 0))))
    assert "quant" in plain[0] and "quant" not in none[0]
    kl = stage2("c", "--quant", "nvfp4", "--quant_softmax")
    assert kl[0]["quant_snr"] == plain[0]["quant_snr"] and kl[0]["quant"] != plain[0]["quant"]


@pytest.mark.parametrize("script", [one, two])
def test_fp8_without_its_hardware_ends_with_one_line(script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="mode fp8 cannot run here: no NVIDIA GPU is visible") as stop:
        script.main(common.parse(script.Config, ["--quant", "fp8", "--out", str(tmp_path / "run")]))
    assert "\n" not in stop.value.code and not (tmp_path / "run").exists()


def test_control_learns_on_a_frozen_base_in_8_bits(monkeypatch, tmp_path):
    """The base keeps its full weights, as the file of --init fills them after the pass and the teacher is saved of them."""
    monkeypatch.setattr(quant, "unavailable", lambda mode: "")                          # the reference of fp8.product runs
    flags = "--init assets/tiny-stage1.safetensors --train control --control adaln+prope --init_partial --batch 1 --frames 8 --pool 2"
    one.main(common.parse(one.Config, [*flags.split(), "--steps", "1", "--quant", "fp8", "--out", str(tmp_path)]))
    weights, before = load_file(tmp_path / "teacher.safetensors"), load_file("assets/tiny-stage1.safetensors")
    assert torch.equal(weights["blocks.3.ffn.0.weight"], before["blocks.3.ffn.0.weight"])
    assert not any("scale" in key for key in weights)


def test_exit_steps_of_dmd_and_of_the_forward_kl_never_coincide(stage2, monkeypatch):
    exits, levels, rolled, kl = [], [], two.self_rollout, dmd.teacher_fkl_loss
    monkeypatch.setattr(two, "self_rollout", lambda *a: exits.append(a[7]) or rolled(*a))
    monkeypatch.setattr(dmd, "teacher_fkl_loss", lambda *a: levels.append(a[5]) or kl(*a))
    stage2("with", "--teacher_fkl", 0.1, "--steps", 10, "--denoise", 3)
    sigmas = schedule(3, model.TINY.shift)
    assert set(exits) == {1, 2} and len(levels) == 10
    for l in levels:                                                                    # the student's step 0
        assert l[0] == sigmas[0] and l[-1] == pytest.approx(sigmas[1], abs=1e-12)
    exits.clear()
    stage2("without", "--steps", 10, "--denoise", 3)
    assert set(exits) == {0, 1, 2}


def test_the_curriculum_starts_with_one_chunk_and_adds_one_at_a_time(stage2, monkeypatch):
    frames, rolled = [], two.self_rollout
    monkeypatch.setattr(two, "self_rollout", lambda *a: frames.append(a[3].frames) or rolled(*a))
    stage2("run", "--grow", 2, "--t2v", 1, "--i2v", 0, "--steps", 7, "--critic_warmup", 1)
    assert frames == [4, 4, 4, 8, 8, 12, 12, 12]                                        # the first: the critic's alone


@pytest.mark.parametrize("start", ["--t2v", "--i2v"])
def test_a_start_without_a_past_is_told_no_motion_into_its_first_frame(stage2, monkeypatch, start):
    first, rolled = [], two.self_rollout
    monkeypatch.setattr(two, "self_rollout", lambda *a: first.append(a[1].control.actions[:, 0]) or rolled(*a))
    stage2("still", "--t2v", "0", "--i2v", "0", start, "1", "--batch", "8")
    assert first and not torch.cat(first).any()


def test_the_critic_learns_alone_at_first_and_more_often_after(stage2):
    logged = stage2("run", "--steps", 2, "--critic_warmup", 2, "--critic_steps", 3)
    assert [line["student_updates"] for line in logged] == [0, 0, 1, 2]
    assert [line["critic_updates"] for line in logged] == [3, 6, 9, 12]
    assert ["dmd" in line for line in logged] == [False, False, True, True]


def test_the_best_student_is_kept_besides_the_last(stage2, monkeypatch):
    scores = {1: 3.0, 2: 1.0, 3: 2.0}
    monkeypatch.setattr(two, "load_probe", lambda device: None)
    monkeypatch.setattr(two, "side_by_side", lambda path, *rest: path.write_text("video"))
    monkeypatch.setattr(two, "final_table", lambda *rest: None)
    monkeypatch.setattr(two, "figures", lambda *rest: {
        "val_frechet": scores[len(list(stage2.folder.glob("run/validation*.mp4"))) + 1]})
    logged = stage2("run", "--steps", 3, "--validate", 1, "--preview", 2)
    assert [line["val_frechet"] for line in logged] == [3.0, 1.0, 2.0]
    headers = {}
    for name, place in (("best", "run/best"), ("last", "run")):
        with safe_open(stage2.folder / place / "student.safetensors", "pt") as file:
            headers[name] = file.metadata()["updates"]
    assert headers == {"best": "2", "last": "3"}
    assert [p.name for p in (stage2.folder / "run" / "best").glob("checkpoint-*")] == ["checkpoint-00000002"]


@pytest.mark.parametrize("bad", [900.0, float("nan")])
def test_a_student_unlike_the_data_is_a_warning_and_then_a_stop_with_all_saved(stage2, monkeypatch, capsys, bad):
    compare, calls = two.compare, []

    def sick(*args):
        calls.append(args)
        return compare(*args) | ({("made", "saturation"): torch.tensor(bad)} if len(calls) > 3 else {})
    monkeypatch.setattr(two, "compare", sick)
    monkeypatch.setattr(health, "MADE_STEPS", 2)
    monkeypatch.setattr(health, "SPREAD_FLOOR", 1.0)                                    # this network is not a good one
    with pytest.raises(SystemExit, match="for 2 updates .* unlike real data: saturation .* real data .* --health 0"):
        stage2("run", "--steps", 9, "--patience", 2, "--save_every", 9)
    assert "warning, update 4: saturation" in capsys.readouterr().out
    assert len(stage2.lines("run")) == 5                                                # three well, two ill
    assert {"checkpoint-00000005", "student.safetensors"} <= {path.name for path in (stage2.folder / "run").iterdir()}
    with pytest.raises(SystemExit, match="for 2 updates"):                              # the judgement was saved too
        stage2("run", "--steps", 9, "--patience", 2, "--save_every", 9)
    assert len(stage2.lines("run")) == 6                                                # so that one more is enough
    monkeypatch.setattr(two, "compare", compare)
    assert len(stage2("run", "--steps", 8, "--patience", 2, "--save_every", 9, "--health", 0)) == 8


def test_random_weights_of_a_backbone_without_codec_run_the_same_loop(stage2, monkeypatch):
    monkeypatch.setitem(model.PRESETS, "wan2.1-1.3b", replace(
        model.WAN21, layers=1, dim=24, heads=2, ffn=32, size=(5, 32, 32), text_dim=16, text_len=8))
    logged = stage2("run", "--backbone", "wan2.1-1.3b", "--teacher", "random", "--frames", 20, "--t2v", 1, "--i2v", 0,
                    "--tune", "lora", "--recompute")
    assert logged[0]["student_updates"] == 1 and logged[0]["critic"] > 0
    assert not list(stage2.folder.glob("run/*.safetensors"))                            # noise is not worth a file
