"""Views of slides: some tiles of each, in places that are turned over, turned and stretched.

Source: Giga-SSL (arXiv:2212.03273, step 4) and the code released with it.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

Rounding = Literal["nearest", "truncate"]


@final
@dataclass(frozen=True)
class SlideViewOptions:
    """How the places of a view's tiles are changed; each view of each slide has its own draw.

    Flips come first, then the rotation, then the scaling along the view's own axes; where the tiles lie as a whole is
    left out, as it means nothing.

    Attributes:
        horizontal_flip: probability.
        vertical_flip: probability.
        rotation: by any angle, about uniformly.
        scale: least and greatest factor, drawn anew for each axis; the paper's is (0.5, 2), the code's (0.7, 1.3).
        round: how places become cells. ``"truncate"``, the authors', leaves a tile that falls a trifle short of a cell
            in the one before.
    """

    horizontal_flip: float = 0.5
    vertical_flip: float = 0.5
    rotation: bool = True
    scale: tuple[float, float] = (0.5, 2.0)
    round: Rounding = "nearest"

    def __post_init__(self):
        if not (0 <= self.horizontal_flip <= 1 and 0 <= self.vertical_flip <= 1):
            raise ValueError("horizontal_flip and vertical_flip must lie within 0 to 1")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be positive, the least first, not {list(self.scale)}")

    @classmethod
    def paper(cls) -> "SlideViewOptions":
        """As the paper says."""
        return cls()

    @classmethod
    def code(cls) -> "SlideViewOptions":
        """As the authors' code does with all its switches on."""
        return cls(scale=(0.7, 1.3), round="truncate")

    @classmethod
    def none(cls) -> "SlideViewOptions":
        """Tiles stay where they are: the paper's ablation without slide-level augmentation."""
        return cls(0.0, 0.0, rotation=False, scale=(1.0, 1.0))


def slide_views(images: Tensor, options: SlideViewOptions, generator: torch.Generator) -> list[Tensor]:
    """Two views of slides.

    Args:
        images: float32 [B, 2, T, D + 2], for each of two views T embeddings of tiles and their column and row.
        options: how places are changed.
        generator: on the CPU.

    Returns:
        Two views [B, T, D + 2] on the device of ``images``; the last two numbers are the new column and row, integers
        from 0.
    """
    matrices = draw_matrices(images.shape[:2], options, generator).to(images.device, images.dtype, non_blocking=True)
    places = move_places(images[..., -2:], matrices, options.round)
    return list(torch.cat([images[..., :-2], places], -1).unbind(1))


def draw_matrices(shape: tuple[int, ...], options: SlideViewOptions, generator: torch.Generator) -> Tensor:
    """Random maps of the plane, float64 […, 2, 2] on the CPU."""
    random = torch.rand(*shape, 5, generator=generator, dtype=torch.float64)
    flips = 1 - 2 * (random[..., :2] < torch.tensor([options.horizontal_flip, options.vertical_flip])).double()
    angle = random[..., 2] * (2 * torch.pi * options.rotation)
    least, most = options.scale
    return plane_maps(flips, angle, least + (most - least) * random[..., 3:])


def plane_maps(flips: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
    """Maps […, 2, 2] that flip, then rotate, then scale; flips and quarter turns are exact.

    Args:
        flips: float64 […, 2], −1 to flip along x or y, else 1.
        angle: float64 […], radians from x towards y.
        scale: float64 […, 2], factors along x and y.
    """
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2).round(decimals=15)
    return scale[..., :, None] * turn * flips[..., None, :]


def move_places(places: Tensor, matrices: Tensor, rounding: Rounding) -> Tensor:
    """Places float […, T, 2] of tiles after a map […, 2, 2] of the plane: integers, the least along each axis 0."""
    moved = (places[..., None, :] * matrices[..., None, :, :]).sum(-1)
    moved = moved - moved.amin(-2, keepdim=True)
    return moved.round() if rounding == "nearest" else moved.floor()
