"""The probe: an inverse-dynamics network that reads the motion out of two successive frames.

It is trained on real frames only, half of them through the codec, so that it can judge generated ones: a dream obeys a
key when the probe reads that motion in it. Its early features give the Frechet distance. `evaluate.py --train_probe`
makes assets/probe.safetensors.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import world
from common import autocast, generator, reseed
from data import Trips
from encode import codec
from weights import ASSETS

FILE = ASSETS / "probe.safetensors"


def convolution(channels, out, stride):
    return nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(8, out), nn.GELU()


class Probe(nn.Module):
    """Inverse dynamics: two successive frames -> logits of the translation (9) and the rotation (9) between them."""

    def __init__(self):
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(9, 48, 5, 2, 2), nn.GELU(), *convolution(48, 64, 2))
        later = (c for width, stride in ((64, 2), (128, 1), (128, 1), (128, 1), (128, 2))
                 for c in convolution(width, 128, stride))
        self.late = nn.Sequential(*later, nn.Flatten(), nn.Linear(128 * 24, 256), nn.GELU())
        self.head = nn.Linear(256, 18)

    def forward(self, video):
        """uint8 [B, T, H, W, 3] -> logits [B, T-1, 2, 9] and early features [B, T-1, 128]."""
        x = video.permute(0, 1, 4, 2, 3).float() / 127.5 - 1                            # [B, T, 3, H, W]
        pair = torch.cat([x[:, :-1], x[:, 1:], x[:, 1:] - x[:, :-1]], 2)                # [B, T-1, 9, H, W]
        early = self.early(pair.flatten(0, 1))                                          # [B*(T-1), 64, H/4, W/4]
        logits = self.head(self.late(early)).reshape(*pair.shape[:2], 2, 9)
        features = torch.cat([early.mean((2, 3)), early.std((2, 3))], 1).reshape(*pair.shape[:2], -1)
        return logits, features

    @torch.no_grad()
    def read(self, video, most=2048):
        """Predicted classes [B, T-1, 2] and features [B, T-1, 128] of a long video, about `most` frames at once."""
        device = self.head.weight.device
        out = [self(piece.to(device)) for piece in video.split(max(1, most // video.shape[1]))]
        return torch.cat([l.argmax(-1).cpu() for l, _ in out]), torch.cat([f.double().cpu() for _, f in out])


def learnt(clips, steps, device):
    """A probe after so many `steps`; `clips(step)` gives uint8 video [B, T, H, W, 3] and the labels [B, T] in it."""
    reseed(0, "probe")
    probe = Probe().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(probe.parameters(), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps + 1, pct_start=0.05)
    for step in tqdm(range(steps), desc="probe"):
        video, labels = clips(step)
        with autocast(device):
            logits, _ = probe(video.to(device))                                         # [B, T-1, 2, 9]
        truth, (move, turn) = labels[:, 1:].flatten(), logits.float().flatten(0, 1).unbind(1)
        (F.cross_entropy(move, truth // 9) + F.cross_entropy(turn, truth % 9)).backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return probe.eval()


def train_probe(steps, path, device, batch=1024, length=8):
    """Train on real clips of the embedded world, half of them through the codec; the last weights go to `path`."""
    coder, pool = codec("tiny", device), SimpleNamespace()

    def clips(step):
        if step % 500 == 0:
            trips = Trips(*world.explore(4 * batch, length, generator(step, "probe")))
            real = torch.cat([trips.part(i, i + 512).video(device) for i in range(0, len(trips.maps), 512)])
            coded = torch.cat([coder.decode(coder.encode(piece)).to(device) for piece in real.split(512)])
            pool.labels, pool.videos = trips.actions.to(device), (real, coded)
        pick, at = torch.randint(4 * batch, (batch // 2,), device=device), torch.randint(length - 2, (1,)).item()
        return pool.videos[step % 2][pick, at:at + 3], pool.labels[pick, at:at + 3]
    save_file({k: v.cpu().contiguous() for k, v in learnt(clips, steps, device).state_dict().items()}, path)


def load_probe(device, path=FILE):
    probe = Probe().to(device)
    try:
        probe.load_state_dict(load_file(path), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise OSError(f"{path} is not a probe ({error}); python evaluate.py --train_probe 12000 makes one") from None
    return probe.eval()
