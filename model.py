"""The video diffusion transformers, each behind one forward: velocity of noisy latents, with one noise level per frame.

Wan2.1-T2V-1.3B and Wan2.2-TI2V-5B (Wan, arXiv:2503.20314) share one architecture; `tiny` and `small` are the same code
at the size of the embedded world. HunyuanVideo-1.5-8B (arXiv:2511.18870) is a double-stream transformer,
LTX-2.3-22B the video tower of an audio-video model (arXiv:2601.03233). Parameter names are those of the official
checkpoints, so loading is strict and needs no key map; what this project adds lives under `control.`.

    python model.py wan2.2-5b            # sizes, tokens and operations of a preset, nothing allocated
"""

import itertools
import math
import re
import sys
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import compress
import inject
import nvfp4
import weights
from block import Block, Group, PerBlock, attention
from common import compute_dtype, defaults, rank
from memory import EMPTY, Cache, enter, prefill, through
from rotary import grid, ltx_rope, rotary, rotate, rotate_halves
from parallel import fill


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
    rope_dims: tuple[int, int, int] = ()        # channels of a head per axis (time, height, width); (): Wan's thirds
    glyph_dim: int = 1472                       # HunyuanVideo: width of the states of text to be drawn
    vision_dim: int = 1152                      # HunyuanVideo: width of the image encoder's states
    refiner: int = 2                            # HunyuanVideo: blocks that refine the text states
    eps: float = 1e-6
    arch: str = "wan"                           # which class below: see ARCHITECTURES
    negative: str = ""                          # prompt of the unconditional branch
    control: str = "adaln"                      # how control enters if nothing else is said: see inject.py
    chunk: int = 4                              # K, latent frames generated together
    window: int = 20                            # latent frames the teacher is trained on: history and chunk
    source: str = ""                            # hub repository, or the file shipped in assets/
    file: str = "diffusion_pytorch_model*.safetensors"      # its weights in that repository

    def latent_frames(self, frames):
        return (frames - 1) // self.stride[0] + 1

    def grid(self, height, width):
        """Tokens per frame as rows and columns, for a size in pixels."""
        return tuple(n // s // p for n, s, p in zip((height, width), self.stride[1:], self.patch[1:]))


WAN_NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
                "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
LTX_NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"  # the official list also fits sound
TINY = Spec("tiny", dim=192, heads=6, ffn=768, layers=8, channels=24, stride=(1, 8, 8), size=(12, 64, 96), fps=8,
            shift=3.0, guidance=2.0, text_dim=64, text_len=16, window=12, source="tiny-stage1.safetensors",
            control="prope")
WAN21 = Spec("wan2.1-1.3b", dim=1536, heads=12, ffn=8960, layers=30, channels=16, stride=(4, 8, 8), size=(81, 480, 832),
             fps=16, shift=5.0, guidance=5.0, negative=WAN_NEGATIVE, source="Wan-AI/Wan2.1-T2V-1.3B")
PRESETS = {spec.name: spec for spec in (
    TINY,
    replace(TINY, name="small", dim=224, heads=7, ffn=896, source="small-stage1.safetensors"),
    replace(TINY, name="base", dim=384, heads=12, ffn=1536, layers=12, source="base-stage1.safetensors"),
    WAN21,
    replace(WAN21, name="wan2.2-5b", dim=3072, heads=24, ffn=14336, channels=48, stride=(4, 16, 16),
            size=(121, 704, 1280), fps=24, source="Wan-AI/Wan2.2-TI2V-5B"),
    Spec("hunyuan1.5-8b", dim=2048, heads=16, ffn=8192, layers=54, channels=32, stride=(4, 16, 16),
         size=(121, 480, 848), fps=24, shift=5.0, guidance=6.0, text_dim=3584, text_len=1000, patch=(1, 1, 1),
         rope_dims=(16, 56, 56), arch="hunyuan", source="tencent/HunyuanVideo-1.5",
         file="transformer/480p_t2v/diffusion_pytorch_model.safetensors"),
    # LTX's own grid is shift e^2.05 stretched to end on 0.1; shift 6 is within 0.017 of it, but for the last 2 of 30.
    Spec("ltx2.3-22b", dim=4096, heads=32, ffn=16384, layers=48, channels=128, stride=(8, 32, 32), size=(121, 480, 832),
         fps=24, shift=6.0, guidance=3.0, text_len=1024, patch=(1, 1, 1), arch="ltx", negative=LTX_NEGATIVE, window=16,
         source="Lightricks/LTX-2.3", file="ltx-2.3-22b-dev.safetensors"),
)}


# ---- Pieces ----------------------------------------------------------------------------------------------------------

def layer_norm(x, eps):
    """LayerNorm without parameters, in fp32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


def modulate(x, shift, scale):                          # x [B, T, L, D]; shift, scale [B, T, 1, D]
    return x * (1 + scale) + shift


def named(**parts):
    """A Sequential whose parts have names: those of the official checkpoint."""
    return nn.Sequential(OrderedDict(parts))


def rms_norm(x, eps):
    """Root-mean-square norm without parameters; statistics in fp32, the result in the dtype of `x`."""
    return F.rms_norm(x, x.shape[-1:], eps=eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, statistics in fp32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.eps) * self.weight


def sinusoid(t, dim, dtype=torch.float32):
    """Embedding [..., dim] of times t [...] on the 0..1000 scale: cosines, then sines; in `dtype`, returned in fp32."""
    half = dim // 2
    omega = torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype, device=t.device) / half)
    angle = t.to(dtype)[..., None] * omega
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def lowered(x):
    """`x` for several linear layers, in what they compute in: autocast would make a copy for each."""
    return x.to(compute_dtype(x))


def split(x, heads):
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


class Backbone(nn.Module):
    """What every architecture is to the rest of the project; a subclass has its parts under their official names."""

    block_list = ""                                     # the attribute that holds the transformer blocks
    fp32 = re.compile("")                               # parameters that the official run computes with in fp32
    refuses = {}                                        # control kind that the architecture has no place for -> why

    def __init__(self, spec):
        super().__init__()
        if spec.rope_dims and sum(spec.rope_dims) * spec.heads != spec.dim:
            raise ValueError(f"rope_dims {spec.rope_dims} must add up to dim / heads = {spec.dim / spec.heads:g}")
        self.spec, self.control, self.compress = spec, None, None       # inject.attach and compress.attach give it

    @staticmethod
    def official(key):
        """This class's name of a tensor of the official file; None for one that it does not use."""
        return key.removeprefix("model.diffusion_model.")

    def stored_dtype(self, key, dtype):
        """Of a parameter in a model with `dtype` weights: what computes in fp32 is stored so."""
        return torch.float32 if self.fp32.search(key) else dtype

    def forward(self, x, sigma, text, control=None, memory=None, frames=None):
        """Velocity [B, C, T, H, W] of the latents `x`.

        x        [B, C, T, H, W]  clean history frames and noisy frames together, in time order
        sigma    [B, T]           noise level of each frame; float32
        text     dict             states of the text encoder; the keys are documented at each architecture
        control  Control | None   actions and cameras of the same T frames
        memory   Memory | None    older history as tokens, and who attends to whom (memory.py); or the Cache of it, or
                                  a Past (compress.py), for this network's own compressor
        frames   [T] float | None positions of the frames on the time axis, default 0..T-1

        With a `Cache`, x and sigma are of the chunk alone; control and frames are of the clean frames in it and of x.
        """
        if isinstance(memory, compress.Past):
            memory, frames = self.compress(self, memory, x.shape[2])
        cache = memory if isinstance(memory, Cache) else None
        memory = cache.memory if cache else memory or EMPTY
        groups, branches = enter(self, x, sigma, text, control, memory, frames, None if cache else memory)
        groups, _ = through(self, groups, branches, memory, cache and cache.layers)
        return torch.cat([self.leave(g.x, g.e, x.shape[3]) for g in groups if g.frames and g.x is not None], 2)

    def prefill(self, x, text, control=None, memory=None, frames=None, past=None):
        """The `Cache` of a chunk's history: `memory` and, at sigma 0, clean frames x [B, C, T, H, W], T may be 0.

        control and frames are of x. Under attention `segment`, segments that the Cache `past` of the same text has are
        not computed again.
        """
        return prefill(self, x, text, control, memory, frames, past)

    def within(self, function, *args):
        """`function(*args)`, which uses weights outside of a forward pass: sharded ones are gathered for it."""
        return function(*args)

    def embed(self, x, start=0):
        """Tokens [B, T, L, D] of clean frames, as they enter the first block; `start` is the number of the first."""
        return self.patchify(self.inputs(x, x.new_zeros(x.shape[:3:2]), {}, start == 0))

    # What an architecture has of its own, besides its blocks: patchify(x), its embedding of patches [B, T, L, D];
    # rope(centres [N, 3], older), cos and sin; tell(x, sigma, text, signal), the tokens x as they enter the blocks, the
    # time embedding that the head takes, what blocks are told; leave(x, e, H), the head; and what differs of these:

    def inputs(self, x, sigma, text, begins):
        """What is patchified of the latents `x`, the beginning of a video or not: [B, C', T, H, W]."""
        return x

    def centres(self, frames, H, W):
        """Where the tokens of frames of H x W latents are, at the positions `frames`: [N, 3], as in `Memory`."""
        return grid(frames, H // self.spec.patch[1], W // self.spec.patch[2])

    def places(self, memory):
        """Where the tokens of memory are, as `rope` takes it."""
        return memory.centres

    def prepare(self, text, signal, B):
        """Text, and a signal's sentences, embedded once for all groups."""
        return text, signal

    def heard(self, text):
        """`text` with what depends on it and on the weights alone, for many forwards with the same weights."""
        return text

    def words(self, role, text, sigma):
        """Groups of text tokens for self-attention, for frames at noise levels sigma [B, T]."""
        return []

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

    def scatter(self, groups):
        """The groups of a forward (block.py) before the blocks. Where ranks share a clip, parallel.Ulysses replaces
        this and `gather`: each rank's part of every frame."""
        return groups

    def gather(self, groups):
        """All tokens again, behind the blocks."""
        return groups

    def announce(self, groups, layers):
        """Before the blocks; `layers` are those of a Cache. parallel.compile_blocks replaces this."""

    def inject(self, control, shape):
        """What `control` adds to a forward of latents of `shape`, and where."""
        if control is None:
            return inject.Signal()
        if self.control is None:
            raise ValueError("this backbone has no control parameters; control.attach(backbone) adds them")
        return self.control(control, shape, self.spec.patch)


# ---- Wan -------------------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Attention of `x` to `context`; or its queries, keys and values for attention among tokens of one kind."""

    def __init__(self, dim, heads, eps):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def asks(self, x):                                  # [B, N, D] -> queries, keys, values [B, heads, N, d]
        return split(self.norm_q(self.q(x)), self.heads), *self.keys(x)

    def keys(self, x):
        return split(self.norm_k(self.k(x)), self.heads), split(self.v(x), self.heads)

    def forward(self, x, context, sentences=None):                                      # [B, N, D], [B, S, D]
        q, (k, v) = split(self.norm_q(self.q(x)), self.heads), self.heard(context)
        y = inject.hear(q.to(v.dtype), k, v, sentences, self.heard, attention)          # [B, heads, N, d]
        return self.o(rearrange(y, "b h n d -> b n (h d)"))

    def heard(self, context):
        """Keys and values of it as attention takes them; if it is these already, they stay."""
        k, v = context if isinstance(context, tuple) else self.keys(context)
        return k.to(v.dtype), v


class WanBlock(Block):
    """Transformer block of Wan: self-attention, cross-attention to the text, MLP (arXiv:2503.20314, section 4).

    adaLN (DiT, arXiv:2212.09748) with one modulation vector per latent frame: history frames carry that of sigma 0,
    current frames that of theirs, and attention is bidirectional over both.
    """

    turn = staticmethod(rotate)

    def __init__(self, spec):
        super().__init__()
        D, self.eps = spec.dim, spec.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, D) / D ** 0.5)
        self.self_attn = Attention(D, spec.heads, spec.eps)
        self.norm3 = nn.LayerNorm(D, eps=spec.eps)
        self.cross_attn = Attention(D, spec.heads, spec.eps)
        self.ffn = nn.Sequential(nn.Linear(D, spec.ffn), nn.GELU("tanh"), nn.Linear(spec.ffn, D))

    def before(self, g):                                # x [B, T, L, D]; told: e6 [B, T, 6, D] fp32, text [B, S, D]
        shift, scale, *rest = (g.told[0] + self.modulation).split(1, dim=2)             # each [B, T, 1, D]
        h = lowered(modulate(layer_norm(g.x, self.eps), shift, scale)).flatten(1, 2)    # [B, T*L, D]
        return *self.self_attn.asks(h), rest

    def after(self, g, y, added, modulation):
        (T, L), (_, text, sentences) = g.x.shape[1:3], g.told
        gate1, shift2, scale2, gate2 = modulation
        x = g.x + gate1 * (self.self_attn.o(y) + added).unflatten(1, (T, L))            # [B, T, L, D]

        h = self.norm3(x).flatten(1, 2)
        x = x + self.cross_attn(h, text, sentences).unflatten(1, (T, L))                # ungated: text always acts

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
    """Wan2.1-T2V-1.3B, Wan2.2-TI2V-5B and the embedded world's tiny and small: one architecture.

    text: {"text": [B, <= text_len, text_dim]}; `heard` adds the keys and values of each block, and of what is `said`
    of cameras.
    """

    block_list = "blocks"
    fp32 = re.compile(r"^(time_|head|control\.(translation|rotation))|norm|modulation")

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

    def patchify(self, x):                              # the convolution, as a linear layer
        _, q, r = self.spec.patch
        x = rearrange(x, "b c t (h q) (w r) -> b t (h w) (c q r)", q=q, r=r)            # [B, T, L, C * q * r]
        return F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def rope(self, centres, older):
        third = self.spec.dim // self.spec.heads // 6 * 2                               # even; time takes the rest
        axes = self.spec.rope_dims or (self.spec.dim // self.spec.heads - 2 * third, third, third)
        return rotary(centres, axes, 10000, torch.float64)

    def prepare(self, text, signal, B):
        said = signal.sentences
        if said:
            said = said._replace(states=PerBlock(text["said"])) if "said" in text else said.embed(self.text_embedding)
        own = PerBlock(text["heard"]) if "heard" in text else self.embed_text(text["text"])         # [B, S, D]
        return own, signal._replace(sentences=said)

    @torch.no_grad()
    def heard(self, text):
        made = {"heard": self.embed_text(text["text"])}
        if self.control is not None and "text" in self.control.kinds:
            made["said"] = self.text_embedding(self.control.sentences)
        return text | {name: tuple(block.cross_attn.heard(x) for block in self.blocks) for name, x in made.items()}

    def tell(self, x, sigma, text, signal):
        with torch.autocast(x.device.type, enabled=False):                           # the time path is never below fp32
            e = self.time_embedding(sinusoid(1000 * sigma.double(), self.spec.freq_dim, torch.float64)) + signal.time
            e6 = self.time_projection(e).unflatten(-1, (6, self.spec.dim))              # [B, T, 6, D] of e [B, T, D]
        said = signal.sentences
        if said and isinstance(said.states, PerBlock):
            said = PerBlock(said._replace(states=states) for states in said.states)
        return x.float() + signal.tokens, e, (e6, text, said)                           # the residual stream is fp32

    def leave(self, x, e, H):
        _, q, r = self.spec.patch
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


# ---- HunyuanVideo-1.5 ------------------------------------------------------------------------------------------------

def unpad(states, mask):
    """`states` [B, S, E] without rows that no sample uses; a mask if some are still padding. Waits for the GPU."""
    if mask is None:
        return states, None
    states, mask = states[:, mask.any(0)], mask[:, mask.any(0)].bool()
    return (states, None) if mask.all() else (torch.where(mask[..., None], states, 0), mask)    # padding may be NaN


class RefinerBlock(nn.Module):
    """Self-attention and MLP among text tokens; of adaLN it has the gates only."""

    def __init__(self, spec):
        super().__init__()
        D, self.heads = spec.dim, spec.heads
        self.norm1, self.norm2 = (nn.LayerNorm(D, eps=spec.eps) for _ in range(2))
        self.self_attn_qkv, self.self_attn_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = named(fc1=nn.Linear(D, 4 * D), act=nn.SiLU(), fc2=nn.Linear(4 * D, D))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, h, c, mask):                      # [B, S, D] fp32, [B, 1, D], [B, 1, 1, S] or None
        gate1, gate2 = self.adaLN_modulation(c).chunk(2, -1)                            # each [B, 1, D]
        q, k, v = rearrange(self.self_attn_qkv(self.norm1(h)), "b s (n h d) -> n b h s d", n=3, h=self.heads)
        y = attention(q, k, v, mask)                                                    # [B, heads, S, d]
        h = h + gate1 * self.self_attn_proj(rearrange(y, "b h s d -> b s (h d)"))
        return h + gate2 * self.mlp(self.norm2(h))


class TokenRefiner(nn.Module):
    """Lets the states of a causal language model see each other both ways, told their mean and the noise level."""

    def __init__(self, spec):
        super().__init__()
        D, E = spec.dim, spec.text_dim
        self.t_embedder = named(mlp=nn.Sequential(nn.Linear(spec.freq_dim, D), nn.SiLU(), nn.Linear(D, D)))
        self.c_embedder = named(linear_1=nn.Linear(E, D), act=nn.SiLU(), linear_2=nn.Linear(D, D))
        self.input_embedder = nn.Linear(E, D)
        self.individual_token_refiner = named(blocks=nn.ModuleList(RefinerBlock(spec) for _ in range(spec.refiner)))

    def forward(self, states, mask, e):                 # [B, S, E], zero where [B, S] is; e [B, 1, freq_dim]
        mean = states.sum(1) / (states.shape[1] if mask is None else mask.sum(1, keepdim=True))     # [B, E]
        with torch.autocast(e.device.type, enabled=False):
            c = self.t_embedder(e)                                                      # [B, 1, D]
        c, h = c + self.c_embedder(mean)[:, None], self.input_embedder(states).float()
        for block in self.individual_token_refiner.blocks:
            h = block(h, c, None if mask is None else mask[:, None, None])
        return h                                                                        # [B, S, D]


class HunyuanBlock(Block):
    """Double-stream block (MMDiT of SD3, arXiv:2403.03206, figure 2b): two sets of weights, one attention."""

    turn = staticmethod(rotate)

    def __init__(self, spec):
        super().__init__()
        D, M, self.heads, self.eps = spec.dim, spec.ffn, spec.heads, spec.eps
        self.img_mod, self.txt_mod = (named(act=nn.SiLU(), linear=nn.Linear(D, 6 * D)) for _ in range(2))
        self.img_attn_q, self.img_attn_k, self.img_attn_v, self.img_attn_proj = (nn.Linear(D, D) for _ in range(4))
        self.txt_attn_q, self.txt_attn_k, self.txt_attn_v, self.txt_attn_proj = (nn.Linear(D, D) for _ in range(4))
        self.img_attn_q_norm, self.img_attn_k_norm = (RMSNorm(D // spec.heads, spec.eps) for _ in range(2))
        self.txt_attn_q_norm, self.txt_attn_k_norm = (RMSNorm(D // spec.heads, spec.eps) for _ in range(2))
        self.img_mlp, self.txt_mlp = (named(fc1=nn.Linear(D, M), act=nn.GELU("tanh"), fc2=nn.Linear(M, D))
                                      for _ in range(2))

    def stream(self, g, part):
        """The weights `part` of the stream that the group belongs to: text has no positions."""
        return getattr(self, f"{'txt' if g.rope is None else 'img'}_{part}")

    def before(self, g):                                # x [B, T, L, D]; told: c [B, T, 1, D]; text is one more frame
        shift, scale, *rest = self.stream(g, "mod")(*g.told).chunk(6, -1)               # each [B, T, 1, D]
        h = lowered(modulate(layer_norm(g.x, self.eps), shift, scale)).flatten(1, 2)    # [B, T*L, D]
        q, k, v = (split(self.stream(g, f"attn_{n}")(h), self.heads) for n in "qkv")
        return self.stream(g, "attn_q_norm")(q), self.stream(g, "attn_k_norm")(k), v, rest

    def after(self, g, y, added, modulation):
        gate1, shift2, scale2, gate2 = modulation
        x = g.x + gate1 * (self.stream(g, "attn_proj")(y) + added).unflatten(1, g.x.shape[1:3])     # [B, T, L, D]
        return x + gate2 * self.stream(g, "mlp")(modulate(layer_norm(x, self.eps), shift2, scale2))


class HunyuanVideo(Backbone):
    """HunyuanVideo-1.5-8B (arXiv:2511.18870). text: states of encoders, each with a mask, true at tokens, if padded.

    text [B, S, text_dim], text_mask [B, S]     language model
    glyph [B, S, glyph_dim], glyph_mask         words to be drawn; optional
    vision [B, S, vision_dim], vision_mask      image encoder; optional
    image [B, C, 1, H, W]                       clean frame 0 for the condition channels, where `x` has it noisy, as in
                                                native image-to-video; else they get x's own where it is clean
    """

    block_list = "double_blocks"
    # In bf16: linear layers and the image stream; in fp32: norms, the text stream, as in the official run; time, head.
    fp32 = re.compile(r"^(time_in|txt_in\.t_embedder|vision_in\.proj\.[04]|cond_type|final_layer|control\.[tr])|norm")
    refuses = {"text": "it has no cross-attention, so every frame would hear the sentences of all"}

    def __init__(self, spec):
        super().__init__(spec)
        D, V, G, M = spec.dim, spec.vision_dim, spec.glyph_dim, 2048                    # M: the official, for any D
        self.img_in = named(proj=nn.Conv3d(2 * spec.channels + 1, D, spec.patch, spec.patch))
        self.time_in = named(mlp=nn.Sequential(nn.Linear(spec.freq_dim, D), nn.SiLU(), nn.Linear(D, D)))
        self.txt_in, self.cond_type_embedding = TokenRefiner(spec), nn.Embedding(3, D)
        self.byt5_in = named(layernorm=nn.LayerNorm(G), fc1=nn.Linear(G, M), act1=nn.GELU(), fc2=nn.Linear(M, M),
                             act2=nn.GELU(), fc3=nn.Linear(M, D))
        self.vision_in = named(proj=nn.Sequential(nn.LayerNorm(V), nn.Linear(V, V), nn.GELU(), nn.Linear(V, D),
                                                  nn.LayerNorm(D)))
        self.double_blocks = nn.ModuleList(HunyuanBlock(spec) for _ in range(spec.layers))
        self.final_layer = named(adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D)),
                                 linear=nn.Linear(D, spec.channels * math.prod(spec.patch)))

    def initialise(self):
        """The official initialisation: modulations and the final layer zero, time embeddings N(0, 0.02)."""
        nn.init.xavier_uniform_(self.img_in.proj.weight.flatten(1))                     # a view, as in Wan
        for name, p in self.named_parameters():
            if re.search(r"_mod\.|adaLN_modulation|^final_layer|^img_in.*bias", name):
                nn.init.zeros_(p)
            elif re.search(r"(time_in|t_embedder)\.mlp.*weight", name):
                nn.init.normal_(p, std=0.02)
        return self

    def inputs(self, x, sigma, text, begins):
        """Latents, a clean first frame of the video or zeros, a mask of where it is: [B, 2C + 1, T, H, W]."""
        if not begins or not x.shape[2]:
            return F.pad(x, (0, 0, 0, 0, 0, 0, 0, x.shape[1] + 1))
        first = text.get("image", x[:, :, :1])                                          # [B, C, 1, H, W]
        known = ((sigma[:, :1] == 0) | ("image" in text))[:, :, None, None, None].expand_as(first[:, :1])
        first = torch.cat([torch.where(known, first, 0), known], 1).to(x.dtype)         # [B, C + 1, 1, H, W]
        return torch.cat([x, F.pad(first, (0, 0, 0, 0, 0, x.shape[2] - 1))], 1)

    def patchify(self, x):                              # [B, 2C + 1, T, H, W] -> [B, T, L, D]
        x = rearrange(x, "b c t (h q) (w r) -> b t (h w) (c q r)", q=self.spec.patch[1], r=self.spec.patch[2])
        return F.linear(x, self.img_in.proj.weight.flatten(1), self.img_in.proj.bias)

    def rope(self, centres, older):
        return rotary(centres, self.spec.rope_dims, 256, torch.float64 if older else torch.float32)

    def tell(self, x, sigma, text, signal):
        with torch.autocast(x.device.type, enabled=False):                           # the time path is never below fp32
            c = (self.time_in(sinusoid(1000 * sigma, self.spec.freq_dim)) + signal.time)[:, :, None]    # [B, T, 1, D]
        return x + signal.tokens, c, (c,)

    def words(self, role, text, sigma):
        """Text at the noise level of the noisiest frames, those being made; sigma uniform: the official timestep."""
        e = sinusoid(1000 * sigma.amax(1)[:, None], self.spec.freq_dim)                 # [B, 1, freq_dim]
        with torch.autocast(e.device.type, enabled=False):
            c = self.time_in(e)[:, :, None]                                             # [B, 1, 1, D]
        tokens, mask = self.embed_text(text, e)
        return [Group(role, tokens, None, told=(c,), words=mask)]

    def leave(self, x, c, H):
        (_, q, r), eps = self.spec.patch, self.spec.eps
        with torch.autocast(x.device.type, enabled=False):
            shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, -1)            # each [B, T, 1, D]
            x = self.final_layer.linear(modulate(layer_norm(x, eps), shift, scale))     # [B, T, L, C * q * r]
        return rearrange(x, "b t (h w) (c q r) -> b c t (h q) (w r)", h=H // q, q=q, r=r)

    def embed_text(self, text, e):
        """Condition tokens [B, 1, S, D] of any order, and which of them are valid [B, S], None if all are."""
        p, tokens, masks, ragged = self.spec, [], [], False
        kinds = (("text", p.text_dim, self.txt_in), ("glyph", p.glyph_dim, self.byt5_in),
                 ("vision", p.vision_dim, self.vision_in))                              # rows of cond_type_embedding
        if unknown := set(text) - {"image", *(name + end for name, *_ in kinds for end in ("", "_mask"))}:
            raise ValueError(f"{p.name} knows no {sorted(unknown)} in text, only text, glyph, vision, masks and image")
        for row, (name, width, embed) in enumerate(kinds):
            states, mask = unpad(text.get(name, e.new_zeros(len(e), 0, width)).float(), text.get(f"{name}_mask"))
            if states.shape[::2] != (len(e), width) or (row == 0 and not states.shape[1]):
                raise ValueError(f"text['{name}'] is [{len(e)}, tokens, {width}], got {list(states.shape)}")
            masks.append(states.new_ones(states.shape[:2], dtype=torch.bool) if mask is None else mask)
            states = embed(states, mask, e) if row == 0 else embed(states)
            tokens.append(states.float() + self.cond_type_embedding.weight[row])        # [B, S, D]
            ragged = ragged or mask is not None
        return torch.cat(tokens, 1)[:, None], torch.cat(masks, 1) if ragged else None


# ---- LTX-2.3 ---------------------------------------------------------------------------------------------------------

LTX_UNUSED = re.compile(                # the rest of the official file: codecs, vocoder, text side, everything of audio
    r"(vae|audio_vae|vocoder|text_embedding_projection)\.|model\.diffusion_model\.(audio_|video_embeddings_connector\.|"
    r"av_ca_|transformer_blocks\.\d+\.(audio_|video_to_audio_|scale_shift_table_a2v_ca_))")


class LTXAttention(nn.Module):
    """Attention to `context`, or its parts for attention among tokens; each head has a gate, 1 at a logit of 0."""

    def __init__(self, dim, heads, eps):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.q_norm, self.k_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.to_gate_logits, self.to_out = nn.Linear(dim, heads), nn.Sequential(nn.Linear(dim, dim))

    def asks(self, x):                                  # [B, N, D] -> queries, keys, values [B, heads, N, d]
        return split(self.q_norm(self.to_q(x)), self.heads), *self.keys(x)

    def keys(self, x):
        return split(self.k_norm(self.to_k(x)), self.heads), split(self.to_v(x), self.heads)

    def gate(self, x):                                                                  # [B, N, heads, 1]
        return (2 * self.to_gate_logits(x).sigmoid())[..., None]

    def out(self, y, gate):                             # y [B, N, D] of all heads
        return self.to_out((y.unflatten(-1, (self.heads, -1)) * gate).flatten(2))

    def forward(self, x, context, sentences=None):                                      # [B, N, D], [B, S, D]
        q, (k, v) = split(self.q_norm(self.to_q(x)), self.heads), self.keys(context)
        y = inject.hear(q.to(v.dtype), k.to(v.dtype), v, sentences, self.keys, attention)   # [B, heads, N, d]
        return self.out(rearrange(y, "b h n d -> b n (h d)"), self.gate(x))


class LTXBlock(Block):
    """Transformer block of LTX-2's video stream (arXiv:2601.03233), without its exchange with audio.

    One modulation vector per latent frame, as in Wan: a table of the block plus a vector that all blocks share
    (adaLN-single of PixArt, arXiv:2310.00426). The text is modulated too, so its keys and values depend on sigma.
    """

    turn = staticmethod(rotate_halves)

    def __init__(self, spec):
        super().__init__()
        D, self.eps = spec.dim, spec.eps
        self.scale_shift_table = nn.Parameter(torch.randn(9, D) / D ** 0.5)
        self.prompt_scale_shift_table = nn.Parameter(torch.randn(2, D) / D ** 0.5)
        self.attn1, self.attn2 = (LTXAttention(D, spec.heads, spec.eps) for _ in range(2))
        self.ff = named(net=nn.Sequential(named(proj=nn.Linear(D, spec.ffn)), nn.GELU("tanh"), nn.Linear(spec.ffn, D)))

    def before(self, g):                                # x [B, T, L, D]; told: m [B, T, 9, D] fp32, ...
        m = (g.told[0] + self.scale_shift_table).to(g.x.dtype)      # summed in fp32, applied in the run's dtype
        shift, scale, *rest = m.split(1, 2)                                             # each [B, T, 1, D]
        h = modulate(rms_norm(g.x, self.eps), shift, scale).flatten(1, 2)               # [B, T*L, D]
        return *self.attn1.asks(h), (self.attn1.gate(h), *rest)

    def after(self, g, y, added, modulation):           # told: ..., m_text [B, 2, D], text [B, S, D], sentences
        (T, L), (_, m_text, text, sentences) = g.x.shape[1:3], g.told
        gate, gate1, shift3, scale3, gate3, shift2, scale2, gate2 = modulation
        x = g.x + gate1 * (self.attn1.out(y, gate) + added).unflatten(1, (T, L))        # [B, T, L, D]

        h = modulate(rms_norm(x, self.eps), shift2, scale2).flatten(1, 2)
        m_text = (m_text + self.prompt_scale_shift_table).to(x.dtype).split(1, 1)       # each [B, 1, D]
        said = sentences and sentences.per_frame(lambda states: modulate(states, *m_text))
        x = x + gate2 * self.attn2(h, modulate(text, *m_text), said).unflatten(1, (T, L))

        return x + gate3 * self.ff(modulate(rms_norm(x, self.eps), shift3, scale3))


class LTX(Backbone):
    """LTX-2.3-22B's video tower, 13.1 B parameters; its attribute `fps` is the frame rate: time is in seconds.

    text: {"text": [B, S, dim]} of the text connector: S = 1024, every row valid. It is read at the noise level of the
    noisiest frame, the one being made, whatever the history; by memory at 0. Give `frames` when `x` is not a video's
    beginning: frame 0 is a single pixel frame, every other is eight.
    """

    block_list = "transformer_blocks"
    fp32 = re.compile(r"^(adaln|prompt_adaln|proj_out|control\.(translation|rotation))|_norm|scale_shift_table")

    def __init__(self, spec):
        super().__init__(spec)
        D, self.fps = spec.dim, spec.fps
        if spec.text_dim != D:
            raise ValueError(f"{spec.name} attends to text of its own width: text_dim {spec.text_dim} is not dim {D}")
        self.patchify_proj = nn.Linear(spec.channels, D)
        self.adaln_single, self.prompt_adaln_single = (
            named(emb=named(timestep_embedder=named(linear_1=nn.Linear(spec.freq_dim, D), act=nn.SiLU(),
                                                    linear_2=nn.Linear(D, D))),
                  act=nn.SiLU(), linear=nn.Linear(D, rows * D)) for rows in (9, 2))
        self.transformer_blocks = nn.ModuleList(LTXBlock(spec) for _ in range(spec.layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, D) / D ** 0.5)
        self.proj_out = nn.Linear(D, spec.channels)

    @staticmethod
    def official(key):
        return None if LTX_UNUSED.match(key) else Backbone.official(key)

    def initialise(self):
        """Ours, as none is published: Xavier linears, N(0, 0.02) time embeddings, a zero head; gates start at 1."""
        for name, p in self.named_parameters():
            if re.search(r"bias$|^proj_out|to_gate_logits", name):
                nn.init.zeros_(p)
            elif "timestep_embedder" in name:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("weight") and p.ndim == 2:
                nn.init.xavier_uniform_(p)
        return self

    def patchify(self, x):                                                              # -> [B, T, L, D]
        return self.patchify_proj(rearrange(x, "b c t h w -> b t (h w) c"))

    def rope(self, centres, older):
        return ltx_rope(centres, self.fps, self.spec, older)

    def places(self, memory):
        """What contains latent frame 0, of one pixel frame, begins (stride - 1) pixel frames later than others do."""
        first, s = memory.bounds[:, 0, 0] == 0, self.spec.stride[0]
        return memory.centres + F.pad(first.double()[:, None] * (s - 1) / (2 * s), (0, 2))

    def prepare(self, text, signal, B):
        states = text["text"]
        if states.shape[::2] != (B, self.spec.dim):
            raise ValueError(f"text states are [{B}, S, {self.spec.dim}], got {list(states.shape)}")
        return states, signal

    def tell(self, x, sigma, text, signal):
        p = self.spec
        e, e_text = (sinusoid(1000 * s, p.freq_dim, torch.float32) for s in (sigma, sigma.amax(1)))
        with torch.autocast(x.device.type, enabled=False):                           # the time path is never below fp32
            e = self.adaln_single.emb(e) + signal.time                                  # [B, T, D]
            m = self.adaln_single.linear(F.silu(e)).unflatten(-1, (9, p.dim))           # [B, T, 9, D]
            m_text = self.prompt_adaln_single(e_text).unflatten(-1, (2, p.dim))         # [B, 2, D]
        return x + signal.tokens, e, (m, m_text, text.to(x.dtype), signal.sentences)

    def leave(self, x, e, H):
        with torch.autocast(x.device.type, enabled=False):
            shift, scale = (e[:, :, None] + self.scale_shift_table).split(1, 2)         # each [B, T, 1, D]
            x = self.proj_out(modulate(layer_norm(x, self.spec.eps), shift, scale))     # [B, T, L, C]
        return rearrange(x, "b t (h w) c -> b c t h w", h=H)


ARCHITECTURES = {"wan": Wan, "hunyuan": HunyuanVideo, "ltx": LTX}


# ---- Build and load -----------------------------------------------------------------------------------------------

def preset(name, **fields):
    """The `Spec` of a preset, with `fields` overriding its own."""
    if name not in PRESETS:
        raise ValueError(f"unknown backbone '{name}'; choose {', '.join(PRESETS)}")
    return replace(PRESETS[name], **fields)


def build(name, control="adaln", sentences=None, **fields):
    """A backbone with random weights; under torch.device("meta") nothing is allocated. control=None leaves it plain,
    other kinds and `sentences` are those of `control.attach`."""
    spec = preset(name, **fields)
    model = ARCHITECTURES[spec.arch](spec)
    if not next(model.parameters()).is_meta:
        model.initialise()
    return inject.attach(model, control, sentences) if control else model


def build_on(device, dtype, name, **fields):
    """`build` in place on a device, weights in `dtype` but where the official run computes in fp32: no second copy."""
    with defaults(device, dtype):
        model = build(name, **fields)
    for key, p in model.named_parameters():
        p.data = p.data.float() if model.fp32.search(key) else p.data
    return model


def load(name, source=None, device="cpu", dtype=torch.float32, control=None, partial=False, prepare=None, **fields):
    """A backbone filled from `source`: a safetensors file, a folder in the official layout, or a hub repository id.

    The file's keys must be the model's keys, with the control kinds of the file (those in `control`, if it is given).
    `partial` takes what fits: what is missing keeps its initial values, what is surplus is left out, both are printed.
    With bfloat16 weights run it under torch.autocast; the time path, norms and head keep fp32 weights. Tensors go one
    by one from the mapped file to `device`; on the CPU, those that need no conversion stay in the file's pages. Linears
    that are packed in the file (nvfp4.py) stay so in memory. Errors (ValueError, OSError) name the file and the key.
    `prepare(model)` changes the model while all that the file will fill is on the meta device: further control,
    quantised linears, `parallel.Layout.place`. Of a sharded model each rank reads its own rows alone.
    """
    spec = preset(name, **fields)
    source = source or weights.default_source(spec)
    files = weights.weight_files(source, spec)
    stored = weights.headers(files, spec, ARCHITECTURES[spec.arch].official)
    kinds = "+".join(kind for kind in inject.kinds_in(stored) if control is None or kind in control.split("+"))
    sentences = torch.zeros(stored["control.sentences"][2]) if "text" in kinds else None
    history = weights.note(files, "history")
    make = lambda: compress.attach(build(name, kinds, sentences, **fields), history and compress.Settings.read(history))
    with torch.device("meta"):
        model = make()
    if any(key.endswith(".weight_scale") for key in stored):
        model = nvfp4.load(model, files, device, dtype)
        return prepare(model) if prepare else model
    expected, doubt = {key: list(p.shape) for key, p in model.state_dict().items()}, f"is it a checkpoint of {name}?"
    missing, surplus = [key for key in expected if key not in stored], [key for key in stored if key not in expected]
    differs = [f"{source} has {how} {weights.listed(keys)}"
               for how, keys in (("no tensor", missing), ("surplus", surplus)) if keys]
    if differs and not partial:
        raise ValueError(f"{'; '.join(differs)}; {doubt} partial=True (--init_partial) takes what fits")
    if differs and rank() == 0:
        print("\n".join(differs))
    stored = {key: where for key, where in stored.items() if key in expected}
    for key, (file, _, shape) in stored.items():
        if shape != expected[key]:
            raise ValueError(f"{file}: '{key}' is {shape}, but {name} needs {expected[key]}; {doubt}")
    fresh = make().state_dict() if missing else {}
    model = prepare(model) if prepare else model
    places, state = model.state_dict(), {}
    for key, part in itertools.chain(weights.read(stored), ((key, fresh[key]) for key in missing)):
        state[key] = fill(places[key], part, device, model.stored_dtype(key, dtype))
    model.load_state_dict(state, strict=not prepare, assign=True)           # what `prepare` added has values
    return model


# ---- Counting --------------------------------------------------------------------------------------------------------

def wan_macs(p, D, T, F, N, S, G):
    """Multiply-adds of linear layers and query-key pairs of attention to S words: F tokens of frames among N, with T
    modulations, in G groups."""
    block = N * (6 * D ** 2 + 2 * D * p.ffn) + G * S * 2 * D ** 2
    ends = F * 2 * p.channels * math.prod(p.patch) * D
    ends += S * (p.text_dim * D + D ** 2) + T * (p.freq_dim * D + 7 * D ** 2)
    return p.layers * block + ends, p.layers * N * S


def hunyuan_macs(p, D, T, F, N, S, G):
    block = (N + S) * (4 * D ** 2 + 2 * D * p.ffn) + (T + 1) * 6 * D ** 2
    ends = F * (3 * p.channels + 1) * math.prod(p.patch) * D + T * 2 * D ** 2 + (T + 2) * (p.freq_dim * D + D ** 2)
    refiner = p.refiner * (S * 12 * D ** 2 + 2 * D ** 2) + (S + 1) * p.text_dim * D + D ** 2
    return p.layers * block + ends + refiner, p.refiner * S ** 2


def ltx_macs(p, D, T, F, N, S, G):
    block = N * (6 * D ** 2 + 2 * D * p.ffn + 2 * D * p.heads) + G * S * 2 * D ** 2
    ends = F * 2 * p.channels * D + (T + G) * (p.freq_dim * D + D ** 2) + (9 * T + 2 * G) * D ** 2
    return p.layers * block + ends, p.layers * N * S


def flops(spec, frames, rows, columns, text=None, memory=0, cached=0, segments=(), heard=False):
    """Operations of one forward on a token grid, by kind; a multiply-add is two. `text`: tokens, default text_len.

    `memory` tokens go through the blocks too; `cached` ones are attended to alone. With `segments`, the lengths of
    memory's, it is a prefill in which each of them sees itself. `heard`: behind `Backbone.heard`.
    """
    macs = {"wan": wan_macs, "hunyuan": hunyuan_macs, "ltx": ltx_macs}[spec.arch]
    F, S = frames * rows * columns, text or spec.text_len
    T, N, own = frames + (memory > 0), F + memory, S if spec.arch == "hunyuan" else 0   # own: words in self-attention
    linear, words = macs(spec, spec.dim, T, F, N, S, (F > 0) + (memory > 0))
    if heard and spec.arch == "wan":                                                    # others have nothing to hear
        linear, _ = macs(spec, spec.dim, T, F, N, 0, 0)
    pairs = sum(n * (n + own) for n in (*segments, F)) + own ** 2 if segments else (N + own) * (N + own + cached)
    return {"linear": 2 * linear, "self_attention": 4 * spec.dim * spec.layers * pairs,
            "text_attention": 4 * spec.dim * words}


def chunk_flops(spec, mode, steps, chunk, clean, rows, columns, memory=0, new=None, text=None, heard=False):
    """Operations of a chunk of `chunk` frames in `steps` steps behind `clean` frames and `memory` tokens, by kind.

    Under attention `segment`, `new` has the lengths of those segments that are not cached yet; the rest as `flops`.
    """
    each = lambda frames, **more: flops(spec, frames, rows, columns, text, heard=heard, **more)
    if mode == "joint":
        parts = steps * [each(clean + chunk, memory=memory)]
    else:
        new = tuple(new or ()) if mode == "segment" else (memory,) if memory else ()
        first = each(clean, memory=sum(new), segments=new if mode == "segment" else ()) if clean or new else {}
        parts = [first] * bool(first) + steps * [each(chunk, cached=memory + clean * rows * columns)]
    return {kind: sum(part[kind] for part in parts) for kind in parts[-1]}


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
