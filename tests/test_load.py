"""Official files of every backbone, tiny: read in every layout, refused by name, never held twice. Passes over blocks."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

import common
import model
import weights
from parallel import checkpoint_blocks, compile_blocks
from model import PRESETS, attention, build, load
from weights import default_source, save, weight_files

TINY = dict(dim=64, heads=4, ffn=112, layers=2, text_dim=64, freq_dim=32, rope_dims=(4, 6, 6))
OFFICIAL = [name for name, spec in PRESETS.items() if "/" in spec.source]
NAME = "wan2.1-1.3b"
ROOT = Path(model.__file__).parent


@pytest.fixture(scope="module", params=OFFICIAL)
def official(request):
    """A backbone's name and the tensors of its official file: right names and shapes, random content."""
    with torch.device("meta"):
        shapes = build(request.param, control=None, **TINY).state_dict()
    return request.param, {key: torch.randn(p.shape) for key, p in shapes.items()}


def shard(tensors, folder, index="diffusion_pytorch_model.safetensors.index.json"):
    """`tensors` in two files and an index, as large checkpoints come."""
    folder.mkdir(parents=True)
    files = {f"{i}-of-2.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    for file, part in files.items():
        save_file(part, folder / file)
    (folder / index).write_text(json.dumps({"weight_map": {key: file for file, part in files.items() for key in part}}))
    return folder


def hollow(name, path, **fields):
    """The file of a backbone at full length, with nothing but a header on the disk."""
    with torch.device("meta"):
        shapes = build(name, control=None, **fields).state_dict()
    header, end = {}, 0
    for key, p in shapes.items():
        header[key] = {"dtype": "F32", "shape": list(p.shape), "data_offsets": [end, end := end + 4 * p.numel()]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, path.stat().st_size + end)
    return path


# ---- What loads ------------------------------------------------------------------------------------------------------

def test_every_layout_of_an_official_checkpoint_loads(official, tmp_path, monkeypatch):
    name, tensors = official
    file = PRESETS[name].file.replace("*", "")
    whole = tmp_path / "repository" / file
    whole.parent.mkdir(parents=True)
    save_file(tensors, whole)
    save_file(tensors, whole.with_name("another-model.safetensors"))                    # the repository has more
    save_file({f"model.diffusion_model.{k}": v for k, v in tensors.items()}, tmp_path / "packed.safetensors")
    (tmp_path / "bare").mkdir()
    save_file(tensors, tmp_path / "bare" / "any-name.safetensors")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or tmp_path / "repository")
    layouts = {"file": whole, "repository": tmp_path / "repository", "file's own folder": whole.parent,
               "bare": tmp_path / "bare", "packed": tmp_path / "packed.safetensors", "hub": None,
               "sharded": shard(tensors, tmp_path / "shards"),
               "sharded repository": tmp_path / "two"}
    shard(tensors, (tmp_path / "two" / file).parent)
    for layout, source in layouts.items():
        loaded = load(name, source, **TINY).state_dict()
        assert loaded.keys() == tensors.keys(), layout
        assert all(torch.equal(loaded[key], value) for key, value in tensors.items()), layout
    wanted = [PRESETS[name].file, f"{PRESETS[name].file}.index.json"]
    assert asked == [((PRESETS[name].source,), {"allow_patterns": wanted})]             # of hundreds of gigabytes


def test_a_repository_of_many_models_has_this_one_in_a_folder(tmp_path):
    tensors = build(NAME, control=None, **TINY).state_dict()
    for size in ("480p", "720p"):
        (tmp_path / "transformer" / size).mkdir(parents=True)
        save_file(tensors, tmp_path / "transformer" / size / "model.safetensors")
    for source in (tmp_path, tmp_path / "transformer" / "480p"):
        loaded = load(NAME, source, file="transformer/480p/model.safetensors", **TINY)
        assert all(torch.equal(value, tensors[key]) for key, value in loaded.state_dict().items())


def test_the_native_size_is_known_from_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "read", lambda stored: ((key, torch.empty(shape, device="meta"))
                                                       for key, (_, _, shape) in stored.items()))
    for name in OFFICIAL:
        loaded = load(name, hollow(name, tmp_path / "hollow.safetensors"), device="meta")
        assert loaded.spec == PRESETS[name] and all(p.is_meta for p in loaded.parameters())


def test_a_file_in_bf16_and_one_in_fp32_fill_models_of_both(official, tmp_path):
    name, tensors = official
    for stored in (torch.float32, torch.bfloat16):
        save_file({key: value.to(stored) for key, value in tensors.items()}, tmp_path / "x.safetensors")
        for dtype in (torch.float32, torch.bfloat16):
            loaded = load(name, tmp_path / "x.safetensors", dtype=dtype, **TINY)
            for key, value in loaded.state_dict().items():
                own = torch.float32 if loaded.fp32.search(key) else dtype               # its islands stay in fp32
                assert value.dtype == own and torch.equal(value, tensors[key].to(stored).to(own)), key


@torch.no_grad()
def test_bf16_weights_compute_what_fp32_weights_do(tmp_path):
    torch.manual_seed(1)
    exact = build(NAME, control=None, **TINY)
    for key, p in exact.named_parameters():
        p.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.1)
    save(exact, tmp_path / "x.safetensors", torch.float32)
    half = load(NAME, tmp_path / "x.safetensors", dtype=torch.bfloat16, **TINY)
    x, sigma, text = torch.randn(1, 16, 3, 8, 12), torch.rand(1, 3), {"text": torch.randn(1, 9, 64)}
    with torch.autocast("cpu", torch.bfloat16):
        v = half(x, sigma, text)
    assert v.dtype == torch.float32 and (v - exact(x, sigma, text)).norm() < 0.03 * v.norm()


def test_control_comes_with_the_file_and_unused_tensors_are_passed_over(tmp_path, monkeypatch):
    own = build(NAME, **TINY)
    own.control.rotation.data.normal_()
    save_file({**own.state_dict(), "vae.conv": torch.zeros(3)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(model.Wan, "official", staticmethod(lambda key: None if key.startswith("vae.") else key))
    assert torch.equal(load(NAME, tmp_path / "x.safetensors", **TINY).control.rotation, own.control.rotation)


# ---- What is refused -------------------------------------------------------------------------------------------------

def refuse(source, *words, name=NAME):
    with pytest.raises((ValueError, OSError)) as error:
        load(name, source, **TINY)
    for word in words:
        assert str(word) in str(error.value), error.value


def test_what_is_not_its_own_is_refused_by_file_and_key(official, tmp_path, monkeypatch):
    name, tensors = official
    key = list(tensors)[-1]
    shards = shard(tensors, tmp_path / "shards")
    cases = {"missing": {k: v for k, v in tensors.items() if k != key}, "misshapen": {**tensors, key: torch.zeros(3)},
             "surplus": {**tensors, "blocks.9.extra": torch.zeros(1)}}
    for case, content in cases.items():
        save_file(content, tmp_path / f"{case}.safetensors")
    monkeypatch.setattr(weights, "read", None)                                            # all this before a byte is read
    refuse(tmp_path / "missing.safetensors", "missing.safetensors", f"no tensor '{key}'", name, name=name)
    refuse(tmp_path / "surplus.safetensors", "surplus.safetensors", "'blocks.9.extra'", name, name=name)
    refuse(tmp_path / "misshapen.safetensors", "misshapen.safetensors", f"'{key}' is [3]", name, name=name)
    other = shards / "1-of-2.safetensors"
    save_file({k: v for k, v in list(tensors.items())[3::2]}, other)
    refuse(shards, shards, f"no tensor '{list(tensors)[1]}'", name=name)
    os.truncate(other, other.stat().st_size - 1)
    refuse(shards, other, "not a complete safetensors file", "fetch it again", name=name)
    other.unlink()
    refuse(shards, other, "does not exist, though its index names it", name=name)


def test_files_that_are_no_checkpoint_are_refused_by_name(tmp_path):
    (tmp_path / "text.safetensors").write_text("not a tensor in sight")
    (tmp_path / "none.safetensors").write_bytes(b"")
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.pth")
    for file in ("text.safetensors", "none.safetensors", "model.pth"):
        refuse(tmp_path / file, tmp_path / file, "not a complete safetensors file", "convert it")
    refuse(tmp_path / "gone.safetensors", "gone.safetensors", "does not exist")
    refuse("runs/gone.safetensors", "runs/gone.safetensors", "does not exist")          # a path, no repository of the hub


def test_folders_without_one_checkpoint_are_refused_by_name(tmp_path):
    refuse(tmp_path, tmp_path, "0 safetensors files", PRESETS[NAME].file)
    for file in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{file}.safetensors")
    refuse(tmp_path, tmp_path, "2 safetensors files", "give the file itself")
    for text in ("{", "{}", "[]", "null", '{"weight_map": []}', '{"weight_map": {"a": 3}}'):
        (tmp_path / "x.safetensors.index.json").write_text(text)
        refuse(tmp_path, "x.safetensors.index.json", "is not an index")


def test_a_tensor_that_is_there_twice_is_refused(tmp_path):
    tensors = {"a": torch.zeros(1), "b": torch.zeros(1)}
    save_file(tensors | {"model.diffusion_model.b": torch.ones(1)}, tmp_path / "x.safetensors")
    refuse(tmp_path / "x.safetensors", "'b' is there twice", "as 'model.diffusion_model.b'")
    shard(tensors, tmp_path / "two")
    save_file(tensors, tmp_path / "two" / "1-of-2.safetensors")
    refuse(tmp_path / "two", "'a' is there twice", "0-of-2.safetensors", "1-of-2.safetensors")


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path):
    save(build("tiny", layers=1), tmp_path / "x.safetensors")
    refuse(tmp_path / "x.safetensors", "made for the backbone tiny", "give --backbone tiny")
    save_file(build("wan2.2-5b", control=None, **TINY).state_dict(), tmp_path / "five.safetensors")     # says nothing
    refuse(tmp_path / "five.safetensors", "five.safetensors", "' is [", f"is it a checkpoint of {NAME}?")


def test_a_repository_that_cannot_be_fetched_is_named(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    for name in OFFICIAL:                                                               # a version is no file ending
        with pytest.raises(OSError, match=f"{PRESETS[name].source} is no local folder and could not be .*no network"):
            load(name)
    assert weight_files(default_source(PRESETS["tiny"]), PRESETS["tiny"])[0].exists()


# ---- Memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys, torch, model, weights
def anonymous():                                                                        # MB of memory that no file backs
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
fields, path, read, seen = eval(sys.argv[1]), sys.argv[2], weights.read, []
def watched(stored):
    for part in read(stored):
        yield part
        seen.append(anonymous())
weights.read = watched
model.load("wan2.1-1.3b", path, dtype=torch.bfloat16, **fields | dict(layers=1))        # once for what torch itself takes
for dtype in (torch.float32, torch.bfloat16):
    seen.clear()
    before = anonymous()
    loaded = model.load("wan2.1-1.3b", path, dtype=dtype, **fields)
    total = sum(float(p.sum()) for p in loaded.parameters())
    print(max(seen) - before, anonymous() - before, sum(p.nbytes for p in loaded.parameters()) / 2 ** 20)
    del loaded
model.describe("wan2.2-5b")
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


def test_weights_are_never_in_memory_twice(tmp_path):
    fields = dict(dim=1024, heads=8, ffn=4096, layers=4)
    path = hollow(NAME, tmp_path / "big.safetensors", **fields)                         # 330 MB, 17 in the largest tensor
    hollow(NAME, path.with_name("one.safetensors"), **fields | dict(layers=1))
    script = MEASURE.replace("path, dtype=torch.bfloat16", "path.replace('big', 'one'), dtype=torch.bfloat16")
    done = subprocess.run([sys.executable, "-c", script, repr(fields), path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same, converted, (highest,) = ([float(n) for n in line.split()] for line in done.stdout.splitlines())
    assert same[2] > 300 and max(same[:2]) < 20                                         # fp32 from fp32: the file's pages
    assert converted[2] > 140 and max(converted[:2]) < converted[2] + 40                # bf16 from fp32: one copy
    assert highest < 3000                                                               # `describe` made no 20 GB model


# ---- Passes over blocks ----------------------------------------------------------------------------------------------

class Count(TorchDispatchMode):
    """How often operators run, by what their name contains."""

    def __init__(self, **names):
        super().__init__()
        self.names, self.seen = names, dict.fromkeys(names, 0)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        for name, part in self.names.items():
            self.seen[name] += part in str(op) and "backward" not in str(op)
        return op(*args, **kwargs or {})


def gradients(net, seed=0):
    """Of a loss on one batch, by parameter; `net` is in bf16 compute, as in training."""
    g = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, net.spec.channels, 3, 4, 6, generator=g), torch.randn(2, 9, net.spec.text_dim, generator=g)
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        v = net(x, torch.rand(2, 3, generator=g), {"text": text})
    v.square().mean().backward()
    return {key: p.grad for key, p in net.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params={PRESETS[name].arch: name for name in OFFICIAL}.values())
def net(request):
    torch.manual_seed(2)
    net = build(request.param, control=None, **TINY)
    for p in net.parameters():
        p.data.normal_(0, 0.1)
    return net


def test_checkpointing_repeats_the_cheap_work_and_changes_no_gradient(net):
    names, calls = dict(attention="scaled_dot_product", linear="aten.addmm"), {}
    for kind in ("none", "selective", "full"):
        tried = copy.deepcopy(net)
        if kind != "none":
            checkpoint_blocks(tried, keep_attention=kind == "selective")
        with Count(**names) as count:
            found = gradients(tried)
        calls[kind] = count.seen
        expected = gradients(net)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected), kind
    assert calls["selective"]["attention"] == calls["none"]["attention"]                # kept
    assert calls["full"]["attention"] > calls["none"]["attention"]                      # computed twice
    assert calls["selective"]["linear"] == calls["full"]["linear"] > 1.3 * calls["none"]["linear"]


def test_compiled_blocks_obey_the_checkpoint_and_share_one_compilation(net):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    graphs = {"forward": [], "backward": []}

    def note(where):
        return lambda graph, _: graphs[where].append(str(graph.code)) or make_boxed_func(graph.forward)

    torch._dynamo.reset()
    tried = compile_blocks(checkpoint_blocks(copy.deepcopy(net)), fullgraph=True,
                           backend=aot_autograd(fw_compiler=note("forward"), bw_compiler=note("backward")))
    found, expected = gradients(tried), gradients(net)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=0.05 * float(value.abs().max()), rtol=0)
    assert len(graphs["forward"]) == len(graphs["backward"]) == 1                       # for all blocks
    assert "scaled_dot_product_flash_attention_for_cpu_backward" in graphs["backward"][0]
    assert "scaled_dot_product_flash_attention_for_cpu.default" not in graphs["backward"][0]


def test_attention_asks_for_the_fastest_kernel_on_a_gpu_and_leaves_the_setting_alone(monkeypatch):
    q = torch.randn(1, 2, 5, 8)
    assert torch.equal(attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
    order = lambda: [SDPBackend(i) for i in torch._C._get_sdp_priority_order()]
    before, seen = order(), []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(order()))
    attention(type("OnGPU", (), {"is_cuda": True})(), q, q)
    assert seen[0][:4] == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                           SDPBackend.MATH]
    assert order() == before


def test_a_local_folder_goes_before_a_repository_of_its_name(tmp_path, monkeypatch):
    def unasked(*args, **kwargs):
        raise AssertionError("the hub was asked")
    monkeypatch.setattr("huggingface_hub.snapshot_download", unasked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert weights.fetched("org/name", "*").resolve() == tmp_path / "org" / "name"


def test_defaults_are_as_before_behind_what_is_made_in_bf16():
    with pytest.raises(KeyError), common.defaults("meta", torch.bfloat16):
        assert torch.empty(1).dtype == torch.bfloat16 and torch.empty(1).is_meta
        raise KeyError
    assert torch.empty(1).dtype == torch.float32 and not torch.empty(1).is_meta
