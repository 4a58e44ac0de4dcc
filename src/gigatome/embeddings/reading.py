"""Tiles of many slides, read by threads ahead of whoever uses them, in a fixed order."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TypeVar, final

import numpy as np
from numpy.typing import NDArray

from gigatome.core.logs import log
from gigatome.slides.cohort import CohortSlide
from gigatome.slides.slide import Slide
from gigatome.tiles.grid import TileGrid

Key = TypeVar("Key")


@final
class SlideTiles:
    """The tiles of one slide's grid; the slide is opened by whichever thread comes first.

    After the first tile that cannot be read the slide counts as failed, and no more of it is read.

    Args:
        slide: the slide.
        grid: its tiles.

    Attributes:
        error: what failed; None as long as nothing did.
    """

    def __init__(self, slide: CohortSlide, grid: TileGrid):
        self.error: Exception | None = None
        self._source, self._grid = slide, grid
        self._slide: Slide | None = None
        self._opening = Lock()

    def read(self, index: int) -> NDArray[np.uint8] | None:
        """Tile ``index`` of the grid, uint8 [H, W, 3]; None if the slide has failed. Thread-safe."""
        if self.error is not None:
            return None
        x, y = (int(value) for value in self._grid.coords[index])
        try:
            return self._open().read_tile(x, y, self._grid.tile_size, self._grid.mpp, exact=False)
        except Exception as error:  # whatever a decoder raises, the other slides go on
            log.warning("%s: tile at (%d, %d) cannot be read: %s", self._source.name, x, y, error)
            self.error = error
            return None

    def close(self) -> None:
        """Closes the slide; it is not to be read after that."""
        if self._slide is not None:
            self._slide.close()
            self._slide = None

    def _open(self) -> Slide:
        with self._opening:
            if self._slide is None:
                self._slide = self._source.open()
            return self._slide


def read_ahead(
    requests: Iterator[tuple[Key, SlideTiles, int]], *, threads: int, ahead: int
) -> Generator[tuple[Key, int, NDArray[np.uint8] | None]]:
    """Reads tiles in the order of ``requests``, up to ``ahead`` of them before they are asked for.

    A tile that is requested several times in a row is read once.

    Args:
        requests: key of the caller, slide, and index of the tile; drawn from as tiles are handed out.
        threads: how many read at a time.
        ahead: how many tiles are held, read or being read; bounds memory.

    Yields:
        Key, index, and the tile, or None where its slide has failed.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tiles")
    queue: deque[tuple[Key, int, Future[NDArray[np.uint8] | None]]] = deque()
    last: tuple[SlideTiles, int, Future[NDArray[np.uint8] | None]] | None = None
    try:
        for key, tiles, index in requests:
            if last is None or last[:2] != (tiles, index):
                last = (tiles, index, pool.submit(tiles.read, index))
            queue.append((key, index, last[2]))
            if len(queue) >= ahead:
                key, index, future = queue.popleft()
                yield key, index, future.result()
        while queue:
            key, index, future = queue.popleft()
            yield key, index, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
