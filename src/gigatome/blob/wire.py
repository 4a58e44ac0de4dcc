"""Range requests on plain HTTP/1.1 connections, for a quarter or less of the processor time that obstore takes.

It knows one answer only: status 206 with the bytes asked for. obstore says, and signs, where an object is; and where
anything else comes, a redirect, an error, a stall, a connection that breaks, the caller is sent back to obstore, which
knows what to do about it.
"""

import asyncio
import contextlib
import random
import socket
import ssl
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple, final
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np
import obstore

from gigatome.blob.remote import RemoteBlob, RemoteOptions
from gigatome.blob.uri import WEB
from gigatome.core.version import __version__

# Space for the head of an answer.
_HEAD_BYTES = 4096
_SIGNED_SECONDS = 3600
# An object that had a wrong answer is left to obstore for a while, and a server that gave this many in a row.
_FAILURES, _REST_SECONDS = 3, 30
# Until an idle connection is closed, and until the server's name is looked up again.
_IDLE_SECONDS, _LOOKUP_SECONDS = 60, 60
# What a query keeps as it is: a signature must not be touched, and a line must not be broken.
_IN_QUERY = "!$%&'()*+,-./:;=?@[]_~"
# Where bytes go that nobody asked for.
_NOWHERE = memoryview(bytearray(1))

Want = tuple[RemoteBlob, Sequence[int], Sequence[int]]
"""An object, and the starts and lengths of ranges of it."""


@dataclass(eq=False, slots=True)
class _Batch:
    """Requests that are waited for together; a body stays None where its request failed."""

    bodies: list[memoryview | None]
    left: int
    done: asyncio.Future[None]

    def take(self, place: int, body: memoryview | None) -> None:
        self.bodies[place] = body
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(None)


@dataclass(eq=False, slots=True)
class _Server:
    """A server and the connections to it, of which those on the stack are idle."""

    secure: bool
    host: str
    port: int
    options: RemoteOptions
    connections: set["_Connection"] = field(default_factory=set)
    idle: list["_Connection"] = field(default_factory=list)
    failures: int = 0
    rests_until: float = 0.0
    addresses: list[str] = field(default_factory=list)
    looked_up: float = 0.0

    def note(self, good: bool) -> None:
        """Counts failures, and has the server rest after several."""
        self.failures = 0 if good else self.failures + 1
        if self.failures == _FAILURES:
            self.failures, self.rests_until = 0, time.monotonic() + _REST_SECONDS


class _Place(NamedTuple):
    """Where an object is, and the head of requests for it but for the range."""

    server: _Server
    head: bytes


@final
class _Connection(asyncio.BufferedProtocol):
    """A connection that carries one request at a time."""

    def __init__(self, server: _Server):
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._view = _NOWHERE
        self._batch: _Batch | None = None
        self._place = self._start = self._length = self._arrived = self._end = 0
        self._last_one = False
        self.last = time.monotonic()

    @property
    def busy(self) -> bool:
        return self._batch is not None

    def ask(self, head: bytes, start: int, length: int, batch: _Batch, place: int) -> None:
        """Sends a request; ``batch`` takes the answer."""
        self._batch, self._place, self._start, self._length = batch, place, start, length
        self._arrived = self._end = 0
        self.last = time.monotonic()
        if self._transport is None:
            return self.connection_lost(None)
        # Not bytearray, which writes zeros first.
        self._view = np.empty(length + _HEAD_BYTES, np.uint8).data
        return self._transport.write(b"%bRange: bytes=%d-%d\r\n\r\n" % (head, start, start + length - 1))

    def abort(self) -> None:
        """Closes the connection; a request under way fails."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # pyright: ignore[reportAttributeAccessIssue]
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.connections.discard(self)
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.take(self._place, None)
        else:
            with contextlib.suppress(ValueError):
                self._server.idle.remove(self)

    def eof_received(self) -> None:
        """The transport closes itself."""

    def get_buffer(self, sizehint: int) -> memoryview:
        return _NOWHERE if self._batch is None else self._view[self._arrived :]

    def buffer_updated(self, nbytes: int) -> None:
        self._arrived += nbytes
        self.last = time.monotonic()
        if self._batch is None:
            return self.abort()
        if not self._end and not self._read_head():
            return None
        if self._arrived < self._end:
            return None
        if self._arrived > self._end:
            return self.abort()
        batch, self._batch = self._batch, None
        body, self._view = self._view[self._end - self._length : self._end], _NOWHERE
        if self._last_one:
            self.abort()
        else:
            self._server.idle.append(self)
        return batch.take(self._place, body)

    def _read_head(self) -> bool:
        """Whether the head has arrived and is right; closes the connection if it is not."""
        head, separator, _ = self._view[: min(self._arrived, _HEAD_BYTES)].tobytes().partition(b"\r\n\r\n")
        if not separator:
            if self._arrived >= _HEAD_BYTES:
                self.abort()
            return False
        head = head.lower() + b"\r\n"
        last = self._start + self._length - 1
        right = (
            head.startswith(b"http/1.1 206 ")
            and b"\r\ncontent-length: %d\r\n" % self._length in head
            and b"\r\ncontent-range: bytes %d-%d/" % (self._start, last) in head
            and b"\r\ntransfer-encoding:" not in head
            and b"\r\ncontent-encoding:" not in head
        )
        if not right:
            self.abort()
            return False
        self._last_one = b"\r\nconnection: close\r\n" in head
        self._end = len(head) + 2 + self._length
        return True


@final
class Wire:
    """Connections to all servers, of one event loop; used in its thread alone."""

    def __init__(self):
        self._servers: dict[tuple[bool, str, int, RemoteOptions], _Server] = {}
        # Each with the time until which it holds.
        self._places: weakref.WeakKeyDictionary[RemoteBlob, tuple[float, _Place | None]] = weakref.WeakKeyDictionary()
        self._tls: ssl.SSLContext | None = None
        self._watch: asyncio.Task[None] | None = None

    async def read(self, wanted: Sequence[Want]) -> list[list[memoryview] | None]:
        """Bodies of ranges of objects, each of the length asked for; None for an object that is not to be had so."""
        places = [await self._find(blob) for blob, _, _ in wanted]
        needs: Counter[_Server] = Counter()
        for place, (_, starts, _) in zip(places, wanted, strict=True):
            if place is not None:
                needs[place.server] += len(starts)
        for server, count in needs.items():
            if len(server.idle) < count:
                await self._connect(server, count)
        # Nothing is awaited between looking at idle connections and taking them.
        asked: list[tuple[_Server, range] | None] = []
        batch = _Batch([], 0, asyncio.get_running_loop().create_future())
        for place, (_, starts, lengths) in zip(places, wanted, strict=True):
            if place is None or len(place.server.idle) < len(starts):
                asked.append(None)
                continue
            indices = range(batch.left, batch.left + len(starts))
            asked.append((place.server, indices))
            batch.bodies += [None] * len(starts)
            batch.left += len(starts)
            for index, start, length in zip(indices, starts, lengths, strict=True):
                place.server.idle.pop().ask(place.head, start, length, batch, index)
        if batch.left:
            await batch.done
        return [entry and self._collect(batch, want[0], *entry) for want, entry in zip(wanted, asked, strict=True)]

    def close(self) -> None:
        """Closes all connections."""
        if self._watch is not None:
            self._watch.cancel()
        for server in self._servers.values():
            for connection in list(server.connections):
                connection.abort()

    def _collect(self, batch: _Batch, blob: RemoteBlob, server: _Server, indices: range) -> list[memoryview] | None:
        bodies = [body for body in batch.bodies[indices.start : indices.stop] if body is not None]
        good = len(bodies) == len(indices)
        server.note(good)
        if not good:
            self._places[blob] = time.monotonic() + _REST_SECONDS, None
        return bodies if good else None

    async def _find(self, blob: RemoteBlob) -> _Place | None:
        now = time.monotonic()
        until, place = self._places.get(blob, (0.0, None))
        if until < now:
            place = await self._locate(blob)
            self._places[blob] = now + (0.9 * _SIGNED_SECONDS if place else _REST_SECONDS), place
        return None if place is None or place.server.rests_until > now else place

    async def _locate(self, blob: RemoteBlob) -> _Place | None:
        """Where obstore would find an object, signed for an hour; None if that is unclear."""
        if not blob.plain:
            return None
        url = blob.url
        if urlsplit(url).scheme not in WEB:
            try:
                url = await obstore.sign_async(blob.store, "GET", blob.key, timedelta(seconds=_SIGNED_SECONDS))
            except (obstore.exceptions.BaseError, OSError, ValueError, TypeError):
                return None
        parts = urlsplit(url)
        secure, host = parts.scheme == "https", parts.hostname or ""
        if "@" in parts.netloc or _proxied(parts.scheme, host):
            return None
        query = f"?{quote(parts.query, safe=_IN_QUERY)}" if parts.query else ""
        target = quote(unquote(parts.path), safe="/~") + query
        head = f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nUser-Agent: gigatome/{__version__}\r\n"
        key = (secure, host, parts.port or (443 if secure else 80), blob.options)
        server = self._servers.get(key)
        if server is None:
            server = self._servers[key] = _Server(*key)
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._close_stalled())
        return _Place(server, head.encode("ascii", "replace"))

    async def _connect(self, server: _Server, count: int) -> None:
        """Makes as many idle connections as are missing, if it can, to all addresses that the server's name has."""
        loop = asyncio.get_running_loop()
        try:
            if not server.addresses or server.looked_up + _LOOKUP_SECONDS < time.monotonic():
                found = await loop.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
                # The resolver puts a family that has a route first.
                server.addresses = [str(place[0]) for family, *_, place in found if family == found[0][0]]
                server.looked_up = time.monotonic()
            if server.secure and self._tls is None:
                self._tls = ssl.create_default_context()
        except (OSError, ValueError):
            return server.note(False)
        secure = {"ssl": self._tls, "server_hostname": server.host} if server.secure else {}

        async def connect() -> None:
            address = random.choice(server.addresses)  # noqa: S311 - spreads the load
            made = loop.create_connection(lambda: _Connection(server), address, server.port, **secure)
            _, connection = await asyncio.wait_for(made, server.options.connect_seconds)
            server.idle.append(connection)

        while (missing := count - len(server.idle)) > 0:
            for failure in await asyncio.gather(*(connect() for _ in range(missing)), return_exceptions=True):
                if failure is not None:
                    return server.note(False)
        return None

    async def _close_stalled(self) -> None:
        """Closes connections on which nothing arrives, or that nobody needs any more."""
        while True:
            seconds = min((server.options.stall_seconds for server in self._servers.values()), default=1.0)
            await asyncio.sleep(min(1.0, seconds / 4))
            now = time.monotonic()
            for server in self._servers.values():
                for connection in list(server.connections):
                    limit = server.options.stall_seconds if connection.busy else _IDLE_SECONDS
                    if connection.last + limit < now:
                        connection.abort()


def _proxied(scheme: str, host: str) -> bool:
    proxies = getproxies()
    return bool(proxies.get(scheme) or proxies.get("all")) and not proxy_bypass(host)
