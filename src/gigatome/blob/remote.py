"""Objects in buckets and on web servers, read in ranges through obstore."""

import contextlib
import functools
import hashlib
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final
from urllib.parse import unquote, urlsplit

import obstore

from gigatome.blob.cache import ByteCache, Checksums
from gigatome.blob.ranges import BrokenBodyError, Traffic, check_range, pause, reading, short_body
from gigatome.blob.uri import WEB, redact
from gigatome.core.errors import StoreError

# One request opens an object: it gives the size and the bytes in which most TIFF headers lie.
HEAD_BYTES = 1 << 18
# Connections to this many buckets, hosts and signed addresses are kept for slides opened later.
_STORES = 64
# Where each provider's settings stand in the environment; obstore reads these itself.
_PREFIXES = {"s3": "AWS_", "s3a": "AWS_", "gs": "GOOGLE_"}
_AZURE = "AZURE_"
_STATUS = r"non-2xx status code: (\d{3})"
# Settings of the HTTP client, which obstore takes from the environment only if it is given none in code.
_CLIENT_KEYS = (
    "allow_http", "allow_invalid_certificates", "connect_timeout", "default_content_type", "http1_only", "http2_only",
    "pool_idle_timeout", "pool_max_idle_per_host", "proxy_ca_certificate", "proxy_excludes", "proxy_url",
    "randomize_addresses", "read_timeout", "timeout", "user_agent",
)  # fmt: skip
_DETOURS = ("allow_invalid_certificates", "proxy_ca_certificate", "proxy_url")
_SWITCHES = ("allow_http", "allow_invalid_certificates", "http1_only", "http2_only", "randomize_addresses")


@final
@dataclass(frozen=True)
class RemoteOptions:
    """How objects in buckets and on web servers are read.

    Addresses, regions and credentials are none of these: they come from the environment, as obstore reads them
    (``AWS_ENDPOINT_URL``, ``AWS_ALLOW_HTTP``, ``AZURE_STORAGE_ACCOUNT_NAME`` …). A setting of the HTTP client that
    stands there, such as ``AWS_TIMEOUT``, goes before those given here.

    Attributes:
        connect_seconds: after which a connection that is not made is tried anew.
        stall_seconds: after which a request to which nothing more arrives is made anew.
        request_seconds: after which one request is given up however steadily it arrives.
        retries: how often a request is made again after a server error, a lost connection or a time-out, with waits
            from 0.05 to 1 s that double.
        retry_seconds: after which no request is made again.
        tries: how often a range is asked for whose body breaks off, or is short though the server says it is whole.
        direct: whether a :class:`~gigatome.blob.fetch.Fetcher` carries requests on connections of its own where it can,
            and leaves to obstore only what goes wrong; obstore takes several times the processor time for a request.
        cache_bytes: of the process-wide :class:`~gigatome.blob.cache.ByteCache`; 0 for none.
        checksums: ranges whose checksums are kept, 8 bytes each; a power of two.
    """

    connect_seconds: float = 10
    stall_seconds: float = 20
    request_seconds: float = 300
    retries: int = 5
    retry_seconds: float = 60
    tries: int = 4
    direct: bool = True
    cache_bytes: int = 256 << 20
    checksums: int = 1 << 20


@final
class Shared:
    """What all remote blobs of a process with the same options share; made by :func:`shared`.

    Attributes:
        options: as given.
        cache: bytes read lately.
        checksums: of the ranges read before.
    """

    def __init__(self, options: RemoteOptions):
        self.options = options
        self.cache, self.checksums = ByteCache(options.cache_bytes), Checksums(options.checksums)
        self._stores: OrderedDict[bytes, Any] = OrderedDict()
        self._lock = threading.Lock()

    def store(self, uri: str) -> tuple[Any, str]:
        """The store at the root of ``uri``, with its pool of connections, and the key in it.

        The query of a signed address stays with the store.

        Raises:
            StoreError: the environment does not say how to reach it.
        """
        parts = urlsplit(uri)
        root = f"{parts.scheme}://{parts.netloc}"
        if parts.scheme in WEB and parts.query:
            root += f"/?{parts.query}"
        prefix = _PREFIXES.get(parts.scheme, _AZURE)
        settings = sorted(item for item in os.environ.items() if item[0].startswith(prefix))
        # Signatures and keys are not kept as they are.
        name = hashlib.sha256(repr((root, settings)).encode()).digest()
        with self._lock:
            store = self._stores.get(name)
            if store is None:
                with translated(redact(uri)):
                    store = self._stores[name] = self._connect(parts.scheme, root)
                if len(self._stores) > _STORES:
                    self._stores.popitem(last=False)
            self._stores.move_to_end(name)
        return store, unquote(parts.path).lstrip("/")

    def _connect(self, scheme: str, root: str) -> Any:
        options = self.options
        client: dict[str, Any] = {
            "connect_timeout": timedelta(seconds=options.connect_seconds),
            "read_timeout": timedelta(seconds=options.stall_seconds),
            "timeout": timedelta(seconds=options.request_seconds),
        }
        if scheme == "http":
            client["allow_http"] = True
        for key, value in _environment(scheme, _CLIENT_KEYS).items():
            client[key] = value.lower() in ("1", "true", "on", "yes") if key in _SWITCHES else value
        retry: Any = {
            "max_retries": options.retries,
            "retry_timeout": timedelta(seconds=options.retry_seconds),
            "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=1), "base": 2},
        }
        # from_url would take an address of amazonaws.com for a bucket, and lose the signature in it.
        connect: Any = obstore.store.HTTPStore.from_url if scheme in WEB else obstore.store.from_url
        return connect(root, client_options=client, retry_config=retry)


def _environment(scheme: str, keys: Sequence[str]) -> dict[str, str]:
    """Settings of the HTTP client that stand in the environment for a provider; none for a web server."""
    prefix = _PREFIXES.get(scheme, _AZURE)
    found = {key: os.environ.get(prefix + key.upper()) for key in keys if scheme not in WEB}
    return {key: value for key, value in found.items() if value is not None}


@functools.lru_cache(maxsize=4)
def shared(options: RemoteOptions) -> Shared:
    """The connections, cache and checksums of this process for ``options``."""
    return Shared(options)


@final
class RemoteBlob:
    """An object read in ranges; see :class:`gigatome.blob.store.Blob`.

    Opening costs one request. Ranges that touch are asked for together; see :mod:`gigatome.blob.ranges`.

    Attributes:
        handle: -1.
        stamp: tag, version and time of change, as far as the store states them.
        identity: stands for this version of the object, in checksums and the cache.
        traffic: what was asked for and what arrived, the opening left out.
        options: as given.
        checksums: of the process.
        store, key: where obstore finds it.
        url: as given, with what :attr:`uri` leaves out.
        plain: whether neither the options nor the environment ask for more than a connection to its server.
    """

    handle = -1

    def __init__(self, uri: str, options: RemoteOptions):
        process = shared(options)
        self.uri, self.url, self.options = redact(uri), uri, options
        self.store, self.key = process.store(uri)
        self.checksums, self._cache = process.checksums, process.cache
        self.plain = options.direct and not _environment(urlsplit(uri).scheme, _DETOURS)
        self.traffic = Traffic()
        meta, self._head = self._open()
        self.size = int(meta["size"])
        self.stamp = " ".join(str(meta[key]) for key in ("e_tag", "version", "last_modified") if meta[key])
        self.identity = hash((self.uri, self.size, self.stamp))

    def _open(self) -> tuple[Any, bytes]:
        """What the store says of the object, and its first bytes."""
        attempt = 0
        while True:
            try:
                with translated(self.uri):
                    meta, head = self._first_bytes()
                length = min(int(meta["size"]), HEAD_BYTES)
                if len(head) == length:
                    return meta, head
                failure = short_body(self.uri, len(head), length, 0)
            except BrokenBodyError as error:
                failure = error
            attempt += 1
            if attempt >= self.options.tries:
                raise failure
            time.sleep(pause(attempt))

    def _first_bytes(self) -> tuple[Any, bytes]:
        try:
            result = obstore.get(self.store, self.key, options={"range": (0, HEAD_BYTES)})
            return result.meta, bytes(result.bytes())
        except obstore.exceptions.BaseError as error:
            # No range of an empty object can be served: some servers say so, others send all of it.
            whole = isinstance(error, obstore.exceptions.NotSupportedError)
            if not whole and _found(_STATUS, error) not in ("400", "416"):
                raise
            meta = obstore.head(self.store, self.key)
            if int(meta["size"]):
                raise
            return meta, b""

    def read(self, offset: int, length: int) -> bytes:
        """See :class:`gigatome.blob.store.Blob`."""
        return self.read_ranges([(offset, length)])[0]

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See :class:`gigatome.blob.store.Blob`."""
        parts = [self._known(offset, length) for offset, length in ranges]
        missing = [k for k, part in enumerate(parts) if part is None]
        if missing:
            wanted = [ranges[k] for k in missing]
            for k, part in zip(missing, self._fetch(wanted), strict=True):
                parts[k] = part
                self._cache.put((self.identity, *ranges[k]), part)
        return parts  # pyright: ignore[reportReturnType]

    def _known(self, offset: int, length: int) -> bytes | None:
        check_range(self, offset, length)
        if offset + length <= len(self._head):
            return self._head[offset : offset + length]
        return self._cache.get((self.identity, offset, length))

    def _fetch(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        steps = reading(self, ranges, self.traffic)
        answer = None
        while True:
            try:
                ask = steps.send(answer)
            except StopIteration as end:
                return end.value
            time.sleep(ask.delay)
            try:
                with translated(self.uri):
                    answer = obstore.get_ranges(
                        self.store, self.key, starts=ask.starts, lengths=ask.lengths, coalesce=0
                    )
            except BrokenBodyError as error:
                answer = error

    def close(self) -> None:
        """Forgets the first bytes; connections stay open for other objects."""
        self._head = b""


def list_objects(uri: str) -> list[str]:
    """URIs of all objects whose keys start with that of ``uri``.

    Raises:
        StoreError: the bucket does not exist or may not be listed; web servers cannot be listed.
    """
    parts = urlsplit(uri)
    if parts.scheme in WEB:
        raise StoreError(f"{redact(uri)}: a web server cannot be listed; write the slides into a CSV")
    store, prefix = shared(RemoteOptions()).store(uri)
    with translated(redact(uri)):
        pages = obstore.list(store, prefix=prefix or None)
        return [f"{parts.scheme}://{parts.netloc}/{item['path']}" for page in pages for item in page]


@contextlib.contextmanager
def translated(uri: str) -> Iterator[None]:
    """Whatever goes wrong with a request becomes a :class:`StoreError` that repeats nothing the server said."""
    try:
        yield
        return
    except FileNotFoundError:
        reason = "not found (404)"
    except (PermissionError, obstore.exceptions.PermissionDeniedError):
        reason = "access denied (403); the credentials are missing, expired or not allowed to read it"
    except obstore.exceptions.UnauthenticatedError:
        reason = "access denied (401); the credentials are missing or expired"
    except obstore.exceptions.NotSupportedError:
        reason = "the server does not serve byte ranges; copy the file to a disk or a bucket"
    except (obstore.exceptions.BaseError, OSError, ValueError, TypeError) as error:
        again = _found(r"after (\d+) retries", error)
        count = f" after {again} retries" if again else ""
        status = _found(_STATUS, error)
        if status:
            reason = f"the server answered {status}{count}"
        elif "kind: Timeout" in str(error):
            reason = f"the server did not answer in time{count}"
        else:
            reason = f"the store cannot be reached or did not answer as expected ({type(error).__name__}{count})"
        if not again and "response body error" in str(error):
            raise BrokenBodyError(f"{uri}: {reason}") from None
    # Not chained: the original text holds the whole URL, and so a signature.
    raise StoreError(f"{uri}: {reason}") from None


def _found(pattern: str, error: Exception) -> str:
    """What stands in the place of the group of ``pattern``; "" if it does not match."""
    match = re.search(pattern, str(error))
    return match[1] if match else ""
