"""Quantization as a pass over a finished model: linears in 4 bits (NVFP4, see nvfp4.py) or 8 (FP8).

    emulate  any machine   4-bit rounding as Blackwell does it, straight-through gradients: quantization-aware training
    packed   any machine   4-bit weights in memory, 16-bit matmuls: saves memory, not time
    te       Blackwell     4-bit weights and activations, multiplied by Transformer Engine: saves time too
    fp8      Hopper        8-bit matmuls, forward and backward, traced by the compiler (see fp8.py): saves time
    fp8-te   Ada, Hopper   the same by Transformer Engine, whose modules the compiler does not see
    auto                   te where the machine has it, else packed; prints its choice

Train for what you deploy: `emulate` for packed, with activations for te. What cannot run here stops with the reason.

    python quant.py student.safetensors --mode packed --out student-nvfp4.safetensors
"""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import fp8
import weights
from nvfp4 import BLOCK, EmulatedLinear, PackedLinear, QuantizedLinear, check, rounded, save
from nvfp4 import dequantize, fake_quant, quantize  # noqa: F401, to be had from here

LAYERS = {                                              # what is worth it, by the names of the official checkpoints
    "wan": r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])",
    "hunyuan": r"double_blocks\.\d+\.(img|txt)_(attn_(q|k|v|proj)|mlp\.fc[12])",
    "ltx": r"transformer_blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2))"}
MODULATION = r"double_blocks\.\d+\.(img|txt)_mod\.linear"       # a third of HunyuanVideo; sees one row a frame
DIVISORS = {"te": (16, 32), "fp8": (16, 16), "fp8-te": (16, 16)}        # of rows and columns of a weight
LOW = 19.5                                              # dB of a weight below which it is named; Gaussian ones: 20.4


# ---- Transformer Engine ----------------------------------------------------------------------------------------------

class EngineLinear(QuantizedLinear):
    """Computed by Transformer Engine, whose own module borrows our parameters at each call."""

    def __init__(self, layer, recipe):
        super().__init__(layer)
        import transformer_engine.pytorch as te
        engine = te.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None,
                           params_dtype=layer.weight.dtype, device="meta")
        self.recipe, self.autocast, self.hidden, self.cast = recipe, te.autocast, [engine], None    # [] hides a module
        self.low_precision = torch.compiler.disable(self.low_precision)

    def low_precision(self, x):
        engine, rows = self.hidden[0], x.shape[:-1].numel()
        engine._parameters.update(self._parameters)                                     # FSDP makes new ones
        first = None                                    # None: the weight is cast at every call
        if not self.weight.requires_grad and not self.recipe.delayed():                 # True, then False: once
            now = (self.weight.data_ptr(), self.weight._version)
            first, self.cast = now != self.cast, now
        h = x.reshape(rows, -1)
        h = F.pad(h, (0, 0, 0, -rows % 32)) if rows % 32 else h                         # whole groups of rows only
        with self.autocast(enabled=True, recipe=self.recipe):
            y = engine(h, is_first_microbatch=first)
        return y[:rows].reshape(*x.shape[:-1], -1)


class Unavailable(OSError, RuntimeError):
    """This machine cannot run the mode."""


def unavailable(mode):
    """Why this machine cannot run `mode`, in one line; empty when it can. Only modes te import the engine."""
    if mode not in DIVISORS:
        return ""
    least, what = ((10, 0), "NVFP4") if mode == "te" else ((8, 9), "FP8")
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is visible"
    if torch.cuda.get_device_capability() < least:
        return (f"device compute capability {least[0]}.{least[1]} or higher required for {what} execution, but "
                f"{torch.cuda.get_device_name()} has {'.'.join(map(str, torch.cuda.get_device_capability()))}")
    if mode == "fp8":
        return fp8.refusal()
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError, AssertionError, RuntimeError) as error:
        return (f"Transformer Engine cannot be imported ({repr(error).splitlines()[0]}); install the extra nvfp4: "
                "pip install --no-build-isolation 'transformer_engine[pytorch]'")
    return (te.is_nvfp4_available if mode == "te" else te.is_fp8_available)(return_reason=True)[1]


def settle(mode):
    """`auto` decided, and printed; a mode that cannot run here refused (Unavailable, ValueError)."""
    if mode == "auto":
        mode = "packed" if (reason := unavailable("te")) else "te"
        print(f"quantization auto: {mode}" + (f", for te cannot run here: {reason}" if reason else ""))
    if mode not in ("emulate", "packed", *DIVISORS):
        raise ValueError(f"unknown quantization mode '{mode}'; choose emulate, packed, te, fp8, fp8-te or auto")
    if reason := unavailable(mode):
        raise Unavailable(f"quantization mode {mode} cannot run here: {reason}; mode packed runs anywhere")
    return mode


def engine_recipe(mode, tile, delayed):
    """How Transformer Engine scales. NVFP4 in rows: for inference and QAT; in 16x16 tiles: all training in 4 bits."""
    from transformer_engine.common import recipe
    if mode == "fp8-te":
        return recipe.DelayedScaling() if delayed else recipe.Float8CurrentScaling()
    if tile == (1, BLOCK):
        return recipe.NVFP4BlockScaling(disable_rht=True, disable_stochastic_rounding=True,
                                        disable_2d_quantization=True, backward_override="dequantized")
    consumer = torch.cuda.get_device_capability()[0] == 12                              # without kernels for two parts
    return recipe.NVFP4BlockScaling(disable_rht=consumer, disable_stochastic_rounding=consumer)


# ---- The pass --------------------------------------------------------------------------------------------------------

def choose(model, mode, keep=(), layers=None, edge_blocks=0):
    """Sorted names of the nn.Linears to quantize: `layers` matches the whole name, no expression of `keep` a part.

    `layers` is the list of the backbone (LAYERS); `edge_blocks` keeps so many blocks at both ends.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    layers = layers or "|".join([*LAYERS.values(), *([MODULATION] if mode == "packed" else [])])
    for pattern in keep:
        if not any(re.search(pattern, name) for name in linears):
            raise ValueError(f"nothing to keep: no linear has a name with '{pattern}'")
    names = [name for name in linears if re.fullmatch(layers, name)]
    if edge_blocks:
        block = {name: int(re.search(r"blocks\.(\d+)", name)[1]) for name in names}
        names = [name for name in names if edge_blocks <= block[name] <= max(block.values()) - edge_blocks]
    if not (names := [name for name in names if not any(re.search(pattern, name) for pattern in keep)]):
        raise ValueError("no linear is left to quantize; see `layers`, `keep` and `edge_blocks`")
    return sorted(names)


def maker(mode, activations=False, tile=(1, BLOCK), delayed=False):
    """What makes a quantized layer of an nn.Linear, in a mode that `settle` returned."""
    if (activations and mode != "emulate") or (delayed and mode != "fp8-te") or (tile != (1, BLOCK) and "fp8" in mode):
        raise ValueError(f"mode {mode} does not take these options: activations {activations} is for emulate (te and "
                         f"fp8 always round them, packed never), delayed {delayed} for fp8-te, tile {tile} for NVFP4")
    if mode in ("packed", "emulate", "fp8"):
        return {"packed": lambda layer: PackedLinear(layer, tile), "fp8": fp8.replace,
                "emulate": lambda layer: EmulatedLinear(layer, tile, activations)}[mode]
    recipe = engine_recipe(mode, tile, delayed)
    return lambda layer: EngineLinear(layer, recipe)


def quantize_model(model, mode, keep=(), layers=None, edge_blocks=0, **options):
    """Replace linears of `model` in place; returns their sorted names. `options` go to `maker`.

    Call it before FSDP, LoRA adapters and compilation. Activations are rounded in runs of 16, whatever the `tile`.
    """
    mode = settle(mode)
    if any(isinstance(module, (QuantizedLinear, PackedLinear, fp8.StoredLinear)) for module in model.modules()):
        raise ValueError("the model is quantized already")
    make, names = maker(mode, **options), choose(model, mode, keep, layers, edge_blocks)
    for name in names:
        check(model.get_submodule(name).weight.shape, options.get("tile", (1, BLOCK)), name,
              DIVISORS.get(mode, (1, BLOCK)))
    for name in tqdm(names, f"quantize, {mode}", disable=None, leave=False):
        model.set_submodule(name, make(model.get_submodule(name)))
    if options.get("delayed"):
        one_region(model, model.get_submodule(names[0]))
    return names


def one_region(model, layer):
    """Delayed scaling has its scales from earlier training steps; a step is an outermost region: a whole forward."""
    regions = []

    def enter(module, args):
        regions.append(layer.autocast(enabled=True, recipe=layer.recipe))
        regions[-1].__enter__()

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(lambda *_: regions.pop().__exit__(None, None, None), always_call=True)


@contextlib.contextmanager
def full_precision(model):
    """Within it, layers that keep their full weights are plain linears: the teacher's pass of self-distillation."""
    layers = [module for module in model.modules() if isinstance(module, (QuantizedLinear, fp8.StoredLinear))]
    if not layers or not all(isinstance(layer, QuantizedLinear) for layer in layers):
        raise ValueError("the model has no layer that could be switched to full precision (stored ones cannot)")
    before = [layer.quantized for layer in layers]
    try:
        for layer in layers:
            layer.quantized = False
        yield
    finally:
        for layer, was in zip(layers, before):
            layer.quantized = was


# ---- Losses of quantization-aware training ---------------------------------------------------------------------------

def self_distillation(v_student, v_teacher, sigma, flow=1.0, x0=0.25, mask=None):
    """Mean over samples of sum((flow + x0 sigma^2) d^2) / sum(v_teacher^2), d = v_student - v_teacher: on v and on x0.

    The teacher is the same network under `full_precision`, at the same x_t and sigma ([B] or [B, T]); velocities are
    [B, C, T, H, W], and only the frames of `mask` [B, T] count. Returns the loss and what to log, SNR in dB included.
    """
    m = 1.0 if mask is None else mask[:, None, :, None, None].float()
    v_teacher, s = v_teacher.detach().float(), sigma.reshape(len(sigma), 1, -1, 1, 1).float()
    total = lambda x: (m * x).flatten(1).sum(1)                                         # [B]
    d2, power = (v_student.float() - v_teacher).square(), total(v_teacher.square()).clamp_min(1e-12)
    loss = (total((flow + x0 * s.square()) * d2) / power).mean()
    snr = -10 * torch.log10((total(d2.detach()).sum() / power.sum()).clamp_min(1e-12))
    return loss, {"quant": loss.detach(), "quant_snr": snr}


def softmax_distillation(v_student, v_teacher, x_t, sigma, flow=1.0, x0=0.25, mask=None):
    """BiWM's form: KL(softmax(teacher) || softmax(student)) over the channels of v and of x0 = x_t - sigma v.

    For comparison only. Latents are no logits: an offset common to all channels, such as a tint, costs nothing here.
    """
    m = torch.ones_like(x_t[:, 0]) if mask is None else mask[:, :, None, None].expand_as(x_t[:, 0])     # [B, T, H, W]
    s, loss = sigma.reshape(len(sigma), 1, -1, 1, 1), 0.0
    for weight, student, teacher in ((flow, v_student, v_teacher), (x0, x_t - s * v_student, x_t - s * v_teacher)):
        p, q = (F.log_softmax(y.float(), 1) for y in (teacher.detach(), student))
        loss = loss + weight * (((p.exp() * (p - q)).sum(1) * m).flatten(1).sum(1) / m.flatten(1).sum(1)).mean()
    return loss, {"quant": loss.detach()}


# ---- Report and command ----------------------------------------------------------------------------------------------

def snr(y, z):
    """Signal-to-noise ratio of `z` for `y`, in dB."""
    y, z = y.detach().float(), z.detach().float()
    return float(10 * torch.log10(y.square().sum() / (y - z).square().sum().clamp_min(1e-30)))


@torch.no_grad()
def report(model, names, make, run, to=rounded):
    """{name: {"weight": dB, "output": dB}} of linears that are still unquantized, each quantized by itself: `make` is
    what `maker` returns, `to` rounds a weight, `run()` puts a calibration batch through the model."""
    rows, hooks = {}, []
    for name in tqdm(names, "weights", disable=None, leave=False):
        layer = model.get_submodule(name)
        rows[name] = {"weight": snr(layer.weight, to(layer.weight))}

        def measure(layer, args, y, row=rows[name]):
            row["output"] = snr(y, make(layer)(*args))
        hooks.append(layer.register_forward_hook(measure))
    run()
    for hook in hooks:
        hook.remove()
    return rows


def draw(rows, path, title):
    """A picture of a report: dB of weights and outputs over the blocks, a line for each kind of layer."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, what in zip(axes, ("weight", "output")):
        for kind, names in kinds(rows).items():
            axis.plot([rows[name][what] for name in names], "o-", ms=3, lw=1, label=kind)
        axis.set(title=f"{what}s, {title}", xlabel="block", ylabel="signal to noise, dB")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def kinds(rows):
    """The names of `rows` by kind of layer, in the order of blocks."""
    found = {}
    for name in sorted(rows, key=lambda name: [int(i) for i in re.findall(r"\d+", name)]):
        found.setdefault(re.sub(r"^\w+\.\d+\.", "", name), []).append(name)
    return found


@dataclass(frozen=True)
class Config:
    """Quantize the linears of a checkpoint, and report layer by layer what it costs, on a batch of pure noise."""
    checkpoint: str                         # safetensors file, official folder or hub repository
    out: str = "nvfp4.safetensors"          # what packed writes; the report goes beside it, as .json and .png
    backbone: str = "tiny"                  # a preset of model.py
    mode: str = "packed"                    # packed | emulate | te | fp8 | fp8-te | auto; only packed writes weights
    activations: bool = False               # emulate: round activations too
    keep: str = ""                          # regular expression of linears to leave alone
    edge_blocks: int = 0                    # leave so many blocks at both ends alone
    modelopt: bool = False                  # packed: write the names of NVIDIA ModelOpt
    frames: int = 4                         # latent frames of the calibration batch

    def __post_init__(self):
        if Path(self.out).suffix != ".safetensors":
            raise ValueError(f"--out ends in .safetensors, got '{self.out}'")
        if self.frames < 1 or self.edge_blocks < 0 or self.modelopt and self.mode != "packed":
            raise ValueError(f"--frames {self.frames} is above 0, --edge_blocks {self.edge_blocks} not below; "
                             "--modelopt is for --mode packed")


def noise_run(model, cfg, device):
    """A function that gives the velocity of pure noise, what every sampler begins with, under a random text."""
    from common import generator
    spec, g = model.spec, generator(0, "calibration")
    H, W = (n // s for n, s in zip(spec.size[1:], spec.stride[1:]))
    x = torch.randn(1, spec.channels, cfg.frames, H, W, generator=g).to(device)
    text = {"text": torch.randn(1, spec.text_len, spec.text_dim, generator=g).to(device)}
    sigma = torch.ones(1, cfg.frames, device=device)

    def run():
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return model(x, sigma, text)
    return run


def main(cfg):
    from common import one_line_errors, provenance, setup
    from model import load
    with one_line_errors():
        device, mode, keep = setup(), settle(cfg.mode), (cfg.keep,) if cfg.keep else ()
        make, out = maker(mode, cfg.activations), Path(cfg.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").open("a").close()                                      # fails now, not after the work
        model = load(cfg.backbone, cfg.checkpoint, device, torch.bfloat16).requires_grad_(False)
        names = choose(model, mode, keep, edge_blocks=cfg.edge_blocks)
    run, size = noise_run(model, cfg, device), lambda: sum(t.nbytes for t in model.state_dict().values())
    rows, exact, before = report(model, names, make, run, fp8.dequantized if "fp8" in mode else rounded), run(), size()
    quantize_model(model, mode, keep, edge_blocks=cfg.edge_blocks, activations=cfg.activations)
    total, after = snr(exact, run()), size()

    print("signal to noise, dB      weights: lowest   mean   outputs: lowest   mean")
    for kind, group in kinds(rows).items():
        w, y = (torch.tensor([rows[name][what] for name in group]) for what in ("weight", "output"))
        print(f"{len(group):4} {kind:24} {w.min():10.2f} {w.mean():6.2f} {y.min():17.2f} {y.mean():6.2f}")
    for name in [name for name in names if rows[name]["weight"] < LOW]:
        print(f"low: {name} has {rows[name]['weight']:.2f} dB in its weight; consider --keep '{re.escape(name)}'")
    print(f"{cfg.backbone}, {mode}: {len(names)} linears, {before / 1e9:.3f} -> {after / 1e9:.3f} GB in memory, "
          f"velocity {total:.2f} dB")
    if mode == "packed":
        save(model, out, cfg.modelopt, **weights.header(cfg.checkpoint, model.spec))
    out.with_suffix(".json").write_text(json.dumps({"mode": mode, "velocity": total, "bytes": [before, after],
                                                    "layers": rows, **provenance()}, indent=1) + "\n")
    draw(rows, out.with_suffix(".png"), f"{cfg.backbone}, {mode}")


if __name__ == "__main__":
    from common import parse
    main(parse(Config))
