"""Views of tiles for self-supervised learning: random crops and colours of a whole batch at once, on any device.

Every image of the batch has its own draw. Randomness (:func:`draw_view`) and pixels (:func:`render_view`) are apart:
the first is all chance, from one generator on the CPU, and the second is a pure function. A crop is resampled, flipped
and antialiased by two small matrix products, which is exact and fast on a CPU as on a GPU.

Source: the augmentation of facebookresearch/dino; differs: crop boxes are not rounded to whole pixels, pixels beside
the crop take part in its antialiasing, the order of the colour changes is drawn once for a view of the batch and not
for each image, the blur is a true Gaussian, renormalised at the edge, and on an oblong tile the fallback crop lies
anywhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ATTEMPTS = 10
_LUMA = (0.299, 0.587, 0.114)


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
        jitter: probability of changing brightness, contrast, saturation and hue.
        brightness: factor in 1 ± this; so are contrast and saturation.
        contrast: see brightness.
        saturation: see brightness.
        hue: shift in ± this, as a part of the colour circle.
        grayscale: probability of losing all colour.
        blur: probabilities of a Gaussian blur.
        blur_sigma: range of its standard deviation in pixels.
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
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must lie within 0 to 0.5, not at {self.hue}")
        if min(self.global_size, self.local_size) < 1 or self.local_views < 0:
            raise ValueError("global_size and local_size must be positive, local_views at least 0")


@dataclass(frozen=True)
class ViewDraw:
    """What chance decided for one view of each of B images; tensors of [B], on the CPU.

    Attributes:
        x: left edge of the crop in pixels of the tile; so are y, width and height.
        y: see x.
        width: see x.
        height: see x.
        mirror_x: left and right are swapped.
        mirror_y: top and bottom are swapped.
        transpose: rows and columns are swapped, after the mirrors.
        brightness: factor; 1 changes nothing. So are contrast and saturation.
        contrast: see brightness.
        saturation: see brightness.
        hue: shift in turns of the colour circle.
        gray: all colour is removed.
        blur: it is blurred.
        sigma: of the blur in pixels.
        solarize: bright pixels are inverted.
        order: in which brightness (0), contrast (1), saturation (2) and hue (3) are changed.
    """

    x: Tensor
    y: Tensor
    width: Tensor
    height: Tensor
    mirror_x: Tensor
    mirror_y: Tensor
    transpose: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    gray: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor
    order: tuple[int, ...]


def multi_crop(images: Tensor, options: ViewOptions, generator: torch.Generator) -> list[Tensor]:
    """Two global and ``local_views`` local views of each tile.

    Args:
        images: uint8 [B, H, W, 3], on the device that does the work.
        options: how.
        generator: on the CPU; the draws are the same whatever the device.

    Returns:
        float32 [B, 3, size, size] in [0, 1] for each view, the global ones first.
    """
    batch, height, width, _ = images.shape
    pixels = images.float().div_(255)
    views = []
    for view in range(2 + options.local_views):
        size = options.global_size if view < 2 else options.local_size
        draw = draw_view(options, min(view, 2), batch, height, width, generator)
        views.append(render_view(pixels, draw, size))
    return views


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
    return ViewDraw(
        x=uniform(0, 1) * (width - crop_width),
        y=uniform(0, 1) * (height - crop_height),
        width=crop_width,
        height=crop_height,
        mirror_x=chance(options.horizontal_flip) ^ (turns == 1) ^ (turns == 2),
        mirror_y=chance(options.vertical_flip) ^ (turns == 2) ^ (turns == 3),
        transpose=turns % 2 == 1,
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


def render_view(pixels: Tensor, draw: ViewDraw, size: int) -> Tensor:
    """One view of each image.

    Args:
        pixels: float32 [B, H, W, 3] in [0, 1].
        draw: what to do to each.
        size: side of the view in pixels.

    Returns:
        float32 [B, 3, size, size] in [0, 1].
    """
    x = _crop(pixels, draw, size)
    recolour = (
        (_brightness, draw.brightness),
        (_contrast, draw.contrast),
        (_saturation, draw.saturation),
        (_hue, draw.hue),
    )
    for change, amount in (recolour[position] for position in draw.order):
        x = change(x, amount.to(x.device, non_blocking=True)[:, None, None, None])
    x = _change(x, draw.gray, _luma)
    x = _change(x, draw.blur, lambda chosen: _blur(chosen, draw.sigma[draw.blur]))
    return _change(x, draw.solarize, lambda chosen: torch.where(chosen >= 0.5, 1 - chosen, chosen))


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
    aspect = torch.exp(torch.rand(batch, _ATTEMPTS, generator=generator) * (high - low) + low)
    widths, heights = (area * aspect).sqrt(), (area / aspect).sqrt()
    fits = (widths <= width) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)
    fallback_width = min(width, height * ratio[1])
    fallback_height = min(height, width / ratio[0])
    none = ~fits.any(1)
    return (
        torch.where(none, fallback_width, widths.gather(1, first)[:, 0]),
        torch.where(none, fallback_height, heights.gather(1, first)[:, 0]),
    )


def _crop(pixels: Tensor, draw: ViewDraw, size: int) -> Tensor:
    """Crops, resamples, mirrors and transposes: [B, H, W, 3] → [B, 3, size, size]."""
    batch, height, width, _ = pixels.shape
    rows_BhH = _resampling(draw.y, draw.height, draw.mirror_y, height, size, pixels.device)
    columns_BwW = _resampling(draw.x, draw.width, draw.mirror_x, width, size, pixels.device)
    x = (rows_BhH @ pixels.reshape(batch, height, width * 3)).view(batch, size, width, 3)
    x = x.permute(0, 3, 1, 2).reshape(batch, 3 * size, width) @ columns_BwW.mT
    x = x.view(batch, 3, size, size).clamp_(0, 1)
    return _change(x, draw.transpose, lambda chosen: chosen.mT)


def _resampling(
    start: Tensor, length: Tensor, mirror: Tensor, source: int, target: int, device: torch.device
) -> Tensor:
    """Weights [B, target, source] that resample ``length`` pixels from ``start`` to ``target`` pixels, all [B].

    Bicubic with a = −0.5, widened when it shrinks so that nothing aliases, as ``PIL.Image.resize`` does it.
    """
    start, length, mirror = (values.to(device, non_blocking=True)[:, None] for values in (start, length, mirror))
    step = length / target
    reach = step.clamp(min=1)
    place = torch.arange(target, device=device) + 0.5
    centre = start + torch.where(mirror, target - place, place) * step
    taps = torch.arange(math.ceil(4 * max(1.0, source / target)) + 1, device=device)
    taps = (centre - 2 * reach).floor()[..., None] + taps
    distance = ((taps + 0.5 - centre[..., None]) / reach[..., None]).abs_()
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, far * (distance < 2))
    weights *= (taps >= 0) & (taps < source)
    weights /= weights.sum(-1, keepdim=True)
    dense = torch.zeros(len(start), target, source, device=device)
    return dense.scatter_add_(2, taps.long().clamp_(0, source - 1), weights)


def _change(x: Tensor, chosen: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies ``change`` to the chosen images of ``x`` [B, …], in place."""
    index = chosen.nonzero()[:, 0].to(x.device, non_blocking=True)  # known on the CPU: the device need not wait
    if len(index):
        x[index] = change(x[index])
    return x


def _luma(x: Tensor) -> Tensor:
    """Brightness [B, 1, h, w] of colours [B, 3, h, w]."""
    red, green, blue = _LUMA
    return (x[:, :1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:], alpha=blue)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_luma(x).mean((2, 3), keepdim=True), x, factor).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_luma(x), x, factor).clamp_(0, 1)


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turns the colour circle of HSV, on which red lies at 0 (and 6), green at 2 and blue at 4."""
    red, green, blue = x.unbind(1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    unit = chroma.clamp(min=1e-8)[:, 0]
    top = value[:, 0]
    angle = torch.where(
        top == red,
        (green - blue) / unit,
        torch.where(top == green, (blue - red) / unit + 2, (red - green) / unit + 4),
    )
    angle = (angle + 6 * turn[:, 0]).remainder_(6)
    fades = torch.stack([2 - (angle - 3).abs(), (angle - 2).abs() - 1, (angle - 4).abs() - 1], 1).clamp_(0, 1)
    return torch.addcmul(value, chroma, fades, value=-1)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blurs each image [B, 3, h, w] with its own sigma [B], in pixels."""
    place = torch.arange(x.shape[-1], device=x.device)
    profile = torch.exp(-0.5 * (place / sigma.to(x.device, non_blocking=True)[:, None]) ** 2)
    weights = profile[:, (place[:, None] - place).abs()]
    weights = (weights / weights.sum(-1, keepdim=True))[:, None]
    return weights @ x @ weights.mT
