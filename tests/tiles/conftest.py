"""Small slides for grids and streams: cheap to make, and every tile tells where it was read."""

import numpy as np
import pytest
import shapely
import tifffile

from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.tissue.mask import TissueMask

WIDTH, HEIGHT = 1600, 1200


def write_slide(path, seed=0):
    """A tiled TIFF whose red and green channels are coordinates and whose blue channel is the seed."""
    rgb = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    rgb[..., 0] = np.arange(WIDTH)[None] // 8
    rgb[..., 1] = np.arange(HEIGHT)[:, None] // 8
    rgb[..., 2] = seed
    tifffile.imwrite(path, rgb, tile=(128, 128), compression="deflate", photometric="rgb")
    return path


def ring(x=800, y=600, outer=500, inner=200):
    """A round piece of tissue with a hole."""
    centre = shapely.Point(x, y)
    return centre.buffer(outer).difference(centre.buffer(inner))


@pytest.fixture
def cohort(tmp_path):
    """Four slides at 0.5 mpp."""
    folder = tmp_path / "slides"
    folder.mkdir()
    paths = [write_slide(folder / f"s{index}.tif", seed=60 * index) for index in range(4)]
    return Cohort(tuple(CohortSlide(str(path), path.stem, path.stem, 0.5) for path in paths), "four slides")


@pytest.fixture
def masks():
    """Tissue of the four slides."""
    return {f"s{index}": TissueMask.of([ring(x=700 + 50 * index)], WIDTH, HEIGHT, mpp=0.5) for index in range(4)}
