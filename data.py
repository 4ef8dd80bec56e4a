"""Training clips: windows of latents with their labels and caption, the same for any interruption.

The embedded world is rendered as it is needed. A pool of long trajectories lives in memory, is replaced every
`refresh` steps, and batches are random windows of it; pool and batch are functions of (seed, rank, step) alone.
"""

from dataclasses import dataclass

import torch

import world
from common import generator, rank
from control import ACTIONS, Condition, Control, relative


@dataclass(frozen=True)
class Batch:
    """Clips x0 [B, C, T, H, W] with their condition (text, actions and cameras of the same T frames)."""
    x0: torch.Tensor
    condition: Condition


@dataclass(frozen=True)
class Trips:
    """Trajectories with exact truth: maps [N], states [N, T, 4], and [N, T] each: `actions`, labels of what happened,
    `blocked` where that is not what was asked for, and `asked`."""
    maps: torch.Tensor
    states: torch.Tensor
    actions: torch.Tensor
    blocked: torch.Tensor
    asked: torch.Tensor

    def part(self, start, stop):
        """Trajectories start..stop-1."""
        return Trips(*(x[start:stop] for x in vars(self).values()))

    def frames(self, start, stop):
        """Frames start..stop-1 of all trajectories."""
        return Trips(self.maps, *(x[:, start:stop] for x in list(vars(self).values())[1:]))

    def control(self, device="cpu"):
        """What happened: labels and exact cameras of every frame."""
        c2w = relative(world.pose(self.states.to(device)))                              # [N, T, 4, 4]
        return Control(self.actions.to(device), c2w, world.K.to(device).expand(*c2w.shape[:2], 3, 3))

    def video(self, device="cpu"):
        """The exact picture of every frame, uint8 [N, T, H, W, 3]."""
        N, T = self.states.shape[:2]
        c2w = world.pose(self.states.to(device)).flatten(0, 1)
        return world.render(c2w, self.maps.to(device).repeat_interleave(T)).unflatten(0, (N, T))


class WorldStream:
    """Windows of the embedded world, rendered live. Half of them carry the labels of what happened, half those of what
    was asked for: no motion shows a key that a wall stops, so walls are learnt from the latter. Cameras show what
    happened."""

    def __init__(self, codec, seed, pool=256, length=48, refresh=200, split="train"):
        """`pool` trajectories of `length` frames live for `refresh` steps; splits never share a trajectory."""
        if length < 2 or pool < 1 or refresh < 1:
            raise ValueError(f"a pool needs trajectories (got {pool}) of 2 frames or more (got {length}) "
                             f"and at least one step of life (got {refresh})")
        self.codec, self.seed, self.split = codec, seed, split
        self.pool, self.length, self.refresh, self.loaded = pool, length, refresh, None
        self.captions = codec.text(world.CAPTIONS)

    def load(self, number):
        """Render and encode pool `number`, in pieces that bound the memory of the pixels."""
        trips = Trips(*world.explore(self.pool, self.length, generator(self.seed, self.split, "pool", rank(), number)))
        device = self.codec.device
        self.latents = torch.cat([self.codec.encode(trips.part(i, i + 64).video(device))
                                  for i in range(0, self.pool, 64)])                    # [N, C, length, H, W]
        self.labels, self.maps = torch.stack([trips.actions, trips.asked]).to(device), trips.maps.to(device)
        self.control = trips.control(device)
        self.loaded = number

    def batch(self, step, size, frames):
        """The batch of `size` clips of `frames` latent frames that belongs to `step`."""
        if frames > self.length:
            raise ValueError(f"clips of {frames} frames do not fit trajectories of {self.length}")
        if self.loaded != step // self.refresh:
            self.load(step // self.refresh)
        g = generator(self.seed, self.split, "batch", rank(), step)
        trip = torch.randint(self.pool, (size,), generator=g).to(self.codec.device)
        start = torch.randint(self.length - frames + 1, (size,), generator=g).to(self.codec.device)
        kind = torch.randint(2, (size,), generator=g).to(self.codec.device)
        index = start[:, None] + torch.arange(frames, device=self.codec.device)         # [B, T]
        x0 = self.latents[trip[:, None], :, index].transpose(1, 2)                      # [B, C, T, H, W]
        text = {key: value[self.maps[trip]] for key, value in self.captions.items()}
        at = trip[:, None], index
        control = Control(self.labels[kind[:, None], *at], relative(self.control.c2w[at]), self.control.K[at])
        return Batch(x0.contiguous(), Condition(text, control))


class RandomStream:
    """Noise in the shape of a backbone's clips, text and actions: speed and memory of training, without any data."""

    def __init__(self, spec, seed, device):
        self.spec, self.seed, self.device = spec, seed, device

    def text(self, prompts):
        """The same random states for any prompt, in the shape that a text encoder gives them."""
        states = torch.randn(1, self.spec.text_len, self.spec.text_dim, generator=generator(self.seed, "text"))
        return {"text": states.expand(len(prompts), -1, -1).to(self.device)}

    def batch(self, step, size, frames):
        g, spec = generator(self.seed, "random", rank(), step), self.spec
        H, W = (n // s for n, s in zip(spec.size[1:], spec.stride[1:]))
        x0 = torch.randn(size, spec.channels, frames, H, W, generator=g).to(self.device)
        actions = torch.randint(ACTIONS, (size, frames), generator=g).to(self.device)
        return Batch(x0, Condition(self.text([""] * size), Control(actions)))
