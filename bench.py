"""Speed and memory of the backbones: ours and diffusers' in the same run, against what the GPU was seen to do.

    python bench.py forward                                     # the official backbones at native size, one clip
    python bench.py train                                       # forward and backward with activation checkpointing
    python bench.py forward --backbone tiny --no-compile        # the embedded world's network, on a CPU too
    python bench.py plan --stage 2 --gpus 8 --shard fsdp        # what a training step will take, by arithmetic: plan.py

Weights are random. A row's ceiling is its linear layers and its attention, once, at the best rates seen in the run.
"""

import gc
import json
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

import plan
import qat
from common import autocast, defaults, fail, one_line_errors, parse, provenance, require_positive, setup, timed
from parallel import checkpoint_blocks, compile_blocks
from block import FASTEST, attention
from model import PRESETS, build_on, flops, preset
from quant import snr

TEXT = {"hunyuan": 300}                     # valid text tokens of a usual prompt; other backbones always see text_len
TINY = dict(dim=64, heads=4, ffn=128, layers=2, freq_dim=32, text_dim=64, rope_dims=(4, 6, 6), size=(9, 64, 96))
PATIENCE = 4000                             # ms: a repetition ends after the call that passes it
GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32        # that networks compute in


@dataclass(frozen=True)
class Config:
    """Measure the backbones."""
    backbone: str = ""          # a preset; without it all official ones (train: both of Wan)
    eager: bool = True          # without compiling
    compile: bool = True        # with compiled blocks
    peer: bool = True           # also diffusers, if it is installed
    quant: str = ""             # further rows of ours with such linears, separated by commas: packed, fp8, fp8-te, te
    repeats: int = 3            # timed calls in each of two repetitions; fewer where calls are slow
    tiny: bool = False          # tiny sizes, on a CPU too: shows that it runs, measures nothing
    out: str = ""               # file for the rows, as JSON

    def __post_init__(self):
        require_positive(self, "repeats")
        preset(self.backbone or "tiny")                 # refuses an unknown one


# ---- Timing ----------------------------------------------------------------------------------------------------------

def measure(call, device, repeats):
    """Median time of a call after a first one, which compiles, and those of two repetitions; peak memory of the GPU."""
    torch.cuda.reset_peak_memory_stats() if GPU else None
    (first, _), repetitions = timed(call, device), ([], [])
    for times in repetitions:
        while len(times) < repeats and sum(times) < PATIENCE:
            times.append(timed(call, device)[0])
    return {"ms": statistics.median(sum(repetitions, [])), "repetitions": repetitions, "first_s": first / 1000,
            "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30}


def ceilings(device, tiny):
    """The best rates in TFLOP/s: matrix multiplication, attention forward, attention forward and backward."""
    n, heads, tokens, width = (64, 2, 64, 16) if tiny else (8192, 24, 32768, 128) if GPU else (2048, 6, 288, 32)
    a, b = torch.randn(2, n, n, device=device, dtype=DTYPE)
    q, k, v, g = torch.randn(4, 1, heads, tokens, width, device=device, dtype=DTYPE)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    work = 4 * heads * width * tokens ** 2                              # and 2.5 times as much backward
    calls = {"matmul": (2 * n ** 3, lambda: a @ b), "attention": (work, lambda: attention(q, k, v)),
             "attention_train": (3.5 * work, lambda: torch.autograd.grad(attention(*leaves), leaves, g))}
    return {name: flop / measure(call, device, 20)["ms"] / 1e9 for name, (flop, call) in calls.items()}


# ---- Ours ------------------------------------------------------------------------------------------------------------

def random_model(name, device, dtype, **fields):
    """A backbone with random weights made in place, the fp32 ones in fp32; there is never a second copy."""
    model = build_on(device, dtype, name, control=None, **fields)
    for key, p in model.named_parameters():             # so that signals keep their size
        std = p.shape[1:].numel() ** -0.5 if p.ndim > 1 else 0.02
        p.data.normal_(std=std).add_(p.ndim == 1 and "norm" in key and key.endswith("weight"))
    return model


def example(spec, device):
    """Latents [1, C, T, H, W], noise levels [1, T] and text states [1, S, E] of one clip of the native size."""
    frames, height, width = spec.size
    T, S = spec.latent_frames(frames), TEXT.get(spec.arch, spec.text_len)
    x = torch.randn(1, spec.channels, T, height // spec.stride[1], width // spec.stride[2], device=device)
    return x, torch.full((1, T), 0.7, device=device), torch.randn(1, S, spec.text_dim, device=device)


def our_call(name, device, fields, compiled, checkpointing, quant="none"):
    """A forward with weights in DTYPE, with `checkpointing` a forward and backward with fp32 ones, as we train.

    With `quant` linears are rounded; returned are then also GiB of all weights and dB of the velocity over its error.
    """
    model = random_model(name, device, torch.float32 if checkpointing else DTYPE, **fields)
    model.requires_grad_(bool(checkpointing))
    x, sigma, text = example(model.spec, device)

    def velocity(train=checkpointing):
        with autocast(device), torch.set_grad_enabled(bool(train)):
            return model(x, sigma, {"text": text})
    exact = velocity(False)
    size = sum(t.nbytes for t in qat.apply(model, quant).state_dict().values()) / 2 ** 30
    facts = {} if quant == "none" else {"gib": size, "snr": snr(exact, velocity(False))}
    if checkpointing:
        checkpoint_blocks(model, keep_attention=checkpointing == "selective")
    if compiled:
        compile_blocks(model, fullgraph="te" not in quant.split("-"))       # Transformer Engine is not traced
    return partial(step, model, velocity, checkpointing), facts


def step(model, velocity, train):
    v = velocity()
    if train:
        v.float().square().mean().backward()
        model.zero_grad(set_to_none=True)


# ---- diffusers -------------------------------------------------------------------------------------------------------

def wan_peer(library, p, x, text):
    """WanTransformer3DModel, with one timestep per sample: its fastest way, for the 5B too."""
    model = library.WanTransformer3DModel(
        num_attention_heads=p.heads, attention_head_dim=p.dim // p.heads, in_channels=p.channels, ffn_dim=p.ffn,
        out_channels=p.channels, text_dim=p.text_dim, freq_dim=p.freq_dim, num_layers=p.layers)
    return model, model.blocks, dict(hidden_states=x, timestep=x.new_full([1], 700), encoder_hidden_states=text)


def hunyuan_peer(library, p, x, text):
    """HunyuanVideo15Transformer3DModel, with text, glyphs and image padded as its pipeline pads them, and masks."""
    model = library.HunyuanVideo15Transformer3DModel(
        in_channels=2 * p.channels + 1, out_channels=p.channels, num_attention_heads=p.heads, mlp_ratio=p.ffn / p.dim,
        attention_head_dim=p.dim // p.heads, num_layers=p.layers, text_embed_dim=p.text_dim, rope_axes_dim=p.rope_dims)
    missing = p.text_len - text.shape[1]
    return model, model.transformer_blocks, dict(
        hidden_states=F.pad(x, (0, 0, 0, 0, 0, 0, 0, p.channels + 1)), timestep=x.new_full([1], 700),
        encoder_hidden_states=F.pad(text, (0, 0, 0, missing)), image_embeds=x.new_zeros(1, 729, 1152),
        encoder_attention_mask=F.pad(x.new_ones(1, text.shape[1]), (0, missing)),
        encoder_hidden_states_2=x.new_zeros(1, 256, 1472), encoder_attention_mask_2=x.new_zeros(1, 256))


def ltx_peer(library, p, x, text):
    """LTX2VideoTransformer3DModel: it always has its audio tower, which is given one token here."""
    width, (_, C, T, H, W) = p.dim // p.heads, x.shape
    model = library.LTX2VideoTransformer3DModel(
        in_channels=C, out_channels=C, num_attention_heads=p.heads, attention_head_dim=width, cross_attention_dim=p.dim,
        audio_num_attention_heads=p.heads, audio_attention_head_dim=width // 2, audio_cross_attention_dim=p.dim // 2,
        num_layers=p.layers, gated_attn=True, cross_attn_mod=True, audio_gated_attn=True, audio_cross_attn_mod=True,
        perturbed_attn=True, use_prompt_embeddings=False, rope_type="split")
    time = x.new_full([1], 700)
    return model, model.transformer_blocks, dict(
        hidden_states=x.flatten(2).mT, encoder_hidden_states=text, fps=p.fps, sigma=time,
        timestep=time.expand(1, T * H * W), audio_timestep=time, audio_hidden_states=x.new_zeros(1, 1, 128),
        audio_encoder_hidden_states=x.new_zeros(1, 1, p.dim // 2), num_frames=T, height=H, width=W, audio_num_frames=1,
        isolate_modalities=True)


def peer_call(name, device, fields, compiled, checkpointing):
    """The same work by diffusers, all in what we compute in, attention by the same kernels."""
    import diffusers
    spec = preset(name, **fields)
    x, _, text = (y.to(DTYPE) for y in example(spec, device))
    make = {"wan": wan_peer, "hunyuan": hunyuan_peer, "ltx": ltx_peer}[spec.arch]
    with defaults(device, DTYPE):
        model, blocks, inputs = make(diffusers, spec, x, text)
    if checkpointing:
        model.train().enable_gradient_checkpointing()
    for block in blocks if compiled else ():
        block.compile(dynamic=False)
    velocity = torch.set_grad_enabled(bool(checkpointing))(lambda: model(**inputs, return_dict=False)[0])
    call = partial(step, model, velocity, checkpointing)
    return sdpa_kernel(FASTEST, set_priority=True)(call) if GPU else call, {}


# ---- Rows ------------------------------------------------------------------------------------------------------------

def jobs(mode, cfg):
    """(backbone, who, how, maker of the call to measure), in the order of the table."""
    makers = {"ours": our_call}
    if cfg.peer and find_spec("diffusers"):
        makers[f"diffusers {version('diffusers')}"] = peer_call
    elif cfg.peer:
        print("diffusers is not installed: no rows of it")
    makers |= {f"ours, {quant}": partial(our_call, quant=quant) for quant in cfg.quant.split(",") if quant}
    official = [name for name, p in PRESETS.items() if "/" in p.source and (mode == "forward" or p.arch == "wan")]
    for name in [cfg.backbone] if cfg.backbone else official:
        for how in ["eager"] * cfg.eager + ["compiled"] * cfg.compile:
            for who, make in makers.items():
                for kept in [""] if mode == "forward" else ["selective", "full"] if "ours" in who else ["full"]:
                    yield name, who, f"{how} {kept}".strip(), partial(make, compiled=how[0] == "c", checkpointing=kept)


def row(mode, cfg, device, rates, name, who, how, make):
    """One measurement; its model lives as long as this call."""
    fields = TINY if cfg.tiny else {}
    spec = preset(name, **fields)
    work = flops(spec, spec.latent_frames(spec.size[0]), *spec.grid(*spec.size[1:]), TEXT.get(spec.arch))
    linear, scores, rate = work["linear"], work["self_attention"] + work["text_attention"], rates["attention"]
    if mode == "train":
        linear, scores, rate = 3 * linear, 3.5 * scores, rates["attention_train"]
    done = {"mode": mode, "backbone": name, "size": list(spec.size), "who": who, "how": how,
            "tflop": (linear + scores) / 1e12, "ceiling_ms": (linear / rates["matmul"] + scores / rate) / 1e9,
            "linear_ms": linear / rates["matmul"] / 1e9}
    try:
        call, facts = make(name, device, fields)
        return done | facts | measure(call, device, cfg.repeats)
    except torch.OutOfMemoryError:
        return done | {"ms": None}


def table(rows):
    """The rows in markdown."""
    more = any("snr" in r for r in rows)
    lines = ["| backbone | frames, height, width | who | how | ms | TFLOP/s | of ceiling | peak GiB | first call, s |" +
             " weights GiB | dB |" * more, "|---" * 4 + "|---:" * (5 + 2 * more) + "|"]
    for r in rows:
        cells = ["out of memory", *"----"] if r["ms"] is None else [
            f"{r['ms']:.1f}", f"{1000 * r['tflop'] / r['ms']:.3g}", f"{r['ceiling_ms'] / r['ms']:.0%}",
            f"{r['peak_gib']:.1f}", f"{r['first_s']:.1f}"]
        cells += [f"{r['gib']:.2f}", f"{r['snr']:.1f}"] if "snr" in r else ["-", "-"] * more
        lines.append("| " + " | ".join([r["backbone"], str(r["size"])[1:-1], r["who"], r["how"], *cells]) + " |")
    return lines


def main(mode, cfg):
    device = setup()
    if not GPU and not cfg.tiny and "/" in preset(cfg.backbone or "wan2.1-1.3b").source:
        fail("this measures a GPU and there is none; --backbone tiny fits a CPU, --tiny shows that it runs")
    rates = ceilings(device, cfg.tiny)
    print(f"{provenance()['device']}, torch {torch.__version__}; TFLOP/s, at the best:",
          ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items()))
    rows = []
    for job in jobs(mode, cfg):
        gc.collect()                                    # the last model
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        rows.append(row(mode, cfg, device, rates, *job))
        print(table(rows)[-1], flush=True)
        if cfg.out:
            Path(cfg.out).write_text(json.dumps({**provenance(), "ceilings": rates, "rows": rows}, indent=1) + "\n")
    print("", *table(rows), sep="\n")
    return rows


if __name__ == "__main__":
    commands = {"forward": (main, Config), "train": (main, Config), "plan": (plan.main, plan.Config)}
    run, config = commands.get("".join(sys.argv[1:2])) or sys.exit("usage: python bench.py forward|train|plan [flags]")
    with one_line_errors():
        run(sys.argv[1], parse(config, sys.argv[2:]))
