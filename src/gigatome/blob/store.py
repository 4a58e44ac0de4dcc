"""Bytes from a disk, a bucket or a web server, in ranges; and files that appear whole or not at all.

A local file is read with ``os.pread``, everything else through obstore: ``s3://``, ``gs://``, ``az://``, ``http://``
and ``https://``. Credentials come from the environment, as each provider's own tools take them; they never stand in
a message, nor does the query of a signed URL.
"""

import bisect
import contextlib
import glob
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar, final
from urllib.parse import unquote, urlsplit

import obstore

from gigatome.core.errors import StoreError

T = TypeVar("T")

_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "http", "https")
_WEB = ("http", "https")
# One request opens an object: it gives the size and the bytes in which most TIFF headers lie.
_HEAD_BYTES = 1 << 16
# Chunks that all but touch are fetched together; obstore's own default of 1 MiB fetches far more than a tile needs.
_COALESCE_BYTES = 4096
# Server errors and lost connections are tried again this often; a server that is gone is given up on in a second.
_RETRY: Any = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=1), "base": 2},
}


class Blob(Protocol):
    """A file or object that is read in ranges, by many threads at once.

    Attributes:
        uri: where it lies, fit for messages: without user, password and query.
        size: its length in bytes.
    """

    uri: str
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``; raises :class:`StoreError` if they are not all there."""
        ...

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each ``(offset, length)``, in order; raises :class:`StoreError` as :meth:`read` does."""
        ...

    def close(self) -> None:
        """Gives back what is held open; harmless when called twice."""
        ...


def open_blob(uri: str | os.PathLike[str]) -> Blob:
    """Opens a local path, ``file://``, ``s3://``, ``gs://``, ``az://``, ``http://`` or ``https://`` for reading.

    Raises:
        StoreError: it does not exist, is a folder, or may not be read.
    """
    uri = os.fspath(uri)
    return _RemoteBlob(uri) if is_remote(uri) else _LocalBlob(local_path(uri))


def is_remote(uri: str | os.PathLike[str]) -> bool:
    """Whether ``uri`` names an object in a bucket or on a web server rather than a local file."""
    scheme, separator, _ = os.fspath(uri).partition("://")
    return bool(separator) and scheme.lower() in _SCHEMES


def local_path(uri: str | os.PathLike[str]) -> Path:
    """Local path of a path or a ``file://`` URI; raises :class:`StoreError` for a scheme that nobody knows."""
    text = os.fspath(uri)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme.lower() != "file":
        raise StoreError(f"{redact(text)}: {scheme}:// is not supported; use a path, s3, gs, az, http or https")
    return Path(unquote(rest if rest.startswith("/") else "/" + rest.partition("/")[2]))


def redact(uri: str | os.PathLike[str]) -> str:
    """``uri`` without user, password, query and fragment, for messages; a local path stays as it is."""
    text = os.fspath(uri)
    if not is_remote(text):
        return text
    parts = urlsplit(text)
    before, _, host = parts.netloc.rpartition("@")
    container = bool(before) and ":" not in before and parts.scheme not in _WEB  # abfss://container@account…
    return f"{parts.scheme}://{parts.netloc if container else host}{parts.path}"


def list_uris(prefix: str | os.PathLike[str], suffixes: tuple[str, ...]) -> list[str]:
    """Files under a folder (with its subfolders), matching a glob, or under a bucket prefix.

    Args:
        prefix: folder, glob pattern (``**`` goes into subfolders) or ``s3://bucket/prefix`` and the like.
        suffixes: endings to keep, lower case, such as ``(".svs", ".tif")``; compared without case. A glob that names
            its own ending is filtered too.

    Returns:
        Sorted paths or URIs; hidden files are left out. Empty if nothing matches.

    Raises:
        StoreError: the folder or bucket does not exist or may not be listed; web servers cannot be listed.
    """
    text = os.fspath(prefix)
    if is_remote(text):
        return _list_remote(text, suffixes)
    folder = local_path(text)
    if folder.is_dir():
        found = (str(Path(root) / name) for root, _, names in os.walk(folder) for name in names)
    elif folder.is_file():
        found = iter([str(folder)])
    elif glob.has_magic(str(folder)):
        found = (path for path in glob.iglob(str(folder), recursive=True) if Path(path).is_file())  # noqa: PTH207
    else:
        raise StoreError(f"{text}: no such folder")
    return sorted(path for path in found if path.lower().endswith(suffixes) and not Path(path).name.startswith("."))


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside ``path``, renamed to it when the block ends well and removed when it does not.

    The contents are on disk before the name is, so that after a crash there is the old file, the new one or none.
    Missing parent folders are made.

    Raises:
        StoreError: the file cannot be made or renamed.
    """
    target = Path(path)
    # Process and thread in the name: two writers of one file never share a temporary one.
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{target.parent}: cannot be made ({error.strerror})") from error
    try:
        yield temporary
        try:
            sync(temporary)
            os.replace(temporary, target)  # noqa: PTH105 - the rename is the point
            sync(target.parent)
        except OSError as error:
            raise StoreError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a whole file through :func:`atomic_path`; text as UTF-8."""
    with atomic_path(path) as temporary:
        try:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        except OSError as error:
            raise StoreError(f"{path}: cannot be written ({error.strerror})") from error


@final
class _LocalBlob:
    def __init__(self, path: Path):
        self.uri = str(path)
        self._handle = -1
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self._handle)
        except FileNotFoundError:
            raise StoreError(f"{path}: no such file") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
        if path.is_dir():
            self.close()
            raise StoreError(f"{path}: is a folder, not a file")
        self.size = status.st_size

    def read(self, offset: int, length: int) -> bytes:
        _check_range(self, offset, length)
        try:
            data = os.pread(self._handle, length, offset)
            while len(data) < length:
                more = os.pread(self._handle, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise StoreError(f"{self.uri}: cannot be read ({error.strerror})") from error
        return _check_length(self, data, offset, length)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self.read(offset, length) for offset, length in ranges]

    def close(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def __del__(self):
        self.close()


@final
class _RemoteBlob:
    def __init__(self, uri: str):
        self.uri = redact(uri)
        self._store, self._key = _store_of(uri)
        self.size, self._head = _guarded(self.uri, self._open)
        _check_length(self, self._head, 0, min(self.size, _HEAD_BYTES))

    def _open(self) -> tuple[int, bytes]:
        options: Any = {"range": (0, _HEAD_BYTES)}
        try:
            result = obstore.get(self._store, self._key, options=options)
            return int(result.meta["size"]), bytes(result.bytes())
        except obstore.exceptions.GenericError:
            # No range of an empty object can be served.
            if int(obstore.head(self._store, self._key)["size"]):
                raise
            return 0, b""

    def read(self, offset: int, length: int) -> bytes:
        return self.read_ranges([(offset, length)])[0]

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        for offset, length in ranges:
            _check_range(self, offset, length)
        head = self._head
        missing = [(offset, length) for offset, length in ranges if offset + length > len(head)]
        fetched = self._fetch(_coalesce(missing)) if missing else {}
        starts = sorted(fetched)
        parts = []
        for offset, length in ranges:
            if offset + length <= len(head):
                parts.append(head[offset : offset + length])
                continue
            start = starts[bisect.bisect_right(starts, offset) - 1]
            parts.append(fetched[start][offset - start : offset - start + length])
        return parts

    def _fetch(self, ranges: Sequence[tuple[int, int]]) -> dict[int, bytes]:
        starts, lengths = [start for start, _ in ranges], [length for _, length in ranges]
        parts = _guarded(
            self.uri,
            lambda: obstore.get_ranges(self._store, self._key, starts=starts, lengths=lengths, coalesce=0),
        )
        return {
            start: _check_length(self, part, start, length)
            for start, length, part in zip(starts, lengths, parts, strict=True)
        }

    def close(self) -> None:
        self._head = b""


def _coalesce(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins ranges that overlap or all but touch. Done here because obstore's own joining panics on a short answer."""
    joined: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if joined and offset - sum(joined[-1]) <= _COALESCE_BYTES:
            start, before = joined[-1]
            joined[-1] = (start, max(before, offset + length - start))
        else:
            joined.append((offset, length))
    return joined


def _store_of(uri: str) -> tuple[Any, str]:
    """Store at the root of ``uri`` and the key in it; the query of a signed URL stays with the store."""
    parts = urlsplit(uri)
    root = f"{parts.scheme}://{parts.netloc}"
    if parts.scheme in _WEB and parts.query:
        root += f"/?{parts.query}"
    options: dict[str, Any] = {"client_options": {"allow_http": True}} if parts.scheme == "http" else {}
    # from_url would take an address of amazonaws.com for a bucket, and lose the signature in it
    connect = obstore.store.HTTPStore.from_url if parts.scheme in _WEB else obstore.store.from_url
    store = _guarded(redact(uri), lambda: connect(root, retry_config=_RETRY, **options))
    return store, unquote(parts.path).lstrip("/")


def _list_remote(uri: str, suffixes: tuple[str, ...]) -> list[str]:
    if urlsplit(uri).scheme in _WEB:
        raise StoreError(f"{redact(uri)}: a web server cannot be listed; write the slides into a CSV")
    store, prefix = _store_of(uri)
    root = f"{urlsplit(uri).scheme}://{urlsplit(uri).netloc}/"

    def collect() -> list[str]:
        pages = obstore.list(store, prefix=prefix or None)
        return [root + item["path"] for page in pages for item in page]

    found = _guarded(redact(uri), collect)
    return sorted(item for item in found if item.lower().endswith(suffixes))


def _guarded(uri: str, request: Callable[[], T]) -> T:
    """Runs one request; whatever goes wrong becomes a :class:`StoreError` that repeats nothing the server said."""
    try:
        return request()
    except FileNotFoundError:
        reason = "not found (404)"
    except (PermissionError, obstore.exceptions.PermissionDeniedError):
        reason = "access denied (403); the credentials are missing, expired or not allowed to read it"
    except obstore.exceptions.UnauthenticatedError:
        reason = "access denied (401); the credentials are missing or expired"
    except obstore.exceptions.NotSupportedError:
        reason = "the server does not serve byte ranges; copy the file to a disk or a bucket"
    except (obstore.exceptions.BaseError, OSError, ValueError, TypeError) as error:
        reason = f"the store cannot be reached or did not answer as expected ({type(error).__name__})"
    # Not chained: the original text holds the whole URL, and so a signature.
    raise StoreError(f"{uri}: {reason}") from None


def _check_range(blob: Blob, offset: int, length: int) -> None:
    if offset < 0 or length < 0 or offset + length > blob.size:
        raise StoreError(f"{blob.uri}: bytes {offset} to {offset + length} lie outside its {blob.size} bytes")


def _check_length(blob: Blob, data: Any, offset: int, length: int) -> bytes:
    data = data if isinstance(data, bytes) else bytes(data)
    if len(data) != length:
        raise StoreError(f"{blob.uri}: {len(data)} of {length} bytes arrived from offset {offset}")
    return data


def sync(path: Path) -> None:
    """Has the disk keep a file, or the names in a folder, before anything that relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
