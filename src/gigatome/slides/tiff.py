"""The pages of a TIFF file and where each of their chunks lies.

Read with few range requests, and only those values that are asked for. Nothing in the file is trusted: every number is
held against a limit before memory or time is spent on it, and whatever is wrong raises
:class:`~gigatome.core.errors.DamagedSlideError`. The limits are those that a malformed file was seen to need (other
readers ran for minutes on a tile count of 2**30).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np

from gigatome.blob.store import Blob
from gigatome.slides.directories import INTEGERS, MAX_TAGS, RATIONAL, Directories, Tag
from gigatome.slides.index import Coding

MAX_PAGES = 100
MIN_CHUNK_SIDE, MAX_CHUNK_SIDE = 16, 4096
# As many as a slide of MAX_SIDE in chunks of 256 pixels has.
MAX_CHUNKS = 1 << 24
MAX_CHUNK_BYTES = 64 << 20
MAX_SIDE = 1 << 20

SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
DESCRIPTION, MAKE, STRIP_OFFSETS, SAMPLES, ROWS_PER_STRIP, STRIP_COUNTS = 270, 271, 273, 277, 278, 279
X_RESOLUTION, Y_RESOLUTION, PLANAR, RESOLUTION_UNIT, SOFTWARE, PREDICTOR = 282, 283, 284, 296, 305, 317
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS, SUB_PAGES = 322, 323, 324, 325, 330
SAMPLE_FORMAT, JPEG_TABLES, XMP, IMAGE_DEPTH, ARGOS_METADATA = 339, 347, 700, 32997, 65000


@final
class TiffPage:
    """One page (image file directory). Sizes are read and checked at once, other values when they are asked for.

    Attributes:
        index: number of the page in the file; sub-pages carry their parent's.
        tags: the tags that are present.
        width, height: in pixels.
        chunk_width, chunk_height: 0 if not tiled.
        subfile: TIFF's bits: 1 a smaller copy of another page, 4 a mask.
    """

    def __init__(self, source: Directories, index: int, tags: Mapping[int, Tag]):
        self._source, self.index, self.tags = source, index, tags
        self.width, self.height = self.number(WIDTH), self.number(HEIGHT)
        if not (0 < self.width <= MAX_SIDE and 0 < self.height <= MAX_SIDE):
            raise source.damaged(f"page {index} is {self.width} × {self.height} pixels")
        self.chunk_width = self.chunk_height = 0
        if TILE_WIDTH in tags:
            self.chunk_width, self.chunk_height = self.number(TILE_WIDTH), self.number(TILE_HEIGHT)
            if not all(MIN_CHUNK_SIDE <= side <= MAX_CHUNK_SIDE for side in (self.chunk_width, self.chunk_height)):
                raise source.damaged(f"page {index} has chunks of {self.chunk_width} × {self.chunk_height} pixels")
        if self.number(IMAGE_DEPTH, 1) != 1:
            raise source.damaged(f"page {index} is a volume, which is not supported")
        self.subfile = self.number(SUBFILE, 0)

    @property
    def tiled(self) -> bool:
        """Whether the page is cut into chunks rather than strips."""
        return self.chunk_width > 0

    @property
    def columns(self) -> int:
        """Chunks in a row."""
        return -(-self.width // self.chunk_width)

    @property
    def rows(self) -> int:
        """Chunks in a column."""
        return -(-self.height // self.chunk_height)

    @cached_property
    def compression(self) -> int:
        """TIFF's code."""
        return self.number(COMPRESSION, 1)

    @cached_property
    def photometric(self) -> int:
        """TIFF's code of the colour space."""
        return self.number(PHOTOMETRIC, 2)

    @cached_property
    def planar(self) -> int:
        """1 if the components of a pixel lie together."""
        return self.number(PLANAR, 1)

    @cached_property
    def predictor(self) -> int:
        """1 for none, 2 for horizontal differencing."""
        return self.number(PREDICTOR, 1)

    @cached_property
    def samples(self) -> int:
        """Components of a pixel."""
        return self.number(SAMPLES, 1)

    @cached_property
    def bits(self) -> tuple[int, ...]:
        """Bits of each component."""
        return self.numbers(BITS, 1)

    @cached_property
    def sample_format(self) -> tuple[int, ...]:
        """1 for unsigned whole numbers, for each component."""
        return self.numbers(SAMPLE_FORMAT, 1)

    @cached_property
    def description(self) -> str:
        """Text of the description, "" if absent."""
        return self.text(DESCRIPTION)

    @cached_property
    def software(self) -> str:
        """What wrote the file, "" if absent."""
        return self.text(SOFTWARE)

    @cached_property
    def resolution(self) -> tuple[float, float] | None:
        """Pixels per unit in x and y, None if absent."""
        x, y = self._rational(X_RESOLUTION), self._rational(Y_RESOLUTION)
        return (x, y) if x and y else None

    @cached_property
    def resolution_unit(self) -> int:
        """1 none, 2 inch, 3 centimetre."""
        return self.number(RESOLUTION_UNIT, 2)

    @cached_property
    def coding(self) -> Coding:
        """How its chunks are compressed; the tables are a JPEG stream of their own."""
        tables = self.bytes(JPEG_TABLES)
        return Coding(self.compression, self.photometric, self.samples, self.predictor, tables)

    def number(self, tag: int, default: int | None = None) -> int:
        """The first value of a tag; ``default`` if it is absent, an error if that is None."""
        return self.numbers(tag, default)[0]

    def numbers(self, tag: int, default: int | None = None) -> tuple[int, ...]:
        """Values of a tag of whole numbers, at most :data:`MAX_TAGS`; as :meth:`number` if it is absent."""
        if tag not in self.tags and default is not None:
            return (default,)
        entry = self.need(tag)
        _, kind, count, _ = entry
        if kind not in INTEGERS or not 0 < count <= MAX_TAGS:
            raise self._source.damaged(f"tag {tag} of page {self.index} is not a whole number")
        return self._source.integers(entry)

    def need(self, tag: int) -> Tag:
        """A tag as it stands in the directory; raises :class:`DamagedSlideError` if it is absent."""
        if tag not in self.tags:
            raise self._source.damaged(f"page {self.index} has no tag {tag}")
        return self.tags[tag]

    def text(self, tag: int) -> str:
        """Text of a tag up to its first NUL; "" if it is absent."""
        return self.bytes(tag).partition(b"\0")[0].decode("utf-8", errors="replace")

    def bytes(self, tag: int) -> bytes:
        """Values of a tag as they lie in the file; b"" if it is absent."""
        return self._source.value(self.tags[tag]) if tag in self.tags else b""

    def _rational(self, tag: int) -> float:
        entry = self.tags.get(tag)
        if entry is None or entry[1:3] != (RATIONAL, 1):
            return 0.0
        numerator, denominator = self._source.unpack("II", self._source.value(entry))
        return numerator / denominator if denominator else 0.0


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
        source: the file's directories and the values of their tags.
        pages: the chain of pages, in file order.

    Raises:
        NotASlideError: the file is no TIFF.
        DamagedSlideError: it is one, and truncated or contradictory.
    """

    def __init__(self, blob: Blob, name: str):
        # Pages hold the source, not this object: a circle would keep what was read of the file until it is found.
        self.source = Directories(blob, name)
        self.pages = self._chain(self.source.first)

    def sub_pages(self, page: TiffPage) -> tuple[TiffPage, ...]:
        """The pages that hang on a page rather than in the chain; chains of their own are not followed."""
        if SUB_PAGES not in page.tags:
            return ()
        offsets = page.numbers(SUB_PAGES)
        if len(offsets) > MAX_PAGES:
            raise self.source.damaged(f"page {page.index} has more than {MAX_PAGES} sub-pages")
        self.source.fetch(offsets)
        return tuple(TiffPage(self.source, page.index, self.source.directory(offset)[0]) for offset in offsets)

    def chunks(self, pages: Sequence[TiffPage]) -> list[ChunkIndex]:
        """Locates the chunks of tiled pages, with one call for all of them.

        Raises:
            DamagedSlideError: their number does not fit the page, or one lies outside the file.
        """
        entries = [self._chunk_entries(page) for page in pages]
        values = iter(self.source.values([entry for pair in entries for entry in pair]))
        found = []
        for page in pages:
            offsets, counts = (value.reshape(page.rows, page.columns) for value in (next(values), next(values)))
            self.check_chunks(page, offsets, counts)
            found.append(ChunkIndex(offsets.astype(self.offset_type), counts.astype(np.uint32)))
        return found

    @property
    def offset_type(self) -> type[np.unsignedinteger]:
        """The smallest type that holds an offset: thousands of slides may be open at once."""
        return np.uint32 if self.source.size < 1 << 32 else np.uint64

    def _chunk_entries(self, page: TiffPage) -> list[Tag]:
        number = page.rows * page.columns
        if number > MAX_CHUNKS:
            raise self.source.damaged(f"page {page.index} has {number} chunks, more than {MAX_CHUNKS}")
        entries = [page.need(tag) for tag in (TILE_OFFSETS, TILE_COUNTS)]
        for _, kind, count, _ in entries:
            if count != number or kind not in INTEGERS:
                raise self.source.damaged(f"page {page.index} lists {count} chunks where its size implies {number}")
        return entries

    def check_chunks(self, page: TiffPage, offsets: np.ndarray, counts: np.ndarray) -> None:
        """Raises :class:`DamagedSlideError` if a chunk of a page is too large or lies behind the end of the file.

        Arrays of unsigned numbers.
        """
        size = np.uint64(self.source.size)
        if counts.max() > MAX_CHUNK_BYTES:
            raise self.source.damaged(f"page {page.index} has a chunk of {int(counts.max())} bytes")
        if offsets.max() <= size and np.add(offsets, counts, dtype=np.uint64).max() <= size:
            return
        # Compared without adding, which could overflow; where a chunk is left out its offset may be anything.
        outside = (counts > 0) & ((offsets > size) | (counts > size - np.minimum(offsets, size)))
        if outside.any():
            number = int(outside.sum())
            raise self.source.damaged(f"{number} chunks of page {page.index} lie behind the end of the file")

    def _chain(self, first: int) -> tuple[TiffPage, ...]:
        pages: list[TiffPage] = []
        offset, seen = first, set()
        while offset:
            if offset in seen:
                raise self.source.damaged("its chain of pages is a circle")
            if len(pages) == MAX_PAGES:
                raise self.source.damaged(f"it has more than {MAX_PAGES} pages")
            seen.add(offset)
            tags, offset = self.source.directory(offset)
            pages.append(TiffPage(self.source, len(pages), tags))
            self.source.expect(_wanted(pages[-1]))
        if not pages:
            raise self.source.damaged("it has no page")
        return tuple(pages)


def _wanted(page: TiffPage) -> list[Tag]:
    """The tags that a level needs besides its sizes; none if the page is no level."""
    tags = [page.tags[tag] for tag in (TILE_OFFSETS, TILE_COUNTS, JPEG_TABLES) if tag in page.tags]
    if not page.tiled or any(tag[2] != page.rows * page.columns for tag in tags if tag[0] != JPEG_TABLES):
        return []
    return tags
