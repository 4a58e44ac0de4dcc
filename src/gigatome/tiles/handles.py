"""Open slides, a bounded number of them, shared by threads."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
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
    """

    def __init__(self, slides: Sequence[CohortSlide], limit: int):
        self._slides, self._limit = slides, limit
        self._handles: OrderedDict[int, _Handle] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def use(self, index: int) -> Iterator[Slide]:
        """Context with a slide open; raises what opening it raises."""
        with self._lock:
            handle = self._handles.setdefault(index, _Handle())
            self._handles.move_to_end(index)
            handle.users += 1
        try:
            with handle.opening:
                if handle.slide is None:
                    handle.slide = self._slides[index].open()
            yield handle.slide
        finally:
            with self._lock:
                handle.users -= 1
                idle = self._evict(self._limit)
            for slide in idle:
                slide.close()

    def close(self) -> None:
        """Closes all slides that nobody uses; later use opens them again."""
        with self._lock:
            idle = self._evict(0)
        for slide in idle:
            slide.close()

    def __len__(self) -> int:
        return sum(handle.slide is not None for handle in list(self._handles.values()))

    def _evict(self, limit: int) -> list[Slide]:
        """Forgets the oldest handles beyond ``limit`` that nobody uses; their slides are to be closed."""
        surplus = len(self._handles) - limit
        old = [index for index, handle in self._handles.items() if not handle.users][: max(0, surplus)]
        handles = [self._handles.pop(index) for index in old]
        return [handle.slide for handle in handles if handle.slide is not None]
