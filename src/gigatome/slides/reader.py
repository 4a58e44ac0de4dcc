"""What every slide reader gives, and the reader for TIFF files that gigatome decodes itself."""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, Protocol, final

import numpy as np

from gigatome.blob.store import Blob
from gigatome.core.errors import DamagedSlideError, GigatomeError, StoreError
from gigatome.core.geometry import Box
from gigatome.core.native import NATIVE
from gigatome.slides.decode import RGB, ChunkError, chunk_format
from gigatome.slides.index import SlideIndex
from gigatome.slides.resample import WHITE, Axis, resample


@final
@dataclass(frozen=True)
class Level:
    """One level of the pyramid.

    Attributes:
        width, height: in pixels of this level.
        scale_x, scale_y: level-0 pixels in one pixel of this level, along each axis.
        chunk_width, chunk_height: of its compressed chunks, in pixels; 0 if the reader does not tell.
        compression: "jpeg", "jpeg2000", "deflate", "lzw", "none", or another name; "" if the reader does not tell.
        shrinks: by which its sides can be divided while its chunks are decoded: 1, and 2, 4, 8 for JPEG.
    """

    width: int
    height: int
    scale_x: float
    scale_y: float
    chunk_width: int
    chunk_height: int
    compression: str
    shrinks: tuple[int, ...] = (1,)

    @property
    def downsample(self) -> float:
        """Level-0 pixels in one pixel of this level, the mean of both axes."""
        return (self.scale_x + self.scale_y) / 2


class LevelReader(Protocol):
    """Reads the levels of one slide; thread-safe.

    Attributes:
        reader: "tiff", "openslide" or "tifffile".
        vendor: "aperio", "generic-tiff", "ome-tiff" or OpenSlide's name of the format.
        levels: largest first.
        properties: what the file says of itself.
        mpp: µm per level-0 pixel in x and y, or None if the file does not state it.
        bounds: the scanned part of level 0.
    """

    reader: str
    vendor: str
    levels: tuple[Level, ...]
    properties: Mapping[str, str]
    mpp: tuple[float, float] | None
    bounds: Box

    def read_level(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> np.ndarray:
        """uint8 [height, width, 3] of a region inside a level.

        Args:
            level: of the pyramid.
            x: left edge, in pixels of the level divided by ``shrink``; so are the others.
            y: top edge.
            width: of the region.
            height: of the region.
            shrink: one of the level's ``shrinks``.

        Raises:
            DamagedSlideError: a chunk is truncated or damaged.
            StoreError: the bytes cannot be had.
        """
        ...

    def close(self) -> None:
        """Gives back what is held open."""
        ...


@final
class TiffReader:
    """A tiled pyramidal TIFF, chunks read in ranges and decoded here.

    The C extension, where it is there, decodes what a read needs of each JPEG chunk and no more, without the GIL;
    chunks that it declines, and all of them without it, are decoded whole by libraries, to the same pixels. Damage in a
    part of a chunk that is not needed may go unnoticed.

    A chunk that the file leaves out (byte count 0, which some Aperio files hold) is made from the next finer level,
    as OpenSlide does, and is white at level 0 and in formats that mean white by it.

    Args:
        blob: the file.
        name: what errors call the slide.
        index: where its chunks lie.
        native: whether the C extension is used.

    Raises:
        DamagedSlideError: the JPEG tables of a level are broken.
    """

    reader = "tiff"

    def __init__(self, blob: Blob, name: str, index: SlideIndex, *, native: bool = True):
        self.blob, self.index, self._name = blob, index, name
        try:
            self._formats = [
                chunk_format(level.coding, level.chunk_width, level.chunk_height, native=native)
                for level in index.levels
            ]
        except ChunkError as error:
            raise DamagedSlideError(name, f"its JPEG tables are broken ({error}); copy it again") from error
        self.levels = tuple(
            Level(
                level.width,
                level.height,
                level.scale_x,
                level.scale_y,
                level.chunk_width,
                level.chunk_height,
                chunk.compression,
                chunk.shrinks,
            )
            for level, chunk in zip(index.levels, self._formats, strict=True)
        )
        self.vendor, self.properties, self.mpp, self.bounds = index.vendor, index.properties, index.mpp, index.bounds

    def read_level(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> np.ndarray:
        """See :meth:`LevelReader.read_level`."""
        output = np.empty((height, width, 3), np.uint8)
        if error := read_regions([Region(self, output, level, x, y, shrink)])[0]:
            raise error
        return output

    def ranges(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> list[tuple[int, int]]:
        """Offset and length of the chunks that :meth:`read_level` needs of the file, row by row."""
        rows, columns = self._grid(level, x, y, width, height, shrink)
        index = self.index.levels[level]
        offsets, counts = index.offsets[rows, columns].ravel().tolist(), index.counts[rows, columns].ravel().tolist()
        return [place for place in zip(offsets, counts, strict=True) if place[1]]

    def native_call(
        self, output: np.ndarray, level: int, x: int, y: int, shrink: int, data: Sequence[bytes] | None
    ) -> tuple[object, ...] | None:
        """Arguments of the extension's ``read_tiles``; None if it cannot read the level, or not by itself."""
        index, chunk = self.index.levels[level], self._formats[level]
        source = self.blob.handle if data is None else data
        if chunk.native is None or index.coding.header or source == -1:
            return None
        kind = (chunk.width, chunk.height, chunk.components, index.coding.photometric == RGB)
        corners = np.array([[x, y]], np.int64)
        return chunk.native, source, index.offsets, index.counts, kind, corners, output[None], shrink.bit_length() - 1

    def read_rest(
        self,
        output: np.ndarray,
        level: int,
        x: int,
        y: int,
        shrink: int,
        data: Sequence[bytes] | None,
        status: bytes | None,
    ) -> None:
        """Places the chunks whose ``status`` of the extension is not 0, all if it is None, each decoded whole."""
        index, chunk = self.index.levels[level], self._formats[level]
        rows, columns = self._grid(level, x, y, output.shape[1], output.shape[0], shrink)
        given = iter(data or ())
        for number, (row, column) in enumerate(itertools.product(_range(rows), _range(columns))):
            offset, count = int(index.offsets[row, column]), int(index.counts[row, column])
            raw = next(given) if count and data is not None else None
            top = row * chunk.height // shrink
            if status is not None and not status[number]:
                continue
            if not count:
                pixels = self._missing(level, row, column, shrink)
            else:
                raw = self.blob.read(offset, count) if raw is None else raw
                pixels = self._decode(level, row, column, raw, shrink, output.shape[0] + y - top)
            place(output, pixels, column * chunk.width // shrink - x, top - y)

    def _grid(self, level: int, x: int, y: int, width: int, height: int, shrink: int) -> tuple[slice, slice]:
        """Rows and columns of the chunks that a region touches."""
        side_x, side_y = self._formats[level].width // shrink, self._formats[level].height // shrink
        return (
            slice(y // side_y, (y + height - 1) // side_y + 1),
            slice(x // side_x, (x + width - 1) // side_x + 1),
        )

    def fail(self, error: Exception) -> NoReturn:
        """Raises what an error of the extension means for this slide."""
        if isinstance(error, OSError):
            raise StoreError(f"{self._name}: cannot be read ({error.strerror})") from error
        if isinstance(error, EOFError):
            raise DamagedSlideError(self._name, "it has become shorter since it was opened; copy it again") from None
        raise error

    def _decode(self, level: int, row: int, column: int, data: bytes, shrink: int, rows: int) -> np.ndarray:
        try:
            return self._formats[level].decode(data, shrink, rows)
        except ChunkError as error:
            where = f"chunk {column}, {row} of level {level}"
            raise DamagedSlideError(self._name, f"{where}: {error}; copy the file again or leave it out") from error

    def _missing(self, level: int, row: int, column: int, shrink: int) -> np.ndarray:
        this = self.levels[level]
        height, width = this.chunk_height // shrink, this.chunk_width // shrink
        if level == 0 or self.index.gaps == "white":
            return np.full((height, width, 3), WHITE, np.uint8)
        finer = self.levels[level - 1]
        size = (finer.width, finer.height)
        step_x, step_y = this.scale_x / finer.scale_x, this.scale_y / finer.scale_y
        return resample(
            partial(self.read_level, level - 1),
            size,
            size,
            Axis(column * this.chunk_width * step_x, step_x * shrink, width),
            Axis(row * this.chunk_height * step_y, step_y * shrink, height),
        )

    def close(self) -> None:
        """Closes the file."""
        self.blob.close()


@final
class Region:
    """A region of a level on its way into memory.

    Args:
        reader: of the slide.
        output: uint8 [height, width, 3], contiguous, where the pixels go; its size is that of the region.
        level: of the pyramid.
        x: left edge, in pixels of the level divided by ``shrink``.
        y: top edge.
        shrink: one of the level's ``shrinks``.
        data: the bytes of :meth:`TiffReader.ranges`, if they have been fetched.

    Attributes:
        waited: seconds in which the file was read.
    """

    def __init__(
        self,
        reader: TiffReader,
        output: np.ndarray,
        level: int,
        x: int,
        y: int,
        shrink: int,
        data: Sequence[bytes] | None = None,
    ):
        self._reader, self._output, self._place, self._data = reader, output, (level, x, y, shrink), data
        self.waited = 0.0

    def native_call(self) -> tuple[object, ...] | None:
        """Arguments for the extension, if it can read this; else the bytes are fetched."""
        call = self._reader.native_call(self._output, *self._place, self._data)
        if call is None and self._data is None:
            level, x, y, shrink = self._place
            height, width = self._output.shape[:2]
            start = time.perf_counter()
            self._data = self._reader.blob.read_ranges(self._reader.ranges(level, x, y, width, height, shrink))
            self.waited = time.perf_counter() - start
            call = self._reader.native_call(self._output, *self._place, self._data)
        return call

    def finish(self, result: tuple[bytes, float] | Exception | None) -> None:
        """Takes what the extension gave, if it was called, and reads by libraries what is missing."""
        if isinstance(result, Exception):
            self._reader.fail(result)
        status = None
        if result is not None:
            status, seconds = result
            self.waited += seconds
        if status is None or any(status):
            self._reader.read_rest(self._output, *self._place, self._data, status)


def read_regions(regions: Sequence[Region]) -> list[Exception | None]:
    """Reads regions of any slides; where the extension reads them, without the GIL from the first to the last.

    Returns:
        What went wrong with each: a :class:`GigatomeError` or an OSError, or None.
    """
    errors: list[Exception | None] = [None] * len(regions)
    calls: dict[int, tuple[object, ...]] = {}
    for k, region in enumerate(regions):
        try:
            call = region.native_call()
            if call is None:
                region.finish(None)
            else:
                calls[k] = call
        except (GigatomeError, OSError) as error:
            errors[k] = error
    if calls:
        for k, result in zip(calls, NATIVE.read_many(list(calls.values())), strict=True):
            try:
                regions[k].finish(result)
            except (GigatomeError, OSError) as error:
                errors[k] = error
    return errors


def _range(part: slice) -> range:
    return range(part.start, part.stop)


def place(output: np.ndarray, pixels: np.ndarray, x: int, y: int) -> None:
    """Copies the part of ``pixels`` that falls on ``output`` when its corner lies at (x, y); either may be negative."""
    height, width = output.shape[:2]
    top, left = max(y, 0), max(x, 0)
    bottom, right = min(y + pixels.shape[0], height), min(x + pixels.shape[1], width)
    if top < bottom and left < right:
        output[top:bottom, left:right] = pixels[top - y : bottom - y, left - x : right - x]
