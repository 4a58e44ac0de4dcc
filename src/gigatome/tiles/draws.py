"""Which tile belongs in which place of a batch, and which slides are given up because their tiles are bad."""

import threading
from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import CohortError
from gigatome.core.logs import Failure, log
from gigatome.slides.cohort import Cohort
from gigatome.tiles.pixel_filter import HsvFilter, keeps
from gigatome.tiles.sampler import TileRequest, TileSampler

_FILTER_ATTEMPTS = 50  # tiles of one place that the pixel filter may refuse before it takes one as it is


@final
class Draws:
    """The tiles of a stream; may be used by many threads.

    Args:
        cohort: the slides.
        sampler: draws the tiles.
        indices: of the sampler's slides in the cohort.
        batch_size: places of a batch.
        first: the first place that is wanted here.
        count: how many places are wanted.
        hsv: the pixel filter, if any.
        quarantine: bad tiles after which a slide is given up.

    Attributes:
        failures: slides that cannot be used or gave a bad tile, as far as is known yet.
    """

    def __init__(
        self,
        cohort: Cohort,
        sampler: TileSampler,
        indices: Sequence[int],
        *,
        batch_size: int,
        first: int,
        count: int,
        hsv: HsvFilter | None,
        quarantine: int,
    ):
        self._cohort, self._sampler, self._indices = cohort, sampler, list(indices)
        self._batch_size, self._first, self._count = batch_size, first, count
        self._hsv, self._quarantine = hsv, quarantine
        self.failures: list[Failure] = sampler.failures  # one list: the sampler adds to it while it draws
        self._unopenable: set[int] = set()
        self._bad: dict[int, list[int]] = {}
        self._lock = threading.Lock()

    def draw(self, step: int) -> list[TileRequest]:
        """The tiles of all wanted places of a batch; ``slide`` is an index into the cohort."""
        last = self._first + self._count
        return [self._of_cohort(item) for item in self._sampler.requests(step, self._batch_size, self._first, last)]

    def redraw(self, step: int, place: int, attempt: int) -> TileRequest:
        """The tile of one place at a later attempt.

        Raises:
            CohortError: no slide can be opened.
        """
        if len(self._unopenable) == len(self._indices):
            raise self.exhausted()
        return self._of_cohort(self._sampler.request(step, self._first + place, attempt))

    def given_up(self, slide: int, step: int) -> bool:
        """Whether a slide cannot be opened, or had too many bad tiles in the batches before ``step``."""
        if slide in self._unopenable:
            return True
        bad = self._bad.get(slide)
        return bad is not None and sum(number < step for number in bad) >= self._quarantine

    def failed(self, slide: int, step: int, error: Exception, *, unopenable: bool) -> None:
        """Notes a tile that could not be read; says so the first time."""
        name = self._cohort.slides[slide].name
        with self._lock:
            if unopenable:
                self._unopenable.add(slide)
            else:
                self._bad.setdefault(slide, []).append(step)
                if len(self._bad[slide]) == self._quarantine:
                    log.warning("%s: given up after %d bad tiles", name, self._quarantine)
            if any(failure.slide == name for failure in self.failures):
                return
            self.failures.append(Failure.of(name, "tiles", error))
        log.warning("%s: %s; other tiles take the place of those that cannot be read", name, error)

    def keeps(self, image: NDArray[np.uint8], attempt: int) -> bool:
        """Whether a tile passes the pixel filter, or so many were refused that it is taken as it is."""
        return self._hsv is None or attempt >= _FILTER_ATTEMPTS or keeps(image, self._hsv)

    def exhausted(self) -> Exception:
        """What to raise when no tile can be found for a place."""
        failure = self.failures[-1] if self.failures else None
        reason = f"{failure.slide}: {failure.message}" if failure else "the reason is not known"
        return CohortError(f"{self._cohort.source}: no slide can be read any more; {reason}")

    def state(self) -> dict[str, list[int]]:
        """The steps of the bad tiles so far, by slide."""
        with self._lock:
            return {self._cohort.slides[slide].name: sorted(steps) for slide, steps in self._bad.items()}

    def restore(self, state: Mapping[str, Sequence[int]]) -> None:
        """Takes up a :meth:`state`."""
        with self._lock:
            self._bad = {k: list(state[slide.name]) for k, slide in enumerate(self._cohort) if slide.name in state}

    def begin(self, step: int) -> None:
        """Forgets the bad tiles of batches from ``step`` on, which are read again."""
        with self._lock:
            self._bad = {slide: [n for n in steps if n < step] for slide, steps in self._bad.items()}

    def _of_cohort(self, request: TileRequest) -> TileRequest:
        return TileRequest(self._indices[request.slide], request.x, request.y, request.mpp)
