"""The pages of a TIFF file and where each of their chunks lies.

Reads classic TIFF and BigTIFF of both byte orders, with few range requests. Nothing in the file is trusted: every
number is held against a limit before memory or time is spent on it, and whatever is wrong raises
:class:`~gigatome.core.errors.DamagedSlideError`. Source: TIFF 6.0 specification; the limits are those that a
malformed file was seen to need (other readers ran for minutes on a tile count of 2**30).
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from gigatome.blob.store import Blob
from gigatome.core.errors import DamagedSlideError, NotASlideError
from gigatome.slides.index import Coding

MAX_PAGES = 100
MAX_TAGS = 4096
MIN_CHUNK_SIDE, MAX_CHUNK_SIDE = 16, 4096
MAX_CHUNKS = 1 << 26
MAX_CHUNK_BYTES = 64 << 20
MAX_SIDE = 1 << 20
_MAX_TEXT = 16 << 20
# Small reads are served from blocks of this size, so that a page costs one request at most.
_BLOCK = 1 << 15

SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
DESCRIPTION, MAKE, SAMPLES, X_RESOLUTION, Y_RESOLUTION, PLANAR = 270, 271, 277, 282, 283, 284
RESOLUTION_UNIT, SOFTWARE, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS = 296, 305, 317, 322, 323, 324
TILE_COUNTS, SAMPLE_FORMAT, JPEG_TABLES, XMP, IMAGE_DEPTH = 325, 339, 347, 700, 32997
ARGOS_METADATA, NDPI_FORMAT = 65000, 65420

_BYTES_OF_TYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}


@dataclass(frozen=True)
class _Entry:
    """One tag of a page: its type, the number of values and the file offset of the first."""

    kind: int
    count: int
    offset: int

    @property
    def length(self) -> int:
        return self.count * _BYTES_OF_TYPE[self.kind]


@final
@dataclass(frozen=True)
class TiffPage:
    """One page (image file directory), its values read, its chunks not yet located.

    Attributes:
        index: number of the page in the file.
        tags: the tags that are present.
        width, height: in pixels.
        tiled: whether the page is cut into chunks of ``chunk_width`` × ``chunk_height`` rather than strips.
        chunk_width, chunk_height: 0 if not tiled.
        compression, photometric, planar, predictor, subfile, samples: TIFF codes and counts.
        bits: bits of each sample.
        description, software: text, "" if absent.
        resolution: pixels per unit in x and y, or None; ``resolution_unit``: 1 none, 2 inch, 3 centimetre.
        jpeg_tables: quantisation and Huffman tables common to all chunks, a JPEG stream of its own, or b"".
    """

    index: int
    tags: Mapping[int, "_Entry"]
    width: int
    height: int
    chunk_width: int
    chunk_height: int
    compression: int
    photometric: int
    planar: int
    predictor: int
    subfile: int
    samples: int
    bits: tuple[int, ...]
    sample_format: tuple[int, ...]
    description: str
    software: str
    resolution: tuple[float, float] | None
    resolution_unit: int
    jpeg_tables: bytes

    @property
    def tiled(self) -> bool:
        """Whether the page is cut into chunks rather than strips."""
        return self.chunk_width > 0

    @property
    def coding(self) -> Coding:
        """How its chunks are compressed."""
        return Coding(self.compression, self.photometric, self.samples, self.predictor, self.jpeg_tables)

    @property
    def columns(self) -> int:
        """Chunks in a row."""
        return -(-self.width // self.chunk_width)

    @property
    def rows(self) -> int:
        """Chunks in a column."""
        return -(-self.height // self.chunk_height)


@final
@dataclass(frozen=True)
class ChunkIndex:
    """Where the chunks of a page lie.

    Attributes:
        offsets: uint32 or, for a large file, uint64 [rows, columns], in bytes from the start of the file.
        counts: uint32 [rows, columns], bytes; 0 for a chunk that the file leaves out.
    """

    offsets: np.ndarray
    counts: np.ndarray


@final
class TiffFile:
    """The pages of one TIFF file.

    Args:
        blob: where the bytes are.
        name: what errors call the slide.

    Attributes:
        pages: the chain of pages, in file order.

    Raises:
        NotASlideError: the file is no TIFF.
        DamagedSlideError: it is one, and truncated or contradictory.
    """

    def __init__(self, blob: Blob, name: str):
        self._blob, self._name = blob, name
        self._blocks: dict[int, bytes] = {}
        head = self._read(0, min(16, blob.size))
        if len(head) < 8 or head[:2] not in (b"II", b"MM"):
            raise NotASlideError(name, "is not a TIFF file")
        self._order = "<" if head[:2] == b"II" else ">"
        version = self._integer("H", head[2:4])
        if version not in (42, 43):
            raise NotASlideError(name, "is not a TIFF file")
        self.big = version == 43
        if self.big and (len(head) < 16 or self._integers("HH", head[4:8]) != (8, 0)):
            raise self.damaged("its BigTIFF header is wrong")
        first = self._integer("Q", head[8:16]) if self.big else self._integer("I", head[4:8])
        self.pages = self._chain(first)
        self._blocks.clear()

    def chunks(self, page: TiffPage) -> ChunkIndex:
        """Locates the chunks of a tiled page.

        Raises:
            DamagedSlideError: their number does not fit the page, or one lies outside the file.
        """
        number = page.rows * page.columns
        if number > MAX_CHUNKS:
            raise self.damaged(f"page {page.index} has {number} chunks, more than {MAX_CHUNKS}")
        entries = [self._need(page.tags, tag, page.index) for tag in (TILE_OFFSETS, TILE_COUNTS)]
        for entry in entries:
            if entry.count != number or entry.kind not in _INTEGERS:
                raise self.damaged(f"page {page.index} lists {entry.count} chunks where its size implies {number}")
        ranges = [(entry.offset, entry.length) for entry in entries]
        for offset, length in ranges:
            self._check_inside(offset, length)
        raw = self._blob.read_ranges(ranges)
        shape = (page.rows, page.columns)
        arrays = [
            np.frombuffer(data, self._order + _INTEGERS[entry.kind]).reshape(shape)
            for data, entry in zip(raw, entries, strict=True)
        ]
        self._check_chunks(page, *arrays)
        # Small types: thousands of slides may be open at once.
        offset_type = np.uint32 if self._blob.size < 1 << 32 else np.uint64
        return ChunkIndex(arrays[0].astype(offset_type), arrays[1].astype(np.uint32))

    def _check_chunks(self, page: TiffPage, offsets: np.ndarray, counts: np.ndarray) -> None:
        size = np.uint64(self._blob.size)
        if counts.max() > MAX_CHUNK_BYTES:
            raise self.damaged(f"page {page.index} has a chunk of {int(counts.max())} bytes")
        present = counts > 0
        # Compared without adding, which could overflow.
        outside = present & ((offsets > size) | (counts.astype(np.uint64) > size - np.minimum(offsets, size)))
        if outside.any():
            raise self.damaged(f"{int(outside.sum())} chunks of page {page.index} lie behind the end of the file")

    def _chain(self, first: int) -> tuple[TiffPage, ...]:
        pages: list[TiffPage] = []
        offset, seen = first, set()
        while offset:
            if offset in seen:
                raise self.damaged("its chain of pages is a circle")
            if len(pages) == MAX_PAGES:
                raise self.damaged(f"it has more than {MAX_PAGES} pages")
            seen.add(offset)
            tags, offset = self._directory(offset)
            pages.append(self._page(len(pages), tags))
        if not pages:
            raise self.damaged("it has no page")
        return tuple(pages)

    def _directory(self, offset: int) -> tuple[dict[int, _Entry], int]:
        """Tags of the directory at ``offset`` and the offset of the next one."""
        head, entry, word = (8, 20, "Q") if self.big else (2, 12, "I")
        count = self._integer("Q" if self.big else "H", self._read(offset, head))
        if count > MAX_TAGS:
            raise self.damaged(f"a page has {count} tags")
        size = struct.calcsize(word)
        data = self._read(offset + head, count * entry + size)
        tags = {}
        for start in range(0, count * entry, entry):
            tag, kind = self._integers("HH", data[start : start + 4])
            number = self._integer(word, data[start + 4 : start + 4 + size])
            if kind not in _BYTES_OF_TYPE:
                continue
            inline = offset + head + start + 4 + size
            fits = number * _BYTES_OF_TYPE[kind] <= size
            where = inline if fits else self._integer(word, data[start + 4 + size : start + 4 + 2 * size])
            tags.setdefault(tag, _Entry(kind, number, where))
        return tags, self._integer(word, data[-size:])

    def _page(self, index: int, tags: dict[int, _Entry]) -> TiffPage:
        def number(tag: int, default: int | None = None) -> int:
            return self._numbers(tags, tag, index, default)[0]

        width, height = number(WIDTH), number(HEIGHT)
        chunk = (number(TILE_WIDTH), number(TILE_HEIGHT)) if TILE_WIDTH in tags else (0, 0)
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
            raise self.damaged(f"page {index} is {width} × {height} pixels")
        if TILE_WIDTH in tags and not all(MIN_CHUNK_SIDE <= side <= MAX_CHUNK_SIDE for side in chunk):
            raise self.damaged(f"page {index} has chunks of {chunk[0]} × {chunk[1]} pixels")
        if number(IMAGE_DEPTH, 1) != 1:
            raise self.damaged(f"page {index} is a volume, which is not supported")
        resolution = self._rational(tags, X_RESOLUTION), self._rational(tags, Y_RESOLUTION)
        return TiffPage(
            index=index,
            tags=tags,
            width=width,
            height=height,
            chunk_width=chunk[0],
            chunk_height=chunk[1],
            compression=number(COMPRESSION, 1),
            photometric=number(PHOTOMETRIC, 2),
            planar=number(PLANAR, 1),
            predictor=number(PREDICTOR, 1),
            subfile=number(SUBFILE, 0),
            samples=number(SAMPLES, 1),
            bits=self._numbers(tags, BITS, index, 1),
            sample_format=self._numbers(tags, SAMPLE_FORMAT, index, 1),
            description=self.text(tags, DESCRIPTION),
            software=self.text(tags, SOFTWARE),
            resolution=resolution if resolution[0] and resolution[1] else None,
            resolution_unit=number(RESOLUTION_UNIT, 2),
            jpeg_tables=self._bytes(tags, JPEG_TABLES),
        )

    def text(self, tags: Mapping[int, _Entry], tag: int) -> str:
        """Text of a tag up to its first NUL; "" if it is absent."""
        return self._bytes(tags, tag).partition(b"\0")[0].decode("utf-8", errors="replace")

    def _bytes(self, tags: Mapping[int, _Entry], tag: int) -> bytes:
        entry = tags.get(tag)
        if entry is None:
            return b""
        if entry.length > _MAX_TEXT:
            raise self.damaged(f"tag {tag} holds {entry.length} bytes")
        return self._read(entry.offset, entry.length)

    def _numbers(self, tags: Mapping[int, _Entry], tag: int, page: int, default: int | None) -> tuple[int, ...]:
        if tag not in tags and default is not None:
            return (default,)
        entry = self._need(tags, tag, page)
        if entry.kind not in _INTEGERS or not 0 < entry.count <= MAX_TAGS:
            raise self.damaged(f"tag {tag} of page {page} is not a whole number")
        data = np.frombuffer(self._read(entry.offset, entry.length), self._order + _INTEGERS[entry.kind])
        return tuple(int(value) for value in data)

    def _rational(self, tags: Mapping[int, _Entry], tag: int) -> float:
        entry = tags.get(tag)
        if entry is None or entry.kind != 5 or entry.count != 1:
            return 0.0
        numerator, denominator = self._integers("II", self._read(entry.offset, 8))
        return numerator / denominator if denominator else 0.0

    def _need(self, tags: Mapping[int, _Entry], tag: int, page: int) -> _Entry:
        if tag not in tags:
            raise self.damaged(f"page {page} has no tag {tag}")
        return tags[tag]

    def _integers(self, layout: str, data: bytes) -> tuple[int, ...]:
        return struct.unpack(self._order + layout, data)

    def _integer(self, layout: str, data: bytes) -> int:
        return self._integers(layout, data)[0]

    def _read(self, offset: int, length: int) -> bytes:
        """Bytes through the block cache; long values go past it."""
        self._check_inside(offset, length)
        first, last = offset // _BLOCK, (offset + max(length, 1) - 1) // _BLOCK
        if last - first > 1:
            return self._blob.read_ranges([(offset, length)])[0]
        missing = [block for block in range(first, last + 1) if block not in self._blocks]
        ranges = [(block * _BLOCK, min(_BLOCK, self._blob.size - block * _BLOCK)) for block in missing]
        self._blocks.update(zip(missing, self._blob.read_ranges(ranges) if ranges else [], strict=True))
        data = b"".join(self._blocks[block] for block in range(first, last + 1))
        return data[offset - first * _BLOCK : offset - first * _BLOCK + length]

    def _check_inside(self, offset: int, length: int) -> None:
        if offset + length > self._blob.size:
            raise self.damaged("it is truncated: it refers to bytes behind its end")

    def damaged(self, message: str) -> DamagedSlideError:
        """The error to raise about this file."""
        return DamagedSlideError(self._name, f"{message}; copy it again or leave it out")
