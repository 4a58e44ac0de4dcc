"""Which pixels of a small picture of a slide are tissue: by colour relative to the glass, not by brightness.

Glass, dust, bubbles, cover-slip edges and black ink absorb all colours alike; stained tissue does not. So the measure
is the *stain*: the spread of the three optical densities after the glass has been made white. It needs no split of a
histogram in two, and therefore does not fail on a picture without background, or with almost no tissue.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Plane = NDArray[np.float32]

_GREY = 0.25  # spread ÷ mean density: H&E ≥ 0.36 at its 0.1th percentile on 20 of 21 slides, cover-slip edges ≤ 0.2
_DEFAULT_WHITE = 245.0  # where no glass is in sight; the developers' slides have it between 223 and 250


@dataclass(frozen=True)
class SegmentOptions:
    """How tissue is told from glass.

    Attributes:
        mpp: resolution to work at, µm per pixel; a slide that is coarser is taken as it is.
        stain: spread of optical density that is tissue beyond doubt.
        faint: spread, averaged over ``reach``, that is tissue if it touches tissue beyond doubt: fat, pale stroma.
        reach: µm; about half a fat cell.
        gap: µm; clefts narrower than twice this are closed, and threads thinner than it removed.
        min_area: µm²; smaller fragments are dropped. The default is the area of one 256 px tile at 0.5 mpp.
        min_hole: µm²; smaller holes are filled.
    """

    mpp: float = 8.0
    stain: float = 0.025
    faint: float = 0.010
    reach: float = 40.0
    gap: float = 16.0
    min_area: float = 16_384.0
    min_hole: float = 16_384.0

    def __post_init__(self):
        if not self.mpp > 0:
            raise ValueError(f"mpp must be positive, not {self.mpp}")
        if not 0 < self.faint <= self.stain:
            raise ValueError(f"faint must lie between 0 and stain ({self.stain}), not {self.faint}")
        if min(self.reach, self.gap, self.min_area, self.min_hole) < 0:
            raise ValueError("reach, gap, min_area and min_hole must not be negative")


def tissue_pixels(rgb: NDArray[np.uint8], mpp: float, options: SegmentOptions | None = None) -> Mask:
    """Marks tissue in a picture of a slide.

    Args:
        rgb: uint8 [H, W, 3], best at 4 to 30 µm per pixel.
        mpp: µm per pixel of ``rgb``.
        options: thresholds and sizes.

    Returns:
        bool [H, W], True on tissue.
    """
    options = options or SegmentOptions()
    density = optical_density(rgb, glass_colour(rgb))
    spread, mean = _spread(density), _mean(density)
    ink = ink_pixels(density, mpp)
    coloured = (spread > _GREY * mean) & ~ink
    strong = coloured & (spread > options.stain)
    faint = _coarse_spread(density, coloured, options, mpp) > options.faint
    clear = _morph((spread < options.faint) & (mean < 2 * options.stain), cv2.MORPH_OPEN, options.gap / mpp)
    bare = _touching(clear, _morph(clear, cv2.MORPH_OPEN, max(3, 0.75 * options.reach / mpp)))
    mask = _touching(strong | (faint & ~ink & ~bare), strong)
    mask = _morph(mask, cv2.MORPH_CLOSE, max(1.5, options.gap / mpp))
    mask = _morph(mask, cv2.MORPH_OPEN, options.gap / mpp) & ~ink
    mask = _without_small(mask, max(32, options.min_area / mpp**2))
    return ~_without_small(~mask, max(64, options.min_hole / mpp**2), connectivity=4)


def glass_colour(rgb: NDArray[np.uint8]) -> Plane:
    """Colour of bare glass: the brightest frequent colour that is smooth, bright and nearly neutral.

    Pixels of pure white are left out: they are where the scanner did not look.

    Returns:
        float32 [3], 0 to 255; a light grey if no glass is in sight.
    """
    soft = _blur(rgb, 1.0)
    grey = _mean(soft)
    unscanned = _morph(cv2.inRange(rgb, (255,) * 3, (255,) * 3) > 0, cv2.MORPH_OPEN, 2)
    bright = (grey > 170) & (_spread(soft) < 25)
    smooth = bright & (_local_deviation(_mean(rgb.astype(np.float32))) < 3) & ~unscanned
    counts = np.convolve(np.bincount(np.rint(grey[smooth]).astype(np.int64), minlength=256), np.ones(7), "same")
    frequent = np.flatnonzero(counts >= max(0.002 * grey.size, 0.25 * counts.max()))
    if not len(frequent):
        return np.full(3, _DEFAULT_WHITE, np.float32)
    first = max(0, frequent[-1] - 8)
    peak = first + int(counts[first : frequent[-1] + 1].argmax())
    return np.median(soft[smooth & (np.abs(grey - peak) <= 4)], axis=0).astype(np.float32)


def optical_density(rgb: NDArray[np.uint8], white: Plane) -> Plane:
    """Optical density of each channel relative to ``white``, float32 [H, W, 3]; slightly smoothed, never negative."""
    soft = _blur(rgb, 0.8)
    return np.maximum(np.log10((white + 1) / (soft + 1)), 0, dtype=np.float32)


def ink_pixels(density: Plane, mpp: float) -> Mask:
    """Marks of blue, green, red and black pens, with their soft rims.

    Blue and green ink absorb red most, which no histological stain in common use does at that density. Red ink absorbs
    green and blue alike; so, nearly, does blood, so a red spot of doubt counts only if it lies on glass. Black ink is
    wide, and grey or, on tissue, denser in all three channels than folded tissue is.
    """
    red, green, blue = density[..., 0], density[..., 1], density[..., 2]
    cool = (red > 0.25) & (red - green > 0.25 * red)
    rim = (red > 0.02) & (red - green > 0.15 * red)
    cool = _touching(cool | rim, _without_small(cool, 2_000 / mpp**2))
    warm = (green > 0.4) & (red < 0.35 * green) & (blue > 0.75 * green)
    warm = _on_glass(warm, density) | (warm & (blue > 0.82 * green))
    mean = _mean(density)
    black = (mean > 0.4) & (_spread(density) < 0.2 * mean) | (np.minimum(np.minimum(red, green), blue) > 0.65)
    black = _without_small(black, 10_000 / mpp**2)
    ink = cool | warm | black
    return _morph(ink, cv2.MORPH_DILATE, max(1.0, 16 / mpp)) if ink.any() else ink


def _on_glass(mask: Mask, density: Plane) -> Mask:
    """The components of ``mask`` that are surrounded mostly by glass."""
    count, labels = _components(mask)
    if count == 1 or count >= 2**16:
        return np.zeros_like(mask)
    near = cv2.dilate(labels.astype(np.uint16), np.ones((9, 9), np.uint8))
    ring = (near > 0) & ~_morph(mask, cv2.MORPH_DILATE, 2)
    around = np.bincount(near[ring], minlength=count)
    bare = np.bincount(near[ring & (_mean(density) < 0.03)], minlength=count)
    return (bare > 0.5 * around)[labels]


def _coarse_spread(density: Plane, coloured: Mask, options: SegmentOptions, mpp: float) -> Plane:
    """Spread of the mean colour around each pixel; noise averages out, and dense tissue does not shine far."""
    weight = np.minimum(1, 3 * options.faint / np.maximum(_spread(density), 1e-6)) * coloured
    weighted = np.multiply(density, weight[..., None], dtype=np.float32)
    return _spread(_blur(weighted, max(0.5, options.reach / mpp)))


def _local_deviation(grey: Plane) -> Plane:
    mean = np.asarray(cv2.blur(grey, (5, 5)))
    return np.sqrt(np.maximum(cv2.blur(grey * grey, (5, 5)) - mean * mean, 0))


def _touching(mask: Mask, seeds: Mask) -> Mask:
    """The components of ``mask`` that hold a pixel of ``seeds``."""
    count, labels = _components(mask)
    keep = np.zeros(count, bool)
    keep[labels[seeds & mask]] = True
    return keep[labels]


def _without_small(mask: Mask, area: float, connectivity: int = 8) -> Mask:
    """``mask`` without its components of fewer than ``area`` pixels."""
    count, labels = _components(mask, connectivity)
    keep = np.bincount(labels.ravel(), minlength=count) >= area
    keep[0] = False
    return keep[labels]


def _components(mask: Mask, connectivity: int = 8) -> tuple[int, NDArray[np.int32]]:
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=connectivity)
    return count, np.asarray(labels, np.int32)


def _morph(mask: Mask, operation: int, radius: float) -> Mask:
    """Morphology with a disk of ``radius`` pixels; beyond its edges the picture goes on as it is there."""
    reach = round(radius)
    if reach < 1:
        return mask
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (rows**2 + columns**2 <= radius**2 + 0.5).astype(np.uint8)
    margin = reach + 1
    padded = np.pad(mask.astype(np.uint8), margin, mode="edge")
    done = np.asarray(cv2.morphologyEx(padded, operation, disk))
    return done[margin:-margin, margin:-margin] > 0


def _blur(image: NDArray, sigma: float) -> Plane:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)


def _spread(image: Plane) -> Plane:
    """Largest minus smallest of the three channels; several times as fast as ``np.ptp``."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    return np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)


def _mean(image: Plane) -> Plane:
    return (image[..., 0] + image[..., 1] + image[..., 2]) / np.float32(3)
