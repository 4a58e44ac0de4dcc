"""The readers that ``gigatome bench read`` compares, each behind the same call.

A peer reads the level, and where the tile is coarser than the level its pixels are averaged with OpenCV, which a user
would do too (0.10 ms for 512² → 256² pixels, Pillow's ``reduce`` 0.25 ms).
"""

import importlib
import importlib.metadata
import mmap
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import cv2
import numpy as np
import simplejpeg

from gigatome.blob.store import open_blob
from gigatome.core.errors import SlideError
from gigatome.core.native import NATIVE
from gigatome.core.version import __version__
from gigatome.slides import decode
from gigatome.slides.reader import Level
from gigatome.slides.slide import Slide, open_slide
from gigatome.slides.tiff import TiffFile
from gigatome.slides.tile_plan import read_tiles
from gigatome.slides.vendors import recognise

TILE = 256
"""Side of the tiles that are read, in pixels."""
GIGATOME, PORTABLE, OPENSLIDE, LIMIT = "gigatome", "gigatome, no extension", "OpenSlide", "decode limit"
OURS = (GIGATOME, PORTABLE)


@final
@dataclass(frozen=True)
class Case:
    """Tiles of one resolution.

    Attributes:
        level: of the slide that they are made from.
        level_mpp: µm per pixel of that level.
        shrink: pixels of the level that make one of the tile, along each side.
    """

    level: int
    level_mpp: float
    shrink: int

    @property
    def mpp(self) -> float:
        """µm per pixel of the tiles."""
        return self.level_mpp * self.shrink

    @property
    def side(self) -> int:
        """Side of a tile in pixels of the level."""
        return TILE * self.shrink


@final
@dataclass(frozen=True, eq=False)
class Reader:
    """One reader with the slide open.

    Attributes:
        name: for display.
        version: of its package.
        read: ``read(case, x, y)`` → uint8 [TILE, TILE, 3]; x and y in pixels of the case's level. None of the limit.
        close: gives the slide back.
        read_many: ``read_many(case, positions)`` reads several tiles in one call, if it can.
    """

    name: str
    version: str
    read: Callable[[Case, int, int], np.ndarray | None]
    close: Callable[[], None]
    read_many: Callable[[Case, Sequence[tuple[int, int]]], None] | None = None


_ReadLevel = Callable[[int, int, int, int], np.ndarray]  # level, x and y in its pixels, side
_Opened = tuple[_ReadLevel, Callable[[], None]]


def open_readers(path: Path, mpp: float | None) -> tuple[list[Reader], dict[str, str]]:
    """Every reader that is installed and opens the slide.

    Returns:
        The readers, gigatome first and the decode limit, where there is one, last; and why others are left out.
    """
    own = open_slide(path, mpp=mpp)
    readers, left_out = [Reader(GIGATOME, __version__, _own(own), own.close, _own_many(own))], {}
    if NATIVE is not None and own.reader == "tiff":
        portable = open_slide(path, mpp=mpp, native=False)
        readers.append(Reader(PORTABLE, __version__, _own(portable), portable.close))
    for name, (distributions, opener) in _PEERS.items():
        try:
            version = _version(distributions)
            read, close = opener(path, own.levels)
        except Exception as error:  # a peer that fails, however it does, is left out by name
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        readers.append(Reader(name, version, _boxed(read), close))
    limit = _limit(path)
    return readers + ([limit] if limit else []), left_out


def box_filter(pixels: np.ndarray, shrink: int) -> np.ndarray:
    """Mean of each ``shrink`` × ``shrink`` pixels of a square picture."""
    if shrink == 1:
        return pixels
    side = len(pixels) // shrink
    return cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)


def open_openslide(path: Path) -> Any:
    """The slide as OpenSlide's; raises ImportError where it is not installed."""
    return importlib.import_module("openslide").OpenSlide(path)


def _own(slide: Slide) -> Callable[[Case, int, int], np.ndarray]:
    def read(case: Case, x: int, y: int) -> np.ndarray:
        return slide.read_tile(*_corner(slide.levels[case.level], x, y), TILE, case.mpp, exact=False)

    return read


def _own_many(slide: Slide) -> Callable[[Case, Sequence[tuple[int, int]]], None]:
    """Reads as the stream does: several tiles in one turn of the GIL, into memory that was used before."""
    idle: list[np.ndarray] = []

    def read_many(case: Case, positions: Sequence[tuple[int, int]]) -> None:
        corners = [_corner(slide.levels[case.level], x, y) for x, y in positions]
        plans = [slide.plan_tile(x, y, TILE, case.mpp, exact=False) for x, y in corners]
        images = idle.pop() if idle and len(idle[-1]) >= len(plans) else np.empty((len(plans), TILE, TILE, 3), np.uint8)
        errors = read_tiles(plans, [None] * len(plans), [*images[: len(plans)]])
        idle.append(images)
        for error in filter(None, errors):
            raise error

    return read_many


def _boxed(read: _ReadLevel) -> Callable[[Case, int, int], np.ndarray]:
    return lambda case, x, y: box_filter(read(case.level, x, y, case.side), case.shrink)


def _corner(level: Level, x: int, y: int) -> tuple[int, int]:
    """Level-0 position of a pixel of a level."""
    return round(x * level.scale_x), round(y * level.scale_y)


def _places(sizes: Iterable[Sequence[int]], levels: Sequence[Level]) -> list[int]:
    """Where the levels are in a peer's own list, by their sizes."""
    known = [tuple(size) for size in sizes]
    for level in levels:
        if (level.width, level.height) not in known:
            raise ValueError(f"it has no level of {level.width} × {level.height} px")
    return [known.index((level.width, level.height)) for level in levels]


def _openslide(path: Path, levels: Sequence[Level]) -> _Opened:
    slide = open_openslide(path)
    places = _places(slide.level_dimensions, levels)

    def read(level: int, x: int, y: int, side: int) -> np.ndarray:
        region = slide.read_region(_corner(levels[level], x, y), places[level], (side, side))
        return np.asarray(region.convert("RGB"))

    return read, slide.close


def _tiffslide(path: Path, levels: Sequence[Level]) -> _Opened:
    slide = importlib.import_module("tiffslide").TiffSlide(path)
    places = _places(slide.level_dimensions, levels)

    def read(level: int, x: int, y: int, side: int) -> np.ndarray:
        return slide.read_region(_corner(levels[level], x, y), places[level], (side, side), as_array=True)

    return read, slide.close


def _cucim(path: Path, levels: Sequence[Level]) -> _Opened:
    slide = importlib.import_module("cucim").CuImage(str(path))
    places = _places(slide.resolutions["level_dimensions"], levels)

    def read(level: int, x: int, y: int, side: int) -> np.ndarray:
        return np.asarray(slide.read_region(_corner(levels[level], x, y), (side, side), places[level]))

    return read, slide.close


def _fastslide(path: Path, levels: Sequence[Level]) -> _Opened:
    slide = importlib.import_module("fastslide").FastSlide.from_file_path(str(path))
    places = _places(slide.level_dimensions, levels)

    def read(level: int, x: int, y: int, side: int) -> np.ndarray:
        return slide.read_region((x, y), places[level], (side, side)).numpy()

    return read, slide.close


def _pyvips(path: Path, levels: Sequence[Level]) -> _Opened:
    vips = importlib.import_module("pyvips")
    count = vips.Image.tiffload(str(path)).get("n-pages")
    pages = [vips.Image.tiffload(str(path), page=page) for page in range(count)]
    regions = [vips.Region.new(pages[place]) for place in _places(((p.width, p.height) for p in pages), levels)]

    def read(level: int, x: int, y: int, side: int) -> np.ndarray:
        return np.frombuffer(regions[level].fetch(x, y, side, side), np.uint8).reshape(side, side, 3)

    def close() -> None:
        regions.clear()
        pages.clear()

    return read, close


_PEERS: dict[str, tuple[tuple[str, ...], Callable[[Path, Sequence[Level]], _Opened]]] = {
    # the distributions that may hold it, and how it opens a slide
    OPENSLIDE: (("openslide-bin", "openslide-python"), _openslide),
    "tiffslide": (("tiffslide",), _tiffslide),
    "cuCIM": (("cucim-cu13", "cucim-cu12", "cucim"), _cucim),
    "fastslide": (("fastslide",), _fastslide),
    "pyvips": (("pyvips-binary", "pyvips"), _pyvips),
}


def _version(distributions: Iterable[str]) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ImportError("not installed")


def _limit(path: Path) -> Reader | None:
    """Decodes every chunk that a tile touches, whole, and does nothing else; None if the chunks are not JPEG."""
    with closing(open_blob(path)) as blob:
        try:
            index = recognise(TiffFile(blob, path.name))
        except SlideError:
            return None
    if index is None or any(level.coding.compression != decode.JPEG for level in index.levels):
        return None
    prefixes = [decode.jpeg_prefix(level.coding.tables, rgb=level.coding.photometric == 2) for level in index.levels]
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(case: Case, x: int, y: int) -> None:
        level, prefix = index.levels[case.level], prefixes[case.level]
        for row in range(y // level.chunk_height, (y + case.side - 1) // level.chunk_height + 1):
            for column in range(x // level.chunk_width, (x + case.side - 1) // level.chunk_width + 1):
                start, count = int(level.offsets[row, column]), int(level.counts[row, column])
                if count:
                    simplejpeg.decode_jpeg(prefix + data[start + 2 : start + count], colorspace="RGB")

    return Reader(LIMIT, importlib.metadata.version("simplejpeg"), read, data.close)
