"""Masks of patches for masked image modelling: rectangular blocks, drawn on the CPU."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_ATTEMPTS = 10


@dataclass(frozen=True)
class MaskOptions:
    """Which views are masked and how; the defaults are DINOv2's.

    Attributes:
        share: of the views that are masked at all.
        ratio: range of the share of its patches that a masked view loses; the views of a batch are spread over it.
        min_patches: of a block, as drawn; rounding may make it smaller.
        min_aspect: least ratio of a block's sides; the greatest is its inverse.
        max_block: greatest share of the view that one block may add.
    """

    share: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    min_patches: int = 4
    min_aspect: float = 0.3
    max_block: float = 0.5

    def __post_init__(self):
        if not (0 < self.share <= 1 and 0 <= self.ratio[0] <= self.ratio[1] < 1):
            raise ValueError("masks.share must lie within 0 to 1, above 0, and masks.ratio be a range within 0 to 1")
        if self.min_patches < 1 or not 0 < self.min_aspect <= 1 or not 0 < self.max_block <= 1:
            raise ValueError("masks.min_patches must be at least 1, min_aspect and max_block lie above 0 and up to 1")


def block_masks(views: int, side: int, options: MaskOptions, generator: torch.Generator) -> Tensor:
    """Draws the masks of a batch of views.

    ``share`` of the views, rounded down but at least one, are masked: the first of them loses a share of its patches
    from the lowest part of ``ratio``, the last one from the highest, and then all are shuffled. Blocks are laid until
    that many patches are masked, or until ten draws in a row give no block that fits.

    Args:
        views: N.
        side: of a view, in patches.
        options: how.
        generator: on the CPU.

    Returns:
        bool [N, side · side] on the CPU, true where a patch is masked; patches in row-major order.

    Source: the masking and collation of facebookresearch/dinov2 (blocks as in BEiT, arXiv 2106.08254, algorithm 1);
    differs: at least one view is masked.
    """
    random = np.random.default_rng(int(torch.randint(2**63 - 1, (1,), generator=generator)))
    chosen = max(1, int(views * options.share))
    bounds = np.linspace(*options.ratio, chosen + 1)
    masks = np.zeros((views, side, side), bool)
    for mask, low, high in zip(masks, bounds[:-1], bounds[1:], strict=False):
        _lay_blocks(mask, int(side * side * random.uniform(low, high)), options, random)
    return torch.from_numpy(masks[random.permutation(views)].reshape(views, side * side))


def masked_patches(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Which patches are masked, and how much each counts in :func:`gigatome.selfsup.losses.ibot_loss`.

    Args:
        masks: bool [N, patches] on the CPU.

    Returns:
        int64 [M], numbers of patches in the flat [N · patches], and float32 [M], 1 / N / masked patches of the view.
        If nothing is masked, two patches that count nothing, so that all ranks and heads have something to compute.
    """
    weights = masks / masks.sum(1, keepdim=True).clamp(min=1) / len(masks)
    index = masks.flatten().nonzero()[:, 0]
    if len(index) == 0:
        index = torch.arange(2)
    return index, weights.flatten()[index]


def _lay_blocks(mask: np.ndarray, wanted: int, options: MaskOptions, random: np.random.Generator) -> None:
    """Masks up to ``wanted`` patches of ``mask`` [side, side], in place."""
    side = len(mask)
    largest = options.max_block * side * side
    log_aspect = math.log(options.min_aspect)
    while (room := min(wanted - mask.sum(), largest)) > 0:
        for _ in range(_ATTEMPTS):
            area = random.uniform(*sorted((options.min_patches, room)))
            stretch = math.exp(random.uniform(log_aspect, -log_aspect) / 2)
            height, width = round(math.sqrt(area) * stretch), round(math.sqrt(area) / stretch)
            if not (0 < height < side and 0 < width < side):
                continue
            top, left = random.integers(side - height + 1), random.integers(side - width + 1)
            block = mask[top : top + height, left : left + width]
            if 0 < height * width - block.sum() <= room:
                block[:] = True
                break
        else:
            return
