"""Playing: the server under friendly, clumsy and hostile clients, recordings that can be made again, the page in Chromium."""

import base64
import contextlib
import dataclasses
import gc
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
import weakref
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import common
import play
import rollout
import serve
import world

SEED = 0                                                        # a start from which a turn to the right shows much
RESET = {"start": "clip", "map": 0, "prompt": "", "seed": SEED, "image": ""}
STILL, WALK, TURN = [[[]] * 4, [["w"]] * 4, [["right"]] * 4]    # a chunk of keys


class Toy:
    """A world model whose picture is the label, and the number of frames so far: no network, as slow as it is told."""
    slowness = 0.0

    def reset(self, prompt=None, first=None, seed=0):
        if "dragon" in prompt:
            raise ValueError("no dragons here")
        self.count = 0
        return self.step([0] * 4)

    def step(self, actions):
        time.sleep(self.slowness)
        self.count += len(actions)
        return torch.stack([torch.full((64, 96, 3), int(a), dtype=torch.uint8) for a in actions])

    def state(self):
        return self.count

    def restore(self, state):
        self.count = state


class ToyServer(play.Server):
    def world_model(self, recipe):
        return Toy()


@contextlib.contextmanager
def serving(kind=play.Server, **settings):
    server = kind(play.Config(port=0, seed=SEED, **settings), torch.device("cpu"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        server.thread.shutdown()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A server of toy worlds. The test fails if a handler ended in anything but the client's going away."""
    failures = []
    monkeypatch.setattr("socketserver.BaseServer.handle_error", lambda *_: failures.append(repr(__import__("sys").exception())))
    with serving(ToyServer, out=str(tmp_path)) as server:
        yield server
    assert not failures


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A server of the shipped student."""
    torch.set_num_threads(1)
    with serving(out=str(tmp_path_factory.mktemp("takes")), steps=1) as server:
        yield server


def http(server, path, head="", method="GET"):
    """Status and body of a plain request; `head` replaces the Host line."""
    with socket.create_connection(server.server_address, timeout=10) as wire:
        host = head or f"Host: localhost:{server.server_port}\r\n"
        wire.sendall(f"{method} {path} HTTP/1.1\r\n{host}Connection: close\r\n\r\n".encode("latin1"))
        answer = b"".join(iter(lambda: wire.recv(65536), b""))
    return int(answer.split()[1]), answer


class Client:
    """A WebSocket client written from RFC 6455, with random masks and whatever else a test sends."""

    def __init__(self, server, origin=None, host=None):
        self.wire = socket.create_connection(server.server_address, timeout=20)
        self.file = self.wire.makefile("rb")
        host = host or f"localhost:{server.server_port}"
        self.wire.sendall(f"GET /session HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin or 'http://' + host}\r\nUpgrade: websocket\r\n"
                          "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode())
        self.status = int(self.file.readline().split()[1])
        self.head = dict(line.decode().strip().split(": ") for line in iter(self.file.readline, b"\r\n"))
        self.greeting = self.receive() if self.status == 101 else None

    def send(self, payload, opcode=1, final=True, mask=True, length=None, reserved=0):
        n = len(payload) if length is None else length
        size = [n] if n < 126 else [126, *n.to_bytes(2, "big")] if n < 65536 else [127, *n.to_bytes(8, "big")]
        key = os.urandom(4)
        body = bytes(b ^ key[i % 4] for i, b in enumerate(payload)) if mask else payload
        self.wire.sendall(bytes([128 * final | reserved | opcode, 128 * mask | size[0], *size[1:]]) + key * mask + body)

    def receive(self):
        """The next reply, or the close code and reason."""
        first, n = self.file.read(2)
        assert first in (0x81, 0x88) and n < 128, "whole and unmasked, as servers send"
        n = int.from_bytes(self.file.read({126: 2, 127: 8}[n]), "big") if n > 125 else n
        payload = self.file.read(n)
        return json.loads(payload) if first == 0x81 else (int.from_bytes(payload[:2], "big"), payload[2:].decode())

    def ask(self, **request):
        self.send(json.dumps(request).encode())
        return self.receive()

    def close(self):
        self.file.close()
        self.wire.close()


def pixels(reply):
    """uint8 [F, 64, 96 or 192, 3] of a reply; JPEG at quality 95 is within a few levels of the truth."""
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(p)))) for p in reply["pictures"]]).astype(int)


def seats_free(server, seconds=5):
    """How many seats are free, once `seconds` have passed or all are."""
    end = time.time() + seconds
    while server.seats._value < play.SEATS and time.time() < end:
        time.sleep(0.01)
    return server.seats._value


def memory():
    """Bytes that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- HTTP: only the page, only to itself -----------------------------------------------------------------------------

def test_the_page_needs_nothing_from_elsewhere(toy):
    status, answer = http(toy, "/")
    head, page = answer.decode().split("\r\n\r\n", 1)
    assert status == 200 and "default-src 'none'" in head and page == Path("play.html").read_text()
    assert not re.search(r"https?://|//\w+\.\w+/|@import|<link(?! rel=\"icon\" href=\"data:)|src=", page)


@pytest.mark.parametrize("path", ["/play.py", "/../play.py", "/..%2fplay.py", "/take-1.mp4/../../play.py", "/take-../play.mp4",
                                  "//etc/passwd", "/take-1.mp4", "/take-1.txt%00", "/take-1.png", "/?", "/session/", "\\..\\play.py",
                                  "/take-١.mp4"])
def test_no_path_leads_out(toy, path):
    (Path(toy.cfg.out) / "take-1.png").write_bytes(b"private")
    status, answer = http(toy, path.encode().decode("latin1"))
    assert status == 404 and b"import" not in answer and b"root:" not in answer and b"private" not in answer


def test_recordings_are_the_only_other_files(toy):
    (Path(toy.cfg.out) / "take-7.txt").write_text("python rollout.py")
    assert http(toy, "/take-7.txt")[1].endswith(b"\r\n\r\npython rollout.py")


@pytest.mark.parametrize("origin, host, status", [
    (None, None, 101), (None, "127.0.0.1:{}", 101),
    ("http://evil.example", None, 403), ("null", None, 403), ("http://localhost:1", None, 403),       # another page
    (None, "evil.example:{}", 403), (None, "127.0.0.1.evil.example", 403)])                            # DNS rebinding
def test_only_our_own_page_may_play(toy, origin, host, status):
    client = Client(toy, origin, host and host.format(toy.server_port))
    assert client.status == status
    client.close()
    assert seats_free(toy) == play.SEATS


def test_other_requests_are_refused(toy):
    assert http(toy, "/", "Host: evil.example\r\n")[0] == http(toy, "/", "X: y\r\n")[0] == 403
    origin = f"Host: localhost:{toy.server_port}\r\nOrigin: http://localhost:{toy.server_port}\r\n"
    assert http(toy, "/session")[0] == 403 and http(toy, "/session", origin)[0] == 426          # no origin; no upgrade
    assert http(toy, "/", method="POST")[0] == 501
    assert http(toy, "/" + 70_000 * "a")[0] == 414
    for garbage in (b"\x16\x03\x01\x02", b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", 200 * b"A: b\r\n"):
        with socket.create_connection(toy.server_address, timeout=10) as wire, contextlib.suppress(ConnectionError):
            wire.sendall(garbage)
            wire.shutdown(socket.SHUT_WR)
            while wire.recv(65536):
                pass
    assert http(toy, "/")[0] == 200


def test_the_handshake_is_that_of_the_rfc(toy):
    client = Client(toy)
    assert client.head["Sec-WebSocket-Accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="       # RFC 6455, section 1.3
    client.close()


def test_seats_are_counted_and_given_back(toy):
    clients = [Client(toy) for _ in range(play.SEATS + 1)]
    assert [client.status for client in clients] == [101] * play.SEATS + [503]
    clients[0].close()
    assert seats_free(toy, 0.3) == 1
    clients.append(Client(toy))
    assert clients[-1].status == 101
    for client in clients:
        client.close()
    assert seats_free(toy) == play.SEATS


# ---- Messages --------------------------------------------------------------------------------------------------------

BAD = [b"", b"{", b"[]", b"null", b"7", b'"step"', b"\xff\xfe", b"{}", b'{"step": 1}', b'{"step": []}', b'{"step": [1, 2, 3, 4]}',
       b'{"step": [["w"]]}', b'{"step": [["q"], [], [], []]}', b'{"step": [[[]], [], [], []]}', b'{"step": [["w"], [], [], [], []]}',
       b'{"reset": {}}', b'{"reset": {"start": "clip", "map": 0, "prompt": "", "seed": -1, "image": ""}}',
       b'{"reset": {"start": "clip", "map": 0.5, "prompt": "", "seed": 0, "image": ""}}', b'{"record": 1}',
       b'{"reset": {"start": "clip", "map": 0, "prompt": "", "seed": 0, "image": "", "weights": "/etc/passwd"}}',
       b'{"model": "student", "steps": 1000000}', b'{"model": "student", "steps": "4"}', b'{"model": "/etc/passwd", "steps": 4}',
       b'{"hello": NaN}', 30_000 * b"[", b'{"step": ' + 9_000 * b"[" + 9_000 * b"]" + b"}"]


@pytest.mark.parametrize("payload", BAD, ids=lambda p: p[:40].decode("latin1") or "empty")
def test_what_the_page_never_says_ends_the_connection(toy, payload):
    client = Client(toy)
    client.send(payload)
    assert client.receive() == (1007, "not a request of play.html")
    client.close()
    assert seats_free(toy) == play.SEATS


@pytest.mark.parametrize("code, frame", [
    (1002, {"mask": False}), (1002, {"opcode": 2}), (1002, {"opcode": 0}), (1002, {"opcode": 9}), (1002, {"opcode": 3}),
    (1002, {"reserved": 64}), (1009, {"length": 2 ** 40}), (1009, {"length": 60_000}), (1000, {"opcode": 8})])
def test_bad_frames_end_the_connection_with_a_code(toy, code, frame):
    client = Client(toy)
    client.send(b'{"hello": true}', **frame)
    assert client.receive()[0] == code
    client.close()


def test_fragments_are_joined_and_bounded_together(toy):
    client = Client(toy)
    client.send(b"", final=False)
    client.send(b'{"hel', opcode=0, final=False)
    client.send(b'lo": true}', opcode=0)
    assert client.receive()["backbone"] == "tiny"
    client.send(b" " * 30_000, final=False)
    client.send(b" " * 30_000, opcode=0)
    assert client.receive()[0] == 1009
    client.close()


@settings(max_examples=40, deadline=None)
@given(message=st.one_of(st.binary(max_size=60), st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
       | st.sampled_from(["clip", "w", "student"]), lambda x: st.lists(x, max_size=4) | st.dictionaries(
           st.sampled_from(["step", "reset", "start", "map", "seed", "prompt", "image", "model", "steps", "record", "hello"]), x, max_size=6))))
def test_any_message_is_answered_or_ends_the_connection(fuzzed, message):
    if fuzzed.client is None:
        fuzzed.client = Client(fuzzed.server)
    fuzzed.client.send(message if isinstance(message, bytes) else json.dumps(message).encode())
    reply = fuzzed.client.receive()
    if not isinstance(reply, dict):
        assert reply[0] == 1007
        fuzzed.client = None


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    with serving(ToyServer, out=str(tmp_path_factory.mktemp("fuzz"))) as server:
        holder = type("Holder", (), {"server": server, "client": None})
        yield holder
        if holder.client:
            holder.client.close()


def png(width=96, height=64):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_what_a_player_may_get_wrong_is_an_error_and_the_dream_goes_on(tiny):
    client = Client(tiny)
    whole = png()
    for request, words in [
            ({"reset": RESET | {"prompt": "a red dragon"}}, "does not know the word 'dragon'"), ({"reset": RESET | {"map": 9}}, "--map is 0..3"),
            ({"reset": RESET | {"image": base64.b64encode(png(96, 65)).decode()}}, "96x64 pixels, not 96x65"),
            ({"reset": RESET | {"image": base64.b64encode(png(1, 1)).decode()}}, "96x64 pixels, not 1x1"),
            ({"reset": RESET | {"image": "x"}}, ""), ({"reset": RESET | {"image": "é"}}, ""), ({"reset": RESET | {"image": "AAAA"}}, "cannot identify"),
            ({"step": [["w", "s"], [], [], []]}, "contradict"), ({"step": [["still", "w"], [], [], []]}, "cannot be combined")]:
        reply = client.ask(**request)
        assert words in reply["error"] and "pictures" not in reply
    for cut in range(0, len(whole), 500):                       # a PNG that breaks off, and one that was damaged
        for damaged in (whole[:cut], whole[:cut] + os.urandom(9) + whole[cut + 9:]):
            assert {"error", "pictures"} & client.ask(reset=RESET | {"image": base64.b64encode(damaged).decode()}).keys()
    assert len(client.ask(step=WALK)["pictures"]) == 4
    client.close()


# ---- Load ------------------------------------------------------------------------------------------------------------

def dreaming(server):
    """A client in a world without walls."""
    client = Client(server)
    client.ask(reset=RESET | {"start": "dream"})
    return client


def test_a_thousand_requests_at_once_are_answered_in_order_in_flat_memory(toy):
    client = dreaming(toy)
    chords = [[[["w"], ["s"], ["up"]][i % 3], [], [], []] for i in range(1000)]
    sender = threading.Thread(target=lambda: [client.send(json.dumps({"step": c}).encode()) for c in chords])
    sender.start()
    labels = [client.receive()["labels"][0] for _ in chords[:200]]
    before = memory()
    labels += [client.receive()["labels"][0] for _ in chords[200:]]
    sender.join()
    assert labels == [[9, 18, 1][i % 3] for i in range(1000)]
    assert memory() - before < 4e6
    client.close()


def test_a_reader_that_never_reads_stops_its_world_and_loses_its_seat(toy, monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", 1.0)
    client, before, sent = dreaming(toy), memory(), 0
    client.wire.settimeout(0.5)
    with pytest.raises((TimeoutError, ConnectionError)):        # the server reads no further while its answers wait
        for sent in range(100_000):
            client.send(b'{"step": [["w"], [], [], []]}')
    assert sent < 99_999 and seats_free(toy) == play.SEATS
    assert memory() - before < 16e6
    client.close()


def test_silence_loses_the_seat_too(toy, monkeypatch):
    assert 60 < serve.Handler.timeout < 600                     # a hidden page may speak only once a minute
    monkeypatch.setattr(serve.Handler, "timeout", 0.3)
    client = Client(toy)
    assert seats_free(toy) == play.SEATS and client.file.read() == b""
    client.close()


def test_disconnecting_in_mid_chunk_frees_the_session(toy, monkeypatch):
    sessions = weakref.WeakSet()
    monkeypatch.setattr(play.Session, "hello", lambda self, hello=play.Session.hello: sessions.add(self) or hello(self))
    client = dreaming(toy)
    client.ask(record=True)
    monkeypatch.setattr(Toy, "slowness", 0.3)
    client.send(b'{"step": [["w"], [], [], []]}')
    time.sleep(0.1)
    client.close()
    assert len(sessions) == 1 and seats_free(toy, 0) == play.SEATS - 1                  # the chunk is being computed
    assert seats_free(toy) == play.SEATS
    gc.collect()
    assert not sessions
    (take,) = Path(toy.cfg.out).glob("take-*.mp4")                                      # and its recording is whole
    assert len(iio.imread(take)) == 8 and 'w-1, still-3' in take.with_suffix(".txt").read_text()


def test_a_long_session_keeps_flat_memory(toy):
    client = dreaming(toy)
    for _ in range(50):
        client.ask(step=WALK)
    before = memory()
    for i in range(500):
        client.ask(**({"reset": RESET | {"start": "dream"}} if i % 50 == 0 else {"model": "teacher", "steps": 4} if i % 50 == 25 else {"step": WALK}))
    assert memory() - before < 4e6
    client.close()


# ---- Worlds ----------------------------------------------------------------------------------------------------------

def test_two_clients_live_in_separate_worlds(tiny):
    def play_through(client, chunks, replies):
        client.ask(reset=RESET)
        replies += [client.ask(step=chunk)["pictures"] for chunk in chunks]
        client.close()

    alone, together, other = [], [], []
    play_through(Client(tiny), [WALK, TURN, WALK], alone)
    rival = threading.Thread(target=play_through, args=(Client(tiny), [TURN, TURN, STILL, WALK], other))
    rival.start()
    play_through(Client(tiny), [WALK, TURN, WALK], together)
    rival.join()
    assert alone == together and other[0] != alone[0]


def test_the_truth_walks_by_the_keys_and_the_dream_by_what_happened(tiny):
    client, place, dream = Client(tiny), world.World(0), rollout.WorldModel(next(iter(tiny.models.values())), steps=1)
    place.reset(seed=SEED)
    start = client.ask(reset=RESET)
    first = place.step([0] * 4)
    assert np.abs(pixels(start)[:, :, :96] - first.numpy()).mean() < 2
    dream.reset(world.CAPTIONS[0], first, SEED)
    blocked = 0
    for chunk in [TURN] + [WALK] * 6:
        reply, asked = client.ask(step=chunk), torch.tensor([[{"w": 9, "right": 3}[chunk[0][0]]] * 4])
        happened = world.walk(0, place.state[None], asked)[1][0]
        assert reply["labels"] == happened.tolist() and reply["blocked"] == (happened != asked[0]).any()
        exact = torch.cat([place.step(asked[0]), dream.step(happened)], 2)
        assert np.abs(pixels(reply) - exact.numpy()).mean() < 2
        blocked += reply["blocked"]
    assert 0 < blocked < 7
    client.close()


def test_a_switch_dreams_on_from_here(tiny):
    def frames(*requests):
        client = Client(tiny)
        client.ask(reset=RESET)
        replies = [client.ask(**request) for request in requests]
        client.close()
        return [(reply["who"], reply["pictures"]) for reply in replies if "pictures" in reply]

    plain = frames({"step": WALK}, {"step": TURN})
    assert frames({"step": WALK}, {"model": "student", "steps": 1}, {"step": TURN}) == plain
    switched = frames({"step": WALK}, {"model": "teacher", "steps": 2}, {"step": TURN})
    assert switched[0] == plain[0] and switched[1][0] == "teacher, 2 steps" and switched[1][1] != plain[1][1]


@pytest.mark.parametrize("who, start", [("student", RESET | {"seed": 3}), ("teacher", RESET | {"map": 1, "image": "picture"}),
                                        ("student", RESET | {"start": "dream", "prompt": "a green hedge garden"})])
def test_a_recording_can_be_made_again_by_its_command(tiny, tmp_path, monkeypatch, who, start):     # seed 3 slides along a wall
    if start["image"]:
        file = io.BytesIO()
        Image.fromarray(world.World(2).step([0])[0].numpy()).save(file, "PNG")
        start = start | {"image": base64.b64encode(file.getvalue()).decode()}
    client = Client(tiny)
    client.ask(reset=start)
    client.ask(model=who, steps=1)
    client.ask(step=STILL)                                      # not part of the recording, which begins again
    client.ask(record=True)
    for chunk in (WALK, WALK, [["a"], ["up", "left"], [], ["s", "d", "down"]]):
        assert "take" not in client.ask(step=chunk)
    reply = client.ask(record=False)
    client.close()
    status, video = http(tiny, f"/{reply['take']}.mp4")
    seen = iio.imread(video.split(b"\r\n\r\n", 1)[1], extension=".mp4")
    assert status == 200 and len(seen) == 12 + {True: 1, False: 4}[bool(start["image"])]
    program, script, *flags = shlex.split((Path(tiny.cfg.out) / f"{reply['take']}.txt").read_text())
    assert reply["command"].split()[:2] == [program, script] == ["python", "rollout.py"]
    monkeypatch.setattr(rollout, "setup", lambda: torch.device("cpu"))        # the same number of threads, for the same bits
    rollout.main(common.parse(rollout.Config, [*flags, "--out", str(tmp_path / "again.mp4")]))
    assert np.array_equal(iio.imread(tmp_path / "again.mp4"), seen)


def test_a_latent_frame_may_be_several_frames(toy, monkeypatch):
    monkeypatch.setattr(toy, "spec", dataclasses.replace(toy.spec, stride=(3, 8, 8)))
    client = Client(toy)
    monkeypatch.setattr(Toy, "step", lambda self, actions, step=Toy.step: (
        step(self, actions).repeat_interleave(3, 0)[2 if self.count == 4 else 0:]))     # but a video's first is one
    reply = client.ask(reset=RESET | {"start": "dream"})
    assert len(reply["pictures"]) == len(reply["labels"]) == 10
    reply = client.ask(step=[["w"], ["up"], [], ["w", "right"]])
    assert reply["labels"] == [9] * 3 + [1] * 3 + [0] * 3 + [12] * 3 == pixels(reply)[:, 0, 0, 0].tolist()
    assert reply["keys"][3] == ["up"] and len(reply["pictures"]) == 12
    client.close()


def test_a_recording_has_an_end(toy, monkeypatch):
    monkeypatch.setattr(play, "LONGEST", 8)
    client = Client(toy)
    client.ask(record=True)
    assert "take" not in client.ask(step=WALK) and "take" in client.ask(step=WALK) and "take" not in client.ask(step=WALK)
    client.ask(record=True)
    assert client.ask(record=False) == client.ask(record=False) == {} and len([*Path(toy.cfg.out).iterdir()]) == 2
    for end in ({"reset": RESET}, {"model": "teacher", "steps": 2}, {"record": True}):
        client.ask(record=True)
        client.ask(step=WALK)
        assert "take" in client.ask(**end)
    client.close()


# ---- The command -----------------------------------------------------------------------------------------------------

def test_the_command_serves_and_ends_in_good_order(tmp_path):
    run = subprocess.Popen(["python", "play.py", "--no-browser", "--port", "0", "--out", str(tmp_path)], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
                           preexec_fn=lambda: signal.signal(2, signal.default_int_handler))      # a shell's `&` ignores Ctrl-C
    address, port = re.match(r"play at (http://localhost:(\d+)), end with Ctrl-C", run.stdout.readline()).groups()
    assert b"<title>BiWM" in urllib.request.urlopen(address).read()
    client = Client(SimpleNamespace(server_address=("127.0.0.1", int(port)), server_port=port))
    client.ask(record=True)
    client.ask(step=WALK)
    run.send_signal(2)
    assert run.wait(20) == 0 and run.communicate() == ("", "")
    (take,) = tmp_path.glob("*.mp4")
    assert len(iio.imread(take)) == 8 and take.with_suffix(".txt").exists()             # a recording in the making is kept


def test_the_bench_says_what_a_player_would_notice(tmp_path, capsys):
    play.main(play.Config(port=0, bench=1.5, steps=1))
    figures = re.fullmatch(r"([\d.]+) of 8 frames a second for [12] s; action to photon (\d+) ms median, (\d+) ms at 95 % of \d+; "
                           r"generation ([\d.]+) frames a second\n", capsys.readouterr().out)
    assert 0 < float(figures[1]) <= 8 and int(figures[2]) <= int(figures[3]) and float(figures[4]) > 0


@pytest.mark.parametrize("flags, words", [(["--weights", "/gone.safetensors"], "/gone.safetensors"), (["--backbone", "wan3"], "unknown backbone"),
                                          (["--steps", "0"], "--steps"), (["--port", "PORT"], "choose another --port"),
                                          (["--weights", "README.md"], "not a complete safetensors file")])
def test_bad_settings_are_one_line(toy, flags, words, capsys):
    flags = [str(toy.server_port) if flag == "PORT" else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        play.main(common.parse(play.Config, [*(["--port", "0"] if "--port" not in flags else []), *flags]))
    assert words in stop.value.code and "\n" not in stop.value.code


# ---- The page, in Chromium -------------------------------------------------------------------------------------------

class Browser:
    """Chromium, headless and with a profile of its own, through the WebDriver protocol (w3.org/TR/webdriver2)."""

    def __init__(self, profile, width=1280, height=800, mobile=False):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.base, self.session = f"http://127.0.0.1:{port}", ""
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        screen = {"width": width, "height": height, "pixelRatio": 1, "touch": mobile, "mobile": mobile}
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--enable-precise-memory-info", f"--user-data-dir={profile}"]
        options = {"args": flags, "mobileEmulation": {"deviceMetrics": screen}}
        end = time.time() + 20
        while not self.session:
            try:
                self.session = "/session/" + self("", capabilities={"alwaysMatch": {
                    "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}, base="/session")["sessionId"]
            except urllib.error.URLError:
                assert time.time() < end, "chromedriver does not answer"
                time.sleep(0.1)

    def __call__(self, path, base=None, method="POST", **body):
        url = self.base + (self.session if base is None else base) + path
        request = urllib.request.Request(url, json.dumps(body).encode() if method == "POST" else None, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def js(self, code, *arguments):
        return self("/execute/sync", script=code, args=arguments)

    def keys(self, *actions):
        """Type: "+w" presses, "-w" releases, a number waits for so many milliseconds."""
        named = {"right": "\ue014", "left": "\ue012", "space": " "}
        self("/actions", actions=[{"type": "key", "id": "keyboard", "actions": [
            {"type": "pause", "duration": a} if isinstance(a, int) else
            {"type": "keyDown" if a[0] == "+" else "keyUp", "value": named.get(a[1:], a[1:])} for a in actions]}])

    def touch(self, selector, duration):
        where = self.js("const r = document.querySelector(arguments[0]).getBoundingClientRect(); return [r.x + 9, r.y + 9]", selector)
        self("/actions", actions=[{"type": "pointer", "id": "finger", "parameters": {"pointerType": "touch"}, "actions": [
            {"type": "pointerMove", "x": int(where[0]), "y": int(where[1])}, {"type": "pointerDown", "button": 0},
            {"type": "pause", "duration": duration}, {"type": "pointerUp", "button": 0}]}])

    def text(self, element):
        return self.js("return document.getElementById(arguments[0]).textContent", element)

    def view(self, canvas="dream"):
        """What a canvas shows, uint8 [64, 96, 3] as integers."""
        url = self.js("return document.getElementById(arguments[0]).toDataURL('image/png')", canvas)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")).astype(int)

    def until(self, code, seconds=15):
        end = time.time() + seconds
        while not (value := self.js(f"return {code}")):
            assert time.time() < end, f"{code} did not come true; the page says: {self.text('note')}"
            time.sleep(0.05)
        return value

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self("/screenshot", method="GET")))

    def close(self):
        with contextlib.suppress(OSError):
            self("", method="DELETE")
        self.driver.terminate()
        self.driver.wait()


@pytest.fixture(scope="module")
def chromium():
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: apt-get install chromium chromium-driver")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, serving(out=folder) as server:
        browser = Browser(f"{folder}/profile")
        try:
            browser("/url", url=f"http://localhost:{server.server_port}/")
            yield browser, server
            log = [entry for entry in browser("/se/log", type="browser") if entry["level"] == "SEVERE"]
            assert not log, log                                 # no script failed, nothing was fetched from elsewhere
        finally:
            browser.close()


@pytest.fixture
def page(chromium):
    """The page, live, at the start of a fresh dream."""
    browser, server = chromium
    browser.until("world !== null")
    browser.js("onblur(); if (!playing) act.pause(); $('speed').value = '1× speed'; $('start').value = world.maps[0]; seed = world.seed; "
               "$('prompt').value = ''; act.reset()")
    browser.until("busy === 0 && $('label').textContent.startsWith('0 ')")
    return browser


def test_holding_w_walks_and_the_display_shows_the_label_that_the_model_got(page, monkeypatch):
    told = []
    monkeypatch.setattr(rollout.WorldModel, "step", lambda self, actions, step=rollout.WorldModel.step: (
        told.extend(torch.as_tensor(actions).tolist()), step(self, actions))[1])
    before, seen = page.view(), []
    page.keys("+w")
    assert page.js("return $('w').className") == "down"
    end = time.time() + 2
    while time.time() < end:
        seen.append(page.text("label"))
    page.keys("-w")
    page.until("$('median').textContent !== '–'")
    assert "9 forward" in seen and set(told) >= {9} >= {int(text.split()[0]) for text in seen} - {0}
    assert np.abs(page.view() - before).mean() > 10
    assert re.fullmatch(r"\d+ ms", page.text("median")) and re.fullmatch(r"95 %: \d+ ms", page.text("late"))
    assert re.fullmatch(r"\d+ ms", page.text("chunk")) and float(page.text("fps")) > 1 and page.text("who") == "student, 4 steps"


def test_pressing_right_turns_the_view_right_as_the_exact_world_does(page):
    place = world.World(0)
    place.reset(seed=SEED)
    offsets = torch.arange(-24, 24) * world.ANGLE               # all the way round, from looking back over the left
    around = place.state.repeat(48, 1)
    around[:, 2] += offsets
    views = world.render(world.pose(around), 0).numpy().astype(int)

    def bearing(view):                                          # degrees to the right of the start
        return float(offsets[np.square(views - view).mean((1, 2, 3)).argmin()])

    pairs = []
    page.keys("+right", 300, "-right")
    end = time.time() + 2.5
    while time.time() < end:
        pairs.append((bearing(page.view("truth")), bearing(page.view("dream"))))
    truth, dream = (list(column) for column in zip(*pairs))
    assert truth == sorted(truth) and 15 <= max(truth) <= 90                            # to the right, and then still
    assert not np.array_equal(page.view("truth"), page.view("dream"))
    assert max(dream) > 0 and np.median(np.abs(np.subtract(truth, dream))) <= 2 * world.ANGLE


def test_reset_begins_again_even_when_paused_and_pause_stands_still(page):
    page.js("act.pause(); act.reset()")
    page.until("busy === 0")
    start = page.view()
    page.keys("+space", "-space", "+w", 1200, "-w")
    page.until("drawn > 0 && $('label').textContent.startsWith('9 ')")
    page.keys("+space", "-space")
    assert page.text("status") == page.text("veil") == "paused"
    page.until("busy === 0")
    still, frame, waiting = page.view(), page.js("return drawn"), page.js("return frames.length")
    assert np.abs(still - start).mean() > 5
    time.sleep(1.2)
    assert page.js("return drawn") == frame and page.js("return frames.length") == waiting and np.array_equal(page.view(), still)
    page.keys("+r", "-r")
    page.until("busy === 0")
    assert np.array_equal(page.view(), start) and page.text("label").startswith("0 ")
    page.keys("+space", "-space")
    page.until(f"drawn > {frame} + 6")
    assert page.text("status") == "live"


def test_recording_gives_the_video_and_the_command(page, chromium):
    page.keys("+v", "-v")
    page.until("document.body.classList.contains('recording') && busy === 0")
    page.keys("+w", 700, "-w", "+v", "-v")
    name = page.until("$('note').querySelector('a')?.getAttribute('href')")
    assert not page.js("return document.body.classList.contains('recording')")
    _, server = chromium
    video = iio.imread(http(server, name)[1].split(b"\r\n\r\n", 1)[1], extension=".mp4")
    assert video.shape[1:] == (192, 576, 3) and len(video) >= 8
    assert b"--truth" in http(server, name.replace("mp4", "txt"))[1] and b"w-" in http(server, name.replace("mp4", "txt"))[1]


def test_new_seed_new_place(page):
    start = page.view("truth")
    page.keys("+n", "-n")
    page.until("seed !== world.seed && busy === 0")
    assert np.abs(page.view("truth") - start).mean() > 5


def test_a_chunk_that_arrives_after_a_reset_is_forgotten(page):
    page.js("act.pause()")
    page.until("busy === 0")
    page.js("""const plain = decoded; let arrive; const late = new Promise(done => arrive = done);
        window.decoded = async reply => { if (reply.seconds) await late; return plain(reply); };
        window.release = () => { window.decoded = plain; arrive(); };
        set('w', true, now()); step(); act.reset(); set('w', false, now());""")
    page.until("busy === 1 && frames.length === 3")                                     # the reset has been shown
    page.js("release()")                                                                # and now its predecessor arrives
    page.until("busy === 0")
    assert page.js("return frames.length") == 3 and page.js("return frames.every(frame => frame.reply.labels[0] === 0)")
    page.js("act.pause()")


def test_keys_become_one_chord_a_latent_frame(page):
    def chords(code):
        return page.js(f"playing = false; down.clear(); tapped.clear(); sampled = 1000; {code}; const c = sample().map(keys => keys.sort()); playing = true; return c")

    assert chords("set('w', true, 1100); set('right', true, 1200)") == [["right", "w"]] * 4                 # held: all of it
    assert chords("set('w', true, 1100); set('w', false, 1110)") == [["w"], [], [], []]                     # a tap: one frame
    assert chords("set('w', true, 1100); set('w', false, 1390)") == [["w"], ["w"], [], []]
    assert chords("set('w', true, 1100); set('a', true, 1100); set('a', false, 1101)") == [["a", "w"]] + [["w"]] * 3
    assert chords("set('w', true, 900); set('w', false, 1100)") == [[]] * 4                                 # counted before
    assert chords("set('w', true, 1100); set('s', true, 1100); set('d', true, 1100)") == [["d"]] * 4        # opposites cancel
    assert chords("set('left', true, 1100); set('right', true, 1100); set('right', false, 1101)") == [[]] + [["left"]] * 3


def test_a_thousand_key_events_a_second_change_nothing_but_the_keys(page):
    before = page.js("window.gc?.(); return performance.memory.usedJSHeapSize")
    page.js("""let n = 0, begun = now(); window.storm = setInterval(() => {
        for (; n < now() - begun; n++) dispatchEvent(new KeyboardEvent(n % 2 ? "keyup" : "keydown", {code: ["KeyW", "ArrowLeft"][n % 4 >> 1]}));
        if (n > 3000) { clearInterval(window.storm); window.storm = 0; } }, 5)""".replace("dispatchEvent", "document.body.dispatchEvent")
            .replace("{code", "{bubbles: true, code"))
    drawn = page.js("return drawn")
    page.until("window.storm === 0")
    assert page.js("return drawn") - drawn > 4 and page.js("return changes.length") <= 64 and page.js("return waiting.length") <= 1
    assert page.js("return down.size") <= 2 and page.js("return performance.memory.usedJSHeapSize") - before < 2e7


def test_the_next_chunk_is_asked_for_while_this_one_plays_and_as_late_as_it_may_be(chromium, toy, monkeypatch):
    browser, server = chromium
    monkeypatch.setattr(Toy, "slowness", 0.2)
    browser("/url", url=f"http://localhost:{toy.server_port}/")
    browser.until("drawn > 4 && costs.length > 0")
    browser.js("""window.asked = []; const plain = sample; window.sample = () => {
        asked.push([due + frames.length * pace() - now(), Math.min(Math.max(...costs) + SLACK, 500)]); return plain(); }""")
    browser.until("asked.length >= 4 && frames.length > 1")
    browser.js("set('w', true, now())")
    browser.until("latencies.length > 0 && asked.length >= 8")
    left, most, latency = *np.array(browser.js("return asked")).T, browser.js("return latencies[0]")
    assert (left <= most).all() and np.median(most - left) < 50 and np.median(left) > 150       # the toy needs 200 ms
    assert 200 < latency < 200 + 500 + 300 and browser.text("label") == "9 forward"
    browser("/url", url=f"http://localhost:{server.server_port}/")


def test_a_page_that_is_too_slow_drops_frames(page):
    page.until("frames.length > 2")
    page.js("const end = now() + 700; while (now() < end);")
    page.until("dropped > 0")
    assert page.js("return frames.length") <= 8


def test_touch_model_speed_words_and_pictures(page, tmp_path):
    page.touch("#up", 700)
    page.until("$('label').textContent === '1 look up'")
    page.js("$('model').value = 'teacher, 4 steps'; $('model').onchange()")
    page.until("$('who').textContent === 'teacher, 4 steps'", 30)
    page.js("$('model').value = 'student, 1 steps'; $('model').onchange(); $('speed').value = '4× speed'")
    page.until("$('who').textContent === 'student, 1 steps' && $('rate').textContent === 'of 32'", 30)
    page.js("$('prompt').value = 'a red dragon'; $('prompt').onchange()")
    page.until("$('note').className === 'bad' && $('note').textContent.includes('dragon')")
    page.js("$('prompt').value = ''; $('start').value = WORDS; $('start').onchange()")
    page.until("document.body.classList.contains('solo') && busy === 0", 30)
    Image.fromarray(np.full((100, 300, 3), (200, 40, 40), np.uint8)).save(tmp_path / "red.png")
    (element,) = page("/element", using="css selector", value="#file").values()
    page.js("act.pause(); $('start').value = PICTURE")
    page(f"/element/{element}/value", text=str(tmp_path / "red.png"))
    page.until("busy === 0 && image !== ''")
    assert np.abs(page.view() - (200, 40, 40)).mean() < 12
    page.js("$('model').value = 'student, 4 steps'; $('model').onchange()")


def test_a_lost_connection_is_said_and_made_again(page):
    page.js("socket.close()")
    page.until("$('status').textContent === 'offline'")
    page.until("$('status').textContent === 'live' && frames.length > 0")


@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
def test_the_page_fits(page, tmp_path, width, height):
    page("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride",
         params={"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
    page.screenshot(tmp_path / f"{width}.png")                  # to be looked at
    assert page.js("return [innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert page.js("return document.documentElement.scrollHeight") <= height
