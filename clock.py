"""How long an update takes: its operations, and the bytes that go through memory and between GPUs, call by call.

Seconds of operations are those of results/train.json: the best rates of one H100, and what training reached of them
with compiled blocks; other GPUs are in proportion to their peaks. Everything else is bytes over a bandwidth. What
waits for the host (networks of a few million parameters, codecs, data) is not in it.
"""

import json
from collections import Counter
from functools import cache
from typing import NamedTuple

from common import ROOT
from model import preset
from tally import Job, passes, stage1_calls, work


class GPU(NamedTuple):
    """GiB that a process sees; of the data sheets TFLOP/s in bf16, TB/s of memory, GB/s to other GPUs one way."""
    room: float
    tflops: float
    memory: float
    link: float


GPUS = {"RTX 4090": GPU(23.5, 165, 1.01, 32), "A100 40 GB": GPU(39.4, 312, 1.56, 300),
        "A100 80 GB": GPU(79.2, 312, 2.04, 300), "H100 80 GB": GPU(79.1, 989, 3.35, 450),
        "H200": GPU(139.8, 989, 4.8, 450), "B200": GPU(178.3, 2250, 8.0, 900)}
PEAK = GPUS["H100 80 GB"].tflops                        # of the GPU of results/train.json
# What is seen of those rates: copies within an H200; all-gathers of 400 MB between two (small ones: 0.4), without NVLS.
MEMORY, LINK = 0.88, 0.55
SLOWED = 0.8            # seconds that a second of communication costs the computation beside it: 5B on two H200s
COLLECTIVE = 3e-5       # seconds of a small collective by itself: not measured
EAGER = 2.0             # blocks that are not compiled take so many times as long: LTX-2.3 with adapters on two H100s


class Network(NamedTuple):
    """Whom a tally calls. Bytes of its blocks and of what is outside of them, as stored; weights that a forward casts
    from fp32 to bf16; weights and tensors that learn, optimizer steps in an update, weights in the average; bytes that
    adapters move for each token in a forward."""
    blocks: float = 0
    ends: float = 0
    cast: float = 0
    learns: float = 0
    tensors: int = 0
    steps: int = 0
    average: float = 0
    adapters: float = 0


# ---- Operations ------------------------------------------------------------------------------------------------------

@cache
def measured():
    return json.loads((ROOT / "results" / "train.json").read_text())


def ideal(done):
    """Seconds of operations at the best rates that an H100 was seen to reach."""
    rates = {"linear": "matmul", "attention": "attention", "attention_train": "attention_train"}
    return sum(n / measured()["ceilings"][rates[kind]] for kind, n in done.items()) / 1e12


@cache
def efficiency():
    """What training reached of those rates: the mean of the measured rows."""
    shares = []
    for row in measured()["rows"]:
        if row["who"] == "ours":
            spec = preset(row["backbone"], size=tuple(row["size"]))
            job = Job(spec, [stage1_calls(spec.latent_frames(row["size"][0]))])
            shares.append(1000 * ideal(work(job, job.tallies[0], row["how"].split()[1])) / row["ms"])
    return sum(shares) / len(shares)


def seconds(done, tflops=PEAK):
    """Of operations in compiled blocks on a GPU with this peak."""
    return ideal(done) / efficiency() * PEAK / tflops


# ---- Everything ------------------------------------------------------------------------------------------------------

def traffic(job, size, asked=False, reduces=False):
    """Bytes that come to a GPU when FSDP2 computes with weights of `size` bytes in a call: gathered for its forward;
    gathered again for its backward pass; gradients reduced in the weights' fp32, and their sum over the copies."""
    S, R = job.shards, job.replicas
    gather = size * (S - 1) / S
    return gather, gather * asked, reduces * (gather + 2 * (R - 1) / R * size / S)


def times(job, networks, tally, mode, gpu):
    """Seconds of an update on one GPU by kind; {name: `Network`} is whom the tally calls.

    `communication` is all of it and no further time, `waiting` the part that no computation hides. FSDP2 gathers the
    next block while one computes: each takes max(computation, communication), after a first gather and, backward,
    before a last reduction. `copies` are its own of what arrived and what leaves.
    """
    memory, link = MEMORY * gpu.memory * 1e12, LINK * gpu.link * 1e9
    (rows, columns), N, layers = job.spec.grid(*job.spec.size[1:]), job.sequence, job.spec.layers
    took, added = Counter(), Counter()
    for call in tally.calls:
        net, asked = networks[call.who], bool(call.asked)
        tokens = job.batch / N * call.frames * rows * columns
        done = [seconds(part, gpu.tflops) * (1 if job.compile else EAGER) for part in passes(job, call, mode)]
        rounds, own = 1 + asked * (mode != "none"), "weights" in call.asked and job.trains
        reduces = own and not call.joins                                    # autograd adds up, whole, and hands on once
        added[call.who] += call.joins and bool(call.asked)
        took["arithmetic"] += sum(done)
        took["casts"] += 6 * net.cast * (rounds + own) / memory             # 4 bytes and 2; gradients the other way
        took["adapters"] += tokens * net.adapters * (rounds + asked) / memory
        exchange = 4 * 2 * tokens * job.spec.dim * (N - 1) / N * layers / link          # q, k, v and the result in bf16
        took["communication"] += exchange * (rounds + asked)
        took["waiting"] += exchange * (rounds + asked)
        if job.shards > 1:
            first, again, reduced = (n / layers / link for n in traffic(job, net.blocks, asked, reduces))
            ends = sum(traffic(job, net.ends, asked, reduces)[::2]) / link      # stay gathered for the backward
            late = ends + first + again + reduced
            hidden = [min(there, here / layers) for there, here in zip((first, again + reduced), done)]
            late += (layers - 1) * (first + again + reduced - sum(hidden))
            moved = ends + layers * (first + again + reduced)
            took["communication"] += moved
            took["waiting"] += late + SLOWED * max(0, moved - late)
            took["copies"] += 2 * net.blocks * (1 + asked + reduces) / memory
    for who, net in networks.items():
        sharded = job.shards > 1 and not net.adapters                       # adapters came after fully_shard
        part = job.shards if sharded else 1
        # Bytes a weight: norm 4, clipping 8, AdamW 28; its average 12; gradients added up in one backward pass 12 each
        steps = (40 * net.steps * net.learns + 12 * net.average) / part
        took["optimizer"] += (steps + 12 * added[who] * net.learns) / memory
        if job.gpus > 1 and not sharded:                                    # common.descend, tensor by tensor, and / W
            size = 2 * (job.gpus - 1) / job.gpus * 4 * net.learns
            took["communication"] += net.steps * (size / link + net.tensors * COLLECTIVE)
            took["waiting"] += net.steps * (size / link + net.tensors * COLLECTIVE + 8 * net.learns / memory)
    return took
