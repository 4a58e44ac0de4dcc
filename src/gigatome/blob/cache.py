"""What a process remembers of the remote bytes it has read: some of the bytes, and checksums of many more."""

import threading
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import final

from gigatome.core.native import NATIVE


@final
class ByteCache:
    """The byte ranges used last, up to a number of bytes; many threads may use it at once.

    Good for reads that meet the same chunks again: neighbouring tiles of a grid, a viewer, the Zarr view, the pages of
    a slide that is closed and opened again. Of no use to random tiles of a cohort, which hardly ever do: the online
    stream goes past it.

    Args:
        limit: bytes to keep; 0 keeps nothing.

    Attributes:
        size: bytes kept now.
    """

    def __init__(self, limit: int):
        self._limit, self.size = limit, 0
        self._parts: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> bytes | None:
        """The bytes kept under ``key``, or None."""
        with self._lock:
            part = self._parts.get(key)
            if part is not None:
                self._parts.move_to_end(key)
            return part

    def put(self, key: Hashable, part: bytes) -> None:
        """Keeps ``part``, and forgets those unused the longest for it; a part larger than a quarter is not kept."""
        if len(part) > self._limit // 4:
            return
        with self._lock:
            self.size += len(part) - len(self._parts.pop(key, b""))
            self._parts[key] = part
            while self.size > self._limit:
                self.size -= len(self._parts.popitem(last=False)[1])


@final
class Checksums:
    """Checksums of ranges read before, in 8 bytes each, to tell when one arrives with other bytes than the first time.

    A table of fixed size: a range whose place is taken by another is forgotten, and then passes as new. Two ranges are
    confused once in 2³² such cases, which costs a needless read and nothing else.

    Args:
        count: places of the table; a power of two.
    """

    def __init__(self, count: int):
        if count < 1 or count & (count - 1):
            raise ValueError(f"{count} is not a power of two")
        self._mask = count - 1
        self._table = array("Q", bytes(8 * count))

    def differing(self, keys: Sequence[Hashable], parts: Sequence[bytes]) -> list[int]:
        """Which of the parts do not have the checksum noted for their keys; notes it where there is none."""
        found, table, mask = [], self._table, self._mask
        for k, (key, checksum) in enumerate(zip(keys, _checksums(parts), strict=True)):
            mixed = hash(key)
            place, entry = mixed & mask, _entry(mixed, checksum)
            noted = table[place]
            if (noted ^ entry) >> 32:
                table[place] = entry
            elif noted != entry:
                found.append(k)
        return found

    def replace(self, key: Hashable, part: bytes) -> None:
        """Notes the checksum of ``part`` in place of the one noted for ``key``."""
        mixed = hash(key)
        self._table[mixed & self._mask] = _entry(mixed, _checksums([part])[0])


def _entry(mixed: int, checksum: int) -> int:
    """The upper half tells ranges apart; that of an empty place is 0."""
    return (mixed >> 32 & 0xFFFF_FFFF or 1) << 32 | checksum


def _checksums(parts: Sequence[bytes]) -> list[int]:
    """32 bits each; those of the extension in one call, since each turn of the GIL costs more than they do."""
    return [zlib.crc32(part) for part in parts] if NATIVE is None else NATIVE.digests(parts)
