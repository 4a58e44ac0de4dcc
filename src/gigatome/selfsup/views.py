"""Views of tiles for self-supervised learning: random crops and colours of a whole batch at once, on any device.

Every image of the batch has its own draw. Randomness (:func:`draw_view`) and pixels (:mod:`gigatome.selfsup.render`)
are apart: the first is all chance, from one generator on the CPU, and the second is a pure function.

Source: the augmentation of facebookresearch/dino, on which those of DINOv2 and MoCo v3 are built; differs: crop boxes
are not rounded to whole pixels, pixels beside the crop take part in its antialiasing, the order of the colour changes
is drawn once for a view of the batch and not for each image, colours are not rounded to 8 bits between changes, the
blur is a true Gaussian, renormalised at the edge, and on an oblong tile the fallback crop lies anywhere.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gigatome.core.errors import ConfigError
from gigatome.selfsup.render import ViewDraw, render_views

_ATTEMPTS = 10


@dataclass(frozen=True)
class ViewOptions:
    """How views are made; the defaults are DINO's.

    Probabilities that are three numbers are those of the first global view, the second, and the local ones.

    Attributes:
        global_size: side in pixels of the two global views.
        local_size: side in pixels of the local views.
        local_views: how many local views.
        global_scale: range of the crop's share of the tile's area.
        local_scale: the same for local views.
        ratio: range of the crop's width over its height, log-uniform.
        horizontal_flip: probability.
        vertical_flip: probability; DINO has none, tissue has no up.
        quarter_turns: rotate by a random multiple of 90°.
        rotation: rotate by an angle in ± this, in degrees up to 180; what comes in at the corners is the tissue around
            the crop, mirrored at the tile's edge.
        hed_probability: of changing the stains, before all other colours.
        hed: each of haematoxylin, eosin and residual is multiplied by a factor in 1 ± this, and moved by ± this of
            optical density; 0.05 is "light", 0.2 "strong" (arXiv 1902.06543).
        jitter: probability of changing brightness, contrast, saturation and hue.
        brightness: factor in 1 ± this; so are contrast and saturation.
        contrast: see brightness.
        saturation: see brightness.
        hue: shift in ± this, as a part of the colour circle.
        grayscale: probability of losing all colour.
        blur: probabilities of a Gaussian blur.
        blur_sigma: range of its standard deviation in pixels, up to 16.
        solarize: probabilities of inverting all pixels ≥ 0.5.
    """

    global_size: int = 224
    local_size: int = 96
    local_views: int = 8
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turns: bool = False
    rotation: float = 0.0
    hed_probability: float = 0.0
    hed: float = 0.05
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)

    def __post_init__(self):
        for low, high in (self.global_scale, self.local_scale):
            if not 0 < low <= high <= 1:
                raise ValueError(f"a crop's scale is a range within (0, 1], not {low} to {high}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is a range of positive numbers, not {self.ratio}")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1] <= 16:
            raise ValueError(f"blur_sigma is a range within (0, 16], not {self.blur_sigma}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must lie within 0 to 0.5, not at {self.hue}")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation must lie within 0 to 180 degrees, not at {self.rotation}")
        if min(self.brightness, self.contrast, self.saturation, self.hed) < 0:
            raise ValueError("brightness, contrast, saturation and hed must be at least 0")
        chances = (self.horizontal_flip, self.vertical_flip, self.hed_probability, self.jitter, self.grayscale)
        if not all(0 <= chance <= 1 for chance in (*chances, *self.blur, *self.solarize)):
            raise ValueError("probabilities must lie within 0 to 1")
        if min(self.global_size, self.local_size) < 1 or self.local_views < 0:
            raise ValueError("global_size and local_size must be positive, local_views at least 0")

    @classmethod
    def dino(cls) -> "ViewOptions":
        """DINO's, which HIPT and kaiko use. Source: arXiv 2104.14294 and its code."""
        return cls()

    @classmethod
    def dinov2(cls, blur: Literal["stated", "released"] = "stated") -> "ViewOptions":
        """DINOv2's. Source: arXiv 2304.07193 and its code.

        Args:
            blur: "stated" has the probabilities that its code states, "released" those by which its published models
                were trained: the code exchanges them with their complements, so that the first view never is blurred.
        """
        chances = {"stated": (1.0, 0.1, 0.5), "released": (0.0, 0.9, 0.5)}
        return cls(global_scale=(0.32, 1.0), local_scale=(0.05, 0.32), blur=chances[blur])

    @classmethod
    def moco_v2(cls) -> "ViewOptions":
        """MoCo v2's. Source: arXiv 2003.04297 and its code; differs: it resamples bilinearly."""
        return cls(
            local_views=0, global_scale=(0.2, 1.0), saturation=0.4, blur=(0.5, 0.5, 0.0), solarize=(0.0, 0.0, 0.0)
        )

    @classmethod
    def moco_v3(cls) -> "ViewOptions":
        """MoCo v3's for ViTs; its ResNets have ``global_scale`` (0.2, 1).

        Source: arXiv 2104.02057 and its code; differs: it resamples bilinearly.
        """
        return cls(local_views=0, global_scale=(0.08, 1.0), blur=(1.0, 0.1, 0.0))


def check_patches(sizes: Mapping[str, int], patch_size: int) -> None:
    """Raises :class:`ConfigError` if a view, of a side in pixels by its option's name, does not divide into patches."""
    for size in sizes.values():
        if size % patch_size:
            raise ConfigError(
                f"views of {size} px do not divide into patches of {patch_size} px; change {' or '.join(sizes)}"
            )


def multi_crop(
    images: Tensor,
    options: ViewOptions,
    generator: torch.Generator,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> list[Tensor]:
    """Two global and ``local_views`` local views of each tile.

    Args:
        images: uint8 [B, H, W, 3], on the device that does the work.
        options: how.
        generator: on the CPU; the draws are the same whatever the device.
        mean: [3, 1, 1] on the images' device, 0 to 255; subtracted from the views.
        std: likewise; divided by.

    Returns:
        float32 [B, 3, size, size] for each view, the global ones first; in [0, 1] without ``mean`` and ``std``.
    """
    batch, height, width, _ = images.shape
    kinds = [0, 1] + [2] * options.local_views
    draws = [draw_view(options, kind, batch, height, width, generator) for kind in kinds]
    sizes = [options.local_size if kind == 2 else options.global_size for kind in kinds]
    return render_views(images, draws, sizes, mean, std)


def draw_view(
    options: ViewOptions, kind: int, batch: int, height: int, width: int, generator: torch.Generator
) -> ViewDraw:
    """Draws the parameters of one view of each of ``batch`` tiles.

    Args:
        options: the distributions.
        kind: 0 first global view, 1 second, 2 local.
        batch: B.
        height: of the tiles, in pixels.
        width: see height.
        generator: on the CPU.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=generator) * (high - low) + low

    def chance(probability: float) -> Tensor:
        return torch.rand(batch, generator=generator) < probability

    crop_width, crop_height = _draw_crop(
        options.local_scale if kind == 2 else options.global_scale, options.ratio, batch, height, width, generator
    )
    turns = torch.randint(4, (batch,), generator=generator) * int(options.quarter_turns)
    jitter = chance(options.jitter)
    stain, stain_scale, stain_shift = _draw_stain(options, batch, generator)
    return ViewDraw(
        x=uniform(0, 1) * (width - crop_width),
        y=uniform(0, 1) * (height - crop_height),
        width=crop_width,
        height=crop_height,
        mirror_x=chance(options.horizontal_flip) ^ (turns == 1) ^ (turns == 2),
        mirror_y=chance(options.vertical_flip) ^ (turns == 2) ^ (turns == 3),
        transpose=turns % 2 == 1,
        angle=uniform(-options.rotation, options.rotation) if options.rotation else torch.zeros(batch),
        stain=stain,
        stain_scale=stain_scale,
        stain_shift=stain_shift,
        brightness=torch.where(jitter, uniform(max(0, 1 - options.brightness), 1 + options.brightness), 1.0),
        contrast=torch.where(jitter, uniform(max(0, 1 - options.contrast), 1 + options.contrast), 1.0),
        saturation=torch.where(jitter, uniform(max(0, 1 - options.saturation), 1 + options.saturation), 1.0),
        hue=torch.where(jitter, uniform(-options.hue, options.hue), 0.0),
        gray=chance(options.grayscale),
        blur=chance(options.blur[kind]),
        sigma=uniform(*options.blur_sigma),
        solarize=chance(options.solarize[kind]),
        order=tuple(torch.randperm(4, generator=generator).tolist()),
    )


def _draw_crop(
    scale: tuple[float, float],
    ratio: tuple[float, float],
    batch: int,
    height: int,
    width: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Width and height [B] of random crops: the first of ten attempts that fits, or the largest that does.

    Source: ``torchvision.transforms.RandomResizedCrop``.
    """
    area = height * width * (torch.rand(batch, _ATTEMPTS, generator=generator) * (scale[1] - scale[0]) + scale[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = torch.rand(batch, _ATTEMPTS, generator=generator) * (high - low) + low
    # numpy: in torch, these few numbers would wake the threads of the library that it has for them
    area, aspect = area.numpy(), np.exp(shape.numpy())
    widths, heights = torch.from_numpy(np.sqrt(area * aspect)), torch.from_numpy(np.sqrt(area / aspect))
    fits = (widths <= width) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)
    fallback_width = min(width, height * ratio[1])
    fallback_height = min(height, width / ratio[0])
    none = ~fits.any(1)
    return (
        torch.where(none, fallback_width, widths.gather(1, first)[:, 0]),
        torch.where(none, fallback_height, heights.gather(1, first)[:, 0]),
    )


def _draw_stain(options: ViewOptions, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Which images [B] are stained anew, and each stain's factor and shift [B, 3]."""
    if not options.hed_probability:
        return torch.zeros(batch, dtype=torch.bool), torch.ones(batch, 3), torch.zeros(batch, 3)
    chosen = torch.rand(batch, generator=generator) < options.hed_probability
    scale, shift = (2 * torch.rand(2, batch, 3, generator=generator) - 1) * options.hed
    return chosen, 1 + scale, shift
