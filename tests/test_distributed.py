"""What needs two processes: copies, shards and shared clips give what one process gives.

All checks run in one launch of this file under torchrun (gloo, two processes); each is a test of its own by name.
"""

import json
import os
import subprocess
import sys
import threading
import traceback
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dsd
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import bench
import block
import compress
import data
import history
import model
import rollout
import train_stage1
import train_stage2
from clock import traffic
from common import EMA, barrier, derive, descend, mean_over_ranks, on_host, parse, rank, setup
from control import Condition, Control
from dmd import Discriminator, Head
from inject import attach
from lora import Adapters
from parallel import Layout, checkpoint_blocks
from rollout import velocity_of
from tally import Job
from weights import save

CHECKS = {}
ARCHITECTURES = {"wan2.2-5b": "adaln+text+prope", "hunyuan1.5-8b": "adaln+plucker+prope", "ltx2.3-22b": "adaln+text+prope"}
FSDP, HYBRID = {"shard": "fsdp"}, {"shard": "fsdp", "replicas": 2}


def check(function):
    CHECKS[function.__name__] = function
    return function


def layout(shard="ddp", **fields):
    return Layout(torch.device("cpu"), shard, **fields)


def network(name="wan2.2-5b", control="adaln", dtype=torch.float32, **fields):
    """A very small backbone, the same on both processes, every parameter random."""
    tiny = {k: v for k, v in bench.TINY.items() if k != "size" and (k != "rope_dims" or name.startswith("hunyuan"))}
    torch.manual_seed(1)
    states = torch.randn(81, 3, 64) if "text" in control else None
    net = model.build(name, control, states, **tiny | fields)
    for key, p in net.named_parameters():
        p.data.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.1)
        p.data = p.data.to(net.stored_dtype(key, dtype))
    return net


def clip(net, seed=2, batch=2):
    """Arguments of a forward: 15 tokens a frame, an odd number; text with padding where there are masks."""
    torch.manual_seed(seed)
    spec, T = net.spec, 3
    x, sigma = torch.randn(batch, spec.channels, T, *(n * p for n, p in zip((3, 5), spec.patch[1:]))), torch.rand(batch, T)
    sigma[:, 0] = 0
    text = {"text": torch.randn(batch, 7, spec.text_dim)}
    if spec.arch == "hunyuan":
        text["text_mask"] = torch.arange(7) < torch.arange(7, 7 - batch, -1)[:, None]
    turns = torch.linalg.qr(torch.randn(batch, T, 3, 3))[0]
    c2w = torch.eye(4).repeat(batch, T, 1, 1)
    c2w[..., :3, :3], c2w[..., :3, 3] = turns * torch.det(turns).sign()[..., None, None], torch.randn(batch, T, 3)
    K = torch.tensor([[0.8, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]).expand(batch, T, 3, 3)
    return x, sigma, text, Control(torch.randint(81, (batch, T)), c2w, K)


def loss_of(v):
    return (v.float() * torch.linspace(-1, 2, v[0].numel()).view_as(v[0])).square().mean()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(net, args):
    """Output, and gradients averaged over the processes as `descend` does, all whole."""
    net.zero_grad()
    v = net(*args)
    loss_of(v).backward()
    grads = {}
    for key, p in net.named_parameters():
        if p.grad is not None:
            grads[key] = whole(p.grad).clone()
            if not isinstance(p.grad, DTensor):
                dist.all_reduce(grads[key])
                grads[key] /= 2
    return v.detach(), grads


def same(a, b, tolerance=1e-5):
    """Equal within `tolerance` of the largest value; of dicts, everything."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        for key in a:
            worst, largest = ((y.detach().abs().max().item() for y in (a[key] - b[key], b[key])))
            assert worst <= tolerance * max(largest, 1e-3), (key, worst, largest)
    else:
        same({"it": torch.as_tensor(a)}, {"it": torch.as_tensor(b)}, tolerance)


# ---- Weights ---------------------------------------------------------------------------------------------------------

def trained(fields, joined=False, steps=2):
    """Weights, averages and norms after steps of AdamW with a clip that acts; `joined`: one process, both batches."""
    net = layout(**fields).place(network(layers=1))
    optimizer, ema, norms = torch.optim.AdamW(net.parameters(), 1e-2), EMA(net, 0.9), []
    for step in range(steps):
        if joined:
            for r in range(2):
                (loss_of(net(*clip(net, 10 * step + r))) / 2).backward()
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.01))
            optimizer.step()
            optimizer.zero_grad()
        else:
            loss_of(net(*clip(net, 10 * step + rank()))).backward()
            norms.append(descend(optimizer, 0.01))
            with torch.no_grad():       # as in stage 2: what a forward without a backward gathers must not outlive a step
                net(*clip(net, 99))
        ema.update(net)
    assert min(norms) > 0.02
    return {k: whole(v).detach() for k, v in net.state_dict().items()}, {k: whole(v) for k, v in ema.average.items()}, norms


@check
def copies_and_shards_train_like_one_process_on_both_batches():
    weights, averages, norms = trained({}, joined=True)
    for fields in ({}, FSDP, HYBRID):
        w, a, n = trained(fields)
        same(torch.stack(n), torch.stack(norms))
        same(w, weights, 1e-3)          # Adam divides by small gradients
        same(a, averages, 1e-3)


@check
def each_process_has_half_of_the_rows():
    net = layout(**FSDP).place(network())
    own, total = (sum(f(p).numel() for p in net.parameters()) for f in (lambda p: p.to_local(), lambda p: p))
    assert all(isinstance(p, DTensor) for p in net.parameters()) and own < 0.52 * total
    assert all(p.to_local().shape == p.shape for p in layout(**HYBRID).place(network()).parameters())


@check
def sharding_changes_no_bit_of_a_forward():
    """Which computes in bf16 and which in fp32 is autocast's choice, or that of a frozen model's mixed dtypes."""
    for name, control in ARCHITECTURES.items():
        for dtype in (torch.float32, torch.bfloat16):           # what trains; a frozen teacher
            nets = network(name, control, dtype), layout(**FSDP).place(network(name, control, dtype))
            for net in nets:
                net.requires_grad_(dtype == torch.float32)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), torch.no_grad():
                a, b = (net(*clip(net)) for net in nets)
            assert torch.equal(a, b) and a.isfinite().all(), (name, dtype)


@check
def gradients_of_shards_are_those_of_copies_also_recomputed():
    for name, control in ARCHITECTURES.items():
        nets = network(name, control), layout(**FSDP).place(checkpoint_blocks(network(name, control)))
        (v, g), (w, h) = (gradients(net, clip(net, rank())) for net in nets)
        assert torch.equal(v, w)
        same(h, g)


@check
def several_forwards_may_await_one_backward():
    """A rollout: the graph of each chunk lives on, forwards without graph in between, one backward at the end."""
    results = []
    for fields in ({}, FSDP):
        net, total = layout(**fields).place(network()), 0.0
        optimizer = torch.optim.SGD(net.parameters(), 1.0)
        for i in range(3):
            total = total + loss_of(net(*clip(net, i)))
            with torch.no_grad():
                net(*clip(net, 50 + i))
        total.backward()
        grads = {k: whole(p.grad).clone() for k, p in net.named_parameters()}
        with torch.no_grad():           # what this gathers must not outlive the step
            net(*clip(net))
            descend(optimizer, 1.0)
            results.append({"after": net(*clip(net)), **grads})
    same(results[1], results[0])


@check
def a_plan_knows_what_shards_move():
    """Bytes that reach a process, half of what a collective takes or makes, against clock.traffic: of a forward alone;
    with a backward, also of one that two forwards await; below adapters, whose base is frozen."""
    class Moved(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            for name in "allgather", "reduce_scatter":
                if f"{name}_base" in str(op):
                    moved[name] += max(args[0].nbytes, args[1].nbytes) / 2
            return op(*args, **kwargs or {})

    for trains, asked, forwards in ((True, False, 1), (True, True, 1), (True, True, 2), (False, True, 1)):
        net, moved = network("ltx2.3-22b"), Counter()
        size = sum(p.nbytes for block in net.transformer_blocks for p in block.parameters())
        ends = sum(p.nbytes for p in net.parameters()) - size
        net, expected = layout(**FSDP).place(net).requires_grad_(trains), Counter()
        (x, *args), job = clip(net), Job(net.spec, [], gpus=2, shard="fsdp")
        with Moved(), torch.set_grad_enabled(asked):
            loss = sum(loss_of(net(x.requires_grad_(not trains), *args)) for _ in range(forwards))
            loss.backward() if asked else None
        for joins in range(forwards):
            (first, again, reduced), (out, _, back) = (traffic(job, n, asked, trains and asked and not joins)
                                                       for n in (size, ends))
            expected.update(allgather=first + again + out, reduce_scatter=reduced + back)
        for name in expected:
            same(moved[name], expected[name], 0.01)                                     # odd rows are padded


@check
def a_nan_on_one_process_is_seen_on_both_and_changes_no_weight():
    for fields in ({}, FSDP):
        net = layout(**fields).place(network())
        optimizer, before = torch.optim.SGD(net.parameters(), 1.0), {k: whole(p).clone() for k, p in net.named_parameters()}
        (loss_of(net(*clip(net))) * (float("nan") if rank() else 1.0)).backward()
        assert descend(optimizer, 1.0).isnan()
        same({k: whole(p) for k, p in net.named_parameters()}, before, 0)


@check
def adapters_share_one_sharded_base():
    results = []
    for fields in ({}, FSDP):
        net = layout(**fields).place(network(dtype=torch.bfloat16))
        torch.manual_seed(3)
        adapters, out = Adapters(net, ("student", "critic"), 4), {}
        for p in adapters.sets["critic"].parameters():
            nn.init.normal_(p, std=0.1)
        optimizer = torch.optim.SGD(adapters.sets["critic"].parameters(), 1.0)
        velocity = {name: adapters.velocity(lambda x, sigma, args: net(x, sigma, *args), name) for name in (None, "student", "critic")}
        x, sigma, *args = clip(net, rank())
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            with torch.no_grad():
                out["teacher"], out["student"] = velocity[None](x, sigma, args), velocity["student"](x, sigma, args)
            v = velocity["critic"](x, sigma, args)
        assert torch.equal(out["teacher"], out["student"]) and not torch.equal(v, out["teacher"])
        with adapters.using("critic"):
            loss_of(v).backward()
        out |= {"norm": descend(optimizer, 1.0)} | {k: p.detach() for k, p in adapters.sets["critic"].named_parameters()}
        merged = adapters.merged("critic")
        out |= {f"merged {k}": on_host(merged[k], torch.float32) for k in merged if rank() == 0 or isinstance(merged[k], DTensor)}
        results.append({k: v for k, v in out.items() if not v.is_meta})
    same({k: v for k, v in results[1].items() if k in results[0]}, {k: v for k, v in results[0].items() if k in results[1]}, 1e-6)
    assert rank() or len(results[0]) == len(results[1]) > 100


# ---- Files -----------------------------------------------------------------------------------------------------------

@check
def files_are_written_whole_and_read_by_rows(folder):
    for name, control in ARCHITECTURES.items():
        net = network(name, control)
        fields = {k: v for k, v in bench.TINY.items() if k != "size" and (k != "rope_dims" or name.startswith("hunyuan"))}
        save(layout(**FSDP).place(deepcopy(net)), folder / f"{name}.safetensors", torch.float32)
        barrier()
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in load_file(folder / f"{name}.safetensors").items())
        for place in (layout(**HYBRID).place, layout(**FSDP).place)[name != "wan2.2-5b":]:
            read = model.load(name, folder / f"{name}.safetensors", prepare=place, **fields)
            same({k: whole(v).detach() for k, v in read.state_dict().items()}, net.state_dict(), 0)
            assert all(p.requires_grad for p in read.parameters())
        same(gradients(read, clip(read))[1], gradients(net, clip(net))[1])


def peak_anonymous(call):
    """(result, growth in bytes) of this process's memory that no file backs, at its highest during `call`."""
    def anonymous():
        return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])

    def watch():
        while not done.wait(0.001):
            seen.append(anonymous())
    done, seen, before = threading.Event(), [], anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = call()
    finally:
        done.set()
        watcher.join()
    return result, max([*seen, anonymous()]) - before


@check
def loading_takes_the_memory_of_ones_own_rows(folder):
    fields = dict(layers=16, dim=256, heads=4, ffn=2048, freq_dim=32, text_dim=64)
    if rank() == 0:
        save(model.build("wan2.2-5b", None, **fields), folder / "large.safetensors", torch.bfloat16)
    barrier()
    place = lambda net: layout(**FSDP).place(attach(net, "adaln", device="cpu"))    # new control on a file without
    net, grown = peak_anonymous(lambda: model.load("wan2.2-5b", folder / "large.safetensors", prepare=place, **fields))
    size = sum(4 * p.numel() for p in net.parameters())
    assert size > 90e6 and grown < size / 2 + 15e6, (grown, size)
    assert not whole(net.control.translation).any() and not net.control.translation.is_meta


@check
def a_compressor_in_shards_learns_like_a_copy():
    """Two updates behind 48 frames, of a chunk with gradient and one without; blocks chosen by affinity, caches kept."""
    def trained(shard, kind, attention, before):
        spread, net = layout(shard), network("tiny")
        if before:                                                          # weights that have one; it is set anew
            compress.attach(net, compress.Settings.of(net.spec, kind))
        spread.place(net)
        spread.place_history(history.configure(net, "" if before else kind, attention))
        net.compress.settings = replace(net.compress.settings, top=2)
        parameters = [*net.parameters()]
        optimizer, ema = torch.optim.AdamW(parameters, 1e-2), EMA(net, 0.5)
        g, seen = torch.Generator().manual_seed(rank()), []
        noise = lambda shape: torch.randn(shape, generator=g)
        latents = noise((1, net.spec.channels, 48, 4, 6))
        for _ in range(2):
            past = history.History(latents[:, :, :0], 8, net)
            past.append(latents)
            told = Condition({"text": torch.ones(1, 3, 64)}, Control(torch.zeros(1, 56 - past.begin()).long()))
            made, _ = rollout.chunks(velocity_of(net), told, past, 56, [1.0, 0.5, 0.0], 4, noise, rollout.few_step,
                                     lambda n: {"grad_step": 1}, past.begin())
            made.square().mean().backward()
            seen += [made.detach(), descend(optimizer, 1.0)]
            ema.update(net)
        with torch.no_grad():                                               # weights change behind a pass without backward
            for factor in (1.0, 0.9):
                for p in parameters:
                    p.mul_(factor)
                past = history.History(latents[:, :, :0], 8, net)
                past.append(latents)
                seen.append(rollout.chunks(velocity_of(net), told, past, 52, [1.0, 0.5, 0.0], 4, noise, rollout.few_step,
                                           lambda n: {}, past.begin())[0])
        return seen, {key: on_host(value) for key, value in ema.average.items()}

    for kind, attention, before in (("framepack", "joint", False), ("framepack", "self", True),
                                    ("packforcing", "joint", True), ("packforcing", "segment", False)):
        (a, copies), (b, shards) = (trained(shard, kind, attention, before) for shard in ("ddp", "fsdp"))
        for x, y in zip(a, b):
            assert (x - y).abs().max() < 1e-5, (kind, attention)
        assert any(key.startswith("compress.") for key in copies)
        for key in copies:
            if rank() == 0:
                assert (copies[key] - shards[key]).abs().max() < 1e-4, (kind, attention, key)


@check
def checkpoints_take_sharded_weights_optimizers_and_averages(folder):
    def step(net, optimizer, ema):
        loss_of(net(*clip(net, rank()))).backward()
        descend(optimizer, 1.0)
        ema.update(net)

    def state(net, optimizer, ema):
        return {"net": dsd.get_model_state_dict(net), "optimizer": dsd.get_optimizer_state_dict(net, optimizer), "ema": ema.average}

    def fresh(fields):
        net = layout(**fields).place(network(layers=1))
        return net, torch.optim.AdamW(net.parameters(), 1e-2), EMA(net, 0.9)
    run = fresh(FSDP)
    step(*run)
    dcp.save(state(*run), checkpoint_id=folder / "checkpoint")
    step(*run)
    for fields in (FSDP, HYBRID, {}):                                               # sharded otherwise, or not at all
        net, optimizer, ema = again = fresh(fields)
        stored = state(*again)
        dcp.load(stored, checkpoint_id=folder / "checkpoint")
        dsd.set_model_state_dict(net, stored["net"])
        dsd.set_optimizer_state_dict(net, optimizer, stored["optimizer"])
        ema.average = stored["ema"]
        step(*again)
        same({k: whole(v).detach() for k, v in net.state_dict().items()},
             {k: whole(v).detach() for k, v in run[0].state_dict().items()}, 0 if fields == FSDP else 1e-4)
        same({k: whole(v) for k, v in ema.average.items()}, {k: whole(v) for k, v in run[2].average.items()}, 1e-4)


# ---- Shared clips ----------------------------------------------------------------------------------------------------

@check
def shared_clips_give_what_one_process_gives():
    """Forward, gradients of weights, gradient of the input; sharded weights and recomputation on top."""
    for name, control in ARCHITECTURES.items():
        net = network(name, control)
        args = clip(net)
        args[0].requires_grad_()
        v, g = gradients(net, args)
        input_gradient, args[0].grad = args[0].grad, None
        for fields, change in (({}, lambda net: net), (FSDP, checkpoint_blocks)):
            shared = layout(**fields, sequence=2).place(change(network(name, control)))
            w, h = gradients(shared, args)
            same(w, v)
            same(h, g)
            dist.all_reduce(args[0].grad)
            same(args[0].grad / 2, input_gradient)
            args[0].grad = None


@check
def a_shared_clip_halves_the_tokens_between_blocks_and_the_heads_within():
    net, seen = layout(sequence=2).place(network()), {}
    attend = net.blocks[0].attend
    inner = lambda q, *rest: seen.update(heads=q.shape[1], keys=q.shape[2]) or block.attention(q, *rest)
    net.blocks[0].attend = lambda *args: attend.func(inner, *args)
    net.blocks[1].register_forward_pre_hook(lambda _, args: seen.update(tokens=args[0][0].x.shape[2]))
    net(*clip(net))
    assert seen == {"tokens": 8, "heads": 2, "keys": 45}


@check
def a_discriminator_judges_the_whole_of_a_shared_clip():
    results = []
    for fields in ({}, {"sequence": 2}, FSDP, {"shard": "fsdp", "sequence": 2}):
        net = layout(**fields).place(network())
        torch.manual_seed(4)
        judge = Discriminator(net, lambda x, sigma, args: net(x, sigma, *args), Head(net.spec.dim))
        x, sigma, *args = clip(net)
        x.requires_grad_()
        logits = judge(x, sigma, args)
        g, = torch.autograd.grad(logits.square().sum(), x)      # as the student's term: no gradient for the weights
        dist.all_reduce(g)
        logits = judge(x.detach(), sigma, args)                 # as the critic's
        logits.square().sum().backward()
        grads = {k: whole(p.grad).clone() for k, p in net.named_parameters() if p.grad is not None}
        if not isinstance(next(net.parameters()), DTensor):
            for value in grads.values():
                dist.all_reduce(value)
                value /= 2
        results.append({"logits": logits.detach(), "input": g / 2, **grads})
    for other in results[1:]:
        same(other, results[0])


@check
def processes_that_share_a_clip_draw_the_same():
    from common import data_rank
    layout(sequence=2)
    assert data_rank() == 0
    layout()
    assert data_rank() == rank()


@check
def what_cannot_be_divided_is_refused():
    for fields, message in (({"shard": "none"}, "for one process, not 2"), ({"shard": "zero"}, "none, ddp or fsdp, got 'zero'"),
                            ({"replicas": 2}, "add --shard fsdp"), ({"sequence": 3}, "--sequence 3 does not divide the number of processes, 2"),
                            ({**FSDP, "replicas": 3}, "--replicas 3 does not divide")):
        with pytest.raises(ValueError, match=message):
            layout(**fields)
    with pytest.raises(ValueError, match="--sequence 2 does not divide the 3 heads of wan2.2-5b"):
        layout(sequence=2).place(network(dim=48, heads=3))
    with pytest.raises(ValueError, match="--sequence spreads the frames of a clip, not history"):
        net = network()
        layout(sequence=2).place_history(compress.attach(net, compress.Settings.of(net.spec, "framepack")))
    layout()


# ---- The scripts -----------------------------------------------------------------------------------------------------

def losses(script, folder, name, *flags):
    """What two steps of a script log, in this process: its own `main`, and one group of processes for all."""
    script.main(parse(script.Config, ["--out", str(folder / name), "--steps", "2", "--batch", "2", "--pool", "2", *map(str, flags)]))
    barrier()
    lines = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    return [{k: torch.tensor(v) for k, v in line.items() if k != "seconds"} for line in lines]


def scripts(folder):
    """Smallest settings: the teacher of stage 2 and what both scripts are given."""
    model.PRESETS["tiny"] = replace(model.TINY, layers=2, dim=24, heads=2, ffn=32)
    for script in (train_stage1, train_stage2):
        script.shutdown = lambda: None
    train_stage2.curves = lambda folder: None
    torch.manual_seed(0)
    teacher = model.build("tiny")
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.1)
    save(teacher, folder / "teacher.safetensors")
    barrier()
    return ("--init", folder / "teacher.safetensors", "--log_every", 1, "--frames", 8), (
        "--teacher", folder / "teacher.safetensors", "--critic_warmup", 0, "--critic_steps", 1, "--denoise", 2, "--preview", 0,
        "--frames", 8, "--gan", 0.1, "--teacher_fkl", 0.1)


@check
def stage_1_trains_sharded_as_it_does_in_copies(folder):
    one, _ = scripts(folder)
    expected = losses(train_stage1, folder, "ddp", *one)
    for step, line in enumerate(losses(train_stage1, folder, "fsdp", *one, "--shard", "fsdp", "--recompute")):
        same(line, expected[step], 1e-4)
    a, b = (load_file(folder / name / "teacher.safetensors") for name in ("ddp", "fsdp"))
    same({k: v.float() for k, v in b.items()}, {k: v.float() for k, v in a.items()}, 1e-2)      # they are bf16


@check
def accumulated_batches_are_one_batch(folder):
    one, _ = scripts(folder)
    fields = "--accumulate", 2, "--steps", 1
    line, = losses(train_stage1, folder, "accumulated", *one, *fields)
    net = model.load("tiny", folder / "teacher.safetensors")
    cfg = parse(train_stage1.Config, ["--batch", "2", "--pool", "2", *map(str, (*one, *fields))])
    from encode import codec
    from data import WorldStream
    import random
    coder = codec("tiny")
    stream = WorldStream(coder, cfg.seed, cfg.pool, 48, cfg.refresh * 2)
    frames = train_stage1.draw_frames(cfg, 4, random.Random(derive(0, "stage 1, all ranks", 0)))
    torch.manual_seed(derive(0, "stage 1", rank(), 0))
    total = sum(train_stage1.stage1_loss(velocity_of(net), batch.x0, train_stage1.drop(batch.condition, coder.text([""]), cfg), cfg, net.spec)
                for batch in (stream.batch(i, 2, frames) for i in range(2))) / 2
    same(line["loss"], mean_over_ranks({"x": total})["x"])


@check
def stage_1_measures_speed_on_random_data_and_saves_nothing(folder):
    scripts(folder)
    lines = losses(train_stage1, folder, "random", "--init", "random", "--shard", "fsdp", "--log_every", 1, "--frames", 8)
    assert len(lines) == 2 and not list((folder / "random").glob("*eckpoint*")) + list((folder / "random").glob("*.safetensors"))


def stage_2(folder, tune):
    _, two = scripts(folder)
    two = *two, "--tune", tune, "--rank", 4
    expected = losses(train_stage2, folder, f"{tune}-ddp", *two)
    for step, line in enumerate(losses(train_stage2, folder, f"{tune}-fsdp", *two, "--shard", "fsdp")):
        same(line, expected[step], 1e-3)
    a, b = (load_file(folder / f"{tune}-{name}" / "student.safetensors") for name in ("ddp", "fsdp"))
    same({k: v.float() for k, v in b.items()}, {k: v.float() for k, v in a.items()}, 1e-2)


@check
def stage_2_trains_sharded_as_it_does_in_copies(folder):
    stage_2(folder, "full")


@check
def stage_2_trains_adapters_on_a_sharded_teacher(folder):
    stage_2(folder, "lora")


@check
def sharded_networks_are_shown_by_all_processes_together(folder):
    """Neither process can compute alone, and one writes. The table of many sequences is left out."""
    _, two = scripts(folder)
    samplers, table = train_stage2.samplers_of, train_stage2.final_table
    train_stage2.samplers_of, train_stage2.final_table = partial(samplers, steps=1), lambda *args: None
    losses(train_stage2, folder, "shown", *two, "--shard", "fsdp", "--preview", 1, "--steps", 1, "--gan", 0, "--teacher_fkl", 0)
    train_stage2.samplers_of, train_stage2.final_table = samplers, table
    assert (folder / "shown" / "compare.mp4").stat().st_size


@check
def scripts_draw_once_for_a_shared_clip(folder):
    """With `--sequence 2` both processes have clip, noise and noise levels of one: as if each were alone with them."""
    one, two = scripts(folder)
    for script, flags in ((train_stage1, one), (train_stage2, two)):
        modules = script, data
        draws, name = [module.data_rank for module in modules], script.__name__
        for module in modules:
            module.data_rank = lambda: 0
        expected = losses(script, folder, f"{name}-alone", *flags)
        for module, draw in zip(modules, draws):
            module.data_rank = draw
        for step, line in enumerate(losses(script, folder, f"{name}-together", *flags, "--sequence", 2)):
            same(line, expected[step], 1e-3)
        layout()


# ---- Both sides ------------------------------------------------------------------------------------------------------

def work(folder):
    """One of the two processes: run every check, write what became of each."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    setup()
    outcome = {}
    for name, function in CHECKS.items():
        try:
            own = folder / name
            own.mkdir(exist_ok=True)
            function(own) if function.__code__.co_argcount else function()
            outcome[name] = ""
        except BaseException:
            outcome[name] = traceback.format_exc()
        (folder / f"{rank()}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, __file__, folder], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    files = [folder / f"{r}.json" for r in range(2)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files], done.stderr


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(outcomes, name):
    results, stderr = outcomes
    for r, result in enumerate(results):
        assert result.get(name, f"not reached:\n{stderr[-3000:]}") == "", f"process {r}:\n{result.get(name)}"


if __name__ == "__main__":
    work(Path(sys.argv[1]))
