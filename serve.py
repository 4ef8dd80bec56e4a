"""A page and its WebSocket on the standard library: the parts of HTTP and of RFC 6455 that one page needs, and no more.

Only our own page may open the WebSocket, and only under a name that is ours. Messages are bounded, each is answered
before the next one is read, and anything else that arrives ends the connection with a status code and a reason.
"""

import base64
import hashlib
import socket
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HERE = ("127.0.0.1", "localhost")   # names of a server that only this machine reaches
TEXT, CLOSE = 1, 8                  # opcodes; a browser sends no others of its own accord
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
          "img-src data: blob:")    # the page needs nothing from elsewhere


class Refused(Exception):
    """Why a WebSocket is closed: a status code (RFC 6455, section 7.4.1) and a reason."""


class Server(ThreadingHTTPServer):
    """A thread for each connection; at most `seats` of them are WebSockets. Closing it ends them all in good order."""

    daemon_threads = False

    def __init__(self, host, port, handler, seats):
        self.seats, self.wires = threading.Semaphore(seats), set()
        try:
            super().__init__((host, port), handler)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from None

    def process_request(self, request, address):
        self.wires.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request):
        self.wires.discard(request)
        super().shutdown_request(request)

    def server_close(self):
        for wire in [*self.wires]:
            with suppress(OSError):                             # gone already
                wire.shutdown(socket.SHUT_RDWR)                 # whoever reads from it reads the end
        super().server_close()                                  # waits for the threads

    def handle_error(self, request, address):
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):            # those only mean: gone
            super().handle_error(request, address)


class Handler(BaseHTTPRequestHandler):
    """One connection. A subclass says what a path holds (`file`) and what the two sides talk about (`converse`)."""

    protocol_version = "HTTP/1.1"
    timeout = 150                   # seconds that a read or a write may take before the client counts as gone

    def do_GET(self):
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin", "")
        name, local = host.partition(":")[0], self.server.server_address[0] in HERE
        if local and name not in HERE:          # any site can give 127.0.0.1 a name of its own: DNS rebinding
            self.send_error(403, f"this server answers as {' or '.join(HERE)} only")
        elif self.path != "/session":
            kind, body = self.file(self.path)
            if body is None:
                return self.send_error(404)
            headers = {"Content-Type": kind, "Content-Length": len(body), "Content-Security-Policy": POLICY}
            self.reply(200, headers, body)
        elif origin.partition("//")[2] != host:                 # any page can open a WebSocket to anywhere
            self.send_error(403, "only the page of this server may play")
        elif not (key := self.headers.get("Sec-WebSocket-Key")):
            self.send_error(426)
        elif not self.server.seats.acquire(blocking=False):
            self.send_error(503, "all seats are taken")
        else:
            self.upgrade(key)

    def reply(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def upgrade(self, key):
        """The handshake of section 4.2.2, the conversation, and its end."""
        self.close_connection = True
        try:
            accept = base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest())
            self.reply(101, {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": accept.decode()})
            self.converse()
        except Refused as refused:
            code, reason = refused.args
            self.send(code.to_bytes(2) + reason.encode(), CLOSE)
        finally:
            self.server.seats.release()

    def receive(self, limit):
        """The next message, at most `limit` bytes: section 5.2. Fragments are joined."""
        whole, begun, last = b"", False, False
        while not last:
            head = self.exactly(2)
            last, opcode, masked, n = head[0] & 128, head[0] & 15, head[1] & 128, head[1] & 127
            if opcode == CLOSE:
                raise Refused(1000, "")
            if head[0] & 112 or not masked or opcode != (0 if begun else TEXT):
                raise Refused(1002, "not a frame of a text message")
            if n > 125:
                n = int.from_bytes(self.exactly(2 if n == 126 else 8))
            if len(whole) + n > limit:
                raise Refused(1009, f"a message has at most {limit} bytes")
            mask, payload, begun = self.exactly(4), self.exactly(n), True
            whole += (int.from_bytes(payload) ^ int.from_bytes((mask * (n // 4 + 1))[:n])).to_bytes(n)
        return whole

    def exactly(self, n):
        data = self.rfile.read(n)
        if len(data) < n:
            raise ConnectionResetError("the client is gone")
        return data

    def send(self, payload, opcode=TEXT):
        n = len(payload)
        size = [n] if n < 126 else [126, *n.to_bytes(2)] if n < 65536 else [127, *n.to_bytes(8)]
        self.wfile.write(bytes([128 | opcode, *size]) + payload)

    def log_message(self, *_):
        """Nothing: a page that plays is not news."""
