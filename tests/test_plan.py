"""What a step will take: bytes are those of real networks, calls those of the real loop, operations a counter's."""

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import clock
import common
import model
import plan
import tally
import train_stage1 as one
import train_stage2 as two
from clock import GPUS, Network, seconds, times, traffic
from parallel import Layout, checkpoint_blocks
from tally import Job, stage1_calls, stage2_calls, work

CPU, ROOT = torch.device("cpu"), Path(common.__file__).parent
TRAIN = json.loads((ROOT / "results" / "train.json").read_text())
SMALL = replace(model.TINY, layers=2, dim=32, heads=2, ffn=48)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(model.PRESETS, "tiny", SMALL)


def stage2(**fields):
    return two.Config(**{"teacher": "random", "preview": 0, "t2v": 1.0, "i2v": 0.0, **fields})


class Draw:
    """A random.Random that always draws the smallest."""
    random, randrange, randint = lambda self: 0.5, lambda self, a, b=None: 0 if b is None else a, lambda self, a, b: a


# ---- Bytes -----------------------------------------------------------------------------------------------------------

def nbytes(tensors):
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def optimizer_bytes(modules, lr=1e-3):
    """Of AdamW after a step of each of `modules`, and what their gradients take."""
    moments, gradients = 0, []
    for module in modules:
        for p in module.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        gradients.append(nbytes(p.grad for p in module.parameters() if p.grad is not None))
        optimizer = two.adamw(module, lr, (0.0, 0.999), CPU)
        optimizer.step()
        moments += nbytes(t for s in optimizer.state.values() for t in s.values())
    return moments, gradients


@pytest.mark.parametrize("fields", [{}, {"gan": 0.1}, {"tune": "lora", "rank": 4, "gan": 0.1}, {"quant": "nvfp4-w4a4"}],
                         ids=["full", "GAN", "LoRA", "QAT"])
def test_bytes_of_stage_2_are_those_of_its_networks(small, fields):
    cfg = stage2(**fields)
    _, models, learning, _ = two.networks(cfg, Layout(CPU), CPU)
    state = plan.state(cfg, 2, frozen=torch.float32)
    assert state.parameters == nbytes(p for m in (*models, *learning.values()) for p in m.parameters())
    moments, gradients = optimizer_bytes(learning.values())
    assert state.optimizer == moments
    student, *critic = gradients                                                        # they exist in turn
    assert state.gradients == max(student, sum(critic))
    assert state.average == nbytes(common.EMA(learning["student"], 0.9).average.values())


@pytest.mark.parametrize("train", ["all", "control"])
def test_bytes_of_stage_1_are_those_of_its_network(small, train):
    cfg = one.Config(train=train, init="x" if train == "control" else "", control="adaln+plucker")
    net = model.build("tiny", cfg.control)
    for name, p in net.named_parameters():
        p.requires_grad_(train == "all" or name.startswith("control."))
    state, (moments, gradients) = plan.state(cfg, 1), optimizer_bytes([net])
    assert state[:3] == (nbytes(net.parameters()), gradients[0], moments)
    assert state.average == nbytes(common.EMA(net, 0.9).average.values())
    block = nbytes(net.blocks[0].parameters())
    assert state.gathered == state.parameters - SMALL.layers * block + 2 * block


def test_a_frozen_teacher_is_stored_as_it_is_built_on_a_gpu(small):
    full, half = (plan.state(stage2(), 2, frozen=dtype).parameters for dtype in (torch.float32, torch.bfloat16))
    real = [nbytes(model.build_on(CPU, dtype, "tiny", control=SMALL.control).parameters()) for dtype in (torch.float32, torch.bfloat16)]
    assert full - half == real[0] - real[1] > 0


def test_sharding_divides_what_lives_long_and_adds_what_is_gathered():
    job, state = Job(SMALL, [stage1_calls(4)]), plan.State(1000, 400, 800, 400, 300)
    alone = plan.memory(job, state, "full")
    shared = plan.memory(job._replace(gpus=8, shard="fsdp", replicas=2), state, "full")
    for kind in ("weights", "gradients", "AdamW", "average"):
        assert shared[kind] == alone[kind] / 4                                          # two copies, each on four
    assert alone["gathered"] == 0 and shared["gathered"] == 2 * 300                     # weights, then their gradients
    assert plan.memory(job._replace(gpus=8), state, "full") == alone                    # ddp: each has all
    job.tallies[0].alive["model"] = 8, 4                                # two graphs wait: gradients are added up whole
    waits = plan.memory(job._replace(gpus=8, shard="fsdp", replicas=2), state, "full")
    assert waits["gradients"] == 400 and waits["gathered"] == 300
    low = job._replace(gpus=8, shard="fsdp", trains=False)
    assert plan.memory(low, state, "full")["gathered"] == 300
    adapters = plan.memory(low, state._replace(adapters=200), "full")                   # of the 1000: on each GPU
    assert adapters["weights"] == 800 / 8 + 200 and adapters["AdamW"] == 800 and adapters["average"] == 400


@pytest.mark.parametrize("mode, kept, again", [("full", 4, 34), ("selective", 8, 30), ("none", 38, 0)])
def test_activations_by_hand(mode, kept, again):
    """Two graphs wait, of 4 and 8 frames; when the last one is gone, all gradients are there."""
    job, (D, F) = Job(SMALL, [tally.Tally()], batch=3), (SMALL.dim, SMALL.ffn)
    job.tallies[0].alive["student"] = 12, 8
    per = kept * D + (4 * F if mode == "none" else 0)
    graph = lambda frames: 3 * frames * 24 * SMALL.layers * per
    block = 3 * 8 * 24 * (again * D + (2 if mode == "none" else 6) * F)
    for gradients in (10, 10 ** 9):
        found = plan.memory(job, plan.State(0, gradients, 0, 0, 0), mode)
        assert sum(found.values()) == block + max(graph(12), graph(4) + gradients)
    found = plan.memory(job._replace(accumulate=2), plan.State(0, 10, 0, 0, 0), mode)   # gradients of the pass before
    assert sum(found.values()) == block + graph(12) + 10
    halves = plan.memory(job._replace(sequence=2), plan.State(0, 0, 0, 0, 0), mode)
    assert sum(halves.values()) == (block + graph(12)) / 2


@pytest.mark.parametrize("row", [row for row in TRAIN["rows"] if row["who"] == "ours"],
                         ids=lambda row: f"{row['backbone']} {row['how']}")
def test_what_an_h100_measured_is_met(row):
    """Forward and backward of one clip, without an optimizer: peak within 3 %, time within 5 %."""
    spec, mode = model.preset(row["backbone"], size=tuple(row["size"])), row["how"].split()[1]
    job = Job(spec, [stage1_calls(spec.latent_frames(row["size"][0]))])
    state = plan.state(one.Config(backbone=row["backbone"], frames=20), 1)._replace(optimizer=0, average=0)
    assert sum(plan.memory(job, state, mode).values()) / 2 ** 30 == pytest.approx(row["peak_gib"], rel=0.03)
    assert 1000 * seconds(work(job, job.tallies[0], mode)) == pytest.approx(row["ms"], rel=0.05)


def saved(name, mode, rows, layers=1):
    """Bytes of tensors that a compiled block saves, without its weights and what all blocks share (rotary angles)."""
    spec, D = model.preset(name), 64
    torch._dynamo.reset()
    net = model.build(name, None, dim=D, ffn=128, heads=2, layers=layers, freq_dim=32, text_dim=64,
                      rope_dims=(8, 12, 12) if spec.arch == "hunyuan" else ())
    if mode != "none":
        checkpoint_blocks(net, keep_attention=mode == "selective")
    blocks = getattr(net, net.block_list)
    for p in net.parameters():
        nn.init.normal_(p, std=0.02)
    for block in blocks:
        block.compile(dynamic=False, backend="aot_eager_decomp_partition")              # saves what inductor would
    inside, found = [], {}
    blocks[0].register_forward_pre_hook(lambda *a: inside.append(1))
    blocks[-1].register_forward_hook(lambda *a: inside.clear())

    def pack(t):
        if inside:
            found[t.untyped_storage().data_ptr()] = t
        return t
    _, q, r = net.spec.patch
    x = torch.randn(1, net.spec.channels, 2, rows * q, rows * r)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        net(x, torch.full((1, 2), 0.5), {"text": torch.randn(1, 8, 64)})
    return sum(t.untyped_storage().nbytes() for t in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan2.1-1.3b", "hunyuan1.5-8b", "ltx2.3-22b"])
@pytest.mark.parametrize("mode", plan.MODES)
def test_what_compiled_blocks_keep_for_a_token(name, mode):
    """A second block adds the bytes of KEPT; logarithms of attention's sums and rows of norms are less than 5 %."""
    D, F, arch = 64, 128, model.PRESETS[name].arch
    tokens = 2 * (16 ** 2 - 8 ** 2)
    second = [saved(name, mode, rows, 2) - saved(name, mode, rows, 1) for rows in (8, 16)]
    per = plan.KEPT[arch][plan.MODES.index(mode)] * D + 4 * F * (mode == "none")
    assert (second[1] - second[0]) / tokens == pytest.approx(per, rel=0.05)


# ---- What runs -------------------------------------------------------------------------------------------------------

def forwards(found):
    """{(who, frames, gradients asked for): count}"""
    return Counter((call.who, call.frames, "".join(sorted(call.asked))) for call in found.calls)


def test_the_calls_of_an_update_by_hand():
    """Three chunks from nothing: windows of 4, 8, 12 frames, four steps each, one with gradient; then teacher twice
    and critic once on the whole, and five critic updates."""
    found = stage2_calls(stage2(frames=12), model.TINY, Draw())
    assert forwards(found) == {
        **{("student", T, ""): 3 for T in (4, 8, 12)}, **{("student", T, "weights"): 1 for T in (4, 8, 12)},
        ("teacher", 12, ""): 2, ("critic", 12, ""): 1, ("critic", 12, "weights"): 5}
    assert found.alive == {"student": (24, 12), "critic": (12, 12)}                     # three graphs wait for one x0
    assert [call.frames for call in found.calls if call.joins] == [8, 12]


def test_options_add_their_calls():
    plain = forwards(stage2_calls(stage2(frames=12), model.TINY, Draw()))
    extra = lambda **fields: forwards(stage2_calls(stage2(frames=12, **fields), model.TINY, Draw())) - plain
    assert extra(gan=0.1) == {("critic", 12, "x"): 1,                                   # the student's: none learns
                              ("critic", 12, "weights"): 5 * 4}                         # real, made, and both moved
    assert extra(quant="nvfp4") == {("student", 12, "weights"): 1, ("student", 12, ""): 1}
    assert extra(sft=0.1) == {("student", 12, "weights"): 1}
    assert extra(accumulate=2) == plain


def test_the_tally_runs_what_the_script_runs(small, monkeypatch, tmp_path):
    """Frames of every forward of the shipped loop in one update, against the tally of the same settings."""
    monkeypatch.setattr(two, "setup", lambda: CPU)
    monkeypatch.setattr(two, "curves", lambda folder: None)
    seen, forward = Counter(), model.Wan.forward
    monkeypatch.setattr(model.Wan, "forward",
                        lambda self, x, *a, **k: seen.update([x.shape[2]]) or forward(self, x, *a, **k))
    cfg = stage2(out=str(tmp_path), batch=1, pool=2, steps=1, critic_warmup=0, gan=0.1, teacher_fkl=0.1, sft=0.1,
                 frames=12, quant="nvfp4", accumulate=2)
    monkeypatch.setattr(two.random, "Random", lambda seed: Draw())
    two.main(cfg)
    assert seen == Counter(call.frames for call in stage2_calls(cfg, model.PRESETS["tiny"], Draw()).calls)


# ---- Operations ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, passes", [("none", 3), ("selective", 4), ("full", 4)])
def test_operations_agree_with_a_counter(mode, passes):
    """Matrix products of a step. The counter lacks the gradients of inputs, and the ends of a network a second time."""
    net, T = model.build("tiny", None, layers=4), 8
    if mode != "none":
        checkpoint_blocks(net, keep_attention=mode == "selective")
    x, text = torch.randn(2, 24, T, 8, 12), torch.randn(2, 16, 64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(x, torch.full((2, T), 0.5), {"text": text}).square().mean().backward()
    counted = Counter({str(op): n for op, n in counter.get_flop_counts()["Global"].items()})
    attention, linear = counted.pop("aten.bmm"), sum(counted.values())
    job = Job(net.spec, [stage1_calls(T)], batch=2)
    ours, forward = work(job, job.tallies[0], mode), model.flops(net.spec, T, 4, 6)
    assert ours["linear"] == 2 * passes * forward["linear"]
    assert 0.94 * ours["linear"] < linear <= ours["linear"]
    scores = 2 * (forward["self_attention"] + forward["text_attention"])
    assert ours["attention_train"] == 3.5 * scores and ours["attention"] == scores * (mode == "full")
    assert attention == scores * (3 if mode == "none" else 4)           # unfused: two backward products less, none kept


def test_adapters_need_no_gradient_of_the_weights():
    job = Job(model.TINY, [stage1_calls(8)])
    whole, low = (work(job._replace(trains=trains), job.tallies[0], "none") for trains in (True, False))
    assert low["linear"] * 3 == whole["linear"] * 2 and low["attention_train"] == whole["attention_train"]


def test_seconds_are_in_proportion_to_work_and_peak():
    done = {"linear": 1e15, "attention": 0.0, "attention_train": 0.0}
    assert seconds(done, 2 * clock.PEAK) == pytest.approx(seconds(done) / 2)
    assert 1e3 / TRAIN["ceilings"]["matmul"] / seconds(done) == pytest.approx(0.84, abs=0.03)       # of the ceiling


# ---- Time ------------------------------------------------------------------------------------------------------------

TOY = {"model": Network(blocks=800.0, ends=100.0, cast=225, learns=225, tensors=9, steps=1, average=225)}   # of fp32


def asked(*what, frames=4):
    """A tally of one call, of which gradients of `what` were asked for."""
    found = stage1_calls(frames)
    found.calls[0].asked = set(what)
    return found


def test_communication_by_hand():
    """Blocks of 800 bytes: half of them comes to each of two GPUs, forward, backward and as gradients."""
    job = Job(SMALL, [], gpus=2, shard="fsdp")
    assert traffic(job, 800) == (400, 0, 0) and traffic(job, 800, True) == (400, 400, 0)
    assert traffic(job, 800, True, True) == (400, 400, 400)
    copies = job._replace(gpus=4, replicas=2)                                           # and the sum of 400 over both
    assert traffic(copies, 800, True, True) == (400, 400, 400 + 400)

    slow = GPUS["H100 80 GB"]._replace(link=1e-9 / clock.LINK)                          # a byte a second
    took = times(job, TOY, asked("x", "weights"), "full", slow)
    ends = 50 + 50                                                                      # gathered once, reduced once
    assert took["communication"] == pytest.approx(ends + 3 * 400)
    assert took["waiting"] + took["arithmetic"] / 2 == pytest.approx(ends + 3 * 400, rel=1e-3)      # of two blocks one hides
    quick = times(job, TOY, asked("x", "weights"), "full", slow._replace(link=1e6))
    late = (ends + 200 + 200 + 200) / (1e15 * clock.LINK)
    assert quick["waiting"] == pytest.approx(late + clock.SLOWED * (quick["communication"] - late))


def test_a_gpu_by_itself_does_not_communicate():
    for how in ("ddp", "fsdp", "none"):
        took = times(Job(SMALL, [], shard=how), TOY, asked("weights"), "full", GPUS["H200"])
        assert not (took["communication"] or took["waiting"] or took["copies"]) and took["optimizer"] > 0


def test_copies_sum_their_gradients_once_a_step_and_nothing_else():
    """In fp32, through a ring: 2 (W - 1) / W of the bytes; tensor by tensor."""
    job, free = Job(SMALL, [], gpus=4), GPUS["H200"]._replace(memory=1e9)
    took = times(job, TOY, asked("weights"), "full", free)
    assert took["communication"] == pytest.approx(1.5 * 4 * 225 / (clock.LINK * 450e9) + 9 * clock.COLLECTIVE)
    assert took["waiting"] == pytest.approx(took["communication"])


def test_adapters_sum_their_own_gradients_below_a_base_that_is_gathered(small):
    cfg = stage2(tune="lora", rank=4)
    networks = plan.state(cfg, 2, frozen=torch.float32).networks
    net = model.build("tiny", SMALL.control)
    blocks = nbytes(net.blocks.parameters())
    _, _, learning, _ = two.networks(cfg, Layout(CPU), CPU)
    low = [*learning["student"].parameters()]
    for who, found in networks.items():
        assert (found.blocks, found.ends) == (blocks, nbytes(net.parameters()) - blocks)
        assert (4 * found.learns, found.tensors) == ((0, 0) if who == "teacher" else (nbytes(low), len(low)))
    reads = sum((2 if key.endswith("lora_A.weight") else 8) * max(p.shape) for key, p in
                learning["student"].named_parameters())
    assert networks["student"].adapters == networks["critic"].adapters == reads and not networks["teacher"].adapters

    job = Job(SMALL, [], gpus=2, shard="fsdp", trains=False)
    found, gpu = stage2_calls(cfg, SMALL, Draw()), GPUS["H200"]._replace(memory=1e9)
    both, copies = (times(j, networks, found, "full", gpu)["communication"] for j in (job, job._replace(shard="ddp")))
    rounds = len(found.calls) * nbytes(net.parameters()) + sum(bool(call.asked) for call in found.calls) * blocks
    assert both - copies == pytest.approx(rounds / 2 / (clock.LINK * 450e9))
    assert copies == pytest.approx((1 + 5) * (nbytes(low) / (clock.LINK * 450e9) + len(low) * clock.COLLECTIVE))


def test_an_optimizer_step_moves_the_bytes_of_what_learns():
    """A student's step and five of the critic's; the student's gradient is that of three calls, added up whole."""
    networks = {"teacher": Network(), "student": Network(learns=1e9, steps=1, average=1e9),
                "critic": Network(learns=1e9, steps=5)}
    found, gpu = stage2_calls(stage2(frames=12), model.TINY, Draw()), GPUS["H200"]
    took = times(Job(SMALL, []), networks, found, "full", gpu)["optimizer"]
    one = 1e9 / (clock.MEMORY * 4.8e12)
    assert took == pytest.approx(one * (6 * 40 + 12 + 2 * 12))
    shared = times(Job(SMALL, [], gpus=8, shard="fsdp"), networks, found, "full", gpu)["optimizer"]
    assert shared == pytest.approx(one * ((6 * 40 + 12) / 8 + 2 * 12))


def test_what_autocast_casts():
    """Forward, again before its backward, and the gradient back; a call without any once."""
    took = lambda mode, *what: times(Job(SMALL, []), TOY, asked(*what), mode, GPUS["H200"])["casts"]
    one = 6 * 225 / (clock.MEMORY * 4.8e12)
    assert [took("full", "weights"), took("none", "weights"), took("full")] == pytest.approx([3 * one, 2 * one, one])


def test_blocks_that_are_not_compiled_are_slower(capsys):
    job = Job(SMALL, [])
    quick, slow = (times(job._replace(compile=c), TOY, asked("weights"), "full", GPUS["H200"]) for c in (True, False))
    assert slow["arithmetic"] == clock.EAGER * quick["arithmetic"] and clock.EAGER > 1
    assert slow["optimizer"] == quick["optimizer"]
    for flags, words in (([], "blocks compiled"), (["--no-compile"], "blocks not compiled")):
        plan.main("plan", common.parse(plan.Config, ["--backbone", "wan2.1-1.3b", *flags]))
        assert words in capsys.readouterr().out


LORA = {"backbone": "ltx2.3-22b", "tune": "lora", "frames": 12, "critic_steps": 2, "t2v": 1.0}
WAN, TWICE = {"init": "random"}, "Wan2.2-5B, stage 1, 20 latent frames of 704x1280, FSDP, 2 "


@pytest.mark.parametrize("row, script, fields, gpus, shard, compiled, gpu", [
    (TWICE + "GPUs", 1, WAN, 2, "fsdp", True, "H200"), ("the same, 1 GPU", 1, WAN, 1, "none", True, "H200"),
    ("Wan2.2-5B, stage 2, all weights, 12 latent frames, FSDP, 2 GPUs", 2,
     {**LORA, "backbone": "wan2.2-5b", "tune": "full"}, 2, "fsdp", True, "H200"),
    ("LTX-2.3-22B, stage 2, adapters, 12 latent frames, DDP, 2 GPUs", 2, LORA, 2, "ddp", True, "H200"),
    ("the same, 1 GPU, adapters", 2, LORA, 1, "none", True, "H200"),
    ("not compiled, DDP, 2 GPUs, adapters", 2, LORA, 2, "ddp", False, "H200"),
    (TWICE + "H100", 1, WAN, 2, "fsdp", True, "H100 80 GB"),
    ("LTX-2.3-22B, stage 2, adapters, not compiled, FSDP, 2 H100", 2, {**LORA, "frames": 16, "t2v": 0.0}, 2, "fsdp",
     False, "H100 80 GB")])
def test_what_gpus_measured_is_met(row, script, fields, gpus, shard, compiled, gpu):
    """results/sweeps/shards.json: peak within 10 %, time within 25 %; what it calls planned is what the plan says."""
    known = json.loads((ROOT / "results" / "sweeps" / "shards.json").read_text())["rows"][row]
    measured = {name: values[0] for name, values in known.items()}
    cfg = one.Config(backbone="wan2.2-5b", compile=compiled, **fields) if script == 1 else stage2(**fields, compile=compiled)
    spec = model.PRESETS[cfg.backbone]
    found = stage1_calls(20) if script == 1 else stage2_calls(cfg, spec, Draw())
    state = plan.state(cfg, script)
    job = Job(spec, [found], gpus=gpus, shard=shard, trains=script == 1 or cfg.tune == "full", compile=compiled)
    took = times(job, state.networks, found, "selective", GPUS[gpu])
    took = sum(took.values()) - took["communication"]
    peak = sum(plan.memory(job, state, "selective").values()) / 2 ** 30
    assert (took, peak) == (pytest.approx(measured["s a step"], rel=0.25), pytest.approx(measured["peak GiB a GPU"], rel=0.1))
    assert (took, peak) == (pytest.approx(measured["s planned"], rel=0.01), pytest.approx(measured["GiB planned"], rel=0.01))


# ---- Commands --------------------------------------------------------------------------------------------------------

def test_a_dry_run_prints_settings_and_plan_and_allocates_nothing(tmp_path):
    """LTX's 13 billion parameters three times over, on this processor."""
    flags = ["--backbone", "ltx2.3-22b", "--teacher", "random", "--preview", "0", "--frames", "16", "--dry-run"]
    done = subprocess.run([sys.executable, "train_stage2.py", *flags, "--out", str(tmp_path / "run")], cwd=ROOT,
                          text=True, capture_output=True, env={**os.environ, "WORLD_SIZE": "8"}, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "--backbone ltx2.3-22b\n" in done.stdout and "--critic_steps 5\n" in done.stdout
    assert "8 GPUs" in done.stdout and "H200, 139.8 GiB" in done.stdout and "too small" in done.stdout
    assert not list(tmp_path.iterdir()) and resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3e6    # KiB


def test_other_ranks_keep_quiet_and_bad_settings_end_as_ever(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    dry = lambda cfg: plan.dry_run(1, cfg, one.draw_frames)
    with pytest.raises(SystemExit) as stop:
        common.parse(one.Config, ["--dry-run"], dry_run=dry)
    assert not stop.value.code and not capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        common.parse(one.Config, ["--dry-run", "--steps", "0"], dry_run=dry)
    for flags in (["--replicas", "3"], ["--sequence", "4"], ["--shard", "foo"]):        # as the run itself would
        with pytest.raises(SystemExit) as stop:
            common.parse(one.Config, ["--dry-run", *flags], dry_run=dry)
        assert stop.value.code == 2
    assert stop.value.code == 2 and "--steps must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--height", "700"], "--height must be a multiple of 16"), (["--backbone", "wan3"], "unknown backbone 'wan3'"),
    (["--gpus", "3", "--replicas", "2"], "must divide --gpus 3"), (["--tune", "lora"], "--tune lora is for --stage 2"),
    (["--stage", "2", "--tune", "half"], "--tune is full or lora"), (["--quant", "nvfp4"], "--quant is none or fp8")])
def test_bad_input_is_one_line(flags, words, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop, common.one_line_errors():
        plan.main("plan", common.parse(plan.Config, flags))
    message = capsys.readouterr().err + (stop.value.code if isinstance(stop.value.code, str) else "")
    assert words in message and message.strip().count("\n") == 0


def test_the_command_plans_the_clip_that_was_asked_for(capsys):
    flags = "--backbone wan2.1-1.3b --frames 41 --height 240 --width 416 --gpus 2 --shard fsdp"
    plan.main("plan", common.parse(plan.Config, flags.split()))
    printed = capsys.readouterr().out
    assert "wan2.1-1.3b, 240x416: up to 11 latent frames of 15x26 tokens at once, 4,290; 2 GPUs, fsdp" in printed
    peaks = [float(n) for n in next(line for line in printed.splitlines() if line.startswith("peak")).split()[2:]]
    assert len(peaks) == 3 and peaks == sorted(peaks)
