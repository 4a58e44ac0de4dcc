"""A web server for byte ranges on 127.0.0.1, in a thread, with faults to order."""

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Fault = int | str | None
Faults = Fault | list[Fault] | Callable[[str], Fault]


@dataclass
class RangeServer:
    """``files`` by path. A path in ``faults`` has its requests go wrong, all of them; one after another for a
    list; as it says for a function of the Range header.

    A fault is a status to answer with, None for a right answer, or

    - "short": half the bytes, said to be all;
    - "whole": status 200 and the whole file;
    - "flip": one bit altered, another one each time;
    - "reset": half the bytes, then the connection is reset;
    - "stall": half the bytes, then nothing more;
    - "hang": nothing at all.

    ``headers`` are added to every answer; ``requests`` holds (path, Range header), ``sent`` the bytes of all bodies,
    ``connections`` counts them, ``busy`` is set once a request hangs.
    """

    url: str
    files: dict[str, bytes]
    faults: dict[str, Faults]
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    connections: int = 0
    sent: int = 0
    flipped: int = 0
    busy: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)

    def fault(self, name: str, header: str) -> Fault:
        found = self.faults.get(name)
        if isinstance(found, list):
            return found.pop(0) if found else None
        return found(header) if callable(found) else found


@contextlib.contextmanager
def serve(
    files: dict[str, bytes], faults: dict[str, Faults] | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[RangeServer]:
    state = RangeServer("", files, faults or {})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self):
            state.connections += 1
            super().setup()

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(200, state.files.get(self.name(), b""))

        def do_GET(self):
            name, header = self.name(), self.headers.get("Range", "")
            state.requests.append((self.path, header))
            fault = state.fault(name, header)
            if isinstance(fault, int):
                return self.answer(fault, b"the secret is in the body")
            if fault == "hang":
                return self.wait()
            if name not in state.files:
                return self.answer(404, b"")
            data = state.files[name]
            if fault == "whole":
                return self.answer(200, data)
            first, _, last = header.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data))
            if start >= len(data):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            body = data[start:stop]
            if fault == "short":
                body = body[: len(body) // 2]
            if fault == "flip":
                body = bytes([body[0] ^ 1 << state.flipped % 8]) + body[1:]
                state.flipped += 1
            return self.answer(206, body, {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, fault)

        def name(self):
            return unquote(urlsplit(self.path).path).lstrip("/")

        def answer(self, status, body, headers=(), fault=None):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **state.headers, **dict(headers)}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault in ("reset", "stall"):
                body = body[: len(body) // 2]
            state.sent += len(body)
            self.wfile.write(body)
            if fault == "stall":
                self.wait()
            elif fault == "reset":
                # Linger of zero seconds: closing sends a reset.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

        def wait(self):
            state.busy.set()
            state.stopped.wait(60)
            self.close_connection = True

    class Server(ThreadingHTTPServer):
        request_queue_size = 512

        def handle_error(self, *_):
            pass  # clients that went away

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True)
    thread.start()
    state.url = f"https://localhost:{server.server_port}" if tls else f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        state.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
