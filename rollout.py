"""Chunked bidirectional rollout: the same loop for training, for evaluation and for playing.

A chunk of K latent frames is denoised with the clean history in front of it at sigma 0, under full bidirectional
attention over both (BiWM, arXiv:2606.10135); then it becomes history. Nothing is cached, because the history's
features depend on the noisy chunk; where history does not see the chunk (--attention self, segment), they are.

    python rollout.py --actions "w-8, right-12, w+left-8" --out walk.mp4
    python rollout.py --backbone wan2.1-1.3b --weights student.safetensors --image street.jpg --prompt "A street."
"""

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import world
from common import autocast, generator, one_line_errors, parse, sent, setup, world_size
from control import Condition, Control, check_actions, parse_actions
from encode import codec
from flow import add_noise, euler, guide, schedule, velocity_to_x0
from history import History, behind_cache, budget, configure, identity
from model import load
from graphs import replayed
from weights import ASSETS
from video import VideoFile, compose, read_picture, read_video, spread

LARGE = 1024                                    # width from which a network keeps a GPU busy by itself


def velocity_of(model):
    """A backbone as the callable (x_t, sigma, condition) -> v that losses and samplers take."""
    device = next(model.parameters()).device

    def velocity(x, sigma, condition):
        frames = None
        if not condition.begins and model.spec.stride[0] > 1:   # only a video's first is one pixel frame
            frames = torch.arange(1, x.shape[2] + 1, device=device)
        with autocast(device):
            if condition.past is not None and condition.past.reusable(model.compress.settings):
                return behind_cache(model, x, sigma, condition, velocity)
            return model(x, sigma, condition.text, condition.control, condition.past, frames)
    return velocity


def launched(model):
    """`velocity_of` a model that learns nothing: what it makes of a text alone (`heard`) is made once, so neither its
    weights nor a text may change in place. On a GPU as CUDA graphs, if it is so small that it would wait for launches.
    HunyuanVideo counts its text tokens on the way, which no graph can."""
    device, alone = next(model.parameters()).device, world_size() == 1 and model.spec.arch != "hunyuan"
    velocity, known = velocity_of(model), {}
    velocity = replayed(velocity, device) if alone and model.spec.dim < LARGE else velocity

    @torch.no_grad()
    def informed(x, sigma, condition):
        if (name := identity(condition.text)) not in known:
            if len(known) > 1:                              # a prompt and a negative one
                known.clear()
            with autocast(device):                          # the text itself is kept, for its place in memory names it
                known[name] = condition.text, model.heard(condition.text)
        return velocity(x, sigma, replace(condition, text=known[name][1]))
    return informed


def guided(velocity, scale, null_text):
    """The same callable under classifier-free guidance; a scale of 1 costs nothing."""
    if scale == 1:
        return velocity

    def both(x, sigma, condition):
        return guide(velocity(x, sigma, condition), velocity(x, sigma, condition.null(null_text)), scale)
    return both


# ---- One chunk -------------------------------------------------------------------------------------------------------

def chunk_velocity(velocity, history, x, sigma, condition):
    """Velocity of the noisy chunk `x` [B, C, K, H, W] at level `sigma` behind clean `history` [B, C, n, H, W]."""
    n = history.shape[2]
    levels = torch.zeros(x.shape[0], n + x.shape[2], device=x.device)
    levels[:, n:] = sigma
    return velocity(torch.cat([history, x], 2), levels, condition)[:, :, n:].float()


def few_step(velocity, history, shape, sigmas, condition, noise, grad_step=None, complete=True):
    """Few-step generator: predict x0, renoise to the next level, repeat. Returns (sample, finished), [B, C, K, H, W].

    Without `grad_step` both are the result of all steps. With it, `sample` is the x0 predicted at that step, the only
    one that builds a graph (Self Forcing, arXiv:2506.08009); the remaining steps run without, and `finished`, detached,
    is what the next chunk sees: the history that inference would have. Without `complete` it is the sample, as in
    Self Forcing.
    """
    x, sample, outer = noise(shape), None, torch.is_grad_enabled()
    for i, sigma in enumerate(sigmas[:-1]):
        with torch.set_grad_enabled(outer and i == grad_step):
            x0 = velocity_to_x0(chunk_velocity(velocity, history, x, sigma, condition), x, sigma)
        if i == grad_step:
            sample = x0
            if not complete:
                return sample, sample.detach()
        x = add_noise(x0.detach(), noise(shape), sigmas[i + 1]) if sigmas[i + 1] > 0 else x0.detach()
    return (x if sample is None else sample), x


def ode(velocity, history, shape, sigmas, condition, noise):
    """Euler sampler of the probability-flow ODE: the teacher's. Returns (result, result), as `few_step`."""
    x = noise(shape)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        x = euler(x, chunk_velocity(velocity, history, x, sigma, condition), sigma, sigma_next)
    return x, x


# ---- Many chunks -----------------------------------------------------------------------------------------------------

def chunks(velocity, condition, history, frames, sigmas, chunk, noise, sampler, options_at, offset=0):
    """The loop: extends `history` to `frames`. Returns (samples, finished) of what was made, both [B, C, T, H, W];
    `options_at(n)` go to the sampler of the chunk that ends at frame n. The condition begins with frame `offset`."""
    made = [[history.latents[:, :, :0]] * 2]
    while (n := history.n) < frames:
        K = min(chunk, frames - n)
        clean, start, past = history.view(K, condition.control, offset)
        told = replace(condition.frames(start - offset, n + K - offset), past=past)
        shape = *clean.shape[:2], K, *clean.shape[3:]
        made.append(sampler(velocity, clean, shape, sigmas, told, noise, **options_at(n + K)))
        history.append(made[-1][1])
    return tuple(torch.cat(each, 2) for each in zip(*made))


def rollout(velocity, condition, prefix, frames, sigmas, chunk, window, noise, sampler=few_step, model=None, **options):
    """Extend the clean `prefix` [B, C, n, H, W] (n may be 0) to `frames` latent frames, `chunk` at a time.

    Each chunk sees the latest `window - chunk` clean frames or, if `model` has a compressor, what that shows of all.
    The condition covers all `frames`; a chunk is told only the labels of its own window, so later actions cannot change
    earlier chunks. Gradient never flows through history. Returns [B, C, frames, H, W]; `options` go to the sampler.
    """
    history = History(prefix, window - chunk, model)
    made, _ = chunks(velocity, condition, history, frames, sigmas, chunk, noise, sampler, lambda n: options)
    return torch.cat([prefix, made], 2)


# ---- A world to play in ----------------------------------------------------------------------------------------------

class WorldModel:
    """The one interface for a person, an agent and a metric: `reset`, then `step(actions)`. Same seed, same frames.

    `steps` of a student's few-step denoising a chunk, or of the teacher's ODE with `guidance` when `use_ode`. A last
    chunk may be shorter than K frames.
    """

    def __init__(self, model, steps=4, guidance=1.0, use_ode=False, source=""):
        self.spec, self.device, self.model = model.spec, next(model.parameters()).device, model
        self.codec = codec(model.spec.name, self.device, source)
        self.sees = model.control is not None and "c2w" in model.control.reads
        null = {} if guidance == 1 else self.codec.text([model.spec.negative])
        self.velocity = guided(launched(model), guidance, null)
        self.sigmas, self.sampler = schedule(steps, model.spec.shift), ode if use_ode else few_step

    def reset(self, prompt=None, first=None, seed=0, actions=None):
        """Begin at the frames `first` (uint8 [F, H, W, 3]; labels `actions` of its latent frames, default still), or
        dream a start.

        Returns the start as uint8 [F, H, W, 3]. A start that is refused leaves the present dream as it is.
        """
        text = self.codec.text([prompt or ""])
        self.codec.release("language")
        H, W = (n // s for n, s in zip(self.spec.size[1:], self.spec.stride[1:]))
        latents = torch.zeros(1, self.spec.channels, 0, H, W, device=self.device)
        if first is not None:
            latents = self.codec.encode(torch.as_tensor(first)[None])
        if latents.shape[3:] != (H, W):
            raise ValueError(f"start frames are {self.spec.size[1]}x{self.spec.size[2]}, got {list(first.shape[1:3])}")
        count = latents.shape[2]
        labels = torch.zeros(count, dtype=torch.long) if actions is None else check_actions(actions)
        if len(labels) != count:
            raise ValueError(f"{count} start frames need {count} labels, got {len(labels)}")
        self.random, self.text, self.actions = generator(seed, "play"), text, labels[None]
        self.history = History(latents, self.spec.window - self.spec.chunk, self.model, store="cpu")
        self.stream = {}                            # the codec's state
        return self.step([0] * self.spec.chunk) if first is None else self.codec.decode(latents, self.stream)[0]

    @torch.no_grad()
    def step(self, actions):
        """Live through `actions` [T] (labels 0..80), one latent frame each; returns their uint8 [F, H, W, 3]."""
        actions = check_actions(actions).reshape(1, -1)
        if not actions.shape[1]:
            raise ValueError("step needs at least one action")
        self.actions = torch.cat([self.actions, actions], 1)
        frames = self.history.n + actions.shape[1]
        cameras = self.codec.cameras(self.actions) if self.sees or self.history.by_view else ()     # past all walls
        offset = frames - self.actions.shape[1]                 # frames whose labels are forgotten
        condition = Condition(self.text, Control(self.actions.to(self.device), *cameras), begins=offset == 0)
        _, made = chunks(self.velocity, condition, self.history, frames, self.sigmas, self.spec.chunk, self.noise,
                         self.sampler, lambda n: {}, offset)
        if not self.history.by_view:                            # nothing older is ever looked at again
            self.actions = self.actions[:, self.actions.shape[1] - (frames - self.history.begin()):]
        return self.codec.decode(made, self.stream)[0]

    def state(self):
        """All that the future depends on. Steps replace these tensors and never write into them: no copy is needed."""
        return {"history": self.history.copy(), "actions": self.actions, "text": self.text,
                "stream": dict(self.stream), "random": self.random.get_state()}

    def restore(self, state):
        """Go on from a `state()` of this world model, or of another of the same backbone: its teacher, more steps."""
        self.history, self.actions, self.text = state["history"].copy(self.model), state["actions"], state["text"]
        self.stream = dict(state["stream"])
        self.random = torch.Generator()
        self.random.set_state(state["random"])

    def noise(self, shape):
        return sent(torch.randn(shape, generator=self.random), self.device)


# ---- Command line ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """Drive a world model with an action string and write what it sees."""
    actions: str = "w-8, right-12, w+left-8"    # such as "w-8, w+right-12, 38-4"; counts are latent frames
    out: str = "walk.mp4"                       # .mp4 or .gif
    backbone: str = "tiny"                      # a preset of model.py
    weights: str = ""                           # safetensors of a student or teacher; empty: the shipped student
    codec: str = ""                             # of an official backbone: folder or hub repository; empty: the official
    prompt: str = ""                            # caption; empty: that of --map in the embedded world
    map: int = 0                                # start in this map of the embedded world (0..3)
    start: str = ""                             # clip: four exact views; frame: one; dream: none; empty: clip or dream
    image: str = ""                             # start from this PNG or JPEG instead (i2v)
    video: str = ""                             # start from the end of this video instead (v2v)
    truth: bool = False                         # show the exact world, given the same keys, beside the dream
    steps: int = 4                              # denoising steps a chunk
    guidance: float = 1.0                       # of the teacher; a student needs none
    ode: bool = False                           # the teacher's Euler sampler instead of the student's
    seed: int = 0                               # start place and noise
    history: str = ""                           # none, window, framepack or packforcing; empty: that of the weights
    attention: str = ""                         # of history: joint, or self or segment, whose keys and values are kept
    recent: int = 0                             # latent frames that history leaves as they are; 0: the kind's own
    choose: str = ""                            # packforcing's blocks: affinity, recency or fov
    horizon: float = 0.0                        # go on for so many seconds, the actions repeated; 0: once

    def __post_init__(self):
        if self.start not in ("", "frame", "clip", "dream") or (self.image and self.video):
            raise ValueError("--start is frame, clip or dream; --image or --video, not both, stand for it")
        if self.truth and (self.start == "dream" or self.image or self.video):
            raise ValueError("--truth needs a start in the exact world: --start frame or clip, no --image, no --video")
        if Path(self.out).suffix not in (".mp4", ".gif"):
            raise ValueError(f"--out ends in .mp4 or .gif, got '{self.out}'")
        if self.steps < 1 or self.horizon < 0:
            raise ValueError(f"--steps must be above 0 and --horizon not below, got {self.steps}, {self.horizon}")
        if self.map not in range(len(world.MAPS)):
            raise ValueError(f"--map is 0..{len(world.MAPS) - 1}, got {self.map}")


def begin(cfg, spec):
    """The start that `cfg` asks for: the exact world or None, first frames [F, H, W, 3] or None, and the words."""
    embedded = spec.size[1:] == world.FRAME
    if not embedded and (cfg.start in ("clip", "frame") or cfg.truth):
        raise ValueError(f"{spec.name} knows no exact world: it starts from --image, --video or --prompt alone")
    words = cfg.prompt or (world.CAPTIONS[cfg.map] if embedded else "")
    if cfg.image or cfg.video:
        return None, read_picture(cfg.image, spec) if cfg.image else read_video(cfg.video, spec), words
    if cfg.start == "dream" or not embedded:
        return None, None, words
    place = world.World(cfg.map)
    place.reset(seed=cfg.seed)
    return place, place.step([0] * (1 if cfg.start == "frame" else 4)), words


def network(cfg, device):
    """The network that `cfg` names; weights in what it computes with, but for those that are fp32 in official runs."""
    return load(cfg.backbone, cfg.weights or ASSETS / f"{cfg.backbone}-student.safetensors", device,
                torch.bfloat16 if device.type == "cuda" else torch.float32)


def walk(place, asked):
    """Move the exact world on by labels `asked` [T]: labels of what happened (walls stop some) and the views."""
    happened = world.walk(place.maps, place.state[None], asked[None])[1][0]
    return happened, place.step(asked)


def main(cfg):
    device = setup()
    with one_line_errors():
        labels = parse_actions(cfg.actions)[1:]
        net = configure(network(cfg, device), cfg.history, cfg.attention, cfg.recent, cfg.choose)
        if T := round(cfg.horizon * net.spec.fps / net.spec.stride[0]):
            labels = labels.repeat(T)[:T]
        model = WorldModel(net, cfg.steps, cfg.guidance, cfg.ode, cfg.codec)
        place, first, words = begin(cfg, net.spec)
        if T or net.compress is not None:
            start = net.spec.chunk if first is None else net.spec.latent_frames(len(first))
            print(budget(net, start, 1 + len(labels)), flush=True)
        frames = model.reset(words, first, cfg.seed)
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        open(cfg.out, "ab").close()                     # fails now rather than after the work
    with closing(VideoFile(cfg.out, net.spec.fps)) as video:
        video.add(compose(frames, [0] * len(frames), cfg.steps, first if cfg.truth else None))
        for asked in tqdm(labels.split(net.spec.chunk), "rollout", disable=None):       # written as it is made
            happened, exact = walk(place, asked) if cfg.truth else (asked, None)
            frames = model.step(happened)
            video.add(compose(frames, spread(happened, len(frames), net.spec.stride[0]), cfg.steps, exact))
    print(f"{cfg.out}: {video.frames} frames, {video.frames / net.spec.fps:.1f} s")


if __name__ == "__main__":
    main(parse(Config))
