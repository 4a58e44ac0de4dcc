"""Regions of 4 × 4 tiles of 64 px, a region encoder for them, and what it should make of them."""

import numpy as np
import torch

from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.tiles.regions import RegionOptions

SIDE = 4
TILES_OF = {"tile_size": 64, "mpp": 0.5, "min_tissue": 0.5, "threads": 2}
REGIONS_OF = {**TILES_OF, "regions": RegionOptions(SIDE, 2)}


def region_vit(seed=0, input_dim=32):
    torch.manual_seed(seed)
    model = RegionVit(RegionVitConfig(input_dim=input_dim, dim=24, depth=2, heads=2, grid=3)).eval()
    with torch.no_grad():  # as it begins, it hardly looks at the tiles
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.h5")}


def vectors_of(model, bag):
    """One region after the other, each by itself."""
    side = int(bag.mask.shape[1] ** 0.5)
    found = []
    with torch.inference_mode():
        for grid, mask in zip(bag.grids, bag.mask, strict=True):
            x = torch.from_numpy(grid.astype(np.float32).reshape(side, side, -1)).permute(2, 0, 1)[None]
            found.append(model(x, torch.from_numpy(mask.reshape(1, side, side)))[0].numpy())
    return np.stack(found)
