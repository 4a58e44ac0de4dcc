"""Open slides, a bounded number of them, shared by threads."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

from gigatome.slides.cohort import CohortSlide
from gigatome.slides.slide import Slide


@dataclass(eq=False)
class _Handle:
    users: int = 0
    slide: Slide | None = None
    opening: threading.Lock = field(default_factory=threading.Lock)


@final
class OpenSlides:
    """Opens slides as they are needed and closes those least recently used.

    A slide in use is never closed, so more than ``limit`` may be open for a moment.

    Args:
        slides: the slides, by index.
        limit: how many to keep open.
        opened: called after each opening.
    """

    def __init__(self, slides: Sequence[CohortSlide], limit: int, opened: Callable[[], None] = lambda: None):
        self._slides, self._limit, self._opened = slides, limit, opened
        self._handles: OrderedDict[int, _Handle] = OrderedDict()
        self._lock = threading.Lock()

    def acquire(self, index: int) -> Slide:
        """A slide, open until :meth:`release`; raises what opening it raises, and then need not be released."""
        with self._lock:
            handle = self._handles.setdefault(index, _Handle())
            self._handles.move_to_end(index)
            handle.users += 1
        try:
            with handle.opening:
                if handle.slide is None:
                    handle.slide = self._slides[index].open()
                    self._opened()
            return handle.slide
        except BaseException:
            self.release(index)
            raise

    def release(self, index: int) -> None:
        """Gives back what one :meth:`acquire` gave."""
        with self._lock:
            self._handles[index].users -= 1
            idle = self._evict(self._limit)
        for slide in idle:
            slide.close()

    @contextmanager
    def use(self, index: int) -> Iterator[Slide]:
        """Context with a slide open; raises what opening it raises."""
        slide = self.acquire(index)
        try:
            yield slide
        finally:
            self.release(index)

    def is_open(self, index: int) -> bool:
        """Whether a slide is open now."""
        handle = self._handles.get(index)
        return handle is not None and handle.slide is not None

    def close(self) -> None:
        """Closes all slides; nobody may use one any more. Later use opens them again."""
        with self._lock:
            for handle in self._handles.values():
                handle.users = 0
            idle = self._evict(0)
        for slide in idle:
            slide.close()

    def __len__(self) -> int:
        return sum(handle.slide is not None for handle in list(self._handles.values()))

    def _evict(self, limit: int) -> list[Slide]:
        """Forgets the oldest handles beyond ``limit`` that nobody uses; their slides are to be closed."""
        surplus = len(self._handles) - limit
        if surplus <= 0:
            return []
        old = [index for index, handle in self._handles.items() if not handle.users][:surplus]
        handles = [self._handles.pop(index) for index in old]
        return [handle.slide for handle in handles if handle.slide is not None]
