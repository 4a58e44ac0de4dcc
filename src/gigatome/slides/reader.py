"""What every slide reader gives, and the reader for TIFF files that gigatome decodes itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, final

import numpy as np

from gigatome.blob.store import Blob
from gigatome.core.errors import DamagedSlideError
from gigatome.core.geometry import Box
from gigatome.slides.decode import ChunkError, chunk_format
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
    """

    width: int
    height: int
    scale_x: float
    scale_y: float
    chunk_width: int
    chunk_height: int
    compression: str

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

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3] of a region inside a level, in pixels of that level.

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

    A chunk that the file leaves out (byte count 0, which some Aperio files hold) is made from the next finer level,
    as OpenSlide does, and is white at level 0 and in formats that mean white by it.

    Raises:
        DamagedSlideError: the JPEG tables of a level are broken.
    """

    reader = "tiff"

    def __init__(self, blob: Blob, name: str, index: SlideIndex):
        self._blob, self._name, self._index = blob, name, index
        try:
            self._formats = [
                chunk_format(level.coding, level.chunk_width, level.chunk_height) for level in index.levels
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
            )
            for level, chunk in zip(index.levels, self._formats, strict=True)
        )
        self.vendor, self.properties, self.mpp, self.bounds = index.vendor, index.properties, index.mpp, index.bounds

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """See :meth:`LevelReader.read_level`."""
        side_x, side_y = self.levels[level].chunk_width, self.levels[level].chunk_height
        wanted = [
            (row, column)
            for row in range(y // side_y, (y + height - 1) // side_y + 1)
            for column in range(x // side_x, (x + width - 1) // side_x + 1)
        ]
        index = self._index.levels[level]
        present = [place for place in wanted if index.counts[place]]
        data = self._blob.read_ranges([(int(index.offsets[place]), int(index.counts[place])) for place in present])
        data_of = dict(zip(present, data, strict=True))
        output = np.empty((height, width, 3), np.uint8)
        for row, column in wanted:
            raw = data_of.pop((row, column), None)
            pixels = self._missing(level, row, column) if raw is None else self._decode(level, row, column, raw)
            place(output, pixels, column * side_x - x, row * side_y - y)
        return output

    def _decode(self, level: int, row: int, column: int, data: bytes) -> np.ndarray:
        try:
            return self._formats[level].decode(data)
        except ChunkError as error:
            where = f"chunk {column}, {row} of level {level}"
            raise DamagedSlideError(self._name, f"{where}: {error}; copy the file again or leave it out") from error

    def _missing(self, level: int, row: int, column: int) -> np.ndarray:
        this = self.levels[level]
        x, y = column * this.chunk_width, row * this.chunk_height
        shape = (this.chunk_height, this.chunk_width, 3)
        if level == 0 or self._index.gaps == "white":
            return np.full(shape, WHITE, np.uint8)
        finer = self.levels[level - 1]
        size = (finer.width, finer.height)
        step_x, step_y = this.scale_x / finer.scale_x, this.scale_y / finer.scale_y
        return resample(
            partial(self.read_level, level - 1),
            size,
            size,
            Axis(x * step_x, step_x, this.chunk_width),
            Axis(y * step_y, step_y, this.chunk_height),
        )

    def close(self) -> None:
        """Closes the file."""
        self._blob.close()


def place(output: np.ndarray, pixels: np.ndarray, x: int, y: int) -> None:
    """Copies the part of ``pixels`` that falls on ``output`` when its corner lies at (x, y); either may be negative."""
    height, width = output.shape[:2]
    top, left = max(y, 0), max(x, 0)
    bottom, right = min(y + pixels.shape[0], height), min(x + pixels.shape[1], width)
    if top < bottom and left < right:
        output[top:bottom, left:right] = pixels[top - y : bottom - y, left - x : right - x]
