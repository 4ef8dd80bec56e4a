"""The video diffusion transformers, each behind one forward: velocity of noisy latents, with one noise level per frame.

Wan2.1-T2V-1.3B and Wan2.2-TI2V-5B (Wan, arXiv:2503.20314) share one architecture; `tiny` and `small` are the same code
at the size of the embedded world. Parameter names are those of the official checkpoints, so loading is strict and
needs no key map; what this project adds lives under `control.`.

    python model.py wan2.2-5b            # sizes, tokens and operations of a preset, nothing allocated
"""

import json
import math
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import control as control_module

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Spec:
    """What a backbone is: sizes, the latents and text it was made for, and how it is sampled."""
    name: str
    dim: int                                    # model width D
    heads: int
    ffn: int                                    # hidden width of the MLP
    layers: int
    channels: int                               # latent channels C
    stride: tuple[int, int, int]                # pixels per latent: time, height, width
    size: tuple[int, int, int]                  # native pixel frames, height, width
    fps: float
    shift: float                                # noise-level shift of its sampler
    guidance: float
    text_dim: int = 4096                        # text["text"]: [B, text_len, text_dim], zeros after the true length
    text_len: int = 512
    freq_dim: int = 256                         # width of the time sinusoid
    patch: tuple[int, int, int] = (1, 2, 2)
    rope_dims: tuple[int, int, int] = ()        # channels of a head that turn with time, height, width; (): Wan's thirds
    eps: float = 1e-6
    arch: str = "wan"                           # which class below: see ARCHITECTURES
    negative: str = ""                          # prompt of the unconditional branch
    chunk: int = 4                              # K, latent frames generated together
    window: int = 20                            # latent frames the teacher is trained on: history and chunk
    source: str = ""                            # hub repository, or the file shipped in assets/

    def latent_frames(self, frames):
        return (frames - 1) // self.stride[0] + 1

    def grid(self, height, width):
        """Tokens per frame as rows and columns, for a size in pixels."""
        return tuple(n // s // p for n, s, p in zip((height, width), self.stride[1:], self.patch[1:]))


WAN_NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
                "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
TINY = Spec("tiny", dim=192, heads=6, ffn=768, layers=8, channels=24, stride=(1, 8, 8), size=(12, 64, 96), fps=8,
            shift=3.0, guidance=2.0, text_dim=64, text_len=16, window=12, source="tiny-stage1.safetensors")
WAN21 = Spec("wan2.1-1.3b", dim=1536, heads=12, ffn=8960, layers=30, channels=16, stride=(4, 8, 8), size=(81, 480, 832),
             fps=16, shift=5.0, guidance=5.0, negative=WAN_NEGATIVE, source="Wan-AI/Wan2.1-T2V-1.3B")
PRESETS = {spec.name: spec for spec in (
    TINY,
    replace(TINY, name="small", dim=224, heads=7, ffn=896, source="small-stage1.safetensors"),
    WAN21,
    replace(WAN21, name="wan2.2-5b", dim=3072, heads=24, ffn=14336, channels=48, stride=(4, 16, 16),
            size=(121, 704, 1280), fps=24, source="Wan-AI/Wan2.2-TI2V-5B"),
)}


# ---- Pieces ----------------------------------------------------------------------------------------------------------

def layer_norm(x, eps):
    """LayerNorm without parameters, in fp32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


def modulate(x, shift, scale):                          # x [B, T, L, D]; shift, scale [B, T, 1, D]
    return x * (1 + scale) + shift


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole width, statistics in fp32, before the heads are split."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def sinusoid(t, dim):
    """Embedding [..., dim] of times t [...] on the 0..1000 scale: cosines, then sines; in float64, returned in fp32."""
    omega = 10000 ** (-torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angle = t.double()[..., None] * omega
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def wan_rope(frames, rows, columns, spec):
    """cos and sin [T * rows * columns, head_dim / 2] of Wan's 3-D rotary embedding (RoFormer, arXiv:2104.09864).

    Pairs of channels are shared out as time | height | width, each axis with its own frequency ladder. `frames` [T] are
    positions on the time axis, fractional allowed; nothing is tabulated, so positions have no limit.
    """
    half = spec.dim // spec.heads // 2
    pairs = [n // 2 for n in spec.rope_dims] or (half - 2 * (half // 3), half // 3, half // 3)
    grid = torch.meshgrid(frames.double(), torch.arange(rows, dtype=torch.float64, device=frames.device),
                          torch.arange(columns, dtype=torch.float64, device=frames.device), indexing="ij")
    angles = []
    for position, n in zip(grid, pairs):
        theta = 10000 ** (-torch.arange(n, dtype=torch.float64, device=frames.device) / n)
        angles.append(position.flatten()[:, None] * theta)                              # [N, n]
    angle = torch.cat(angles, -1)                                                       # [N, head_dim / 2]
    return angle.cos().float(), angle.sin().float()


def rotate(x, rope):
    """Turn neighbouring channel pairs of x [B, heads, N, d] by the angles `rope` (cos, sin [N, d / 2]), in fp32."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)                                  # each [B, heads, N, d / 2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Backbone(nn.Module):
    """What every architecture is to the rest of the project; a subclass has its parts under their official names."""

    block_list = ""                                     # the attribute that holds the transformer blocks
    fp32 = re.compile("")                               # parameters that the official run computes with in fp32

    def __init__(self, spec):
        super().__init__()
        self.spec, self.control = spec, None            # control.attach gives it one

    @staticmethod
    def official(key):
        """This class's name of a tensor of the official file; None for one that it does not use."""
        return key.removeprefix("model.diffusion_model.")

    def forward(self, x, sigma, text, control=None, frames=None):
        """Velocity [B, C, T, H, W] of the latents `x`.

        x        [B, C, T, H, W]  clean history frames and noisy frames together, in time order
        sigma    [B, T]           noise level of each frame; float32
        text     dict             states of the text encoder; the keys are documented at each architecture
        control  Control | None   actions of the same T frames
        frames   [T] float | None positions of the frames on the time axis, default 0..T-1
        """
        raise NotImplementedError

    def check(self, x, sigma):
        """Refuse latents and noise levels that do not fit; returns the shape of `x`."""
        B, C, T, H, W = x.shape
        _, q, r = self.spec.patch
        if C != self.spec.channels or H % q or W % r:
            raise ValueError(f"{self.spec.name} takes latents [B, {self.spec.channels}, T, H, W] with H, W divisible "
                             f"by {q}, {r}; got {list(x.shape)}")
        if sigma.shape != (B, T):
            raise ValueError(f"sigma is one noise level per frame [{B}, {T}], got {list(sigma.shape)}")
        return x.shape

    def inject(self, control, B, T):
        if self.control is None:
            raise ValueError("this backbone has no control parameters; control.attach(backbone) adds them")
        if control.actions.shape != (B, T):
            raise ValueError(f"actions are one label per frame [{B}, {T}], got {list(control.actions.shape)}")
        return self.control(control)


# ---- Wan -------------------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Attention of `x` to `context`, or to itself with rotary positions; bidirectional, without masks."""

    def __init__(self, dim, heads, eps):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x, context=None, rope=None):      # [B, N, D], [B, S, D]
        context = x if context is None else context
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (q, k, v))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)             # [B, heads, N, d]
        return self.o(rearrange(y, "b h n d -> b n (h d)"))


class WanBlock(nn.Module):
    """Transformer block of Wan: self-attention, cross-attention to the text, MLP (arXiv:2503.20314, section 4).

    adaLN (DiT, arXiv:2212.09748) with one modulation vector per latent frame: history frames carry that of sigma 0,
    current frames that of theirs, and attention is bidirectional over both.
    """

    def __init__(self, spec):
        super().__init__()
        D, self.eps = spec.dim, spec.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, D) / D ** 0.5)
        self.self_attn = Attention(D, spec.heads, spec.eps)
        self.norm3 = nn.LayerNorm(D, eps=spec.eps)
        self.cross_attn = Attention(D, spec.heads, spec.eps)
        self.ffn = nn.Sequential(nn.Linear(D, spec.ffn), nn.GELU("tanh"), nn.Linear(spec.ffn, D))

    def forward(self, x, e6, text, rope):               # [B, T, L, D] fp32, [B, T, 6, D] fp32, [B, S, D]
        T, L = x.shape[1:3]
        shift1, scale1, gate1, shift2, scale2, gate2 = (e6 + self.modulation).split(1, dim=2)   # each [B, T, 1, D]

        h = modulate(layer_norm(x, self.eps), shift1, scale1).flatten(1, 2)             # [B, T*L, D]
        x = x + gate1 * self.self_attn(h, rope=rope).unflatten(1, (T, L))               # [B, T, L, D]

        x = x + self.cross_attn(self.norm3(x).flatten(1, 2), text).unflatten(1, (T, L))     # ungated: text always acts

        h = modulate(layer_norm(x, self.eps), shift2, scale2)
        return x + gate2 * self.ffn(h)


class WanHead(nn.Module):
    """Final modulation and projection; modulated by the time embedding itself, not by its projection."""

    def __init__(self, spec):
        super().__init__()
        self.eps = spec.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, spec.dim) / spec.dim ** 0.5)
        self.head = nn.Linear(spec.dim, spec.channels * math.prod(spec.patch))

    def forward(self, x, e):                            # [B, T, L, D], [B, T, D]
        shift, scale = (e[:, :, None] + self.modulation).split(1, dim=2)                # each [B, T, 1, D]
        return self.head(modulate(layer_norm(x, self.eps), shift, scale))               # [B, T, L, C * patch]


class Wan(Backbone):
    """Wan2.1-T2V-1.3B, Wan2.2-TI2V-5B and the embedded world's tiny and small: one architecture."""

    block_list = "blocks"
    fp32 = re.compile(r"^(time_|head|control)|norm|modulation")

    def __init__(self, spec):
        super().__init__(spec)
        D = spec.dim
        self.patch_embedding = nn.Conv3d(spec.channels, D, spec.patch, spec.patch)
        self.text_embedding = nn.Sequential(nn.Linear(spec.text_dim, D), nn.GELU("tanh"), nn.Linear(D, D))
        self.time_embedding = nn.Sequential(nn.Linear(spec.freq_dim, D), nn.SiLU(), nn.Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks = nn.ModuleList(WanBlock(spec) for _ in range(spec.layers))
        self.head = WanHead(spec)

    def initialise(self):
        """The official initialisation: Xavier linears, N(0, 0.02) embeddings, a head that starts at zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))                      # a view: fills the weight itself
                nn.init.zeros_(module.bias)
        for layer in (self.text_embedding[0], self.text_embedding[2], self.time_embedding[0], self.time_embedding[2]):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)
        return self

    def forward(self, x, sigma, text, control=None, frames=None):
        """See `Backbone.forward`. text: {"text": [B, <= text_len, text_dim]}."""
        B, C, T, H, W = self.check(x, sigma)
        p, (_, q, r) = self.spec, self.spec.patch
        frames = torch.arange(T, device=x.device) if frames is None else frames
        rope = wan_rope(frames, H // q, W // r, p)

        with torch.autocast(x.device.type, enabled=False):                           # the time path is never below fp32
            e = self.time_embedding(sinusoid(1000 * sigma.double(), p.freq_dim))        # [B, T, D]
            if control is not None:
                e = e + self.inject(control, B, T)
            e6 = self.time_projection(e).unflatten(-1, (6, p.dim))                      # [B, T, 6, D]

        context = self.embed_text(text["text"])                                         # [B, S, D]
        x = rearrange(x, "b c t (h q) (w r) -> b t (h w) (c q r)", q=q, r=r)            # [B, T, L, C * q * r]
        x = F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)  # the convolution
        x = x.float()                                                        # [B, T, L, D]; the residual stream is fp32
        for block in self.blocks:
            x = block(x, e6, context, rope)
        with torch.autocast(x.device.type, enabled=False):
            x = self.head(x, e)                                                         # [B, T, L, C * q * r]
        return rearrange(x, "b t (h w) (q r c) -> b c t (h q) (w r)", h=H // q, q=q, r=r)

    def embed_text(self, states):
        """Zero-pad to text_len rows, then embed: the padding becomes a learned constant that is attended to."""
        missing = self.spec.text_len - states.shape[1]
        if missing < 0 or states.shape[2] != self.spec.text_dim:
            raise ValueError(f"text states are [B, <= {self.spec.text_len}, {self.spec.text_dim}], "
                             f"got {list(states.shape)}")
        return self.text_embedding(F.pad(states, (0, 0, 0, missing)))


ARCHITECTURES = {"wan": Wan}


# ---- Build, load, save -----------------------------------------------------------------------------------------------

def preset(name, **fields):
    """The `Spec` of a preset, with `fields` overriding its own."""
    if name not in PRESETS:
        raise ValueError(f"unknown backbone '{name}'; choose {', '.join(PRESETS)}")
    return replace(PRESETS[name], **fields)


def build(name, control="adaln", **fields):
    """A backbone with random weights; under torch.device("meta") nothing is allocated. control=None leaves it plain."""
    spec = preset(name, **fields)
    model = ARCHITECTURES[spec.arch](spec)
    if not next(model.parameters()).is_meta:
        model.initialise()
    return model if control is None else control_module.attach(model, control)


def build_on(device, dtype, name, **fields):
    """`build` in place on a device, weights in `dtype` but where the official run computes in fp32: no second copy."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = build(name, **fields)
    finally:
        torch.set_default_dtype(before)
    for key, p in model.named_parameters():
        p.data = p.data.float() if model.fp32.search(key) else p.data
    return model


def checkpoint_blocks(model):
    """Keep only each block's input and recompute the rest in the backward pass (arXiv:1604.06174)."""
    for block in getattr(model, model.block_list):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return model


def compile_blocks(model):
    """Compile each transformer block in place; all share one compilation per shape. What stays eager is small."""
    torch._dynamo.config.recompile_limit = 64           # window lengths x with and without gradient x adapters at work
    for block in getattr(model, model.block_list):
        block.compile(dynamic=False)
    return model


def load(name, source=None, device="cpu", dtype=torch.float32, **fields):
    """A backbone filled from `source`: a safetensors file, a folder in the official layout, or a hub repository id.

    The file's keys must be the model's keys; control parameters are optional, for official files have none. With
    bfloat16 weights run it under torch.autocast; the time path, norms and head keep fp32 weights.
    Errors (ValueError, OSError) name the file and the key.
    """
    spec = preset(name, **fields)
    tensors, origin = read_weights(source or default_source(spec), name)
    official = ARCHITECTURES[spec.arch].official
    tensors = {own: value for key, value in tensors.items() if (own := official(key))}
    has_control = any(key.startswith("control.") for key in tensors)
    with torch.device("meta"):
        model = build(name, "adaln" if has_control else None, **fields)
    expected = model.state_dict()
    for key in [*expected, *tensors]:
        if key not in tensors:
            raise ValueError(f"{origin} has no tensor '{key}', which {name} needs; is it a checkpoint of {name}?")
        if key not in expected:
            raise ValueError(f"{origin} has a tensor '{key}' that {name} does not know; is it a checkpoint of {name}?")
        if tensors[key].shape != expected[key].shape:
            raise ValueError(f"{origin}: '{key}' is {list(tensors[key].shape)}, but {name} needs "
                             f"{list(expected[key].shape)}; is it a checkpoint of {name}?")
    tensors = {k: v.to(device, torch.float32 if model.fp32.search(k) else dtype) for k, v in tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(True)


def default_source(spec):
    """The official repository of a preset, or the file this project ships for it."""
    return ASSETS / spec.source if spec.source.endswith(".safetensors") else spec.source


def weight_files(source):
    """The safetensors files of a checkpoint: one file, a folder (single or sharded with an index), a hub repository."""
    path = Path(source)
    if not path.exists() and str(source).count("/") == 1 and not path.suffix:
        try:
            path = Path(snapshot_download(str(source), allow_patterns=["diffusion_pytorch_model*", "config.json"]))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise OSError(f"{source} is no local folder and could not be fetched from the hub: {error}") from None
    if path.is_file():
        return [path]
    if not path.exists():
        raise OSError(f"checkpoint {source} does not exist; give a safetensors file, a folder or a hub repository id")
    index = sorted(path.glob("*.safetensors.index.json"))
    files = sorted({path / name for name in json.loads(index[0].read_text())["weight_map"].values()}) if index \
        else sorted(path.glob("*.safetensors"))
    if not files or (len(files) > 1 and not index):
        raise OSError(f"folder {source} has {len(files)} safetensors files and {'an' if index else 'no'} index")
    return files


def read_weights(source, name):
    """All tensors of a checkpoint, memory-mapped, and what to call it in errors. Refuses files of another preset."""
    tensors, files = {}, weight_files(source)
    for file in files:
        try:
            with safe_open(file, "pt") as reader:
                made_for = (reader.metadata() or {}).get("backbone", name)
                if made_for != name:
                    raise ValueError(f"{file} was made for the backbone {made_for}, not {name}; "
                                     f"give --backbone {made_for}")
                tensors.update({key: reader.get_tensor(key) for key in reader.keys()})
        except FileNotFoundError:
            raise OSError(f"checkpoint {file} does not exist, though {source} names it; fetch it again") from None
        except SafetensorError as error:
            raise OSError(f"{file} is not a complete safetensors file ({error}); fetch or make it again") from None
    return tensors, str(files[0] if len(files) == 1 else files[0].parent)


def save(model, path, dtype=torch.bfloat16, weights=None, **notes):
    """Write `weights` (default: the model's) as one safetensors file; `notes` go into its header."""
    weights = weights or model.state_dict()
    path, partial = Path(path), Path(f"{path}.partial")
    header = {"backbone": model.spec.name, **{k: str(v) for k, v in notes.items()}}
    save_file({k: v.detach().to("cpu", dtype).contiguous() for k, v in weights.items()}, partial, metadata=header)
    partial.rename(path)


# ---- Counting --------------------------------------------------------------------------------------------------------

def flops(spec, frames, rows, columns, text=None):
    """Operations of one forward on a token grid, by kind; a multiply-add is two."""
    D, N, S = spec.dim, frames * rows * columns, text or spec.text_len
    block = 12 * N * D ** 2 + 4 * S * D ** 2 + 4 * N * D * spec.ffn
    ends = 4 * N * spec.channels * math.prod(spec.patch) * D + 2 * S * (spec.text_dim * D + D ** 2)
    time = 2 * frames * (spec.freq_dim * D + D ** 2 + 6 * D ** 2)
    return {"linear": spec.layers * block + ends + time,
            "self_attention": 4 * spec.layers * N ** 2 * D,
            "cross_attention": 4 * spec.layers * N * S * D}


def describe(name):
    """A preset in a few lines, at its native size."""
    spec = preset(name)
    with torch.device("meta"):
        model = build(name, control=None)
    count = sum(p.numel() for p in model.parameters())
    (frames, height, width), (rows, columns) = spec.size, spec.grid(*spec.size[1:])
    T = spec.latent_frames(frames)
    cost = flops(spec, T, rows, columns)
    return "\n".join([
        f"{name}: {count:,} parameters, {spec.layers} layers, width {spec.dim}, {spec.heads} heads, MLP {spec.ffn}",
        f"{frames} frames of {height}x{width} at {spec.fps} fps = latents [{spec.channels}, {T}, "
        f"{height // spec.stride[1]}, {width // spec.stride[2]}] = "
        f"{T} x {rows * columns} = {T * rows * columns:,} tokens",
        "one forward, TFLOP: " + ", ".join(f"{k} {v / 1e12:.4g}" for k, v in cost.items())
        + f", total {sum(cost.values()) / 1e12:.4g}"])


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PRESETS:
        sys.exit(f"usage: python model.py {'|'.join(PRESETS)}")
    print(describe(sys.argv[1]))
