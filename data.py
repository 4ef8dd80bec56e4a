"""Training clips: windows of latents with their labels, cameras and caption, the same for any interruption.

Every stream has one method, `batch(step, size, frames)`, a function of (seed, rank, step) alone. The embedded world is
rendered as it is needed: a pool of long trajectories lives in memory, is replaced every `refresh` steps, and batches
are random windows of it. Recorded and encoded video comes from shards (shards.py).
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence

import world
from common import data_rank, data_ranks, generator
from control import ACTION_SPEC, ACTIONS, Condition, Control, poses_from_labels, relative
from shards import caption_states, read_index, read_shard


@dataclass(frozen=True)
class Batch:
    """Clips x0 [B, C, T, H, W] with their condition: text, actions and cameras of the same T frames."""
    x0: torch.Tensor
    condition: Condition
    ids: list                       # [B] of str, by which each clip can be found again


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
    """Windows of the embedded world, rendered live. Half of them carry labels and cameras of what happened, half of
    what was asked for, as if no wall were there: no motion shows a key that a wall stops, so walls are learnt from the
    latter. A player's cameras are of that kind (`Codec.cameras`)."""

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
        g = generator(self.seed, self.split, "pool", data_rank(), number)
        trips = Trips(*world.explore(self.pool, self.length, g))
        device = self.codec.device
        self.latents = torch.cat([self.codec.encode(trips.part(i, i + 64).video(device))
                                  for i in range(0, self.pool, 64)])                    # [N, C, length, H, W]
        self.labels, self.maps = torch.stack([trips.actions, trips.asked]).to(device), trips.maps.to(device)
        self.control = trips.control(device)
        asked = poses_from_labels(trips.asked, world.STEP, world.ANGLE, trips.states[:, 0, 3]).float()
        self.c2w = torch.stack([self.control.c2w, asked.to(device)])                    # [2, N, length, 4, 4]
        self.loaded = number

    def batch(self, step, size, frames):
        """The batch of `size` clips of `frames` latent frames that belongs to `step`."""
        if frames > self.length:
            raise ValueError(f"clips of {frames} frames do not fit trajectories of {self.length}")
        if self.loaded != step // self.refresh:
            self.load(step // self.refresh)
        g = generator(self.seed, self.split, "batch", data_rank(), step)
        draws = [torch.randint(n, (size,), generator=g) for n in (self.pool, self.length - frames + 1, 2)]
        ids = [f"{self.split} pool {self.loaded} rank {data_rank()} trajectory {i} frames {a}..{a + frames - 1}"
               for i, a in zip(*(draw.tolist() for draw in draws[:2]))]
        trip, start, kind = (draw.to(self.codec.device) for draw in draws)
        index = start[:, None] + torch.arange(frames, device=self.codec.device)         # [B, T]
        x0 = self.latents[trip[:, None], :, index].transpose(1, 2)                      # [B, C, T, H, W]
        text = {key: value[self.maps[trip]] for key, value in self.captions.items()}
        at = kind[:, None], trip[:, None], index
        control = Control(self.labels[at], relative(self.c2w[at]), self.control.K[at[1:]])
        return Batch(x0.contiguous(), Condition(text, control), ids)


class RandomStream:
    """Noise in the shape of a backbone's clips, text, actions and cameras: speed and memory without any data."""

    def __init__(self, spec, seed, device):
        self.spec, self.seed, self.device = spec, seed, device

    def text(self, prompts):
        """The same random states for any prompt, in the shape that a text encoder gives them."""
        states = torch.randn(1, self.spec.text_len, self.spec.text_dim, generator=generator(self.seed, "text"))
        return {"text": states.expand(len(prompts), -1, -1).to(self.device)}

    def release(self, *parts):
        """Nothing is loaded."""

    def batch(self, step, size, frames):
        g, spec = generator(self.seed, "random", data_rank(), step), self.spec
        H, W = (n // s for n, s in zip(spec.size[1:], spec.stride[1:]))
        x0 = torch.randn(size, spec.channels, frames, H, W, generator=g).to(self.device)
        actions = torch.randint(ACTIONS, (size, frames), generator=g).to(self.device)
        ids = [f"random rank {data_rank()} step {step} clip {i}" for i in range(size)]
        still = torch.eye(4, device=self.device).expand(size, frames, 4, 4)
        return Batch(x0, Condition(self.text([""] * size), Control(actions, still, still[..., :3, :3])), ids)


class ShardStream:
    """Windows of the clips in a folder of shards. Every window of the split is equally likely, whatever the length of
    its clip; where a latent is several pixel frames the first one of a clip is special, so there windows begin with it.

    The batch of a step is drawn for all ranks together and cut among them: two ranks see what one would that takes
    twice as many clips. Shards are mapped, not loaded, and their sha256 is compared when they are first needed.
    """

    def __init__(self, folder, spec, fingerprint, seed, device="cpu", split="train", cameras=lambda actions: ()):
        """`fingerprint` is that of the run's codec; ValueError if the shards are of another one, or of other labels.
        `cameras` makes those of labels (`Codec.cameras`), for shards with clips that have none."""
        self.folder, self.seed, self.split, self.device, self.opened = Path(folder), seed, split, device, {}
        self.shards = read_index(folder)
        for shard, (what, ours) in product(self.shards, {"codec": fingerprint, "actions": ACTION_SPEC}.items()):
            if shard[what] != ours:
                raise ValueError(f"{folder}/{shard['file']} was made with {what} [{shard[what]}], this run has "
                                 f"[{ours}]; encode the videos again, or train what they were encoded for")
        alike = {}                                          # what all clips share, and the first file that has it
        for shard in self.shards:
            with safe_open(self.folder / shard["file"], "numpy") as file:
                _, _, *size = file.get_slice("0.x0").get_shape() if shard["clips"] else (0, 0)
            for what, ours in ("fps", shard["fps"]), ("latent size", size):
                theirs, first = alike.setdefault(what, (ours, shard["file"])) if ours else (ours, None)
                if theirs != ours:
                    raise ValueError(f"{folder}/{shard['file']} has {what} {ours}, {first} has {theirs}: train on them "
                                     "one after another, from folders of their own")
        self.clips = [(s, i, clip) for s, shard in enumerate(self.shards) for i, clip in enumerate(shard["clips"])
                      if clip["split"] == split]
        if not self.clips:
            raise ValueError(f"{folder} has no clips of the split '{split}'")
        self.lengths, self.crops = torch.tensor([clip["frames"] for *_, clip in self.clips]), spec.stride[0] == 1
        self.cameras = all(clip["cameras"] for *_, clip in self.clips)      # what not all clips have is read of none
        self.of_labels = cameras

    def open(self, number):
        """The tensors of a shard; ValueError if the file is not the one that was indexed."""
        if number not in self.opened:
            self.opened[number] = read_shard(self.folder, self.shards[number])
        return self.opened[number]

    def windows(self, frames):
        """How many windows of `frames` latent frames each clip has."""
        if frames > self.lengths.max():
            raise ValueError(f"no clip in {self.folder} has {frames} latent frames, the longest has "
                             f"{int(self.lengths.max())}; lower --frames or encode longer clips")
        most = (self.lengths - frames + 1).clamp(min=0)
        return most if self.crops else most.clamp(max=1)

    def batch(self, step, size, frames):
        """This rank's `size` clips of `frames` latent frames in the batch that belongs to `step`."""
        ends = self.windows(frames).cumsum(0)
        g = generator(self.seed, self.split, "batch", step)
        draws = torch.randint(int(ends[-1]), (size * data_ranks(),), generator=g)[data_rank() * size:][:size]
        clips = torch.searchsorted(ends, draws, right=True)
        starts = draws - torch.where(clips > 0, ends[clips - 1], 0)
        rows = [self.window(int(clip), int(start), frames) for clip, start in zip(clips, starts)]
        parts = {key: torch.stack([row[key] for row in rows]).to(self.device) for key in rows[0] if key != "text"}
        text = {key: pad_sequence([row["text"][key] for row in rows], True).to(self.device) for key in rows[0]["text"]}
        actions = parts["actions"].long()
        cameras = (relative(parts["c2w"]), parts["K"]) if self.cameras else self.of_labels(actions)
        ids = [f"{self.split} {self.shards[shard]['file']} clip {clip} frames {a}..{a + frames - 1}"
               for (shard, clip, _), a in zip((self.clips[clip] for clip in clips), starts.tolist())]
        return Batch(parts["x0"].float(), Condition(text, Control(actions, *cameras)), ids)

    def window(self, index, start, frames):
        """The tensors of a window of clip `index`, and its text."""
        shard, i, clip = self.clips[index]
        tensors, cut = self.open(shard), slice(start, start + frames)
        names = ("actions", "c2w", "K") if self.cameras else ("actions",)
        return {"x0": tensors[f"{i}.x0"][:, cut], **{name: tensors[f"{i}.{name}"][cut] for name in names},
                "text": caption_states(tensors, self.shards[shard], clip["text"])}


def open_stream(folder, coder, spec, seed, frames, pool, length, refresh):
    """Clips of up to `frames` latent frames: of the shards in `folder` or, if it is "", of the embedded world."""
    if not folder and spec.stride[0] > 1:
        raise ValueError(f"{spec.name} does not learn from the embedded world; encode.py makes shards: --data FOLDER")
    if not folder:
        return WorldStream(coder, seed, pool, max(length, frames), refresh)
    stream = ShardStream(folder, spec, coder.fingerprint(), seed, coder.device, cameras=coder.cameras)
    stream.windows(frames)                                                              # an error comes now, not later
    return stream
