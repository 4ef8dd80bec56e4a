"""Frozen video autoencoders of the official backbones, from diffusers: pixels <-> latents, whole or piece by piece.

A piece-wise decode goes on where the last piece ended: `decode(latents, state)` with one dict `state` per stream. The
first latent frame of a stream is one pixel frame, each later one is 4 (LTX: 8).

    Wan           causal, remembers the last two frames before each convolution: equal to a whole decode
    HunyuanVideo  the same, and its middle block attends to all frames so far: we keep the last HISTORY of them, so that
                  it is equal up to so many latent frames
    LTX           not causal: the last OVERLAP latent frames are decoded once more in front of each piece, and what
                  comes after the piece is not known yet

    python vae.py wan2.1-1.3b           # speed at the native size, with random weights
"""

import sys
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange

from common import autocast, one_line_errors, optional, setup, timed
from model import preset
from weights import component

HISTORY = 32            # latent frames that HunyuanVideo's middle block attends to: its native clip has 31
OVERLAP = 4             # latent frames that LTX decodes again
PIECE = 4               # latent frames of HunyuanVideo that go through the network at once: bounds the memory


class Autoencoder:
    """uint8 video [B, F, H, W, 3] <-> normalised latents [B, C, T, h, w], one clip after another."""

    library = ""                                        # class of diffusers

    def __init__(self, net, spec):
        self.net, self.spec = net.eval().requires_grad_(False), spec
        self.device = next(net.parameters()).device
        mean, std = (torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 1, 1) for x in self.statistics())
        self.mean, self.std = mean.to(self.device), std.to(self.device)                 # [C, 1, 1, 1]
        if max(len(mean), len(std)) not in (1, spec.channels):
            raise ValueError(f"this VAE has {len(mean)} latent channels, {spec.name} needs {spec.channels}")

    def check(self, video):
        """Refuse what does not fit the strides: nothing is cropped in silence."""
        t, h, w = (s * p for s, p in zip(self.spec.stride, (1, *self.spec.patch[1:])))
        if video.dtype != torch.uint8 or video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(f"a codec takes uint8 video [B, F, H, W, 3], got {video.dtype} {list(video.shape)}")
        F_, H, W = video.shape[1:4]
        if not F_ or (F_ - 1) % t:
            raise ValueError(f"{self.spec.name} takes clips of 1 + {t} k frames, got {F_}: give {(F_ - 1) // t * t + 1}"
                             f" or {max(0, F_ - 1 + t) // t * t + 1}")
        if H % h or W % w or not H * W:
            raise ValueError(f"{self.spec.name} takes heights divisible by {h} and widths by {w}, got {H}x{W}")

    @torch.no_grad()
    def encode(self, video):
        """Latents float32 [B, C, T, h, w] of `video`: the mean of the posterior, computed in fp32."""
        self.check(video)
        latents = []
        with torch.autocast(self.device.type, enabled=False):
            for clip in video:
                x = rearrange(clip.to(self.device), "f h w c -> 1 c f h w").float() / 127.5 - 1
                latents.append((self.posterior_mean(x)[0] - self.mean) / self.std)
        return torch.stack(latents)

    @torch.no_grad()
    def decode(self, latents, state=None):
        """uint8 video [B, F, H, W, 3] on the CPU. `state`, a dict, at first empty, makes the latents continue those of
        the call before: its tensors are replaced and never written into, so that a copy of the dict is a way back."""
        x = self.pixels(latents, {} if state is None else state)
        return rearrange(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), "b c f h w -> b f h w c").cpu()

    def pixels(self, latents, state):
        """The same as numbers around -1..1, float32 [B, 3, F, H, W]; bf16 compute on a GPU."""
        z = latents.to(self.device).float() * self.std + self.mean
        with autocast(self.device):
            return self.continued(z, state).float()

    def posterior_mean(self, x):
        return self.net.encode(x).latent_dist.mode()


class Wan(Autoencoder):
    """AutoencoderKLWan: that of Wan2.1, and with `patch_size` that of Wan2.2."""

    library = "AutoencoderKLWan"

    def statistics(self):
        return self.net.config.latents_mean, self.net.config.latents_std

    def continued(self, z, state):
        """One latent frame at a time, as the library does it; the list of past features is ours to keep."""
        convolutions = sum(isinstance(m, torch.nn.Conv3d) for m in self.net.decoder.modules())
        begins, cache = "cache" not in state, [*state.get("cache", [None] * convolutions)]
        frames = []
        for i, frame in enumerate(z.split(1, 2)):
            frames.append(self.net.decoder(self.net.post_quant_conv(frame), feat_cache=cache, feat_idx=[0],
                                           first_chunk=begins and i == 0))
        state["cache"], p = cache, self.net.config.patch_size or 1
        return rearrange(torch.cat(frames, 2), "b (c q p) f h w -> b c f (h p) (w q)", p=p, q=p).clamp(-1, 1)


# ---- HunyuanVideo ----------------------------------------------------------------------------------------------------

def causal_conv(m, tape, x):
    """A convolution whose past are the last frames of the piece before; at the beginning, the first frame repeated."""
    past, n = next(tape.old, None), m.time_causal_padding[4]
    x = torch.cat([x[:, :, :1].expand(-1, -1, n, -1, -1) if past is None else past, x], 2)
    tape.new.append(x[:, :, -n:].clone())               # a view would keep all of x
    return m.conv(F.pad(x, (*m.time_causal_padding[:4], 0, 0), mode=m.pad_mode))


def causal_attention(m, tape, x):
    """Each frame attends to itself and the `tape.history - 1` frames before it. The library builds a dense mask of all
    tokens squared; frame by frame none is needed."""
    T, h = x.shape[2], m.norm(x)
    q, k, v = (rearrange(f(h), "b c t h w -> b t (h w) c") for f in (m.to_q, m.to_k, m.to_v))
    if past := next(tape.old, None):
        k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
    tape.new.append((k[:, -tape.history:], v[:, -tape.history:]))
    n, y = k.shape[1] - T, []
    for i in range(T):
        seen = slice(max(0, n + i + 1 - tape.history), n + i + 1)
        y.append(F.scaled_dot_product_attention(q[:, i], k[:, seen].flatten(1, 2), v[:, seen].flatten(1, 2)))
    return x + m.proj_out(rearrange(torch.stack(y, 1), "b t (h w) c -> b c t h w", h=x.shape[3]))


def upsample(m, tape, x):
    """Only the first frame of a stream stays a single one in time."""
    if tape.begins or not m.add_temporal_upsample:
        return type(m).forward(m, x)
    h = m._dcae_upsample_rearrange(m.conv(x), r1=2)
    return h + m._dcae_upsample_rearrange(x, r1=2).repeat_interleave(m.repeats, 1)


def downsample(m, tape, x):
    if tape.begins or not m.add_temporal_downsample:
        return type(m).forward(m, x)
    h, shortcut = m._dcae_downsample_rearrange(m.conv(x), r1=2), m._dcae_downsample_rearrange(x, r1=2)
    return h + shortcut.unflatten(1, (h.shape[1], m.group_size)).mean(2)


class HunyuanVideo(Autoencoder):
    """AutoencoderKLHunyuanVideo15, both ways piece by piece: its modules read and write a tape of their pasts."""

    library = "AutoencoderKLHunyuanVideo15"
    piecewise = {"HunyuanVideo15CausalConv3d": causal_conv, "HunyuanVideo15AttnBlock": causal_attention,
                 "HunyuanVideo15Upsample": upsample, "HunyuanVideo15Downsample": downsample}

    def __init__(self, net, spec, history=HISTORY):
        super().__init__(net, spec)
        self.tape = SimpleNamespace(history=history)
        for m in net.modules():
            if type(m).__name__ in self.piecewise:
                m.forward = partial(self.piecewise[type(m).__name__], m, self.tape)

    def statistics(self):
        return [0.0], [1 / self.net.config.scaling_factor]

    def run(self, net, pieces, state):
        """`net` of one piece after another; `state` holds the pasts, in the order in which modules ask for them."""
        y = []
        for x in pieces:
            self.tape.begins, self.tape.old, self.tape.new = not state, iter(state.get("cache", ())), []
            y.append(net(x))
            state["cache"] = self.tape.new
        self.tape.old = self.tape.new = None            # the stream owns them
        return torch.cat(y, 2)

    def posterior_mean(self, x):
        frames = PIECE * self.spec.stride[0]
        pieces = [x[:, :, :1], *x[:, :, 1:].split(frames, 2)] if x.shape[2] > 1 else [x]
        return self.run(self.net.encoder, pieces, {}).chunk(2, 1)[0]

    def continued(self, z, state):
        return self.run(self.net.decoder, z.split(PIECE, 2), state)


# ---- LTX -------------------------------------------------------------------------------------------------------------

class LTX(Autoencoder):
    """AutoencoderKLLTX2Video. Its decoder also looks ahead: what follows a piece is missing at the end of it."""

    library = "AutoencoderKLLTX2Video"

    def __init__(self, net, spec, overlap=OVERLAP):
        super().__init__(net, spec)
        self.overlap = overlap

    def statistics(self):
        return self.net.latents_mean, self.net.latents_std / self.net.config.scaling_factor

    def continued(self, z, state):
        past = state.get("past", z[:, :, :0])
        state["past"] = torch.cat([past, z], 2)[:, :, -self.overlap:]
        x = self.net.decode(torch.cat([past, z], 2)).sample
        return x[:, :, -self.spec.stride[0] * z.shape[2]:]                              # all of it at the beginning


CLASSES = {"wan": Wan, "hunyuan": HunyuanVideo, "ltx": LTX}


def load(spec, source, device):
    """The VAE of a backbone out of the folder `vae` of `source`, a folder in diffusers' layout or a hub repository."""
    kind = CLASSES[spec.arch]
    net = getattr(optional("diffusers", "encode"), kind.library)
    try:
        net = net.from_pretrained(component(source, "vae") / "vae", torch_dtype=torch.float32)
    except (RuntimeError, TypeError) as error:          # keys or shapes of another VAE
        raise ValueError(f"{source} has no VAE of {spec.name}: {str(error).splitlines()[0]}") from None
    return kind(net.to(device), spec)


# ---- Speed -----------------------------------------------------------------------------------------------------------

WAN22 = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12,
         "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48,
         "latents_std": [1.0] * 48}
LTX23 = {"block_out_channels": (256, 512, 1024, 1024), "layers_per_block": (4, 6, 4, 2, 2),
         "decoder_block_out_channels": (256, 512, 512, 1024), "decoder_layers_per_block": (4, 6, 4, 2, 2),
         "decoder_spatio_temporal_scaling": (True,) * 4, "decoder_inject_noise": (False,) * 5,
         "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
         "upsample_residual": (False,) * 4, "upsample_factor": (2, 2, 1, 2), "decoder_causal": False,
         "decoder_spatial_padding_mode": "zeros"}
OFFICIAL = {"wan2.1-1.3b": {}, "wan2.2-5b": WAN22, "hunyuan1.5-8b": {}, "ltx2.3-22b": LTX23}       # arguments


def measure(name, device, size=None):
    """Speed of encoding and of chunk-wise decoding at `size` (frames, height, width), and how far the chunks are from a
    whole decode: a line of text. Random weights."""
    spec = preset(name)
    frames, H, W = size or spec.size
    torch.manual_seed(0)
    with torch.device(device):
        net = getattr(optional("diffusers", "encode"), CLASSES[spec.arch].library)(**OFFICIAL[name])
    vae = CLASSES[spec.arch](net, spec)
    video, state = torch.randint(256, (1, frames, H, W, 3), dtype=torch.uint8, device=device), {}
    vae.encode(video)                                                                   # warm-up, as the first chunks
    encode, latents = timed(lambda: vae.encode(video), device)
    chunks = [timed(lambda: vae.pixels(z, state), device) for z in latents.split(spec.chunk, 2)]
    chunk = sorted(ms for ms, x in chunks[1:-1])[len(chunks[1:-1]) // 2]
    with torch.no_grad():
        whole = vae.pixels(latents, {})
    error = (torch.cat([x for _, x in chunks], 2) - whole).square().mean() / whole.var()
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else float("nan")
    return (f"{name}, {frames} frames of {H}x{W}: encode {1000 * frames / encode:.1f} frames a second; decode "
            f"{chunk:.0f} ms a chunk of {spec.chunk} latent frames, {spec.chunk * spec.stride[0]} pixel frames "
            f"({1000 * spec.chunk * spec.stride[0] / chunk:.1f} a second); chunks against a whole decode: relative "
            f"error {float(error) ** 0.5:.2e}; peak {peak:.1f} GiB")


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if name in OFFICIAL]
    if len(names) != len(sys.argv[1:]) or not names:
        sys.exit(f"usage: python vae.py {' '.join(OFFICIAL)}     (one or more)")
    with one_line_errors(), torch.no_grad():
        for one in names:
            print(measure(one, setup()))
