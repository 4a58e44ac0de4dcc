"""Changes of colour, for a batch of images at once, each by its own amount.

Images are float32 [B, 3, h, w] in [0, 1]; what is changed is not written to.
"""

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)

# Optical density, in red, green and blue, of haematoxylin, eosin and diaminobenzidine.
# Source: Ruifrok and Johnston 2001, "Quantification of histochemical staining by color deconvolution".
_STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))


def luma(x: Tensor) -> Tensor:
    """Brightness [B, 1, h, w] of colours."""
    red, green, blue = _LUMA
    return (x[:, :1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:], alpha=blue)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiplies by ``factor`` [B, 1, 1, 1]."""
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Moves away from the image's mean brightness by ``factor`` [B, 1, 1, 1]."""
    return torch.lerp(luma(x).mean((2, 3), keepdim=True), x, factor).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Moves away from each pixel's brightness by ``factor`` [B, 1, 1, 1]."""
    return torch.lerp(luma(x), x, factor).clamp_(0, 1)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turns the colour circle of HSV, on which red lies at 0 (and 6), green at 2 and blue at 4.

    Args:
        x: images.
        turn: [B, 1, 1, 1], 1 for once round.
    """
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


def restain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Changes how much haematoxylin, eosin and residual there is: each amount times ``scale``, plus ``shift``.

    Amounts are those of colour deconvolution, with optical density to base 10; 1/255 is the darkest there is.

    Source: arXiv 1902.06543, HED jitter; differs: the base of the logarithm, which it does not state.

    Args:
        x: images.
        scale: [B, 3], on the CPU.
        shift: the same.
    """
    stains = torch.tensor(_STAINS)
    mixing = torch.linalg.inv(stains) @ (scale[:, :, None] * stains)
    mixing, offset = (values.mT.to(x.device, non_blocking=True) for values in (mixing, (shift @ stains)[:, None]))
    density = torch.baddbmm(offset, mixing, x.flatten(2).clamp(min=1 / 255).log10_().neg_())
    return torch.pow(10, density.neg_()).clamp_(0, 1).view_as(x)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian of standard deviation ``sigma`` [B] pixels, cut off at four of them, renormalised at the edge."""
    place = torch.arange(x.shape[-1], device=x.device)
    sigma = sigma.to(x.device, non_blocking=True)[:, None]
    profile = torch.exp(-0.5 * (place / sigma) ** 2) * (place <= (4 * sigma).ceil())
    weights = profile[:, (place[:, None] - place).abs()]
    weights = (weights / weights.sum(-1, keepdim=True))[:, None]
    return weights @ x @ weights.mT


def solarize(x: Tensor) -> Tensor:
    """Inverts what is at least 0.5."""
    return torch.where(x >= 0.5, 1 - x, x)
