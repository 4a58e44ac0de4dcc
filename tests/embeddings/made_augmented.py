"""Made stores of augmented embeddings."""

import numpy as np

from gigatome.embeddings.augmented import SHARING, AugmentedBag, AugmentedStore, write_augmented


def made_bag(number, draws=3, tiles=6, dim=4, *, name=None, encoder="tiny", weights="abc", sharing="shared", mpp=0.25):
    """Slide ``number``, whose tiles have random embeddings and lie somewhere on a grid of 40 × 30 cells."""
    random = np.random.default_rng(number)
    cells = np.stack([random.integers(40, size=(draws, tiles)), random.integers(30, size=(draws, tiles))], -1)
    attrs = {"patch_size": 256, "overlap": 0, "target_mpp": 1.0, "mpp_level0": mpp}
    embeddings = random.standard_normal((draws, tiles, dim)).astype(np.float16)
    encoding = {"encoder_weights": weights, SHARING: sharing}
    return AugmentedBag(name or f"s{number:02}", encoder, cells * round(256 / mpp), embeddings, attrs, encoding)


def made_store(folder, bags, encoder="tiny"):
    """A job folder with these slides."""
    tiles = folder / "10x_256px_0px_overlap"
    for bag in bags:
        write_augmented(tiles / f"augmented_{encoder}" / f"{bag.name}.h5", bag)
    return AugmentedStore.open(folder)
