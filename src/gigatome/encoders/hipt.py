"""HIPT's encoders, loaded from the authors' checkpoints.

Source: Chen et al., "Scaling Vision Transformers to Gigapixel Images via Hierarchical Self-Supervised Learning",
CVPR 2022, and the code released with it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gigatome.core.errors import ConfigError
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.vit import EncoderConfig, TileEncoder, restore_encoder
from gigatome.encoders.weights import encoder_weights, load_weights, read_weights

VIT256 = EncoderConfig(model="vit_small_patch16_224", pos_embed="dino")
"""ViT256-16. The mean and std of 0.5 are those of the authors' inference; their training script has ImageNet's."""

VIT4096 = RegionVitConfig()
"""ViT4096-256."""

_TILE = 256


def load_vit256(
    weights: str | Path | Mapping[str, Any], *, part: Literal["teacher", "student"] = "teacher"
) -> TileEncoder:
    """ViT256-16, the encoder of 256 px tiles at 0.5 mpp, in evaluation mode.

    Args:
        weights: the authors' ``vit256_small_dino.pth`` or the content of such a file. The weights are for
            non-commercial use and are not distributed with gigatome.
        part: which of the two networks of the checkpoint; the teacher is the one to use.

    Raises:
        StoreError: the file cannot be read.
        RunError: it is a checkpoint of another model; the message names the keys that are missing or unexpected.
    """
    given = isinstance(weights, Mapping)
    source = "ViT256 weights" if given else str(weights)
    state = encoder_weights(weights, source=source, part=part) if given else read_weights(weights, part=part)
    return restore_encoder(VIT256, state, source=source, name="hipt-vit256")


def load_vit4096(
    weights: str | Path | Mapping[str, Any], *, part: Literal["teacher", "student"] = "teacher"
) -> RegionVit:
    """ViT4096-256, the encoder of regions of 16 × 16 tiles of ViT256-16, in evaluation mode.

    Args:
        weights: the authors' ``vit4k_xs_dino.pth`` or the content of such a file. The weights are for non-commercial
            use and are not distributed with gigatome.
        part: which of the two networks of the checkpoint; the teacher is the one to use.

    Raises:
        StoreError: the file cannot be read.
        RunError: it is a checkpoint of another model; the message names the keys that are missing or unexpected.
    """
    given = isinstance(weights, Mapping)
    source = "ViT4096 weights" if given else str(weights)
    state = encoder_weights(weights, source=source, part=part) if given else read_weights(weights, part=part)
    with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
        encoder = RegionVit(VIT4096)
    load_weights(encoder, state, source=source, pos_embed="dino")
    return encoder.eval()


@torch.inference_mode()
def encode_regions(
    tile_encoder: TileEncoder, region_encoder: RegionVit, images: Tensor, *, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Embeddings of regions, from their pixels, by the two encoders one after the other.

    Args:
        tile_encoder: ViT256, in evaluation mode.
        region_encoder: ViT4096, in evaluation mode, on the same device.
        images: normalised, float [B, 3, H, W], of any size; what is no whole tile of 256 px at the edges is left out,
            half on each side.
        batch_size: tiles that the tile encoder sees at once.

    Returns:
        Embeddings of the tiles [B, rows, columns, 384] and of the regions [B, 192].

    Raises:
        ConfigError: the images are smaller than a tile.
    """
    height, width = images.shape[2:]
    rows, columns = height // _TILE, width // _TILE
    if not rows or not columns:
        raise ConfigError(f"regions of {height} × {width} px hold no tile of {_TILE} px")
    top, left = round((height - rows * _TILE) / 2), round((width - columns * _TILE) / 2)
    inner = images[:, :, top : top + rows * _TILE, left : left + columns * _TILE]
    tiles = inner.unflatten(3, (columns, _TILE)).unflatten(2, (rows, _TILE)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    embeddings = torch.cat([tile_encoder(part) for part in tiles.split(batch_size)])
    grid = embeddings.unflatten(0, (len(images), rows, columns))
    return grid, region_encoder(grid.permute(0, 3, 1, 2))
