"""Pictures of slides as they look at 8 µm per pixel, with the truth beside them."""

from dataclasses import dataclass

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

GLASS = (243, 241, 243)
EOSIN = np.array([0.07, 0.35, 0.15])  # optical density of pink stroma in red, green and blue
HAEMATOXYLIN = np.array([0.35, 0.45, 0.20])


@dataclass
class Picture:
    """A picture under construction: optical densities on glass, and which pixels are tissue."""

    density: NDArray[np.float64]
    tissue: NDArray[np.bool_]
    rng: np.random.Generator

    @property
    def rgb(self) -> NDArray[np.uint8]:
        light = np.array(GLASS) * 10**-self.density + self.rng.normal(0, 0.7, self.density.shape)
        return np.clip(np.rint(light), 0, 255).astype(np.uint8)

    def add_tissue(self, where: NDArray[np.bool_], strength: float = 1.0) -> "Picture":
        """Pink stroma with nuclei, as dense as ``strength``."""
        nuclei = self.rng.random(where.shape) < 0.2
        stain = np.where(nuclei[..., None], HAEMATOXYLIN, EOSIN) * self.rng.uniform(0.6, 1.4, (*where.shape, 1))
        self.density += strength * where[..., None] * stain
        self.tissue |= where
        return self

    def add_fat(self, where: NDArray[np.bool_], radius: int = 4) -> "Picture":
        """White round cells as large as fat cells between thin pink walls."""
        walls = np.ones(where.shape, np.uint8)
        step = 2 * radius + 1
        for row, y in enumerate(range(0, where.shape[0], step)):
            for x in range((row % 2) * radius, where.shape[1], step):
                cv2.circle(walls, (x, y), radius, 0, -1)
        self.density += (where & (walls > 0))[..., None] * EOSIN * 0.35
        self.tissue |= where
        return self

    def add_line(self, points, width: int, density, closed: bool = False) -> NDArray[np.bool_]:
        """Something on top of the glass that absorbs ``density``; gives its pixels."""
        mark = np.zeros(self.tissue.shape, np.uint8)
        cv2.polylines(mark, [np.array(points, np.int32)], closed, 1, width)
        self.density += cv2.GaussianBlur(mark.astype(float), (0, 0), 0.6)[..., None] * np.asarray(density)
        return mark > 0


def disk(shape, x, y, radius) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


@pytest.fixture
def picture():
    def make(height: int = 240, width: int = 320) -> Picture:
        return Picture(np.zeros((height, width, 3)), np.zeros((height, width), bool), np.random.default_rng(0))

    return make
