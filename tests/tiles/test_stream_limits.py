"""Streams of a part of the slides, of a limited number of tiles, and of tiles finer than their slides."""

import itertools

import numpy as np
import pytest

from gigatome.core.errors import ConfigError
from gigatome.tiles.stream import StreamOptions, TileStream

OPTIONS = StreamOptions(tile_size=32, mpp=(0.5, 1.0), threads=2, prefetch=2)


def take(stream, count, start=0):
    with stream:
        return list(itertools.islice(stream.batches(start), count))


def test_a_limited_stream_holds_few_tiles(cohort, masks):
    stream = TileStream(cohort, OPTIONS, batch_size=24, seed=0, masks=masks, limit_tiles=10)
    batches = take(stream, 6)
    tiles = {image.tobytes() for batch in batches for image in batch.images}
    assert len(tiles) == 10
    later = take(stream, 2, start=4)
    assert all(np.array_equal(a.images, b.images) for a, b in zip(batches[4:], later, strict=True))
    halves = [
        TileStream(cohort, OPTIONS, batch_size=24, masks=masks, limit_tiles=10, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    parts = [take(half, 1)[0].images for half in halves]
    assert np.array_equal(np.concatenate(parts), batches[0].images)


def test_a_share_of_the_slides(cohort, masks):
    def used(share, seed=0):
        stream = TileStream(cohort, OPTIONS, batch_size=24, seed=seed, masks=masks, slide_fraction=share)
        return {stream.cohort.slides[index].name for batch in take(stream, 4) for index in batch.slides}

    assert [len(used(share)) for share in (0.1, 0.25, 0.5, 0.75, 1.0)] == [1, 1, 2, 3, 4]
    assert used(0.1) < used(0.5) < used(0.75)
    assert len({frozenset(used(0.5, seed)) for seed in range(6)}) > 1
    for wrong in (0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="slide_fraction"):
            TileStream(cohort, OPTIONS, masks=masks, slide_fraction=wrong)


def test_slides_too_coarse_for_a_resolution_are_counted(cohort, masks, caplog):
    TileStream(cohort, OPTIONS, masks=masks, mpp=[0.25, 0.5])
    assert "4 of 4 slides are too coarse for tiles at 0.25 mpp" in caplog.text
    caplog.clear()
    stream = TileStream(cohort, OPTIONS, batch_size=8, masks=masks, mpp=[0.25], max_enlargement=2)
    assert set(take(stream, 1)[0].mpp) == {0.25}
    assert "too coarse" not in caplog.text
    with pytest.raises(ConfigError, match="max_enlargement must be at least 1"):
        TileStream(cohort, OPTIONS, masks=masks, max_enlargement=0.5)
