"""Tiles that are planned first and read later, several at a time, so that their bytes can be fetched in between."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, final

import numpy as np

from gigatome.blob.store import Blob
from gigatome.core.errors import GigatomeError
from gigatome.slides.reader import LevelReader, Region, TiffReader, read_regions
from gigatome.slides.resample import Axis, one_block, resample, window

# Source pixels that wait to be resampled at a time.
_HELD_BYTES = 4 << 20


class Source(NamedTuple):
    """A level, shrunk: its size, the part that is picture, and level-0 pixels in one of its pixels."""

    level: int
    shrink: int
    size: tuple[int, int]
    extent: tuple[float, float]
    scale_x: float
    scale_y: float


@final
@dataclass(frozen=True)
class View:
    """Output pixels: where to read them, and their axes there."""

    source: Source
    x: Axis
    y: Axis


def read_view(reader: LevelReader, view: View, x: int, y: int, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3] of a region of a view's level."""
    return reader.read_level(view.source.level, x, y, width, height, view.source.shrink)


@final
class TilePlan:
    """One tile that is still to be read; made by :meth:`gigatome.slides.slide.Slide.plan_tile`.

    Attributes:
        blob: the file that holds its bytes; None where the slide's reader, or the size of the tile, needs more than
            one step.
        ranges: offset and length of what it needs of ``blob``.
        inside: whether all of the tile lies on the slide; the rest of it is white.
        waited: seconds in which :meth:`read` read the file, as far as that can be told from decoding.
    """

    def __init__(self, reader: LevelReader, view: View):
        self._reader, self._view = reader, view
        size, extent = view.source.size, view.source.extent
        self._window = window(size, extent, view.x, view.y) if one_block(view.x, view.y) else None
        self.waited = 0.0
        self.inside = view.x.within(extent[0]) and view.y.within(extent[1])
        self.blob: Blob | None = reader.blob if isinstance(reader, TiffReader) and self._window is not None else None

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """Offset and length of what the tile needs of ``blob``."""
        view, part, reader = self._view, self._window, self._reader
        if part is None or not isinstance(reader, TiffReader):
            return []
        return reader.ranges(view.source.level, part.x, part.y, part.width, part.height, view.source.shrink)

    def read(self, data: Sequence[bytes] | None = None, output: np.ndarray | None = None) -> np.ndarray:
        """Decodes the tile, without the GIL where the C extension does it.

        Args:
            data: the bytes of ``ranges``; None to read them here.
            output: uint8 [tile_size, tile_size, 3], contiguous, to write into; None for a new one.

        Returns:
            uint8 [tile_size, tile_size, 3]; ``output`` if it was given.

        Raises:
            DamagedSlideError: a chunk is truncated or damaged.
            StoreError: the bytes cannot be had.
        """
        output = np.empty((self._view.y.count, self._view.x.count, 3), np.uint8) if output is None else output
        if error := read_tiles([self], [data], [output])[0]:
            raise error
        return output

    def begin(self, data: Sequence[bytes] | None, output: np.ndarray) -> tuple[Region, np.ndarray] | None:
        """The source pixels to read, and where they go; None if the tile takes more than that, and has been read."""
        view, part, reader = self._view, self._window, self._reader
        if part is None or not isinstance(reader, TiffReader):
            output[:] = resample(partial(read_view, reader, view), view.source.size, view.source.extent, view.x, view.y)
            return None
        pixels = output if part.as_read else np.empty((part.height, part.width, 3), np.uint8)
        return Region(reader, pixels, view.source.level, part.x, part.y, view.source.shrink, data), pixels

    def finish(self, region: Region, pixels: np.ndarray, output: np.ndarray) -> None:
        """Makes the tile of its source pixels, now that they have been read."""
        self.waited = region.waited
        if self._window is not None:
            self._window.render(pixels, output)


def read_tiles(
    plans: Sequence[TilePlan], data: Sequence[Sequence[bytes] | None], outputs: Sequence[np.ndarray]
) -> list[Exception | None]:
    """Decodes several tiles of any slides, with fewer turns of the GIL than one by one.

    Args:
        plans: of the tiles.
        data: the bytes of each plan's ``ranges``; None to read them here.
        outputs: uint8 [tile_size, tile_size, 3] each, contiguous, written.

    Returns:
        What went wrong with each: a :class:`GigatomeError` or an OSError, or None.
    """
    errors: list[Exception | None] = [None] * len(plans)
    begun: dict[int, tuple[Region, np.ndarray]] = {}

    def finish() -> None:
        failed = read_regions([region for region, _ in begun.values()])
        for (k, (region, pixels)), error in zip(begun.items(), failed, strict=True):
            errors[k] = error
            if error is None:
                plans[k].finish(region, pixels, outputs[k])
        begun.clear()

    held = 0
    for k, (plan, parts, output) in enumerate(zip(plans, data, outputs, strict=True)):
        try:
            started = plan.begin(parts, output)
        except (GigatomeError, OSError) as error:
            errors[k] = error
            continue
        if started is not None:
            begun[k] = started
            held += 0 if started[1] is output else started[1].nbytes
        if held > _HELD_BYTES:
            finish()
            held = 0
    finish()
    return errors
