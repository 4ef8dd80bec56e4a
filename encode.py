"""Frozen codecs: video <-> latents, prompt -> text states. Nothing here is trained.

    python encode.py --videos FOLDER --out SHARDS           # a folder of videos into shards: ingest.py

The embedded world's codec is one fixed orthonormal matrix: an 8x8 block DCT (Ahmed, Natarajan, Rao 1974) in an
orthonormal luma / chroma space, of which the lowest frequencies are kept. It needs no weights and no download. Those of
the official backbones (vae.py, language.py) do: diffusers and transformers, the extra `encode`.
"""

import hashlib
import json
import math
import os
import sys
from functools import lru_cache

import torch
from einops import rearrange
from safetensors import safe_open

import language
import vae
import world
from common import digest, generator, parse
from control import poses_from_labels
from inject import SENTENCES
from model import preset
from weights import component, weight_files

BLOCK = 8                                       # pixels per latent, both ways
KEEP = (16, 4, 4)                               # coefficients kept of luma, blue-yellow, red-green: 24 channels
# Standard deviation of each kept coefficient over the world's frames (pixels in [-1, 1]): `python encode.py`.
DEVIATION = (3.6765, 0.77, 1.0335, 0.3891, 0.3933, 0.5924, 0.2044, 0.2801, 0.2428, 0.3646, 0.1554, 0.1264, 0.1988,
             0.1719, 0.244, 0.0962,
             2.4676, 0.3547, 0.5045, 0.171, 1.7576, 0.2502, 0.371, 0.1189)
GAIN = 1.2677                                     # brings the latents' mean variance to 1


def dct_matrix(n):
    """Orthonormal DCT-II, rows are frequencies."""
    k, i = torch.arange(n).double()[:, None], torch.arange(n).double()[None]
    basis = torch.cos(math.pi * (i + 0.5) * k / n) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def basis():
    """Orthonormal [3 * BLOCK^2, channels]: from a block of pixels (colour, row, column) to its kept coefficients."""
    colours = torch.tensor([[1, 1, 1], [-1, -1, 2], [1, -1, 0]], dtype=torch.float64)   # luma, blue-yellow, red-green
    colours = colours / colours.norm(dim=1, keepdim=True)
    d = dct_matrix(BLOCK)
    waves = torch.einsum("ui,vj->uvij", d, d)                                           # [u, v, row, column]
    order = sorted(((u, v) for u in range(BLOCK) for v in range(BLOCK)), key=lambda w: (w[0] + w[1], max(w), w))
    columns = [torch.einsum("c,ij->cij", colour, waves[u, v]).flatten()
               for colour, keep in zip(colours, KEEP) for u, v in order[:keep]]
    return torch.stack(columns, 1)


class Codec:
    """What every backbone's codec can do. Its networks are frozen, loaded when they are first needed.

    spec                         of its backbone
    encode(video)                uint8 [B, F, H, W, 3] -> float32 latents [B, C, T, h, w]; F = 1 + stride (T - 1)
    decode(latents, state=None)  -> uint8 video on the CPU; `state`, a dict that begins empty, carries a stream on
    text(prompts)                -> dict of text states [B, ...]; each prompt's do not depend on the others
    sentences()                  camera sentences of the 81 labels [81, S, E], zeros after each one's end
    cameras(actions)             c2w [B, T, 4, 4], K [B, T, 3, 3] of one who begins level and obeys `actions` [B, T]
    fingerprint()                sha256 of all that latents and text states depend on
    release(*parts)              give back the memory of "vae", "language", or both
    """

    def release(self, *parts):
        """Nothing is loaded."""


class TinyCodec(Codec):
    """Codec of the embedded world: uint8 video [B, T, H, W, 3] <-> latents [B, 24, T, H/8, W/8], one per frame."""

    def __init__(self, spec, device="cpu"):
        self.spec = spec
        # Divided by the root of the deviation: by the deviation itself, high frequencies would own the loss.
        scale = GAIN / torch.tensor(DEVIATION, dtype=torch.float64).sqrt()
        self.analysis = (basis() * scale).float().to(device)                            # [192, 24]
        self.synthesis = (basis() / scale).T.float().to(device)                         # [24, 192]
        camera = sorted({*" ".join(SENTENCES).replace(".", "").lower().split()} - {*world.WORDS})
        self.words = {word: i for i, word in enumerate((*world.WORDS, *camera))}
        self.vectors = torch.cat([torch.randn(len(table), 64, generator=generator(0, name))
                                  for table, name in ((world.WORDS, "word vectors"), (camera, "camera words"))])
        self.device = device

    def encode(self, video):
        """uint8 [B, T, H, W, 3] -> float32 latents [B, C, T, H/8, W/8]."""
        fits = video.dtype == torch.uint8 and video.ndim == 5 and video.shape[-1] == 3
        if not fits or video.shape[2] % BLOCK or video.shape[3] % BLOCK:
            raise ValueError("the tiny codec takes uint8 video [B, T, H, W, 3] with H and W divisible by 8, "
                             f"got {video.dtype} {list(video.shape)}")
        x = video.to(self.device).float() / 127.5 - 1
        blocks = rearrange(x, "b t (h i) (w j) c -> b t h w (c i j)", i=BLOCK, j=BLOCK)
        return rearrange(blocks @ self.analysis, "b t h w c -> b c t h w").contiguous()

    def decode(self, latents, state=None):
        """Latents [B, C, T, h, w] -> uint8 video [B, T, 8h, 8w, 3] on the CPU. Frames do not depend on each other."""
        blocks = rearrange(latents.float(), "b c t h w -> b t h w c") @ self.synthesis
        x = rearrange(blocks, "b t h w (c i j) -> b t (h i) (w j) c", c=3, i=BLOCK, j=BLOCK)
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    def text(self, prompts):
        """Prompts -> {"text": [B, 16, 64]}: a fixed random vector per word; the empty prompt is all zeros."""
        states = torch.zeros(len(prompts), 16, 64)
        for row, prompt in zip(states, prompts):
            words = prompt.lower().split()
            for word in words:
                if word not in self.words:
                    raise ValueError(f"the tiny world does not know the word '{word}'; it knows "
                                     + ", ".join(self.words))
            if len(words) > len(row):
                raise ValueError(f"a prompt has at most {len(row)} words, '{prompt}' has {len(words)}")
            for i, word in enumerate(words):
                row[i] = self.vectors[self.words[word]]
        return {"text": states.to(self.device)}

    def fingerprint(self):
        """Stands for what latents and text states mean: shards made with another codec are not for this one."""
        return f"tiny {digest(BLOCK, KEEP, DEVIATION, GAIN, [*self.words])}"

    def sentences(self):
        """The camera sentences of all 81 labels [81, S, 64], zeros after each one's end."""
        states = self.text([s.replace(".", "") for s in SENTENCES])["text"]
        return states[:, :int((states != 0).any(-1).sum(1).max())]

    def cameras(self, actions):
        """c2w [B, T, 4, 4] and K [B, T, 3, 3] of one who begins level and obeys `actions` [B, T]; no wall stops it."""
        c2w = poses_from_labels(actions, world.STEP, world.ANGLE).float().to(self.device)
        return c2w, world.K.to(self.device).expand(*actions.shape, 3, 3)


class OfficialCodec(Codec):
    """Codec of an official backbone: its VAE and its text encoders, from `source` in diffusers' layout."""

    STEP, ANGLE = 0.05, 3.0     # of a latent frame: 20 steps ahead are what `Cameras.normalised` makes 1; degrees
    WIDE = 60.0                 # degrees that the picture is wide, when no one knows better

    def __init__(self, spec, device, source):
        self.spec, self.device, self.source, self.loaded = spec, device, source, {}
        self.states = lru_cache(32)(self.states)                # the same few prompts come again and again

    def part(self, name):
        """The VAE or the text encoders, loaded now if they are not yet."""
        if name not in self.loaded:
            made = vae.load if name == "vae" else language.ENCODERS[self.spec.arch]
            self.loaded[name] = made(*((self.spec, self.source) if name == "vae" else (self.source, self.spec)),
                                     self.device)
        return self.loaded[name]

    def release(self, *parts):
        for name in parts or ("vae", "language"):
            self.loaded.pop(name, None)
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()

    def encode(self, video):
        return self.part("vae").encode(video)

    def decode(self, latents, state=None):
        return self.part("vae").decode(latents, state)

    @torch.no_grad()
    def states(self, prompt):
        text, tokens = self.part("language")(prompt)
        return {key: value.cpu() for key, value in text.items()}, tokens

    def text(self, prompts):
        rows = [self.states(prompt)[0] for prompt in prompts]
        return {key: torch.cat([row[key] for row in rows]).to(self.device) for key in rows[0]}

    def sentences(self):
        rows = [(text["text"][0, :tokens], tokens) for text, tokens in map(self.states, SENTENCES)]
        return torch.nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True).to(self.device)

    def cameras(self, actions):
        """Labels have no scale and no lens: STEP, ANGLE and WIDE are conventions."""
        c2w = poses_from_labels(actions, self.STEP, self.ANGLE).float().to(self.device)
        f = 0.5 / math.tan(math.radians(self.WIDE / 2))
        K = torch.tensor([[f, 0, 0.5], [0, f * self.spec.size[2] / self.spec.size[1], 0.5], [0, 0, 1]])
        return c2w, K.to(self.device).expand(*actions.shape, 3, 3)

    def fingerprint(self):
        """Of each file: its name, size and a sample of its bytes, of configurations what they say; and the latents'
        statistics. Nothing is loaded."""
        parts = "vae", *language.ENCODERS[self.spec.arch].parts
        folder, hashed = component(self.source, *parts), hashlib.sha256()
        files = [file for part in parts for file in sorted((folder / part).rglob("*")) if file.is_file()]
        files += weight_files(folder, self.spec) if (folder / self.spec.file).exists() else []
        for file in files:
            hashed.update(f"{file.relative_to(folder)}\n".encode() + sample(file))
        return f"{self.spec.name} {hashed.hexdigest()}"


SAMPLE = 2 ** 16        # bytes, three times a file


def sample(file):
    """What `fingerprint` takes of a file: bytes that differ if its content does, but for changes made to hide."""
    if file.name == "config.json":                      # which version wrote it does not matter
        config = json.loads(file.read_text())
        config = {key: value for key, value in config.items() if "version" not in key and key[0] != "_"}
        return json.dumps(config, sort_keys=True).encode()
    size = file.stat().st_size
    with open(file, "rb") as stream:
        taken = [os.pread(stream.fileno(), SAMPLE, at) for at in (0, size // 2, max(0, size - SAMPLE))]
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as reader:
            taken += [reader.get_tensor(key).float().numpy().tobytes()
                       for key in ("latents_mean", "latents_std") if key in reader.keys()]
    return b"".join([str(size).encode(), *taken])


SOURCES = {"wan2.1-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan2.2-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
           "hunyuan1.5-8b": "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
           "ltx2.3-22b": "diffusers/LTX-2.3-Diffusers"}


@lru_cache
def codec(name, device="cpu", source=""):
    """The codec of a backbone, one for all who ask. `source`: a folder in diffusers' layout (vae, text_encoder,
    tokenizer, ...) or a hub repository, by default the official one; LTX's connector is in the official file, beside
    those folders or where the backbone's weights come from."""
    spec = preset(name)
    if name not in SOURCES:
        if source:
            raise ValueError(f"the codec of {name} is computed, not read: there is no --codec {source}")
        return TinyCodec(spec, device)
    return OfficialCodec(spec, device, source or SOURCES[name])


def measure(frames=2048):
    """Deviations and gain of the tiny codec from explored frames, and its PSNR: the constants above."""
    maps, states, *_ = world.explore(frames // 8, 8, generator(0, "codec"))
    video = world.render(world.pose(states), maps[:, None])
    blocks = rearrange(video.double() / 127.5 - 1, "b t (h i) (w j) c -> (b t h w) (c i j)", i=BLOCK, j=BLOCK)
    coefficients = blocks @ basis()
    deviation = coefficients.std(0)
    gain = 1 / deviation.mean().sqrt()                      # mean over channels of (gain^2 / deviation) deviation^2 = 1
    error = ((coefficients @ basis().T).clamp(-1, 1) - blocks).square().reshape(frames, -1).mean(1)
    psnr = (10 * torch.log10(4 / error)).mean()
    return [round(d, 4) for d in deviation.tolist()], round(float(gain), 4), float(psnr)


if __name__ == "__main__":
    if len(sys.argv) > 1:                       # videos -> shards
        import ingest
        ingest.main(parse(ingest.Config))
        sys.exit()
    print("DEVIATION = {}\nGAIN = {}\nPSNR {:.2f} dB".format(*measure()))
