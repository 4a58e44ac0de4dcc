"""Headers read through a few large windows, so that opening a remote slide costs few requests."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import final

from gigatome.blob.remote import HEAD_BYTES
from gigatome.blob.store import Blob, is_remote

# Bytes before and behind an offset. A scanner's thumbnail, which stands between two pages, is smaller than _AHEAD.
_BEFORE, _AHEAD = 1 << 16, 15 << 16
# If no more than this is left of the file it is read to its end: label and macro stand there.
_REST = 2 << 20
# A gap of so many bytes is cheaper than a request.
_GAP = 1 << 18
# Longer values are not held.
_LARGEST = 1 << 20
_LOCAL_AHEAD = 1 << 14
_MAX_WINDOWS = 32


@final
class Windows:
    """Small reads of a blob, served from large ones.

    A page of a TIFF, its values and often the next page lie together; those are read at once, from a disk in smaller
    windows than from a bucket, where a request costs more than a megabyte does.
    """

    def __init__(self, blob: Blob):
        self._blob = blob
        self._remote = is_remote(blob.uri)
        self._held: deque[tuple[int, bytes]] = deque(maxlen=_MAX_WINDOWS)
        self._expected: list[tuple[int, int]] = []
        self._hold([(0, min(blob.size, HEAD_BYTES if self._remote else _LOCAL_AHEAD))])

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of a range inside the blob; if they are not held, a window around them is read."""
        data = self._find(offset, length)
        if data is None and length <= _LARGEST:
            start, size = self._around(offset)
            self._load([(start, max(size, offset + length - start))])
            data = self._find(offset, length)
        return self._blob.read(offset, length) if data is None else data

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes of ranges inside the blob; those that are not held are read as they are, with one call."""
        found = [self._find(offset, length) for offset, length in ranges]
        missing = [place for place, data in zip(ranges, found, strict=True) if data is None]
        fetched = iter(self._blob.read_ranges(missing) if missing else [])
        return [next(fetched) if data is None else data for data in found]

    def fetch(self, offsets: Iterable[int]) -> None:
        """Reads windows around offsets inside the blob with one call."""
        self._load([self._around(offset) for offset in offsets if self._find(offset, 1) is None])

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Ranges that will be asked for: of a remote blob they come together with the next window."""
        if self._remote:
            self._expected += [
                (offset, length)
                for offset, length in ranges
                if length <= _LARGEST and offset + length <= self._blob.size
            ]

    def _load(self, windows: list[tuple[int, int]]) -> None:
        expected = [place for place in self._expected if self._find(*place) is None]
        self._expected.clear()
        gap = _GAP if self._remote else 0
        joined: list[tuple[int, int]] = []
        for offset, length in sorted([*windows, *expected]):
            start, before = joined[-1] if joined else (offset, 0)
            if joined and offset - start - before <= gap:
                joined[-1] = (start, max(before, offset + length - start))
            else:
                joined.append((offset, length))
        if windows:
            self._hold(joined[-_MAX_WINDOWS:])

    def _around(self, offset: int) -> tuple[int, int]:
        if not self._remote:
            return offset, min(_LOCAL_AHEAD, self._blob.size - offset)
        start = max(0, offset - _BEFORE)
        left = self._blob.size - start
        return start, left if left <= _REST else _BEFORE + _AHEAD

    def _hold(self, ranges: Sequence[tuple[int, int]]) -> None:
        starts = [start for start, _ in ranges]
        self._held.extend(zip(starts, self._blob.read_ranges(ranges), strict=True))

    def _find(self, offset: int, length: int) -> bytes | None:
        for start, data in reversed(self._held):
            if start <= offset and offset + length <= start + len(data):
                return data[offset - start : offset - start + length]
        return None
