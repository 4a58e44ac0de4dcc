"""Stores of grids, small and made up."""

from pathlib import Path

import numpy as np

from gigatome.embeddings.regions import TILES, RegionBag, write_regions
from gigatome.embeddings.store import WEIGHTS, EmbeddingStore

ENCODER, HASH = "tiny-0123abcd", "0123456789abcdef"


def make_grids(count, tiles=6, dim=8, seed=0, absent=0.0):
    """Grids [count, tiles², dim] of smooth waves, and the mask of the tiles that are there."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:tiles, :tiles] / tiles
    frequency, phase = random.uniform(0.5, 3, (2, count, 1, 1, dim)), random.uniform(0, 6, (count, 1, 1, dim))
    waves = np.sin(frequency[0] * 2 * x[..., None] + frequency[1] * 2 * y[..., None] + phase) + 0.01
    mask = random.random((count, tiles**2)) >= absent
    return np.where(mask[..., None], waves.reshape(count, tiles**2, dim), 0), mask


def make_store(
    folder, sizes, *, tiles=6, dim=8, absent=0.0, dtype="float16", encoder=ENCODER, weights=HASH, mpp=0.5
) -> EmbeddingStore:
    """A job folder with a slide ``s0``, ``s1``, … for each number of regions in ``sizes``."""
    side = tiles * 256
    features = Path(folder) / f"20x_{side}px_0px_overlap" / f"features_{encoder}"
    attrs = {TILES: tiles, "patch_size": side, "patch_size_level0": side, "target_mpp": mpp}
    for number, count in enumerate(sizes):
        grids, mask = make_grids(count, tiles, dim, seed=number, absent=absent)
        coords = np.stack([np.arange(count) * side, np.zeros(count)], 1).astype(np.int64)
        bag = RegionBag(f"s{number}", encoder, coords, grids, mask, attrs, {WEIGHTS: weights} if weights else {})
        write_regions(features / f"s{number}.h5", bag, dtype=dtype)
    return EmbeddingStore.open(folder)
