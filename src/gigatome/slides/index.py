"""What is known of a slide once its headers are read: enough to find and decode any chunk of it, and small."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from gigatome.core.geometry import Box


@final
@dataclass(frozen=True)
class Coding:
    """How the chunks of a level are compressed, as the tags of its TIFF page say.

    Attributes:
        compression: TIFF's code.
        photometric: TIFF's code of the colour space.
        samples: components of a pixel.
        predictor: 1 for none, 2 for horizontal differencing.
        tables: JPEG quantisation and Huffman tables common to all chunks, a JPEG stream of its own, or b"".
        header: b"" if a chunk starts with a header of its own; else the chunk is one restart interval of a JPEG with
            the marker that ends it (RST0 to RST7, or EOI), and ``header + chunk[:-2] + EOI`` is a whole JPEG.
    """

    compression: int
    photometric: int
    samples: int
    predictor: int
    tables: bytes
    header: bytes = b""


@final
@dataclass(frozen=True, eq=False)
class LevelIndex:
    """One level of the pyramid and where its chunks lie.

    Attributes:
        width, height: in pixels of this level.
        scale_x, scale_y: level-0 pixels in one pixel of this level, along each axis.
        chunk_width, chunk_height: of every chunk, in pixels.
        coding: how the chunks are compressed.
        offsets: uint32 or, for a large file, uint64 [rows, columns], in bytes from the start of the file.
        counts: uint32 [rows, columns], bytes; 0 for a chunk that the file leaves out.
    """

    width: int
    height: int
    scale_x: float
    scale_y: float
    chunk_width: int
    chunk_height: int
    coding: Coding
    offsets: np.ndarray
    counts: np.ndarray


@final
@dataclass(frozen=True, eq=False)
class SlideIndex:
    """The pyramid of a slide whose chunks are decoded here.

    Attributes:
        vendor: "aperio", "generic-tiff" and the like.
        levels: largest first.
        mpp: µm per level-0 pixel in x and y, or None if the file does not state it.
        properties: what the file says of itself.
        bounds: the scanned part of level 0.
        gaps: what stands for a chunk that the file leaves out: the next finer level, shrunk, or white.
    """

    vendor: str
    levels: tuple[LevelIndex, ...]
    mpp: tuple[float, float] | None
    properties: Mapping[str, str]
    bounds: Box
    gaps: Literal["finer", "white"] = "finer"


def level_scale(width: int, height: int, level_width: int, level_height: int) -> tuple[float, float]:
    """Level-0 pixels in one pixel of a level along x and y, from the sizes of both.

    Scanners shrink by a whole factor and drop the rest: 4443 × 3567 by 2 becomes 2221 × 1783, and the factor is 2, not
    2.0005, which would be a pixel off at the far edge. Where the level is larger than that it was resized to whole
    pixels, and the ratio of the sizes holds. (Measured on real slides of both kinds.)
    """
    factor = round(width / level_width)
    if all(0 <= side - factor * small < factor for side, small in ((width, level_width), (height, level_height))):
        return float(factor), float(factor)
    return width / level_width, height / level_height
