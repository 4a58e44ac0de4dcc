"""DINOv2 small enough for tests."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from gigatome.selfsup.dinov2 import Dinov2, Dinov2Options
from gigatome.selfsup.masking import MaskOptions
from gigatome.training.schedules import Clock

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from tiny_run import ENCODER, VIEWS, TinyBatch, TinyStream, digest  # noqa: F401 - the last three for the tests

CLOCK = Clock(step=2, steps=10, epoch_steps=2)
SHARED = Dinov2Options(
    views=VIEWS,
    masks=MaskOptions(ratio=(0.2, 0.6), min_patches=2),
    out_dim=48,
    head_hidden_dim=32,
    head_bottleneck_dim=16,
    drop_path=0.0,
    teacher_temperature_warmup_epochs=2,
)
SEPARATE = replace(
    SHARED, separate_head=True, patch_out_dim=24, patch_head_hidden_dim=32, patch_head_bottleneck_dim=8, kde_weight=0.05
)
SINKHORN = replace(SEPARATE, centering="sinkhorn_knopp")


def make(options: Dinov2Options = SHARED, seed: int = 3, **encoder) -> Dinov2:
    return Dinov2(replace(ENCODER, registers=2, layer_scale=1e-2, **encoder), options, seed=seed, name="tiny")


def views(method: Dinov2, tiles: torch.Tensor, clock: Clock = CLOCK) -> list[torch.Tensor]:
    return method.views(tiles, torch.Generator().manual_seed(0), clock)
