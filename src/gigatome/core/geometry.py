"""Boxes and scales.

Coordinates are (x, y) in level-0 pixels, top-left, everywhere in gigatome; a scale is always microns per pixel
(mpp). Only this module converts between the two.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangle in level-0 pixels.

    Attributes:
        x: left edge; may lie outside the slide.
        y: top edge; may lie outside the slide.
        width: positive, in level-0 pixels.
        height: positive, in level-0 pixels.
    """

    x: int
    y: int
    width: int
    height: int

    def __post_init__(self):
        if self.width <= 0 or self.height <= 0:
            raise ValueError(f"a box needs a positive width and height, not {self.width} × {self.height}")


def level0_length(pixels: float, mpp: float, slide_mpp: float) -> float:
    """Length in level-0 pixels of ``pixels`` pixels at ``mpp`` on a slide of ``slide_mpp``; not rounded."""
    return pixels * mpp / slide_mpp


def magnification(mpp: float) -> float:
    """Nominal objective magnification of a resolution: 0.25 mpp is 40×, 0.5 mpp is 20×. For display only."""
    return 10.0 / mpp


def nominal_magnification(mpp: float) -> float:
    """:func:`magnification`, snapped to a whole number or a power-of-two fraction when within 1 % of it.

    So 0.4990 mpp reads as 20 and 8.01 mpp as 1.25, which is how other tools name their folders; a resolution that is
    truly odd keeps its exact value and loses nothing.
    """
    exact = magnification(mpp)
    unit = 1.0 if exact >= 2.5 else 0.15625
    snapped = round(exact / unit) * unit
    return snapped if snapped > 0 and abs(snapped - exact) < 0.01 * exact else exact
