"""The positions of many slides: found when first needed, kept in bounded memory and, if wanted, in a folder.

A file holds what draws from one slide need, its outlines included: reading it takes some ten microseconds, finding the
positions anew some ten milliseconds. Files that are damaged, or were made with other outlines, are made anew.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from gigatome import config
from gigatome.blob.store import write_atomic
from gigatome.core.errors import MissingMppError, StoreError
from gigatome.core.logs import log
from gigatome.tiles.positions import Positions, find_positions, least_tissue
from gigatome.tissue.area import AreaIndex
from gigatome.tissue.mask import TissueMask, TissueSize

_MAGIC = int.from_bytes(b"gtpos001", "little")
_HEAD = 4  # words before the counts: magic, key, sum of the words that follow, edges
_OBJECTS = 6000  # bytes that the objects of one slide take beside their arrays


@final
@dataclass(frozen=True)
class SlideTissue:
    """What the sampler needs to know of a slide.

    Attributes:
        name: of the slide.
        mpp: µm per level-0 pixel.
        width: level-0 pixels.
        height: level-0 pixels.
        area: of its tissue, level-0 pixels.
        load: gives the outlines, when they are needed; may raise :class:`StoreError`.
        version: differs if the outlines do; empty if nothing may be kept of them.
    """

    name: str
    mpp: float
    width: int
    height: int
    area: float
    load: Callable[[], TissueMask]
    version: str = ""

    @classmethod
    def of(cls, name: str, mpp: float, mask: TissueMask) -> "SlideTissue":
        """Tissue that is in memory."""
        return cls(name, mpp, mask.width, mask.height, mask.area, partial(_same, mask))

    @classmethod
    def stored(
        cls,
        name: str,
        path: str | PathLike[str],
        *,
        mpp: float | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "SlideTissue":
        """Tissue that is in a file; of files that gigatome wrote only the beginning is read.

        Args:
            name: of the slide.
            path: GeoJSON, as :meth:`TissueMask.read` takes it.
            mpp: of the slide; None if the file states it.
            width: likewise.
            height: likewise.

        Raises:
            StoreError: the file cannot be read, or states no size and none is given.
            MissingMppError: it states no resolution and none is given.
        """
        load = partial(TissueMask.read, path, width=width, height=height)
        try:
            status = Path(path).stat()
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
        found = TissueSize.peek(path) or TissueSize.of(load())
        mpp = mpp or found.mpp
        if mpp is None:
            raise MissingMppError(name, f"{path} states no resolution; take it from the slide, or add a column mpp")
        version = f"{status.st_size} {status.st_mtime_ns}"
        return cls(name, mpp, width or found.width, height or found.height, found.area, load, version)


@final
@dataclass(frozen=True, eq=False)
class SlidePositions:
    """Where tiles may lie on one slide.

    Attributes:
        tissue: the outlines.
        scales: the positions at each resolution; None where there are none.
    """

    tissue: AreaIndex
    scales: tuple[Positions | None, ...]

    @cached_property
    def possible(self) -> tuple[bool, ...]:
        """Whether there are any, for each resolution."""
        return tuple(scale is not None for scale in self.scales)

    @property
    def nbytes(self) -> int:
        """Memory that it takes, bytes."""
        cells = sum(scale.cells.nbytes + scale.ends.nbytes for scale in self.scales if scale)
        return self.tissue.nbytes + cells + _OBJECTS


@final
class PositionStore:
    """Positions of slides; may be used by many threads.

    Args:
        slides: the slides.
        sides: float64 [S, K], side of the tiles on each slide at each resolution, level-0 pixels; 0 where they are not
            wanted.
        min_tissue: share of a tile that must be tissue, 0 to 1.
        folder: where to keep what was found, one file a slide; None to keep nothing.
        memory: bytes that the positions may take; those that were not used longest are dropped.

    Attributes:
        nbytes: that the positions take.
    """

    def __init__(
        self,
        slides: Sequence[SlideTissue],
        sides: NDArray[np.float64],
        min_tissue: float,
        folder: Path | None = None,
        memory: int = 256 << 20,
    ):
        self._slides, self._sides, self._min_tissue = slides, sides, min_tissue
        self._folder, self._memory = folder, memory
        self._kept: OrderedDict[int, SlidePositions] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def get(self, slide: int) -> SlidePositions:
        """Positions of a slide by its index; raises what loading its outlines raises."""
        with self._lock:
            found = self._kept.get(slide)
            if found is not None:
                self._kept.move_to_end(slide)
                return found
        found = self._read_or_find(slide)
        with self._lock:
            if slide not in self._kept:
                self._kept[slide] = found
                self.nbytes += found.nbytes
            while self.nbytes > self._memory and len(self._kept) > 1:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return found

    def _read_or_find(self, slide: int) -> SlidePositions:
        path = self._path(slide)
        if path is None:
            return self._find(slide)
        sides = self._sides[slide].tolist()
        key = self._key(slide, sides)
        found = _unpack(path, key, sides, self._min_tissue)
        if found is None:
            found = self._find(slide)
            try:
                write_atomic(path, _pack(found, key))
            except StoreError as error:
                self._folder = None
                log.warning("%s; positions are found anew when they are needed again", error)
        return found

    def _find(self, slide: int) -> SlidePositions:
        known = self._slides[slide]
        tissue = AreaIndex.of(known.load().polygons)
        find = partial(find_positions, tissue, known.width, known.height, min_tissue=self._min_tissue)
        return SlidePositions(tissue, tuple(find(side=side) if side else None for side in self._sides[slide].tolist()))

    def _path(self, slide: int) -> Path | None:
        known = self._slides[slide]
        return self._folder / f"{known.name}.bin" if self._folder and known.version else None

    def _key(self, slide: int, sides: list[float]) -> int:
        known = self._slides[slide]
        return int(config.digest([known.version, known.width, known.height, sides, self._min_tissue]), 16) >> 1


def _same(mask: TissueMask) -> TissueMask:
    return mask


def _pack(found: SlidePositions, key: int) -> bytes:
    """The file of a slide: 64-bit words, little-endian."""
    counts = [(len(scale.cells), scale.sure) if scale else (0, 0) for scale in found.scales]
    arrays = [array for scale in found.scales if scale for array in (scale.ends, scale.cells)]
    words = [np.array([found.tissue.pieces.shape[1], *sum(counts, ())]), found.tissue.pieces, *arrays]
    body = b"".join(_little(array).tobytes() for array in words)
    return np.array([_MAGIC, key, np.frombuffer(body, "<i8").sum()], "<i8").tobytes() + body


def _little(array: NDArray) -> NDArray:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _unpack(path: Path, key: int, sides: Sequence[float], min_tissue: float) -> SlidePositions | None:
    """What a file holds; None if there is none, or not for these outlines and sides."""
    try:
        words = np.fromfile(path, "<i8")
    except OSError:
        return None
    start = _HEAD + 2 * len(sides)
    if len(words) < start or words[:2].tolist() != [_MAGIC, key] or words[3:].sum() != words[2]:
        return None
    edges, *counts = words[3:start].tolist()
    tissue = AreaIndex(words[start : start + 4 * edges].view("<f8").reshape(4, edges))
    start += 4 * edges
    scales: list[Positions | None] = []
    for side, count, sure in zip(sides, counts[::2], counts[1::2], strict=True):
        ends, cells = words[start : start + count], words[start + count : start + 3 * count]
        start += 3 * count
        least = least_tissue(side, min_tissue)
        scales.append(Positions(tissue, side, least, cells.view("<i4").reshape(-1, 4), ends, sure) if count else None)
    return SlidePositions(tissue, tuple(scales))
