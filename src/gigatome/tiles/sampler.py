"""Random tiles of many slides: a slide by weight, a resolution by weight, a position uniform over its tissue.

Source: arXiv:2404.15217, IV-B and IV-C: 256 px tiles of at least 40 % foreground at 5×, 10×, 20× and 40×. The paper
does not say how positions are distributed; here all that have the minimum overlap are equally likely.
"""

import itertools
import math
import threading
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import CohortError, GigatomeError, NoTissueError
from gigatome.core.geometry import level0_length
from gigatome.core.logs import Failure, Progress, log, silent
from gigatome.core.seeding import generator
from gigatome.tiles.position_store import PositionStore, SlidePositions, SlideTissue
from gigatome.tiles.positions import Positions, draw, least_tissue

MAX_ENLARGEMENT = 1.25
"""How much a tile is enlarged at most: scanners of one magnification differ a little, but 20× must not pose as 40×."""

_COLUMNS = 4  # numbers a place has in the first round: slide, resolution, position, and one to spare
_GROWTH = 6  # later rounds have more positions, up to 4 · 2^6 numbers
_PATIENCE = 16  # rounds in which only slides without a tile were drawn, before all slides are looked at
_KNOWN = 1 << 16  # tiles of a limited stream that are remembered, and not drawn again


@dataclass(frozen=True)
class TileRequest:
    """One tile to read.

    Attributes:
        slide: index into the sampler's ``slides``.
        x: left edge, level-0 pixels.
        y: top edge, level-0 pixels.
        mpp: µm per pixel.
    """

    slide: int
    x: int
    y: int
    mpp: float


@final
class TileSampler:
    """Draws batches of tiles; each tile is a function of the seed, the step and its place in the batch alone.

    Tiles lie wholly on their slide. A resolution is possible on a slide if it is no finer than the slide's own by more
    than ``max_enlargement`` and some position has enough tissue; the weights of the others are shared out among those
    possible. A slide on which none is possible is left out and listed in ``failures``, as is one whose outlines
    cannot be read: at the start if its size or its area of tissue tells, else when it is first drawn. May be used by
    many threads.

    Args:
        slides: the slides.
        tile_size: side of a tile in pixels.
        mpps: resolutions, µm per pixel.
        mpp_weights: how likely each resolution is, in proportion; equally by default.
        slide_weights: how likely each slide is, in proportion, as
            :func:`~gigatome.tiles.slide_weights.slide_weights` makes them; equally by default.
        min_tissue: share of a tile that must be tissue, 0 to 1.
        seed: of all draws, ≥ 0.
        folder: where to keep the positions of slides that were stored; None to keep them in memory only.
        memory: bytes that positions may take in memory.
        limit_tiles: draw from that many distinct tiles only; they are those that one batch of that many would hold. A
            tile of them that cannot be read has the same substitute each time.
        max_enlargement: how much a tile may be enlarged.

    Attributes:
        slides: the slides as given.
        failures: those that no tile can be drawn from, as far as is known yet.

    Raises:
        NoTissueError: no tile can be drawn from any slide; the message names the first ones.
        CohortError: there are no slides.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        slides: Sequence[SlideTissue],
        tile_size: int,
        mpps: Sequence[float],
        mpp_weights: Sequence[float] | None = None,
        slide_weights: Sequence[float] | NDArray[np.float64] | None = None,
        min_tissue: float = 0.4,
        seed: int = 0,
        folder: str | PathLike[str] | None = None,
        memory: int = 256 << 20,
        limit_tiles: int | None = None,
        max_enlargement: float = MAX_ENLARGEMENT,
    ):
        if not slides:
            raise CohortError("there are no slides to draw tiles from")
        if tile_size <= 0 or not mpps or not all(math.isfinite(mpp) and mpp > 0 for mpp in mpps):
            raise ValueError(f"tiles need a positive size and positive mpps, not {tile_size} px at {list(mpps)}")
        if not 0 <= min_tissue <= 1:
            raise ValueError(f"min_tissue must lie between 0 and 1, not {min_tissue}")
        if limit_tiles is not None and limit_tiles < 1:
            raise ValueError(f"limit_tiles must be at least 1, not {limit_tiles}")
        weights = _weights(mpp_weights, len(mpps), "mpp_weights")
        self.limit_tiles, self.max_enlargement = limit_tiles, max_enlargement
        self._known = lru_cache(_KNOWN)(self._of_limited)
        self.slides, self.tile_size, self.min_tissue, self.seed = tuple(slides), tile_size, min_tissue, seed
        self.mpps = tuple(mpp for mpp, weight in zip(mpps, weights.tolist(), strict=True) if weight)
        self._mpp_weights = weights[weights > 0]
        self._mpp_ends: dict[tuple[bool, ...], list[float]] = {}
        possible = possible_scales(slides, tile_size, self.mpps, min_tissue, max_enlargement)
        self._weights = _weights(slide_weights, len(slides), "slide_weights") * possible.any(axis=1)
        self._slide_ends = _ends(self._weights)
        self.failures: list[Failure] = []
        self._lost: set[int] = set()
        self._lock = threading.Lock()
        for index in np.flatnonzero(~possible.any(axis=1)).tolist():
            self._lose(index, self._no_tile([index]))
        if not self._weights.any():
            raise self._nothing()
        if folder is not None:
            scales = "-".join(f"{mpp:g}" for mpp in self.mpps)
            folder = Path(folder) / f"{tile_size}px_{scales}mpp_{min_tissue:g}"
        sides = np.where(possible, _sides(slides, tile_size, self.mpps), 0)
        self._store = PositionStore(self.slides, sides, min_tissue, folder, memory)

    def requests(self, step: int, count: int, first: int = 0, last: int | None = None) -> list[TileRequest]:
        """Some of the ``count`` tiles of a batch: places ``first`` to ``last``, without the latter.

        A place has the same tile whatever part of the batch is asked for, and in a larger batch too.

        Raises:
            NoTissueError: no tile can be drawn from any slide.
        """
        last = count if last is None else last
        if not 0 <= first <= last <= count:
            raise ValueError(f"places {first} to {last} are not in a batch of {count}")
        if self.limit_tiles is not None:
            return [self._known(number, 0) for number in self._choices(step, last, self.limit_tiles)[first:]]
        return self._draw(step, first, last, attempt=0)

    def request(self, step: int, place: int, attempt: int = 0) -> TileRequest:
        """Tile of one place; ``attempt`` ≥ 1 gives another one, where the first cannot be read."""
        if self.limit_tiles is not None:
            return self._known(self._choices(step, place + 1, self.limit_tiles)[place], attempt)
        return self._draw(step, place, place + 1, attempt)[0]

    def find_all(self, *, threads: int = 2, progress: Progress = silent) -> None:
        """Finds the positions on all slides now, so that ``failures`` is complete and no draw waits for them.

        Args:
            threads: slides worked on at a time.
            progress: called after each slide with stage ``"positions"``.
        """
        wanted = np.flatnonzero(self._weights).tolist()
        with ThreadPoolExecutor(threads, thread_name_prefix="positions") as pool:
            for done, _ in enumerate(pool.map(self._at, wanted), start=1):
                progress("positions", done, len(wanted))

    def _choices(self, step: int, count: int, limit: int) -> list[int]:
        """Which of the limited tiles the places of a batch have."""
        return generator(self.seed, "limited", step).integers(limit, size=count).tolist()

    def _of_limited(self, number: int, attempt: int) -> TileRequest:
        """One of the limited tiles: the tile of that place in batch 0."""
        return self._draw(0, number, number + 1, attempt)[0]

    def _draw(self, step: int, first: int, last: int, attempt: int) -> list[TileRequest]:
        """Round after round of numbers, until each place has a slide, a resolution and a good position."""
        drawn: dict[int, TileRequest] = {}
        chosen: dict[int, tuple[int, int, Positions]] = {}
        waiting, ends = list(range(first, last)), self._slide_ends
        for number in itertools.count():
            if not waiting:
                return [drawn[place] for place in range(first, last)]
            numbers = self._numbers((step, attempt, number), first, last)
            if number == _PATIENCE and len(chosen) < last - first:
                ends = self._certain_ends()
            for place in waiting:
                if place not in chosen:
                    slide_number, scale_number = numbers[place - first, :2].tolist()
                    slide = int(ends.searchsorted(slide_number, side="right"))
                    scale = self._scale(slide, scale_number)
                    if scale:
                        chosen[place] = slide, *scale
            ready = [place for place in waiting if place in chosen]
            if not ready:
                continue
            positions = numbers[np.array(ready) - first, 2 : None if number else 3]
            found, x, y = draw([chosen[place][2] for place in ready], positions)
            for place, good, left, top in zip(ready, found.tolist(), x.tolist(), y.tolist(), strict=True):
                if good:
                    slide, scale, _ = chosen[place]
                    drawn[place] = TileRequest(slide, left, top, self.mpps[scale])
            waiting = [place for place in waiting if place not in drawn]
        raise AssertionError("unreachable")

    def _numbers(self, path: tuple[int, int, int], first: int, last: int) -> NDArray[np.float64]:
        """Numbers of a round, uniform in [0, 1), float64 [places, columns]; those of other places are skipped."""
        columns = _COLUMNS << min(max(path[2] - 1, 0), _GROWTH)
        rng = generator(self.seed, "tiles", *path)
        assert isinstance(rng.bit_generator, np.random.Philox)  # noqa: S101 - it can skip, four numbers at a time
        rng.bit_generator.advance(first * columns // 4)
        return rng.random((last - first, columns))

    def _scale(self, slide: int, number: float) -> tuple[int, Positions] | None:
        """A resolution that the slide has, and the positions at it; None if it has none."""
        found = self._at(slide)
        if found is None:
            return None
        possible = found.possible
        ends = self._mpp_ends.get(possible)
        if ends is None:
            ends = self._mpp_ends[possible] = _ends(self._mpp_weights * possible).tolist()
        scale = bisect_right(ends, number)
        positions = found.scales[scale]
        assert positions is not None, "a resolution without positions has no weight"  # noqa: S101
        return scale, positions

    def _at(self, slide: int) -> SlidePositions | None:
        """Positions on a slide; None if it has none, or its outlines cannot be read."""
        if slide in self._lost:
            return None
        try:
            found = self._store.get(slide)
        except (GigatomeError, OSError) as error:
            self._lose(slide, error)
            return None
        if any(found.possible):
            return found
        self._lose(slide, self._no_tile([slide]))
        return None

    def _certain_ends(self) -> NDArray[np.float64]:
        """As ``_slide_ends``, of the slides that certainly have a tile."""
        self.find_all()
        weights = self._weights.copy()
        weights[list(self._lost)] = 0
        if not weights.any():
            raise self._nothing()
        return _ends(weights)

    def _lose(self, slide: int, error: Exception) -> None:
        """Leaves a slide out from now on."""
        failure = Failure.of(self.slides[slide].name, "tiles", error)
        with self._lock:
            if slide in self._lost:
                return
            self._lost.add(slide)
            self.failures.append(failure)
        log.warning("%s: %s", failure.slide, failure.message)

    def _nothing(self) -> NoTissueError:
        return self._no_tile(sorted(self._lost))

    def _no_tile(self, slides: Sequence[int]) -> NoTissueError:
        """What to say of slides that have none."""
        names = [self.slides[index].name for index in slides]
        name = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        scales = ", ".join(f"{mpp:g}" for mpp in self.mpps)
        best = min((self.slides[index].mpp for index in slides), default=0.0)
        if best > self.max_enlargement * max(self.mpps):
            reason = (
                f"{best:g} mpp is the finest there is; tiles at {scales} mpp would be enlarged more than "
                f"{self.max_enlargement:g} times; use a coarser mpp, or allow it with max_enlargement"
            )
        else:
            reason = (
                f"no tile of {self.tile_size} px holds {self.min_tissue:.0%} of tissue at {scales} mpp; "
                "use smaller tiles, a resolution that the slide has, or a lower min_tissue"
            )
        return NoTissueError(name or "the cohort", reason)


def possible_scales(
    slides: Sequence[SlideTissue],
    tile_size: int,
    mpps: Sequence[float],
    min_tissue: float,
    max_enlargement: float = MAX_ENLARGEMENT,
) -> NDArray[np.bool_]:
    """Resolutions that a slide may have tiles at, bool [S, K], by its size and area alone; the outlines may say no."""
    side = _sides(slides, tile_size, mpps)
    mpp, least, area = np.array([(s.mpp, min(s.width, s.height), s.area) for s in slides]).T[:, :, None]
    large_enough = (side <= least + 1e-6) & (area >= least_tissue(side, min_tissue))
    return large_enough & (mpp <= max_enlargement * np.array(mpps))


def _sides(slides: Sequence[SlideTissue], tile_size: int, mpps: Sequence[float]) -> NDArray[np.float64]:
    """Side of the tiles on each slide at each resolution, level-0 pixels, float64 [S, K]."""
    return np.array([[level0_length(tile_size, mpp, slide.mpp) for mpp in mpps] for slide in slides])


def _weights(given: Sequence[float] | NDArray[np.float64] | None, count: int, name: str) -> NDArray[np.float64]:
    weights = np.ones(count) if given is None else np.asarray(given, np.float64)
    if weights.shape != (count,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(f"{name} must be {count} numbers that are not negative and not all zero, not {given}")
    return weights


def _ends(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cumulative probabilities; searched on the right side, they never give one of probability zero."""
    ends = np.cumsum(weights)
    return ends / ends[-1] if ends[-1] else ends
