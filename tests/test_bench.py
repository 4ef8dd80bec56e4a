"""The one place that measures: operations agree with a counter and with published counts; the command runs at tiny size."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
from common import parse
from model import PRESETS, Spec, build, flops, preset

OFFICIAL = [name for name, spec in PRESETS.items() if "/" in spec.source]


@pytest.mark.parametrize("name", OFFICIAL)
def test_operations_agree_with_a_counter(name):
    net = build(name, control=None, **bench.TINY, refiner=3)
    x, sigma, text = bench.example(net.spec, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net(x, sigma, {"text": text})
    counted = counter.get_flop_counts()["Global"]
    attention = counted.pop(torch.ops.aten.bmm)
    rows, columns = net.spec.grid(*net.spec.size[1:])
    ours = flops(net.spec, x.shape[2], rows, columns, text.shape[1])
    assert ours["linear"] == sum(counted.values()) and ours["self_attention"] + ours["text_attention"] == attention


HUNYUAN = Spec("", dim=2048, heads=16, ffn=8192, layers=54, channels=32, stride=(4, 16, 16), size=(121, 480, 848),
               fps=24, shift=5, guidance=6, text_dim=3584, text_len=300, patch=(1, 1, 1), arch="hunyuan")
LTX = Spec("", dim=4096, heads=32, ffn=16384, layers=48, channels=128, stride=(8, 32, 32), size=(121, 480, 832),
           fps=24, shift=6, guidance=3, text_len=1024, patch=(1, 1, 1), arch="ltx")


@pytest.mark.parametrize("spec, expected", [                                # TFLOP: linear, among tokens, with text
    (preset("wan2.1-1.3b"), (82.1, 197.8, 3.1)), (preset("wan2.2-5b"), (237.5, 274.3, 5.1)),
    (HUNYUAN, (269.7, 1087.9, 0.0)), (LTX, (144.2, 30.6, 5.0))])
def test_operations_at_the_native_sizes(spec, expected):
    found = flops(spec, spec.latent_frames(spec.size[0]), *spec.grid(*spec.size[1:])).values()
    assert tuple(round(n / 1e12, 1) for n in found) == expected


def test_random_models_are_stored_as_loaded_ones_are():
    net = bench.random_model("wan2.2-5b", torch.device("cpu"), torch.bfloat16, **bench.TINY)
    for key, p in net.named_parameters():
        assert p.requires_grad and p.std() > 0.01
        assert p.dtype == (torch.float32 if net.fp32.search(key) else torch.bfloat16)


@pytest.mark.parametrize("mode, per_backbone", [
    ("forward", ["ours eager", "diffusers eager"]),
    ("train", ["ours eager selective", "ours eager full", "diffusers eager full"])])
def test_every_row_is_printed_and_written(mode, per_backbone, tmp_path, capsys):
    pytest.importorskip("diffusers")
    out = tmp_path / "rows.json"
    bench.main(mode, parse(bench.Config, ["--tiny", "--no-compile", "--repeats", "2", "--out", str(out)]))
    written, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert {"commit", "device", "torch", "ceilings"} <= written.keys() and min(written["ceilings"].values()) > 0
    names = OFFICIAL if mode == "forward" else ["wan2.1-1.3b", "wan2.2-5b"]
    rows = [f"{r['who'].split()[0]} {r['how']}" for r in written["rows"]]
    assert rows == per_backbone * len(names)
    assert [r["backbone"] for r in written["rows"]][::len(per_backbone)] == names
    for r in written["rows"]:
        assert r["ms"] > 0 and [len(times) for times in r["repetitions"]] == [2, 2] and r["ceiling_ms"] > 0
        row = f"| {r['backbone']} | 9, 64, 96 | {r['who']} | {r['how']} |"
        line, repeated = [line for line in printed.splitlines() if row in line]           # at once, and in the table
        assert line == repeated and f" {r['ms']:.1f} | " in line and f" {r['ceiling_ms'] / r['ms']:.0%} |" in line


def test_the_ceiling_is_the_sum_of_both_kinds_of_work_at_their_rates(monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *a: {"ms": 1.0})
    monkeypatch.setattr(bench, "flops", lambda *a: dict(linear=3e9, self_attention=5e9, text_attention=1e9))
    rates = dict(matmul=1.0, attention=2.0, attention_train=4.0)
    cfg = parse(bench.Config, ["--tiny"])
    ceiling = [bench.row(mode, cfg, torch.device("cpu"), rates, "wan2.2-5b", "ours", "", lambda *a: (None, {}))["ceiling_ms"]
               for mode in ("forward", "train")]
    assert ceiling == [3 + 6 / 2, 3 * 3 + 3.5 * 6 / 4]                                  # ms; backward is twice and 2.5 times


def test_rounded_linears_have_rows_of_their_own_with_their_size_and_error(capsys):
    flags = ["--tiny", "--no-compile", "--no-peer", "--backbone", "wan2.2-5b", "--repeats", "1", "--quant", "packed"]
    plain, packed = bench.main("forward", parse(bench.Config, flags))
    assert (plain["who"], packed["who"]) == ("ours", "ours, packed") and "snr" not in plain
    whole = bench.random_model("wan2.2-5b", torch.device("cpu"), torch.float32, **bench.TINY)
    assert 0.1 < packed["gib"] * 2 ** 30 / sum(4 * p.numel() for p in whole.parameters()) < 0.6        # linears are most
    assert 15 < packed["snr"] < 35                                                      # 4 bits of random weights
    assert "weights GiB | dB |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="'packd'"):
        bench.main("forward", parse(bench.Config, [*flags[:-1], "packd"]))


def test_out_of_memory_is_a_row_and_not_the_end(monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(bench, "our_call", full)
    rows = bench.main("forward", parse(bench.Config, ["--tiny", "--no-compile", "--no-peer", "--backbone", "wan2.2-5b"]))
    assert [r["ms"] for r in rows] == [None] and "| ours | eager | out of memory |" in capsys.readouterr().out


def test_without_a_gpu_it_refuses_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="this measures a GPU and there is none; --backbone tiny fits a CPU") as error:
        bench.main("forward", parse(bench.Config, []))
    assert "\n" not in str(error.value)
