"""Whether a tile looks like tissue, by the colours of its pixels.

Source: arXiv:2504.05186 (Midnight): a tile is kept if at least 60 % of its pixels have a hue in [90, 180], a saturation
in [8, 255] and a value in [103, 255], in OpenCV's units. The authors' code is not published; the numbers are as the
public re-implementations (wsistream, OpenMidnight) have them, of which OpenMidnight asks for more than 60 %.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class HsvFilter:
    """Which tiles are kept, in OpenCV's 8-bit units: hue 0 to 179 (half degrees), saturation and value 0 to 255.

    The hues of the defaults go from cyan over blue to magenta and end just before red: strong red, as of blood, and
    brown, as of DAB, do not count.

    Attributes:
        hue: least and greatest hue of a pixel that counts; 180 is as good as 179.
        saturation: its least and greatest saturation.
        value: its least and greatest value.
        share: part of the pixels that must count, 0 to 1.
    """

    hue: tuple[int, int] = (90, 180)
    saturation: tuple[int, int] = (8, 255)
    value: tuple[int, int] = (103, 255)
    share: float = 0.6

    def __post_init__(self):
        for name, (low, high), limit in (
            ("hue", self.hue, 180), ("saturation", self.saturation, 255), ("value", self.value, 255)
        ):  # fmt: skip
            if not 0 <= low <= high <= limit:
                raise ValueError(f"{name} must be two numbers from 0 to {limit}, the lesser first, not {low}, {high}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie between 0 and 1, not {self.share}")


def keeps(image: NDArray[np.uint8], wanted: HsvFilter) -> bool:
    """Whether a tile passes the filter.

    Args:
        image: uint8 [H, W, 3], RGB.
        wanted: what a pixel must be, and how many of them.
    """
    low, high = zip(wanted.hue, wanted.saturation, wanted.value, strict=True)
    counted = cv2.inRange(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), low, high)
    return cv2.countNonZero(counted) / counted.size >= wanted.share
