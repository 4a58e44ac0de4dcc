"""Tiny hierarchies, and a slide whose pixels are noise that any box of it shows again."""

import numpy as np
import torch

from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.region_zoo import RegionCard
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, encoder_name
from gigatome.evaluation.bag_head import BagHead, FittedBagHead
from gigatome.evaluation.saved import SavedModel
from gigatome.heatmaps.chain import Chain
from gigatome.mil.zoo import bag_model
from gigatome.tiles.grid import TileGrid

PATCH, TILE, SIDE = 8, 32, 2


class NoiseSlide:
    """Noise at 0.5 mpp with level 0 at 0.25: a pixel of a tile is one of the noise, wherever the tile begins."""

    mpp, uri, name, width, height = 0.25, "noise.svs", "noise", 640, 512

    def __init__(self, seed=0):
        self.pixels = np.random.default_rng(seed).integers(0, 256, (512, 512, 3), dtype=np.uint8)
        blocks = np.random.default_rng(seed + 1).integers(0, 200, (64, 64, 3), dtype=np.uint8)
        self.pixels //= 4
        self.pixels += blocks.repeat(8, 0).repeat(8, 1) // 2  # so that patches differ

    def read_tile(self, x, y, tile_size, mpp, *, exact=True):
        assert mpp == 0.5
        assert x % 2 == y % 2 == 0
        return self.pixels[y // 2 : y // 2 + tile_size, x // 2 : x // 2 + tile_size]


def make_chain(*, seed=0, dim=16, heads=2, tiles=SIDE, slide=None):
    """Two encoders with random weights."""
    tile = build_encoder(EncoderConfig("vit_tiny_patch16_224", TILE, PATCH, dim, 2, 2), seed=seed, name="tiny")
    config = RegionVitConfig(input_dim=dim, dim=12, depth=2, heads=heads, grid=tiles)
    region = RegionVit(config)
    _scrambled(tile, seed)
    _scrambled(region, seed)
    card = RegionCard("tiny4k", config, "made", "", encoder_name(tile), encoder_digest(tile), TILE, 0.5, tiles)
    return Chain(tile, region, card, slide)


def make_heads(model, dim, origin, *, folds=2, classes=("a", "b"), options=None):
    """Saved heads of several folds with random weights."""
    options = options or {}
    networks = [_scrambled(bag_model(model, dim, len(classes), options), fold) for fold in range(folds)]
    shape = (dim, len(classes), len(classes), np.zeros(0), None, ())
    heads = tuple(FittedBagHead(BagHead(model, options), network, *shape) for network in networks)
    card = {"classes": list(classes), "origin": origin, "threshold": None}
    return SavedModel(card, heads, np.zeros(dim, np.float32), np.ones(dim, np.float32), "slide")


def _scrambled(module, seed):
    """Weights so large that attention is far from uniform."""
    generator = np.random.default_rng(seed)
    for parameter in module.parameters():
        parameter.data = torch.from_numpy(generator.normal(0, 0.4, parameter.shape).astype(np.float32))
    return module.eval()


def make_tiles(places, *, width=640, height=512):
    """A grid of the tiles at these (column, row)."""
    coords = np.array(places, np.int64).reshape(-1, 2) * 2 * TILE
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    ones = np.ones(len(coords), np.float32)
    return TileGrid(coords[order], ones, TILE, 0.5, 0, 0.25, width, height)
