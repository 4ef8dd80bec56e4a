"""The page a person drives a world model from: W A S D walk, the arrow keys turn.

    python play.py                      # serves play.html to this machine
    python play.py --bench 120          # no browser: frames a second and action-to-photon latency

play.html keeps the time: it samples the keys, asks for the next chunk as late as the measured compute time allows, and
shows each frame when it is due. This server answers one request after another over a WebSocket (RFC 6455). A connection
is a session with a `WorldModel` of its own over shared weights. Nothing is sent unasked, so a client that reads slowly
costs no memory, and one that goes away takes its session along.
"""

import base64
import io
import json
import os
import random
import re
import shlex
import time
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")        # read as torch loads: its idle threads soon leave the core
import torch
from PIL import Image

import rollout
import serve
import world
from common import ROOT, command_line, one_line_errors, parse, setup
from control import KEYS, format_actions, keys_from_label, label_from_keys
from model import preset
from weights import ASSETS, default_source
from video import VideoFile, compose, spread

SEATS = 4                           # sessions at once; they take turns on one device
LONGEST = 2400                      # latent frames of a recording: five minutes of the embedded world
TYPES = {".html": "text/html; charset=utf-8", ".mp4": "video/mp4", ".txt": "text/plain; charset=utf-8"}


class Session:
    """One player's world. `understand` turns a request into a call; the calls return replies, which are dicts."""

    def __init__(self, server):
        self.server, self.spec, self.dream, self.video = server, server.spec, None, None
        self.maps = world.CAPTIONS if self.spec.size[1:] == world.FRAME else []         # where truth can walk along
        start = "clip" if self.maps else "dream"
        self.recipe = rollout.Config(backbone=self.spec.name, codec=server.cfg.codec, start=start, seed=server.cfg.seed)
        self.switch("student", server.cfg.steps)
        self.greeting = self.hello() | self.reset()

    def understand(self, request):
        """The call that `request` asks for; ValueError or TypeError if play.html says no such thing."""
        match request:
            case {"hello": True}:
                return self.hello
            case {"step": [*chords]} if (len(chords) == self.spec.chunk
                                         and all(key in [*KEYS] for keys in chords for key in keys)):
                return partial(self.step, chords)
            case {"reset": {"start": "clip" | "dream", "map": int(), "prompt": str(), "seed": int(seed),
                            "image": str(), **more} as start} if not more and seed in range(2 ** 31):
                return partial(self.reset, **start)
            case {"model": "student" | "teacher" as who, "steps": int(steps)} if steps in range(1, 101):
                return partial(self.switch, who, steps)
            case {"record": bool(on)}:
                return partial(self.reset, record=True) if on else self.cut
        raise ValueError("no such request")

    def hello(self):
        """What the page has to know; a paused page asks for it as a sign of life."""
        return {"size": self.spec.size[:0:-1], "fps": self.spec.fps, "chunk": self.spec.chunk, "maps": self.maps,
                "stride": self.spec.stride[0], "backbone": self.spec.name, "device": str(self.server.device),
                "steps": self.server.cfg.steps, "seed": self.server.cfg.seed}

    def switch(self, who, steps):
        """Let the student or its guided teacher, at other steps, dream on from here."""
        cfg, teacher = self.server.cfg, who == "teacher"
        source = (cfg.teacher or default_source(self.spec)) if teacher else \
            cfg.weights or ASSETS / f"{self.spec.name}-student.safetensors"
        recipe = replace(self.recipe, weights=str(source), steps=steps, ode=teacher,
                         guidance=self.spec.guidance if teacher else 1.0)
        dream = self.server.world_model(recipe)
        if self.dream:
            dream.restore(self.dream.state())
        reply = self.cut()
        self.dream, self.recipe, self.who = dream, recipe, f"{who}, {steps} steps"
        return reply

    def reset(self, record=False, **start):
        """Begin again, elsewhere if a `start` is given. One that is refused leaves the present dream as it is."""
        if start.get("image"):
            start["image"] = io.BytesIO(base64.b64decode(start["image"]))
        recipe = replace(self.recipe, **start)
        place, first, words = rollout.begin(recipe, self.spec)
        frames = self.dream.reset(words, first, recipe.seed)
        reply = self.cut()
        self.recipe, self.place = recipe, place
        if record:
            self.roll(first)
        return reply | self.show(frames, first if place else None, [0] * len(frames))

    def step(self, chords):
        """Live through one latent frame per chord, a list of keys."""
        asked, begin = torch.tensor([label_from_keys({*keys}) for keys in chords]), time.perf_counter()
        happened, exact = rollout.walk(self.place, asked) if self.place else (asked, None)
        frames = self.dream.step(happened)
        reply = {"blocked": happened.tolist() != asked.tolist(), "seconds": time.perf_counter() - begin}
        if self.video:
            self.asked += asked.tolist()
        return reply | self.show(frames, exact, happened.tolist())

    def show(self, frames, exact, labels):
        """Frames [F, H, W, 3] as JPEGs, the exact view left of the dreamt one, and the label that each one obeys."""
        labels, pictures, reply = spread(labels, len(frames), self.spec.stride[0]), [], {}
        if self.video:
            self.video.add(compose(frames, labels, self.recipe.steps, exact))
            reply = self.cut() if len(self.asked) >= LONGEST else {}
        for picture in (frames if exact is None else torch.cat([exact, frames], 2)).numpy():
            Image.fromarray(picture).save(file := io.BytesIO(), "JPEG", quality=95, subsampling=0)
            pictures.append(base64.b64encode(file.getvalue()).decode())
        return reply | {"pictures": pictures, "labels": labels, "keys": [keys_from_label(n) for n in labels],
                        "truth": exact is not None, "who": self.who}

    def roll(self, first):
        """Begin to record."""
        self.path, self.asked = Path(self.server.cfg.out) / f"take-{time.time_ns()}.mp4", []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.take = replace(self.recipe, truth=self.place is not None, out=f"again-{self.path.name}")
        if self.take.image:
            self.take = replace(self.take, image=str(self.path.with_suffix(".png")))
            Image.fromarray(first[0].numpy()).save(self.take.image)
        self.video = VideoFile(self.path, self.spec.fps)

    def cut(self):
        """End the recording, if any. Beside it: the command that makes the same video again on this machine."""
        if not self.video:
            return {}
        video, self.video = self.video, None
        video.close()
        if not self.asked:                                      # it ended before anything happened
            return self.path.unlink() or {}
        take = replace(self.take, actions=format_actions([0, *self.asked]))
        command = shlex.join(["python", "rollout.py", *command_line(take)]).replace(f"{ROOT}/", "")
        self.path.with_suffix(".txt").write_text(command + "\n")
        return {"take": self.path.stem, "command": command}


class Server(serve.Server):
    """What the sessions share: the weights, and one thread that computes, first come first served."""

    def __init__(self, cfg, device):
        self.cfg, self.device, self.spec, self.models = cfg, device, preset(cfg.backbone), {}
        self.thread = ThreadPoolExecutor(1)
        super().__init__(cfg.host, cfg.port, Handler, SEATS)

    def world_model(self, recipe):
        if recipe.weights not in self.models:
            self.models[recipe.weights] = rollout.network(recipe, self.device)
        return rollout.WorldModel(self.models[recipe.weights], recipe.steps, recipe.guidance, recipe.ode, recipe.codec)

    def run(self, call):
        return self.thread.submit(call).result()


class Handler(serve.Handler):
    def file(self, path):
        """Content type and bytes of the page or of a recording, which are all the files there are."""
        take = re.fullmatch(r"/(take-\d+\.(mp4|txt))", path)
        file = Path(self.server.cfg.out) / take[1] if take else ROOT / "play.html"
        known = (take or path == "/") and file.is_file()
        return TYPES[file.suffix], file.read_bytes() if known else None

    def converse(self):
        """A session: greet, then answer one request after another."""
        session = self.server.run(partial(Session, self.server))
        reply, limit = session.greeting, 4 * session.spec.size[1] * session.spec.size[2] + 2 ** 14  # picture as base64
        try:
            while True:
                self.send(json.dumps(reply).encode())
                try:
                    call = session.understand(json.loads(self.receive(limit)))
                except (ValueError, TypeError, RecursionError):
                    raise serve.Refused(1007, "not a request of play.html") from None
                try:
                    reply = self.server.run(call)
                except (ValueError, OSError) as error:          # an unknown word, a wrong picture, a full disk
                    reply = {"error": str(error)}
        finally:
            session.cut()


def bench(server, seconds):
    """Play without a page, on its schedule, keys changing at random moments; print what a player would notice."""
    session, spec, chance = Session(server), server.spec, random.Random(0)
    frames, chords = spec.chunk * spec.stride[0], [[], ["w"], ["w", "right"], ["left"], ["s"], ["a", "up"]]
    costs, latencies, changed, chunks = [], [], [], 0
    begin = due = change = time.perf_counter()                  # due: when the chunk in the making is to be shown
    while due < begin + seconds:
        time.sleep(max(0, due - max(costs[-5:], default=0) - 0.1 - time.perf_counter()))    # SLACK of the page
        asked = time.perf_counter()
        while change < asked:
            changed.append(change)
            change, chord = change + chance.uniform(0.1, 1.5), chance.choice(chords)
        session.understand({"step": [chord] * spec.chunk})()
        costs.append(time.perf_counter() - asked)
        shown = max(due, time.perf_counter())                   # the first picture starts the clock
        begin, latencies, changed = begin if chunks else shown, latencies + [shown - t for t in changed], []
        due, chunks = shown + frames / spec.fps, chunks + 1
    ms = sorted(round(1000 * t) for t in latencies)
    print(f"{chunks * frames / (due - begin):.2f} of {spec.fps:g} frames a second for {due - begin:.0f} s; action to "
          f"photon {ms[len(ms) // 2]} ms median, {ms[len(ms) * 95 // 100]} ms at 95 % of {len(ms)}; "
          f"generation {frames / sorted(costs)[chunks // 2]:.1f} frames a second")


@dataclass(frozen=True)
class Config:
    """Drive a world model with the keyboard, in a browser."""
    backbone: str = "tiny"          # a preset of model.py
    codec: str = ""                 # of an official backbone: folder or hub repository; empty: the official one
    weights: str = ""               # safetensors of its student; empty: the shipped one
    teacher: str = ""               # of its teacher, for the switch on the page; empty: the shipped or official one
    steps: int = 4                  # denoising steps a chunk to begin with
    seed: int = 844                 # start place and noise to begin with
    host: str = "127.0.0.1"         # 0.0.0.0 lets other machines in: a phone, say
    port: int = 8000
    out: str = "runs/play"          # where recordings go
    browser: bool = True            # open the page
    bench: float = 0.0              # measure for so many seconds instead


def main(cfg):
    with one_line_errors():
        server = Server(cfg, setup())
        Session(server)                                         # bad weights end it here
    if cfg.bench:
        return bench(server, cfg.bench)
    address = f"http://{'localhost' if cfg.host in ('0.0.0.0', Config.host) else cfg.host}:{server.server_port}"
    print(f"play at {address}, end with Ctrl-C")
    if cfg.browser:
        webbrowser.open(address)
    with suppress(KeyboardInterrupt), server:
        server.serve_forever()


if __name__ == "__main__":
    main(parse(Config))
