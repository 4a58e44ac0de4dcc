"""Made stores of tile embeddings with places on a grid, and slide encoders that take them."""

import numpy as np
import torch

from gigatome.core.job import Job
from gigatome.embeddings.store import WEIGHTS, Bag, EmbeddingStore, write_bag
from gigatome.encoders.giga import GigaConfig, build_giga
from gigatome.encoders.slide_zoo import SlideCard, save_slide_encoder

ATTRS = {"patch_size": 256, "overlap": 0, "target_mpp": 1.0, "mpp_level0": 0.25, "patch_size_level0": 1024}


def made_tiles(folder, sizes, *, dim=4, weights="abc", encoder="tiny", attrs=ATTRS):
    """A job with slides s00, s01 … of so many tiles each."""
    tiles = Job(folder).tiles(256, 1.0)
    for number, count in enumerate(sizes):
        random = np.random.default_rng(number)
        places = random.permutation(20 * 20)[:count]
        coords = np.stack([places % 20, places // 20], -1).astype(np.int64) * 1024
        values = random.standard_normal((count, dim)).astype(np.float32)
        bag = Bag(f"s{number:02}", encoder, coords, values, attrs, {WEIGHTS: weights} if weights else {})
        write_bag(tiles.features(encoder) / f"{bag.name}.h5", bag)
    return EmbeddingStore.open(folder, encoder=encoder)


def made_encoder(folder=None, *, pooling="sparse_conv", dim=4, weights="abc", edges="open", **card):
    """A slide encoder whose batch norms have seen something, and its card; written to ``folder``."""
    config = GigaConfig(pooling=pooling, input_dim=dim, dim=8, edges=edges)
    encoder = build_giga(config, seed=1)
    with torch.no_grad():
        encoder(torch.randn(40, dim, generator=torch.Generator().manual_seed(0)),
                torch.arange(80).reshape(40, 2) % 7, torch.tensor([0, 15, 40]))  # fmt: skip
    made = SlideCard("tiny giga", config, "here", "own", "tiny", weights, 256, 1.0, **card)
    if folder is not None:
        save_slide_encoder(encoder, folder, made)
    return encoder.eval(), made
