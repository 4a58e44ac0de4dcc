"""A web server for byte ranges on 127.0.0.1, in a thread, with faults to order."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class RangeServer:
    """``files`` by path; a path in ``faults`` answers with a status, or "short" (half the bytes), or "whole" (200)."""

    url: str
    files: dict[str, bytes]
    faults: dict[str, int | str]
    requests: list[tuple[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def serve(files: dict[str, bytes], faults: dict[str, int | str] | None = None) -> Iterator[RangeServer]:
    state = RangeServer("", files, faults or {})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(200, state.files.get(self.name(), b""), {})

        def do_GET(self):
            state.requests.append((self.path, self.headers.get("Range", "")))
            name, fault = self.name(), state.faults.get(self.name())
            if isinstance(fault, int):
                return self.answer(fault, b"the secret is in the body", {})
            if name not in state.files:
                return self.answer(404, b"", {})
            data = state.files[name]
            if fault == "whole":
                return self.answer(200, data, {})
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data))
            if start >= len(data):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            body = data[start:stop]
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            return self.answer(206, body[: len(body) // 2] if fault == "short" else body, headers)

        def name(self):
            return unquote(urlsplit(self.path).path).lstrip("/")

        def answer(self, status, body, headers):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
