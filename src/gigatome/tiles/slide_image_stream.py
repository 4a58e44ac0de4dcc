"""Images of whole slides, read while the last ones are being used: batches to train on, and each slide once to predict.

Batch k is a function of slides, order, options, seed and k alone. What an image shows does not depend on which of its
rows are read, so processes that share a slide see parts of one image.
"""

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import final
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import ConfigError, DamagedSlideError, GigatomeError
from gigatome.core.logs import Failure, log
from gigatome.core.seeding import generator
from gigatome.slides.cohort import CohortSlide
from gigatome.tiles.handles import OpenSlides
from gigatome.tiles.slide_images import SlideImage, SlideImageOptions, fill_slide_image, slide_frame

_OPEN = 32  # slides kept open at a time
_FAST_ENOUGH = 0.05  # share of the time that whoever uses the images may wait without reading being the limit


@final
@dataclass(frozen=True)
class Order:
    """Which units a step takes: each at most once an epoch, shuffled anew each time.

    An epoch is as many steps as there are whole batches; the units that are left are left out of it.

    Attributes:
        count: number of units.
        batch_size: units a step, of all parts together.
        seed: of all draws, ≥ 0.
        part: which consecutive part of each batch is given.
        parts: number of parts.

    Raises:
        ConfigError: there are fewer units than a batch, or a batch cannot be cut into the parts.
    """

    count: int
    batch_size: int
    seed: int
    part: int = 0
    parts: int = 1

    def __post_init__(self):
        if self.batch_size < 1 or self.parts < 1 or self.batch_size % self.parts:
            raise ConfigError(f"a batch of {self.batch_size} cannot be shared by {self.parts}; make it a multiple")
        if self.count < self.batch_size:
            raise ConfigError(f"a batch of {self.batch_size} needs as many to train on, and there are {self.count}")
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part ({self.part}) must lie below parts ({self.parts})")

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch."""
        return self.count // self.batch_size

    def __call__(self, step: int) -> NDArray[np.int64]:
        """The units of a step: int64 [batch_size / parts], 0 to ``count`` - 1."""
        epoch, number = divmod(step, self.epoch_steps)
        shuffled = generator(self.seed, "order", epoch).permutation(self.count)
        share = self.batch_size // self.parts
        first = number * self.batch_size + self.part * share
        return shuffled[first : first + share].astype(np.int64)


@final
@dataclass(frozen=True, eq=False)
class SlideImageBatch:
    """One batch of images.

    Attributes:
        step: number of the batch.
        images: uint8 [B, rows, image_size, 3].
        units: int64 [B], whose they are.
    """

    step: int
    images: NDArray[np.uint8]
    units: NDArray[np.int64]


@final
@dataclass(frozen=True)
class SlideImageReport:
    """What a stream did between its first batch and now.

    Attributes:
        seconds: that passed.
        waited: seconds in which whoever uses the images waited for a batch.
        images: handed over.
        threads: that read.
    """

    seconds: float = 0.0
    waited: float = 0.0
    images: int = 0
    threads: int = 1

    def sentence(self) -> str:
        """One sentence that says how fast the stream is and whether it is the limit."""
        rate, share = self.images / max(1e-9, self.seconds), self.waited / max(1e-9, self.seconds)
        if share <= _FAST_ENOUGH:
            return f"{rate:.3g} slides/s: the stream is not the limit: its user waited {share:.1%} of the time."
        return (
            f"{rate:.3g} slides/s: reading is the limit: its user waited {share:.1%} of the time; more threads than "
            f"{self.threads} help if there are cores for them."
        )


class _Readers:
    """Threads that read images: as many at a time as there are threads, and the pieces of each by all of them."""

    def __init__(self, slides: Sequence[CohortSlide], options: SlideImageOptions, threads: int):
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self._options = options
        self._slides = OpenSlides(slides, _OPEN)
        self._images = ThreadPoolExecutor(threads, thread_name_prefix="images")
        self._pieces = ThreadPoolExecutor(threads, thread_name_prefix="pieces")

    def submit(
        self, index: int, pixels: NDArray[np.uint8], rows: range, rng: np.random.Generator | None = None
    ) -> Future[str]:
        """Begins to read an image into ``pixels``; the result says what is damaged."""
        return self._images.submit(self._read, index, pixels, rows, rng)

    def close(self) -> None:
        """Stops; images that are not whole stay so."""
        for pool in (self._images, self._pieces):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._images, self._pieces):
            pool.shutdown(wait=True)
        self._slides.close()

    def _read(self, index: int, pixels: NDArray[np.uint8], rows: range, rng: np.random.Generator | None) -> str:
        with self._slides.use(index) as slide:
            frame = slide_frame(slide, self._options, rng)
            return fill_slide_image(slide, frame, pixels, rows, self._pieces)


@dataclass(frozen=True, eq=False)
class _Pending:
    batch: SlideImageBatch
    slides: Sequence[int]
    reads: Sequence[Future[str]]


@final
class SlideImageStream:
    """Images of whole slides to train on, batch after batch without end.

    Parts of a slide that are damaged are white; it is logged once and listed in ``failures``. Any other error ends the
    stream. Use it as a context, or :meth:`close` it, to give the slides back.

    Args:
        slides: those of each unit, one or more; where there are more, one is drawn at each step.
        order: the units of each step, such as an :class:`Order`.
        options: how a slide becomes an image.
        seed: of which slide, crop and flip, ≥ 0.
        rows: of each image that are read, consecutive; None for all.
        threads: that read; the images do not depend on it.
        ahead: batches read while one is used, 1 or more; nor on this. Each takes the memory of its images.

    Attributes:
        failures: slides of which a part could not be read, as far as is known yet.
    """

    def __init__(
        self,
        slides: Sequence[Sequence[CohortSlide]],
        order: Callable[[int], NDArray[np.int64]],
        options: SlideImageOptions,
        *,
        seed: int,
        rows: range | None = None,
        threads: int = 4,
        ahead: int = 1,
    ):
        if not all(slides):
            raise ValueError("each unit needs a slide")
        if min(threads, ahead) < 1:
            raise ValueError(f"threads ({threads}) and ahead ({ahead}) must be at least 1")
        self._slides = tuple(itertools.chain.from_iterable(slides))
        self._counts = [len(several) for several in slides]
        self._firsts = [0, *itertools.accumulate(self._counts)]
        self._order, self._options, self._seed = order, options, seed
        self._rows = range(options.image_size) if rows is None else rows
        self._threads, self._ahead = threads, ahead
        self.failures: list[Failure] = []
        self._lock = threading.Lock()
        self._begun, self._waited, self._handed = 0.0, 0.0, 0
        self._readers: WeakSet[_Readers] = WeakSet()

    def batches(self, start_step: int = 0) -> Iterator[SlideImageBatch]:
        """Batches from ``start_step`` on, without end.

        Threads read ahead; they end when the iterator is closed, dropped or interrupted.

        Raises:
            GigatomeError: a slide cannot be opened or read; it names the slide.
        """
        readers = _Readers(self._slides, self._options, self._threads)
        self._readers.add(readers)
        self._begun = self._begun or perf_counter()
        try:
            pending = deque(self._submit(readers, start_step + number) for number in range(self._ahead))
            for step in itertools.count(start_step + self._ahead):
                ready = pending.popleft()
                start = perf_counter()
                self._finish(ready)
                self._waited += perf_counter() - start
                self._handed += len(ready.batch.units)
                pending.append(self._submit(readers, step))
                yield ready.batch
                del ready  # its memory, before the next is waited for
        finally:
            readers.close()

    def report(self) -> SlideImageReport:
        """Where the time has gone since the first batch was asked for."""
        seconds = perf_counter() - self._begun if self._begun else 0.0
        return SlideImageReport(seconds, self._waited, self._handed, self._threads)

    def state(self) -> dict[str, list[int]]:
        """Nothing: batches depend on their number alone."""
        return {}

    def restore(self, state: Mapping[str, Sequence[int]]) -> None:
        """Takes up the state of the run before, which is none."""

    def close(self) -> None:
        """Ends what :meth:`batches` has begun and closes the slides; the stream may still be used."""
        for readers in list(self._readers):
            readers.close()

    def __enter__(self) -> "SlideImageStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, readers: _Readers, step: int) -> _Pending:
        units = self._order(step)
        size = self._options.image_size
        images = np.empty((len(units), len(self._rows), size, 3), np.uint8)
        slides, reads = [], []
        for unit, pixels in zip(units.tolist(), images, strict=True):
            rng = generator(self._seed, "slide_image", step, unit)
            drawn = int(rng.integers(self._counts[unit])) if self._counts[unit] > 1 else 0
            slides.append(self._firsts[unit] + drawn)
            reads.append(readers.submit(slides[-1], pixels, self._rows, rng))
        return _Pending(SlideImageBatch(step, images, units), slides, reads)

    def _finish(self, pending: _Pending) -> None:
        """Waits until a batch is whole, and notes what is damaged."""
        for index, read in zip(pending.slides, pending.reads, strict=True):
            if damaged := read.result():
                self._note(self._slides[index].name, damaged)

    def _note(self, name: str, damaged: str) -> None:
        with self._lock:
            if any(failure.slide == name for failure in self.failures):
                return
            self.failures.append(damage(name, damaged))
        _warn(name, damaged)


def damage(slide: str, message: str) -> Failure:
    """What to list of a slide, by name, of which parts are damaged; ``message`` is that of its image."""
    return Failure(slide, "images", DamagedSlideError.__name__, message)


def slide_images(
    slides: Sequence[CohortSlide], options: SlideImageOptions, *, rows: range | None = None, threads: int = 4
) -> Iterator[SlideImage]:
    """The image of each slide, all of it: neither cropped nor mirrored. The next is read while one is used.

    A slide that is damaged is logged; :attr:`SlideImage.damaged` says so too.

    Args:
        slides: whose images.
        options: how a slide becomes an image, but for crop and flip.
        rows: of each image that are read, consecutive; None for all.
        threads: that read.

    Raises:
        GigatomeError: a slide cannot be opened or read; it names the slide.
    """
    with contextlib.closing(images_or_errors(slides, options, rows=rows, threads=threads)) as found:
        for image in found:
            if isinstance(image, GigatomeError):
                raise image
            yield image
            del image  # its memory, before the next is waited for


def images_or_errors(
    slides: Sequence[CohortSlide], options: SlideImageOptions, *, rows: range | None = None, threads: int = 4
) -> Generator[SlideImage | GigatomeError, None, None]:
    """As :func:`slide_images`, but in place of an image that cannot be had comes its error, and then the next image."""
    rows = range(options.image_size) if rows is None else rows
    readers = _Readers(slides, options, threads)
    pending: deque[tuple[str, NDArray[np.uint8], Future[str]]] = deque()
    left = iter(enumerate(slides))

    def begin() -> None:
        for index, slide in itertools.islice(left, 1):
            pixels = np.empty((len(rows), options.image_size, 3), np.uint8)
            pending.append((slide.name, pixels, readers.submit(index, pixels, rows)))

    try:
        begin()
        while pending:
            name, pixels, read = pending.popleft()
            try:
                found = SlideImage(pixels, read.result())
            except GigatomeError as error:
                found = error
            begin()
            if isinstance(found, SlideImage) and found.damaged:
                _warn(name, found.damaged)
            del pixels, read
            yield found
            del found
    finally:
        readers.close()


def _warn(name: str, damaged: str) -> None:
    log.warning("%s: %s; what cannot be read of it is white", name, damaged)
