"""What a process remembers of the remote bytes it has read: some of the bytes, and checksums of many more."""

import threading
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import final


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
    """CRC-32 of ranges read before, in 8 bytes each, to tell when one arrives with other bytes than the first time.

    A table of fixed size: a range whose place is taken by another is forgotten, and then passes as new. Two ranges are
    confused once in 2³² such cases, which costs a needless read and nothing else.

    Args:
        count: places of the table; a power of two.
    """

    def __init__(self, count: int):
        if count < 1 or count & (count - 1):
            raise ValueError(f"{count} is not a power of two")
        self._mask, self._sum = count - 1, _fast_crc32()
        self._table = array("Q", bytes(8 * count))

    def agree(self, key: Hashable, data: bytes) -> bool:
        """Whether ``data`` has the checksum noted for ``key``; notes it if there is none."""
        place, entry = self._entry(key, data)
        noted = self._table[place]
        if (noted ^ entry) >> 32:
            self._table[place] = entry
            return True
        return noted == entry

    def replace(self, key: Hashable, data: bytes) -> None:
        """Notes the checksum of ``data`` in place of the one noted for ``key``."""
        place, entry = self._entry(key, data)
        self._table[place] = entry

    def _entry(self, key: Hashable, data: bytes) -> tuple[int, int]:
        mixed = hash(key)
        # The upper half tells ranges apart; that of an empty place is 0.
        return mixed & self._mask, (mixed >> 32 & 0xFFFF_FFFF or 1) << 32 | self._sum(data)


def _fast_crc32() -> Callable[[bytes], int]:
    """zlib-ng's CRC-32, three times as fast as that of some builds of Python, or Python's."""
    import imagecodecs

    return imagecodecs.zlibng_crc32 if imagecodecs.ZLIBNG.available else zlib.crc32  # pyright: ignore[reportReturnType]
