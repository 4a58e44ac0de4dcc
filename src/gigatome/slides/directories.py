"""The directories of a TIFF file and the values of their tags.

Reads classic TIFF, BigTIFF and Hamamatsu's TIFF with 64-bit offsets, of both byte orders. Nothing in the file is
trusted: every number is held against a limit before memory or time is spent on it. Source: TIFF 6.0 specification.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import final

import numpy as np

from gigatome.blob.store import Blob
from gigatome.core.errors import DamagedSlideError, NotASlideError
from gigatome.slides.windows import Windows

MAX_TAGS = 4096
_MAX_TEXT = 16 << 20
NDPI_FORMAT = 65420

_BYTES_OF_TYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
INTEGERS = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}

RATIONAL = 5

Tag = tuple[int, int, int, bytes]
"""Code, type and number of the values of a tag, and its last word: the values if they fit, else where they lie."""


@final
class Directories:
    """Reads directories, and the values that their tags refer to.

    Args:
        blob: where the bytes are.
        name: what errors call the slide.

    Attributes:
        big: whether it is a BigTIFF.
        ndpi: whether it is Hamamatsu's: a classic TIFF whose offsets have 64 bits.
        first: offset of the first directory.
        size: of the file, in bytes.

    Raises:
        NotASlideError: the file is no TIFF.
        DamagedSlideError: it is one, and truncated or contradictory.
    """

    def __init__(self, blob: Blob, name: str):
        self._name, self.size = name, blob.size
        self._windows = Windows(blob)
        head = self.read(0, min(16, blob.size))
        if len(head) < 8 or head[:2] not in (b"II", b"MM"):
            raise NotASlideError(name, "is not a TIFF file")
        self._order = "<" if head[:2] == b"II" else ">"
        version = self.unpack("H", head[2:4])[0]
        if version not in (42, 43):
            raise NotASlideError(name, "is not a TIFF file")
        self.big, self.ndpi = version == 43, False
        if self.big and (len(head) < 16 or self.unpack("HH", head[4:8]) != (8, 0)):
            raise self.damaged("its BigTIFF header is wrong")
        first = self.unpack("Q", head[8:16])[0] if self.big else self.unpack("I", head[4:8])[0]
        if not self.big and len(head) >= 12:
            first = self._ndpi_start(first, self.unpack("Q", head[4:12])[0])
        self.first = first

    def _ndpi_start(self, narrow: int, wide: int) -> int:
        """Where the first page lies; finds out whether that is stated in 32 bits or, as Hamamatsu does it, in 64."""
        if wide:
            try:
                self.ndpi = True
                self.ndpi = NDPI_FORMAT in self.directory(wide)[0]
            except DamagedSlideError:
                self.ndpi = False
        return wide if self.ndpi else narrow

    def directory(self, offset: int) -> tuple[dict[int, Tag], int]:
        """Tags of the directory at ``offset`` and the offset of the next one."""
        head, layout, word = (8, "HHQ8s", "Q") if self.big else (2, "HHI4s", "I")
        count = self.unpack("Q" if self.big else "H", self.read(offset, head))[0]
        if count > MAX_TAGS:
            raise self.damaged(f"a page has {count} tags")
        entries = struct.Struct(self._order + layout)
        link = 8 if self.big or self.ndpi else 4
        data = self.read(offset + head, count * entries.size + link)
        tags = list(entries.iter_unpack(data[: count * entries.size]))
        following = self.unpack("Q" if link == 8 else word, data[-link:])[0]
        if self.ndpi and self.size >= 1 << 32:
            # The upper halves of all last words stand behind the directory.
            high = self.read(offset + head + len(data), 4 * count)
            halves = (high[start : start + 4] for start in range(0, 4 * count, 4))
            tags = [(*tag[:3], tag[3] + half) for tag, half in zip(tags, halves, strict=True)]
        # Of a repeated tag the first counts.
        return {tag[0]: tag for tag in reversed(tags) if tag[1] in _BYTES_OF_TYPE}, following

    def fetch(self, offsets: Sequence[int]) -> None:
        """Reads what stands around some offsets with one call."""
        for offset in offsets:
            self.check_inside(offset, 0)
        self._windows.fetch(offsets)

    def expect(self, tags: Iterable[Tag]) -> None:
        """Tags whose values will be asked for: of a remote file they come together with the next directory."""
        self._windows.expect([place for place in map(self._place, tags) if place])

    def value(self, entry: Tag) -> bytes:
        """The values of a tag as they lie in the file."""
        place = self._place(entry)
        return self.read(*place) if place else entry[3][: entry[2] * _BYTES_OF_TYPE[entry[1]]]

    def values(self, entries: Sequence[Tag]) -> list[np.ndarray]:
        """Whole numbers of several tags, those that must be fetched with one call; in the file's byte order."""
        places = [self._place(entry) for entry in entries]
        found = iter(self.read_all([place for place in places if place]))
        data = (next(found) if place else self.value(entry) for entry, place in zip(entries, places, strict=True))
        kinds = (self._order + INTEGERS[kind] for _, kind, _, _ in entries)
        return [np.frombuffer(value, kind) for value, kind in zip(data, kinds, strict=True)]

    def integers(self, entry: Tag) -> tuple[int, ...]:
        """Whole numbers of a tag; a single 32-bit one of Hamamatsu's may have 64 bits."""
        _, kind, count, word = entry
        if count == 1 and self.ndpi and len(word) == 8 and kind in (4, 13):
            return self.unpack("Q", word)
        return tuple(int(value) for value in np.frombuffer(self.value(entry), self._order + INTEGERS[kind]))

    def _place(self, entry: Tag) -> tuple[int, int] | None:
        """Offset and length of the values of a tag; None if they stand in the tag itself."""
        _, kind, count, word = entry
        length = count * _BYTES_OF_TYPE[kind]
        if length <= (8 if self.big else 4):
            return None
        return self.unpack("Q" if len(word) == 8 else "I", word)[0], length

    def unpack(self, layout: str, data: bytes) -> tuple[int, ...]:
        """Whole numbers in the byte order of the file."""
        return struct.unpack(self._order + layout, data)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the header or of a value; raises :class:`DamagedSlideError` if they lie behind the end."""
        if length > _MAX_TEXT:
            raise self.damaged(f"a tag holds {length} bytes")
        self.check_inside(offset, length)
        return self._windows.read(offset, length)

    def read_all(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes of several ranges, with one call; raises as :meth:`read` does, but sets no limit to their length."""
        for place in places:
            self.check_inside(*place)
        return self._windows.read_ranges(places)

    def check_inside(self, offset: int, length: int) -> None:
        """Raises :class:`DamagedSlideError` if a range reaches behind the end of the file."""
        if offset + length > self.size:
            raise self.damaged("it is truncated: it refers to bytes behind its end")

    def damaged(self, message: str) -> DamagedSlideError:
        """The error to raise about this file."""
        return DamagedSlideError(self._name, f"{message}; copy it again or leave it out")
