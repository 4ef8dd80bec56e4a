"""A network launched as CUDA graphs gives what it gives when launched kernel by kernel."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import rollout
from control import Condition, Control
from model import build
from graphs import flatten, replayed
from rollout import velocity_of


def inputs(frames, seed, device="cpu", cameras=True):
    g = torch.Generator().manual_seed(seed)
    x, sigma = torch.randn(2, 24, frames, 4, 4, generator=g), torch.rand(2, frames, generator=g)
    control = Control(torch.randint(81, (2, frames), generator=g), torch.eye(4).expand(2, frames, 4, 4).clone(),
                      torch.rand(2, frames, 3, 3, generator=g)) if cameras else None
    move = lambda part: part if part is None else part.to(device)
    control = control and Control(*map(move, vars(control).values()))
    return x.to(device), sigma.to(device), Condition({"text": torch.randn(2, 16, 64, generator=g).to(device)}, control)


def test_each_set_of_shapes_is_recorded_once_and_replayed_on_what_is_given(monkeypatch):
    """The bookkeeping, without a GPU: at a replay, the tensors that were recorded hold what was given."""
    calls, replayed_on = [], []

    def velocity(*args):
        calls.append(args)
        return args[0]

    class Graph:
        def replay(self):
            replayed_on.append(self.held)

    @contextmanager
    def record(graph, capture_error_mode):
        yield
        graph.held = calls[-1]

    class Stream:
        wait_stream = staticmethod(lambda other: None)

    for name, stub in (("CUDAGraph", Graph), ("graph", record), ("Stream", Stream), ("current_stream", Stream),
                       ("stream", lambda s: torch.no_grad())):
        monkeypatch.setattr(torch.cuda, name, stub)
    fast = replayed(velocity, "cuda")
    for frames, seed, cameras, begins in ((4, 0, True, True), (4, 1, True, True), (8, 2, True, True),
                                          (4, 3, False, True), (4, 5, True, False), (4, 4, True, True)):
        args = inputs(frames, seed, cameras=cameras)
        args = *args[:2], replace(args[2], begins=begins)
        fast(*args)
        held, given = flatten(replayed_on[-1]), flatten(args)
        assert held.keys() == given.keys()
        assert all(held[k] is leaf or torch.equal(held[k], leaf) and held[k] is not leaf for k, leaf in given.items())
    assert len(calls) == 2 * 4          # a first call and a recording: two lengths, no control, a video that goes on
    fast(*args[:2], replace(args[2], past=object()))
    fast(*args[:2], replace(args[2], past=object()))
    assert len(calls) == 2 * 4 + 2                      # a history that is compressed on the way: called as it is


def test_small_networks_that_are_alone_are_replayed(monkeypatch):
    seen = []
    monkeypatch.setattr(rollout, "replayed", lambda velocity, device: seen.append(velocity) or (lambda *args: "replayed"))
    tiny = build("tiny", layers=1)
    assert rollout.launched(tiny)(*inputs(4, 0)) == "replayed" and len(seen) == 1
    tiny.spec = replace(tiny.spec, dim=rollout.LARGE)                                   # keeps a GPU busy by itself
    rollout.launched(tiny)
    rollout.launched(build("hunyuan1.5-8b", dim=64, heads=4, ffn=64, layers=1, text_dim=16, rope_dims=(4, 6, 6)))
    tiny.spec = replace(tiny.spec, dim=192)
    monkeypatch.setattr(rollout, "world_size", lambda: 2)
    rollout.launched(tiny)
    assert len(seen) == 1


@torch.no_grad()
def test_what_blocks_hear_of_a_text_is_made_once_and_the_same():
    model, calls = build("tiny", "text+adaln", torch.randn(81, 4, 64), layers=2), []
    torch.nn.init.normal_(model.head.head.weight)
    plain, known, embed = velocity_of(model), rollout.launched(model), model.embed_text
    (x, sigma, told), other = inputs(4, 0), inputs(4, 1)[2]
    null = {"text": torch.zeros(1, 2, 64)}
    expected = [rollout.guided(plain, 3.0, null)(x, sigma, condition) for condition in (told, other)]
    model.embed_text = lambda states: calls.append(states) or embed(states)
    for _ in range(2):
        assert torch.equal(rollout.guided(known, 3.0, null)(x, sigma, told), expected[0])
    assert len(calls) == 2                                                              # the prompt, the negative one
    assert torch.equal(rollout.guided(known, 3.0, null)(x, sigma, other), expected[1])
    for _ in range(8):                                  # texts come and go; their places in memory are used again
        told = replace(told, text={"text": torch.randn(2, 3, 64)})
        assert torch.equal(known(x, sigma, told), plain(x, sigma, told))
    whole = torch.randn(2, 3, 64)                       # one memory, two texts
    for text in (whole[:1].expand(2, -1, -1), whole):
        other = Condition({"text": text})
        assert torch.equal(known(x, sigma, other), plain(x, sigma, other))


def test_on_a_processor_nothing_changes():
    velocity = velocity_of(build("tiny", layers=1))
    assert replayed(velocity, "cpu") is velocity


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("control", ["adaln", "prope", "plucker"])
def test_a_replayed_network_equals_the_network(control):
    model = build("tiny", control, layers=2).cuda()
    torch.nn.init.normal_(model.head.head.weight)
    plain, fast = velocity_of(model), replayed(velocity_of(model), "cuda")
    for round in range(2):
        for frames, seed in ((4, 0), (8, 1), (4, 2)):
            args = inputs(frames, seed, "cuda")
            with torch.no_grad():
                assert torch.equal(fast(*args), plain(*args))
        with torch.no_grad():
            model.head.head.weight.mul_(1.5)                                            # a graph sees weights change
