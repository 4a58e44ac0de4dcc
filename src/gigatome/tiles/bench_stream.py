"""How fast a cohort's tiles are streamed here, and what keeps them from coming faster."""

import time
from collections.abc import Iterator

from gigatome.tiles.stream import TileBatch, TileStream
from gigatome.tiles.stream_report import StreamReport

_WARM_UP = 0.1  # share of the time asked for that passes, at least, before anything is counted
_FILLINGS = 2  # times that the batches read ahead are taken, at least, before that


def bench_stream(stream: TileStream, *, seconds: float = 20.0, step: float = 0.0) -> StreamReport:
    """Takes batches as a training loop would; what was done first, such as opening slides, is not counted.

    Args:
        stream: of tiles; closed after.
        seconds: to measure for; the batch that is under way then is waited for.
        step: seconds that whoever uses the tiles takes for a batch.

    Raises:
        CohortError: no slide can be read any more.
    """
    with stream:
        batches = stream.batches()
        _use(batches, step, _FILLINGS * stream.options.prefetch, _WARM_UP * seconds)
        before = stream.report()
        _use(batches, step, 1, seconds)
        return stream.report().since(before)


def _use(batches: Iterator[TileBatch], step: float, count: int, seconds: float) -> None:
    """Takes at least ``count`` batches, for at least so many seconds."""
    end = time.monotonic() + seconds
    while count > 0 or time.monotonic() < end:
        next(batches)
        count -= 1
        time.sleep(step)
