"""Random tiles of many slides: a slide by weight, a resolution by weight, a position uniform over its tissue.

Source: arXiv:2404.15217, IV-B and IV-C: 256 px tiles of at least 40 % foreground at 5×, 10×, 20× and 40×. The paper
does not say how positions are distributed; here all that have the minimum overlap are equally likely.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from gigatome.core.errors import CohortError, NoTissueError
from gigatome.core.geometry import level0_length
from gigatome.core.logs import Failure, log
from gigatome.core.seeding import generator
from gigatome.tiles.positions import Positions, find_positions, has_positions
from gigatome.tissue.mask import TissueMask

MAX_ENLARGEMENT = 1.25
"""How much a tile may be enlarged: scanners of one magnification differ a little, but 20× must not pose as 40×."""


@dataclass(frozen=True)
class SlideTissue:
    """What the sampler needs to know of a slide: its name, µm per level-0 pixel, and tissue."""

    name: str
    mpp: float
    mask: TissueMask


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
    """Draws tiles; each draw is a function of the seed and its index alone.

    Tiles lie wholly on their slide. A resolution is possible on a slide if it is no finer than the slide's own by more
    than :data:`MAX_ENLARGEMENT` and some position has enough tissue; the weights of the others are shared out among
    those possible. A slide on which none is possible is left out and listed in ``failures``.

    Args:
        slides: the slides.
        tile_size: side of a tile in pixels.
        mpps: resolutions, µm per pixel.
        mpp_weights: how likely each resolution is, in proportion; equally by default.
        slide_weights: how likely each slide is, in proportion; ``"tissue"`` for its area of tissue in µm²; equally by
            default.
        min_tissue: share of a tile that must be tissue, 0 to 1.
        seed: of all draws, ≥ 0.

    Attributes:
        slides: the slides as given.
        failures: those that no tile can be drawn from.

    Raises:
        NoTissueError: no tile can be drawn from any slide; the message names them.
        CohortError: there are no slides.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        slides: Sequence[SlideTissue],
        tile_size: int,
        mpps: Sequence[float],
        mpp_weights: Sequence[float] | None = None,
        slide_weights: Sequence[float] | Literal["tissue"] | None = None,
        min_tissue: float = 0.4,
        seed: int = 0,
    ):
        if not slides:
            raise CohortError("there are no slides to draw tiles from")
        if tile_size <= 0 or not mpps or not all(math.isfinite(mpp) and mpp > 0 for mpp in mpps):
            raise ValueError(f"tiles need a positive size and positive mpps, not {tile_size} px at {list(mpps)}")
        if not 0 <= min_tissue <= 1:
            raise ValueError(f"min_tissue must lie between 0 and 1, not {min_tissue}")
        self.slides, self.tile_size, self.mpps = tuple(slides), tile_size, tuple(mpps)
        self.min_tissue, self.seed = min_tissue, seed
        weights = _weights(mpp_weights, len(mpps), "mpp_weights")
        area = [s.mask.area * s.mpp**2 for s in slides] if slide_weights == "tissue" else slide_weights
        by_slide = _weights(area if not isinstance(area, str) else None, len(slides), "slide_weights")
        self._mpp_ends = [_ends(weights * self._possible(slide, weights)) for slide in slides]
        usable = np.array([bool(ends[-1]) for ends in self._mpp_ends])
        self.failures = [self._failure(slide) for slide, good in zip(slides, usable, strict=True) if not good]
        self._slide_ends = _ends(by_slide * usable)
        if not self._slide_ends[-1]:
            raise NoTissueError(", ".join(failure.slide for failure in self.failures) or "the cohort", self._why())
        for failure in self.failures:
            log.warning("%s: %s", failure.slide, failure.message)
        self._positions: dict[tuple[int, int], Positions] = {}

    def request(self, index: int, attempt: int = 0) -> TileRequest:
        """The tile of an index.

        Args:
            index: ≥ 0; a stream's step · batch size + place in the batch.
            attempt: another tile for the same index, where the first cannot be read.
        """
        rng = generator(self.seed, "tile", index, attempt)
        slide = _pick(self._slide_ends, rng)
        scale = _pick(self._mpp_ends[slide], rng)
        x, y = self._at(slide, scale).draw(rng)
        return TileRequest(slide, x, y, self.mpps[scale])

    def _at(self, slide: int, scale: int) -> Positions:
        """Positions of a slide at a resolution, found when they are first needed."""
        found = self._positions.get((slide, scale))
        if found is None:
            found = find_positions(self.slides[slide].mask, self._side(self.slides[slide], scale), self.min_tissue)
            assert found is not None, "has_positions and find_positions disagree"  # noqa: S101
            self._positions[slide, scale] = found
        return found

    def _side(self, slide: SlideTissue, scale: int) -> float:
        return level0_length(self.tile_size, self.mpps[scale], slide.mpp)

    def _possible(self, slide: SlideTissue, weights: np.ndarray) -> np.ndarray:
        return np.array(
            [
                bool(weight)
                and slide.mpp <= MAX_ENLARGEMENT * mpp
                and has_positions(slide.mask, self._side(slide, scale), self.min_tissue)
                for scale, (mpp, weight) in enumerate(zip(self.mpps, weights, strict=True))
            ]
        )

    def _failure(self, slide: SlideTissue) -> Failure:
        return Failure.of(slide.name, "tiles", NoTissueError(slide.name, self._why()))

    def _why(self) -> str:
        scales = ", ".join(f"{mpp:g}" for mpp in self.mpps)
        return (
            f"no tile of {self.tile_size} px holds {self.min_tissue:.0%} of tissue at {scales} mpp; "
            "use smaller tiles, a resolution that the slide has, or a lower min_tissue"
        )


def _weights(given: Sequence[float] | None, count: int, name: str) -> np.ndarray:
    weights = np.ones(count) if given is None else np.asarray(given, np.float64)
    if weights.shape != (count,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(f"{name} must be {count} numbers that are not negative and not all zero, not {given}")
    return weights


def _ends(weights: np.ndarray) -> np.ndarray:
    """Cumulative probabilities, for :func:`_pick`; zeros if all weights are zero."""
    ends = np.cumsum(weights)
    return ends / ends[-1] if ends[-1] else ends


def _pick(ends: np.ndarray, rng: np.random.Generator) -> int:
    """Index drawn by its probability; never one of probability zero."""
    return int(ends.searchsorted(rng.random(), side="right"))
