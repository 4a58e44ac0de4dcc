"""Slide indexes kept on disk, so that a slide whose headers were read once opens without reading them again.

One file a slide, named after its address and marked with its size and time of change (or, in a bucket, its tag). Many
processes may share a folder: files appear whole, and one that is damaged, of another version or of another state of
the slide is passed over and written anew. The cache never raises for what it finds or cannot write.

Layout of a file, little-endian: magic and version (8 bytes), digest of size and stamp (16), CRC-32 of all that follows
(4), length of the JSON text (4); the JSON text, blanks up to a multiple of 8, then the tables and arrays that it names.
Offsets are left out where the chunks follow one another, and byte counts take 2 bytes where they fit.
"""

import hashlib
import itertools
import json
import os
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path
from typing import Any, final

import numpy as np

from gigatome.blob.store import atomic_path, is_remote, local_path, redact
from gigatome.core.errors import StoreError
from gigatome.core.geometry import Box
from gigatome.core.logs import log
from gigatome.slides.index import Coding, LevelIndex, SlideIndex

DEFAULT_MAX_BYTES = 4 << 30
_ENVIRONMENT = "GIGATOME_INDEX_CACHE"
_MAGIC = b"gtindex\x01"
_HEAD = struct.Struct("<8s16sII")
_SUFFIX = ".gtindex"
# The folder is measured once this share of its bound was written, and emptied by twice that.
_SHARE = 16
# A writer that is still at work after this long is dead.
_DEAD_SECONDS = 3600

_Put = Callable[[bytes], list[int]]
"""Appends data to a file; returns where they lie behind its JSON text and how long they are."""


def default_cache_folder() -> Path | None:
    """Folder for slide indexes: $GIGATOME_INDEX_CACHE, None if that is empty; else below the user's cache folder."""
    chosen = os.environ.get(_ENVIRONMENT)
    if chosen is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "gigatome" / "index"
    except RuntimeError:  # no home
        return None


@final
class IndexCache:
    """Slide indexes in one folder; may be shared by threads and processes.

    Args:
        folder: made when the first index is stored.
        max_bytes: bound on the size of the folder; the oldest indexes are removed when it is passed.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = DEFAULT_MAX_BYTES):
        self._folder, self._max_bytes = Path(folder), max_bytes
        self._unmeasured = max_bytes
        self._writable = True

    def load(self, uri: str | os.PathLike[str], size: int, stamp: str) -> SlideIndex | None:
        """The index of a slide, None if it is not kept or the slide has changed since.

        Args:
            uri: where the slide is.
            size: its length in bytes.
            stamp: what changes when the slide does: time of change, or a bucket's tag; with "" nothing is found.
        """
        if not stamp:
            return None
        try:
            return _unpacked(self._path(uri).read_bytes(), _digest(f"{size} {stamp}"))
        except Exception:  # a foreign file of the same name raises almost anything
            return None

    def store(self, uri: str | os.PathLike[str], size: int, stamp: str, index: SlideIndex) -> None:
        """Keeps the index of a slide; see :meth:`load`. With an empty stamp nothing is kept."""
        if not (stamp and self._writable):
            return
        data = _packed(index, _digest(f"{size} {stamp}"))
        try:
            with atomic_path(self._path(uri), durable=False) as temporary:
                temporary.write_bytes(data)
        except (StoreError, OSError) as error:
            self._writable = False
            log.warning("%s: no slide index can be kept there (%s)", self._folder, error)
            return
        self._unmeasured += len(data)
        if self._unmeasured > self._max_bytes // _SHARE:
            self._unmeasured = 0
            self._trim()

    def _path(self, uri: str | os.PathLike[str]) -> Path:
        address = redact(uri) if is_remote(uri) else os.path.abspath(local_path(uri))  # noqa: PTH100 - no links resolved
        return self._folder / (_digest(address).hex() + _SUFFIX)

    def _trim(self) -> None:
        """Removes what dead writers left, and the oldest indexes if the folder has outgrown its bound."""
        found: list[tuple[float, int, str]] = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except OSError:
                    continue  # another process was faster
                dead = entry.name.endswith(".tmp") and status.st_mtime < time.time() - _DEAD_SECONDS
                if dead:
                    _remove(entry.path)
                elif entry.name.endswith(_SUFFIX):
                    found.append((status.st_mtime, status.st_size, entry.path))
        found.sort(reverse=True)
        sizes = list(itertools.accumulate(size for _, size, _ in found))
        if sizes and sizes[-1] > self._max_bytes:
            limit = self._max_bytes - 2 * self._max_bytes // _SHARE
            for total, (_, _, path) in zip(sizes, found, strict=True):
                if total > limit:
                    _remove(path)


@lru_cache(maxsize=1)
def user_cache() -> IndexCache | None:
    """The cache in :func:`default_cache_folder`, made at the first call; None if it is switched off."""
    folder = default_cache_folder()
    return IndexCache(folder) if folder else None


def _remove(path: str) -> None:
    try:
        os.unlink(path)  # noqa: PTH108
    except OSError:
        log.debug("%s: cannot be removed", path)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _packed(index: SlideIndex, key: bytes) -> bytes:
    parts: list[bytes] = []

    def put(data: bytes) -> list[int]:
        place = [sum(map(len, parts)), len(data)]
        parts.append(data + bytes(-len(data) % 8))
        return place

    text = json.dumps(
        {
            "vendor": index.vendor,
            "mpp": index.mpp,
            "properties": dict(index.properties),
            "bounds": astuple(index.bounds),
            "gaps": index.gaps,
            "levels": [_level_fields(level, put) for level in index.levels],
        }
    ).encode()
    text += b" " * (-(_HEAD.size + len(text)) % 8)
    body = b"".join([text, *parts])
    return _HEAD.pack(_MAGIC, key, zlib.crc32(body), len(text)) + body


def _level_fields(level: LevelIndex, put: _Put) -> dict[str, Any]:
    coding = level.coding
    counts, offsets = level.counts.ravel(), level.offsets.ravel()
    follow = _follow(offsets, counts)
    return {
        "size": [level.width, level.height],
        "scale": [level.scale_x, level.scale_y],
        "chunk": [level.chunk_width, level.chunk_height],
        "coding": [coding.compression, coding.photometric, coding.samples, coding.predictor],
        "tables": put(coding.tables),
        "header": put(coding.header),
        "shape": level.counts.shape,
        "counts": _put_array(counts.astype(np.uint16) if counts.max() < 1 << 16 else counts, put),
        "offsets": level.offsets.dtype.str if follow else _put_array(offsets, put),
        "follow": follow,
    }


def _put_array(array: np.ndarray, put: _Put) -> list[Any]:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return [little.dtype.str, *put(little.tobytes())]


def _follow(offsets: np.ndarray, counts: np.ndarray) -> list[int] | None:
    """Offset of the first chunk and bytes between chunks, if that says where all of them lie; else None."""
    between = np.diff(offsets.astype(np.int64)) - counts[:-1]
    if between.size and (between[0] < 0 or (between != between[0]).any()):
        return None
    return [int(offsets[0]), int(between[0]) if between.size else 0]


def _unpacked(data: bytes, key: bytes) -> SlideIndex | None:
    magic, found, checksum, length = _HEAD.unpack_from(data)
    body = memoryview(data)[_HEAD.size :]
    if (magic, found) != (_MAGIC, key) or zlib.crc32(body) != checksum:
        return None
    fields = json.loads(data[_HEAD.size : _HEAD.size + length])
    parts = body[length:]
    return SlideIndex(
        vendor=fields["vendor"],
        levels=tuple(_level(level, parts) for level in fields["levels"]),
        mpp=tuple(fields["mpp"]) if fields["mpp"] else None,
        properties=fields["properties"],
        bounds=Box(*fields["bounds"]),
        gaps=fields["gaps"],
    )


def _level(fields: dict[str, Any], parts: memoryview) -> LevelIndex:
    (width, height), (scale_x, scale_y), (chunk_width, chunk_height) = fields["size"], fields["scale"], fields["chunk"]
    tables, header = (bytes(parts[start : start + length]) for start, length in (fields["tables"], fields["header"]))
    compression, photometric, samples, predictor = fields["coding"]
    counts = _array(fields["counts"], parts).astype(np.uint32, copy=False)
    if fields["follow"]:
        first, between = fields["follow"]
        offsets = np.empty(len(counts), fields["offsets"])
        offsets[0] = first
        np.add(counts[:-1], between, out=offsets[1:], dtype=offsets.dtype, casting="unsafe")
        np.cumsum(offsets, out=offsets)
    else:
        offsets = _array(fields["offsets"], parts)
    return LevelIndex(
        width,
        height,
        scale_x,
        scale_y,
        chunk_width,
        chunk_height,
        Coding(compression, photometric, samples, predictor, tables, header),
        offsets.reshape(fields["shape"]),
        counts.reshape(fields["shape"]),
    )


def _array(place: list[Any], parts: memoryview) -> np.ndarray:
    kind, start, length = place
    return np.frombuffer(parts[start : start + length], kind)
