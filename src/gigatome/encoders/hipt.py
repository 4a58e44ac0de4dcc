"""HIPT's encoders, loaded from the authors' checkpoints.

Source: Chen et al., "Scaling Vision Transformers to Gigapixel Images via Hierarchical Self-Supervised Learning",
CVPR 2022, and the code released with it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from gigatome.encoders.vit import EncoderConfig, TileEncoder, restore_encoder
from gigatome.encoders.weights import encoder_weights, read_weights

VIT256 = EncoderConfig(model="vit_small_patch16_224", pos_embed="dino")
"""ViT256-16. The mean and std of 0.5 are those of the authors' inference; their training script has ImageNet's."""


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
