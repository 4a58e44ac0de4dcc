"""Pixels of views: what was drawn, done to a batch of tiles on any device. Nothing here is left to chance.

A crop is resampled, mirrored and antialiased by two small matrix products, which is exact, and fast on a GPU. On a CPU
the C extension does the same, and the colours, an image at a time in several threads; the two differ by rounding only.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gigatome.core.native import NATIVE
from gigatome.selfsup import colours

_PART = 4  # images that a thread does at a time; they stay in its cache


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
        angle: by which the view is then turned about its middle, in degrees counter-clockwise. Its corners show what
            lies around the crop, mirrored at the tile's edge.
        stain: the stains are changed.
        stain_scale: [B, 3], of haematoxylin, eosin and residual.
        stain_shift: [B, 3], the same.
        brightness: factor; 1 changes nothing. So are contrast and saturation.
        contrast: see brightness.
        saturation: see brightness.
        hue: shift in turns of the colour circle.
        gray: all colour is removed.
        blur: it is blurred.
        sigma: of the blur in pixels.
        solarize: bright pixels are inverted.
        order: in which brightness (0), contrast (1), saturation (2) and hue (3) are changed: of all images, or of each,
            uint8 [B, 4].
    """

    x: Tensor
    y: Tensor
    width: Tensor
    height: Tensor
    mirror_x: Tensor
    mirror_y: Tensor
    transpose: Tensor
    angle: Tensor
    stain: Tensor
    stain_scale: Tensor
    stain_shift: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    gray: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor
    order: tuple[int, ...] | Tensor


def render_views(
    images: Tensor,
    draws: Sequence[ViewDraw],
    sizes: Sequence[int],
    mean: Tensor | None = None,
    std: Tensor | None = None,
    *,
    native: bool = True,
) -> list[Tensor]:
    """Views of each image.

    Args:
        images: uint8 [B, H, W, 3].
        draws: what to do to each, for each view.
        sizes: sides of the views in pixels.
        mean: [3, 1, 1] on the images' device, 0 to 255; subtracted from the views.
        std: likewise; divided by.
        native: on a CPU, use the C extension where it is there, in as many threads as torch has.

    Returns:
        float32 [B, 3, size, size] for each view; in [0, 1] without ``mean`` and ``std``.
    """
    mean = images.new_zeros(3, 1, 1) if mean is None else mean
    std = images.new_full((3, 1, 1), 255) if std is None else std
    gain, bias = 255 / std, -mean / std
    if not (native and NATIVE is not None and images.device.type == "cpu"):
        pixels = images.float().div_(255)
        return [_render(pixels, *view).mul_(gain).add_(bias) for view in zip(draws, sizes, strict=True)]
    pixels, scaling = images.contiguous().numpy(), torch.stack([gain, bias]).view(2, 3).float().numpy()
    views = [_NativeView(pixels, draw, size, scaling) for draw, size in zip(draws, sizes, strict=True)]
    parts = [slice(begin, begin + _PART) for begin in range(0, len(images), _PART)]
    work, threads = [(view, part) for view in views for part in parts], torch.get_num_threads()
    if threads == 1:
        for view, part in work:
            view.render(part)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(view.render, part) for view, part in work]:
                done.result()
    return [view.out for view in views]


class _NativeView:
    """One view in the making by the C extension; parts of the batch can be rendered in any order, by any thread."""

    def __init__(self, pixels: np.ndarray, draw: ViewDraw, size: int, scaling: np.ndarray):
        self.pixels, self.draw, self.size, self.scaling = pixels, draw, size, scaling
        box, self.canvas = _canvas(draw, size)
        self.boxes = torch.cat([box, _table(draw.mirror_x, draw.mirror_y, draw.transpose)], 1).numpy()
        sigma = draw.sigma * draw.blur
        amounts = (draw.brightness, draw.contrast, draw.saturation, draw.hue, draw.gray, sigma, draw.solarize)
        self.colours = _table(*amounts).numpy()
        self.order = np.asarray(draw.order, np.uint8)
        self.torch_too = bool(draw.angle.any() or draw.stain.any())
        # numpy asks for large pages, torch does not
        self.out = torch.from_numpy(np.empty((len(pixels), 3, size, size), np.float32))

    def render(self, part: slice) -> None:
        out = self.out[part]
        crops = out if self.canvas == self.size else torch.empty(len(out), 3, self.canvas, self.canvas)
        NATIVE.crop_views(self.pixels[part], self.boxes[part], crops.numpy())
        if self.torch_too:
            changed = _turn_and_stain(crops, self.draw, self.size, part)
            if changed is not out:
                out.copy_(changed)
        if self.order.ndim == 1:
            NATIVE.recolour_views(out.numpy(), self.colours[part], self.order, self.scaling)
            return
        for view, amounts, order in zip(out.numpy(), self.colours[part], self.order[part], strict=True):
            NATIVE.recolour_views(view[None], amounts[None], order, self.scaling)


def _render(pixels: Tensor, draw: ViewDraw, size: int) -> Tensor:
    """One view [B, 3, size, size] of pixels float32 [B, H, W, 3] in [0, 1]."""
    x = _turn_and_stain(_crop(pixels, draw, *_canvas(draw, size)), draw, size, slice(None))
    x = _recolour(x, draw)
    x = _change(x, draw.gray, colours.luma)
    x = _change(x, draw.blur, lambda chosen: colours.blur(chosen, draw.sigma[draw.blur]))
    return _change(x, draw.solarize, colours.solarize)


def _recolour(x: Tensor, draw: ViewDraw) -> Tensor:
    """Changes brightness, contrast, saturation and hue in the order drawn."""
    recolour = (
        (colours.brightness, draw.brightness),
        (colours.contrast, draw.contrast),
        (colours.saturation, draw.saturation),
        (colours.hue, draw.hue),
    )
    if not isinstance(draw.order, Tensor):
        for change, amount in (recolour[position] for position in draw.order):
            x = change(x, amount.to(x.device, non_blocking=True)[:, None, None, None])
        return x
    for place in draw.order.unbind(1):
        for position, (change, amount) in enumerate(recolour):
            chosen = place == position
            factor = amount[chosen].to(x.device, non_blocking=True)[:, None, None, None]
            x = _change(x, chosen, lambda images, change=change, factor=factor: change(images, factor))
    return x


def _table(*columns: Tensor) -> Tensor:
    return torch.stack(columns, 1).float()


def _canvas(draw: ViewDraw, size: int) -> tuple[Tensor, int]:
    """Boxes [B, 4] (x, y, width, height) to crop, and to how many pixels: more than the view if it is then turned."""
    box = _table(draw.x, draw.y, draw.width, draw.height)
    if not draw.angle.any():
        return box, size
    canvas = size + 2 * math.ceil((math.sqrt(2) - 1) / 2 * size + 2)  # its diagonal, and what a bicubic kernel reaches
    corner, sides = box.split(2, 1)
    margin = (canvas / size - 1) / 2 * sides
    return torch.cat([corner - margin, sides + 2 * margin], 1), canvas


def _crop(pixels: Tensor, draw: ViewDraw, box: Tensor, size: int) -> Tensor:
    """Crops, resamples, mirrors and transposes: [B, H, W, 3] → [B, 3, size, size]."""
    batch, height, width, _ = pixels.shape
    x, y, box_width, box_height = box.unbind(1)
    rows_BhH = _resampling(y, box_height, draw.mirror_y, height, size, pixels.device)
    columns_BwW = _resampling(x, box_width, draw.mirror_x, width, size, pixels.device)
    x = (rows_BhH @ pixels.reshape(batch, height, width * 3)).view(batch, size, width, 3)
    x = x.permute(0, 3, 1, 2).reshape(batch, 3 * size, width) @ columns_BwW.mT
    x = x.view(batch, 3, size, size).clamp_(0, 1)
    return _change(x, draw.transpose, lambda chosen: chosen.mT)


def _resampling(
    start: Tensor, length: Tensor, mirror: Tensor, source: int, target: int, device: torch.device
) -> Tensor:
    """Weights [B, target, source] that resample ``length`` pixels from ``start`` to ``target`` pixels, all [B].

    Bicubic with a = −0.5, widened when it shrinks so that nothing aliases, as ``PIL.Image.resize`` does it. A place
    outside the tile is that of its mirror image. ``start``, ``length`` and ``mirror`` lie on the CPU.
    """
    taps = torch.arange(math.ceil(4 * max(1.0, float(length.max()) / target)) + 1, device=device)
    start, length, mirror = (values.to(device, non_blocking=True)[:, None] for values in (start, length, mirror))
    step = length / target
    reach = step.clamp(min=1)
    place = torch.arange(target, device=device) + 0.5
    centre = (start + torch.where(mirror, target - place, place) * step).abs()
    centre = (source - (source - centre).abs()).clamp(min=0)
    taps = (centre - 2 * reach).floor()[..., None] + taps
    distance = ((taps + 0.5 - centre[..., None]) / reach[..., None]).abs_()
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, far * (distance < 2))
    weights *= (taps >= 0) & (taps < source)
    weights /= weights.sum(-1, keepdim=True)
    dense = torch.zeros(len(start), target, source, device=device)
    return dense.scatter_add_(2, taps.long().clamp_(0, source - 1), weights)


def _turn_and_stain(x: Tensor, draw: ViewDraw, size: int, part: slice) -> Tensor:
    """Turns and stains images ``part`` of the batch; ``x`` itself, perhaps written to, unless they are turned."""
    if draw.angle.any():
        x = _turn(x, draw.angle[part], size)
    chosen = draw.stain[part]
    scale, shift = draw.stain_scale[part][chosen], draw.stain_shift[part][chosen]
    return _change(x, chosen, lambda images: colours.restain(images, scale, shift))


def _turn(x: Tensor, angle: Tensor, size: int) -> Tensor:
    """The middle ``size`` pixels of images [B, 3, h, h] turned by ``angle`` [B] degrees counter-clockwise."""
    radians = torch.deg2rad(angle)
    cosine, sine = torch.cos(radians), torch.sin(radians)
    zero = torch.zeros_like(sine)
    turn = torch.stack([cosine, -sine, zero, sine, cosine, zero], 1).view(-1, 2, 3) * (size / x.shape[-1])
    places = functional.affine_grid(turn.to(x.device, non_blocking=True), [len(x), 3, size, size], align_corners=False)
    return functional.grid_sample(x, places, mode="bicubic", padding_mode="border", align_corners=False).clamp_(0, 1)


def _change(x: Tensor, chosen: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies ``change`` to the chosen images of ``x`` [B, …], in place."""
    index = chosen.nonzero()[:, 0].to(x.device, non_blocking=True)  # known on the CPU: the device need not wait
    if len(index):
        x[index] = change(x[index])
    return x
