"""Views of regions for self-supervised learning: random blocks of their grids of tile embeddings, on any device.

A tile that is not there is all zeros, in the grids and in the views; a view thus says itself which tiles it holds.

Source: arXiv 2206.02647 (HIPT), §3.3, and its code; differs: a vertical flip and quarter turns can be asked for.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor

from gigatome.encoders.region_vit import RegionVit


@final
@dataclass(frozen=True)
class GridViewOptions:
    """How views of grids are made; the defaults are those of HIPT's paper.

    Attributes:
        global_size: side in tiles of the two global views.
        local_size: side in tiles of the local views.
        local_views: how many local views.
        horizontal_flip: probability.
        vertical_flip: probability; HIPT has none, tissue has no up.
        quarter_turns: rotate by a random multiple of 90°; HIPT does not.
        dropout: probability of each number of an embedding to be dropped, in all views; the others grow to make up for
            it. 0.1 in the paper, none in the authors' code.
    """

    global_size: int = 14
    local_size: int = 6
    local_views: int = 8
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turns: bool = False
    dropout: float = 0.1

    def __post_init__(self):
        if not all(0 <= chance <= 1 for chance in (self.horizontal_flip, self.vertical_flip)):
            raise ValueError("horizontal_flip and vertical_flip must lie within 0 to 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, not {self.dropout}")
        if min(self.global_size, self.local_size) < 1 or self.local_views < 0:
            raise ValueError("global_size and local_size must be positive, local_views at least 0")

    @classmethod
    def paper(cls) -> "GridViewOptions":
        """HIPT's as the paper states them, with dropout."""
        return cls()

    @classmethod
    def code(cls) -> "GridViewOptions":
        """HIPT's as its authors' code has them, without dropout."""
        return cls(dropout=0.0)


def grid_crops(grids: Tensor, options: GridViewOptions, generator: torch.Generator) -> list[Tensor]:
    """Two global and ``local_views`` local views of each grid.

    Args:
        grids: float [B, rows, columns, D], on the device that does the work; no side smaller than a view.
        options: how.
        generator: on the CPU; the crops are the same whatever the device. Dropout draws from the global generator of
            the grids' device.

    Returns:
        [B, D, size, size] of the grids' type for each view, the global ones first; D lies innermost in memory.
    """
    views = _crops(grids, 2, options.global_size, options, generator)
    if options.local_views:
        views += _crops(grids, options.local_views, options.local_size, options, generator)
    return views


def embed_grids(encoder: RegionVit, views: Tensor) -> Tensor:
    """Embeddings [B, dim] of views or whole grids, float [B, D, rows, columns], whose missing tiles are all zeros.

    They may have another precision than the encoder.
    """
    present = (views != 0).any(1)
    if not torch.is_autocast_enabled(views.device.type):
        views = views.to(encoder.cls_token.dtype)
    return encoder(views, present)


def _crops(grids: Tensor, count: int, size: int, options: GridViewOptions, generator: torch.Generator) -> list[Tensor]:
    """``count`` views of one size: one gathering of rows of D numbers."""
    batch, rows, columns, dim = grids.shape
    draws = (count, batch)
    top = torch.randint(rows - size + 1, draws, generator=generator)
    left = torch.randint(columns - size + 1, draws, generator=generator)
    mirror_x = torch.rand(draws, generator=generator) < options.horizontal_flip
    mirror_y = torch.rand(draws, generator=generator) < options.vertical_flip
    turns = torch.randint(4, draws, generator=generator) * int(options.quarter_turns)
    mirror_x ^= (turns == 1) | (turns == 2)
    mirror_y ^= (turns == 2) | (turns == 3)
    # where a view begins, and how far on the next row and the next column of it lie
    down = torch.where(mirror_y, -columns, columns)
    right = torch.where(mirror_x, -1, 1)
    start = (top + mirror_y * (size - 1)) * columns + left + mirror_x * (size - 1)
    down, right = torch.where(turns % 2 == 1, right, down), torch.where(turns % 2 == 1, down, right)
    start = start + torch.arange(batch) * (rows * columns)
    start, down, right = torch.stack([start, down, right]).to(grids.device, non_blocking=True)[..., None, None]
    steps = torch.arange(size, device=grids.device)
    places = start + down * steps[:, None] + right * steps
    chosen = grids.reshape(-1, dim).index_select(0, places.flatten())
    if options.dropout:
        chosen = F.dropout(chosen, options.dropout)
    return list(chosen.view(*places.shape, dim).permute(0, 1, 4, 2, 3).unbind(0))
