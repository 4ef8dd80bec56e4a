"""Low-rank adapters: sets that switch on and off over one frozen base, and fold into full weights."""

import copy
import re

import pytest
import torch
from torch import nn

import qat
from control import Condition, Control
from lora import TARGETS, Adapters
from parallel import compile_blocks
from model import build, load
from weights import save
from rollout import velocity_of

X, SIGMA = torch.randn(2, 24, 4, 4, 6, generator=torch.Generator().manual_seed(0)), torch.full((2, 4), 0.5)
CONDITION = Condition({"text": torch.ones(2, 3, 64)}, Control(torch.tensor([[0, 9, 9, 3], [0, 0, 4, 18]])))


def base():
    torch.manual_seed(0)
    model = build("tiny", layers=2, dim=24, heads=2, ffn=32)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def adapted(model, names=("student", "critic"), zero=False, **options):
    adapters = Adapters(model, names, 4, **options)
    for one in adapters.sets.values():
        for key, p in one.named_parameters():
            if not (zero and "lora_B" in key):
                nn.init.normal_(p, std=0.3)
    return adapters


@torch.no_grad()
def test_at_first_every_set_is_the_base_and_switched_off_it_is_so_for_good():
    model = base()
    plain = velocity_of(model)(X, SIGMA, CONDITION)
    keys = model.state_dict().keys()
    adapters = adapted(model, zero=True)
    for name in (None, "student", "critic"):
        assert torch.equal(adapters.velocity(velocity_of(model), name)(X, SIGMA, CONDITION), plain)
    for p in adapters.sets["student"].parameters():
        nn.init.normal_(p)
    assert torch.equal(velocity_of(model)(X, SIGMA, CONDITION), plain) and model.state_dict().keys() == keys
    assert not torch.equal(adapters.velocity(velocity_of(model), "student")(X, SIGMA, CONDITION), plain)
    assert torch.equal(adapters.velocity(velocity_of(model), "critic")(X, SIGMA, CONDITION), plain)


def test_the_active_set_alone_has_gradient_and_the_first_one_is_not_zero():
    model = base()
    adapters = adapted(model, zero=True)
    adapters.velocity(velocity_of(model), "critic")(X, SIGMA, CONDITION).square().sum().backward()
    assert all(p.grad is None for p in [*model.parameters(), *adapters.sets["student"].parameters()])
    for key, p in adapters.sets["critic"].named_parameters():
        assert (p.grad.abs().sum() > 0) == ("lora_B" in key), key                       # A follows when B moved


def test_contexts_nest_and_are_left_on_errors():
    adapters = adapted(base())
    with adapters.using("student"):
        with pytest.raises(RuntimeError), adapters.using("critic"):
            raise RuntimeError
        assert adapters.active == "student"
    assert adapters.active is None


@torch.no_grad()
def test_merged_weights_are_the_adapted_network_and_its_file_is_one_of_full_tuning(tmp_path):
    model = base()
    adapters = adapted(model, alpha=6)                                                  # scale 6 / 4
    expected = adapters.velocity(velocity_of(model), "student")(X, SIGMA, CONDITION)
    save(model, tmp_path / "merged.safetensors", torch.float32, adapters.merged("student"))
    plain = load("tiny", tmp_path / "merged.safetensors", layers=2, dim=24, heads=2, ffn=32)
    torch.testing.assert_close(velocity_of(plain)(X, SIGMA, CONDITION), expected, atol=1e-5, rtol=1e-5)

    student = adapters.sets["student"].state_dict()
    halved = {key: value * (0.5 if "lora_B" in key else 1) for key, value in student.items()}
    q, name = model.state_dict()["blocks.0.self_attn.q.weight"], "blocks.0.self_attn.q"
    whole, half = (adapters.merged("student", values)[f"{name}.weight"] for values in (None, halved))
    torch.testing.assert_close(half - q, (whole - q) / 2, atol=1e-6, rtol=1e-5)
    A, B = (student[f"{name}.lora_{ab}.weight"] for ab in "AB")
    torch.testing.assert_close(whole, q + 1.5 * B @ A)


OFFICIAL = {    # linears of one block of each backbone: those to adapt, and neighbours to leave alone
    "wan": ("blocks.11.", [f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"] + ["ffn.0", "ffn.2"],
            ["head.head", "time_projection.1", "text_embedding.0"]),
    "hunyuan": ("double_blocks.53.", [f"{s}_{p}" for s in ("img", "txt") for p in
                                      ("attn_q", "attn_k", "attn_v", "attn_proj", "mlp.fc1", "mlp.fc2")],
                ["img_mod.linear", "img_attn_q_norm", "img_attn_prope_proj",
                 "txt_in.individual_token_refiner.blocks.0.self_attn_proj"]),
    "ltx": ("transformer_blocks.7.", [f"attn{i}.to_{p}" for i in (1, 2) for p in ("q", "k", "v", "out.0")] +
            ["ff.net.0.proj", "ff.net.2"], ["attn1.to_gate_logits", "audio_attn1.to_q", "audio_ff.net.2"])}


@pytest.mark.parametrize("backbone", OFFICIAL)
def test_attention_and_mlp_of_every_backbone_are_adapted_and_nothing_else(backbone):
    prefix, wanted, others = OFFICIAL[backbone]
    assert all(re.search(TARGETS, prefix + name) for name in wanted)
    assert not any(re.search(TARGETS, place + name) for name in others for place in (prefix, ""))


def test_a_set_covers_the_blocks_of_the_model_and_targets_that_match_nothing_are_an_error():
    assert len(adapted(base()).sets["student"].names) == 2 * 10
    with pytest.raises(ValueError, match="no linear of Wan has a name that matches 'gate'"):
        Adapters(base(), ("student",), 4, targets="gate")


class Blocks(nn.Module):
    """As much of a backbone as compilation needs."""
    block_list = "blocks"

    def __init__(self):
        super().__init__()
        block = nn.Module()
        block.self_attn = nn.ModuleDict({"q": nn.Linear(3, 3)})
        block.forward = block.self_attn["q"].__call__
        self.blocks = nn.ModuleList([block])

    def forward(self, x):
        return self.blocks[0](x)


def test_switching_survives_compilation(monkeypatch):
    """Hooks are set before compiling; the graph must not freeze the set that was at work when it was traced."""
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: setattr(
        self, "_compiled_call_impl", torch.compile(self._call_impl, backend="eager", **options)))
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(2, 3)
    adapters, results = adapted(model), []
    for compiled in (False, True):
        if compiled:
            compile_blocks(model)
        for name in (None, "student", "critic", None):
            with torch.no_grad(), adapters.using(name):
                results.append(model(x))
    for eager, fast in zip(results[:4], results[4:]):
        torch.testing.assert_close(eager, fast)
    assert not torch.equal(results[4], results[5]) and not torch.equal(results[5], results[6])


# ---- On a rounded base -----------------------------------------------------------------------------------------------

def rounded(activations):
    """A base of multiples of 16, its copy with emulated 4 bits, and adapters on that."""
    torch.manual_seed(0)
    plain = build("tiny", layers=2, dim=32, heads=2, ffn=64, text_dim=64)
    for p in plain.parameters():
        nn.init.normal_(p, std=0.1)
    model = qat.apply(copy.deepcopy(plain), "nvfp4-w4a4" if activations else "nvfp4")
    torch.manual_seed(1)
    adapters = qat.RoundedAdapters(model, ("student", "critic"), 4, alpha=2)
    for one in adapters.sets.values():
        for p in one.parameters():
            nn.init.normal_(p, std=0.3)
    return plain, model, adapters


@pytest.mark.parametrize("activations", [False, True])
def test_on_a_rounded_base_the_student_is_what_its_merged_weights_are_after_rounding(activations):
    plain, model, adapters = rounded(activations)
    merged = copy.deepcopy(plain)
    merged.load_state_dict(adapters.merged("student"))
    if activations:
        qat.apply(merged, "nvfp4-w4a4")
    else:
        qat.apply(merged, "packed")                                                     # what is deployed
    student = adapters.velocity(velocity_of(model), "student")(X, SIGMA, CONDITION)
    torch.testing.assert_close(student, velocity_of(merged)(X, SIGMA, CONDITION), rtol=1e-4, atol=1e-4)
    student.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapters.sets["student"].parameters())
    assert all(p.grad is None for p in [*model.parameters(), *adapters.sets["critic"].parameters()])


@torch.no_grad()
def test_the_names_of_rounding_round_what_they_say():
    plain, *_ = rounded(False)
    results = [velocity_of(qat.apply(copy.deepcopy(plain), name))(X, SIGMA, CONDITION)
               for name in ("none", "nvfp4", "nvfp4-w4a4")]
    errors = [float((y - results[0]).norm() / results[0].norm()) for y in results]
    assert errors[0] == 0 < errors[1] < errors[2]                                       # activations add theirs


@torch.no_grad()
def test_on_a_rounded_base_all_but_the_student_are_exact():
    plain, model, adapters = rounded(True)
    teacher, critic = (adapters.velocity(velocity_of(model), name)(X, SIGMA, CONDITION) for name in (None, "critic"))
    assert torch.equal(teacher, velocity_of(plain)(X, SIGMA, CONDITION))
    exact = adapted_copy(plain, adapters)
    assert torch.equal(critic, exact.velocity(velocity_of(plain), "critic")(X, SIGMA, CONDITION))
    student = adapters.velocity(velocity_of(model), "student")
    itself = qat.exactly(model, student)(X, SIGMA, CONDITION)
    assert torch.equal(itself, exact.velocity(velocity_of(plain), "student")(X, SIGMA, CONDITION))
    assert not torch.allclose(itself, student(X, SIGMA, CONDITION))                     # and the rounding is back on


def adapted_copy(model, adapters):
    """Ordinary adapters on an unrounded `model`, with the values of `adapters`."""
    exact = Adapters(model, tuple(adapters.sets), 4, alpha=2)
    for name, one in exact.sets.items():
        one.load_state_dict(adapters.sets[name].state_dict())
    return exact
