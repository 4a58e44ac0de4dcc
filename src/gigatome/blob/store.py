"""Bytes from a disk, a bucket or a web server, in ranges; and files that appear whole or not at all.

A local file is read with ``os.pread``, everything else (:mod:`gigatome.blob.remote`) through obstore: ``s3://``,
``gs://``, ``az://``, ``http://`` and ``https://``. Credentials come from the environment, as each provider's own tools
take them; they never stand in a message, nor does the query of a signed URL.
"""

import contextlib
import glob
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, final

from gigatome.blob.ranges import check_range, short_body
from gigatome.blob.remote import RemoteBlob, RemoteOptions, list_objects
from gigatome.blob.uri import is_remote, local_path, redact
from gigatome.core.errors import StoreError

__all__ = [
    "Blob",
    "atomic_path",
    "is_remote",
    "list_uris",
    "local_path",
    "open_blob",
    "redact",
    "sync",
    "write_atomic",
]


class Blob(Protocol):
    """A file or object that is read in ranges, by many threads at once.

    Attributes:
        uri: where it lies, fit for messages: without user, password and query.
        size: its length in bytes.
        handle: file descriptor of a local file while it is open, else -1.
        stamp: differs if the contents do: time of change, or a bucket's tag; "" if nothing tells.
    """

    uri: str
    size: int
    handle: int
    stamp: str

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``; raises :class:`StoreError` if they are not all there."""
        ...

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each ``(offset, length)``, in order; raises :class:`StoreError` as :meth:`read` does."""
        ...

    def close(self) -> None:
        """Gives back what is held open; harmless when called twice."""
        ...


def open_blob(uri: str | os.PathLike[str], options: RemoteOptions | None = None) -> Blob:
    """Opens a local path, ``file://``, ``s3://``, ``gs://``, ``az://``, ``http://`` or ``https://`` for reading.

    Args:
        uri: where it is.
        options: how remote objects are read; None for the defaults.

    Raises:
        StoreError: it does not exist, is a folder, or may not be read.
    """
    uri = os.fspath(uri)
    return RemoteBlob(uri, options or RemoteOptions()) if is_remote(uri) else _LocalBlob(local_path(uri))


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
        return sorted(found for found in list_objects(text) if found.lower().endswith(suffixes))
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
def atomic_path(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """A temporary name beside ``path``, renamed to it when the block ends well and removed when it does not.

    Missing parent folders are made.

    Args:
        path: of the file.
        durable: whether the contents are on disk before the name is, so that after a crash of the machine there is the
            old file, the new one or none; it takes milliseconds, and what can be made anew does not need it.

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
            if durable:
                sync(temporary)
            os.replace(temporary, target)  # noqa: PTH105 - the rename is the point
            if durable:
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
        self.handle = -1
        try:
            self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self.handle)
        except FileNotFoundError:
            raise StoreError(f"{path}: no such file") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
        if path.is_dir():
            self.close()
            raise StoreError(f"{path}: is a folder, not a file")
        self.size, self.stamp = status.st_size, str(status.st_mtime_ns)

    def read(self, offset: int, length: int) -> bytes:
        check_range(self, offset, length)
        try:
            data = os.pread(self.handle, length, offset)
            while len(data) < length:
                more = os.pread(self.handle, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise StoreError(f"{self.uri}: cannot be read ({error.strerror})") from error
        if len(data) != length:
            raise short_body(self.uri, len(data), length, offset)
        return data

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self.read(offset, length) for offset, length in ranges]

    def close(self) -> None:
        handle, self.handle = self.handle, -1
        if handle >= 0:
            os.close(handle)

    def __del__(self):
        self.close()


def sync(path: Path) -> None:
    """Has the disk keep a file, or the names in a folder, before anything that relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
