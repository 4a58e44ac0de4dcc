"""Small slides, and small encoders, for the tests of extraction."""

import shutil

import cv2
import numpy as np
import pytest
import tifffile
import torch
from small_regions import region_vit
from torch import nn

from gigatome.embeddings.extract import embed
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.slides.cohort import Cohort
from gigatome.slides.slide import Slide

MPP = 0.5


def write_slide(path, seed, *, side=640, tissue=(96, 96, 320, 256)):
    """A tiled TIFF with one blotch of something like stained tissue on white; box as x, y, width, height."""
    rng = np.random.default_rng(seed)
    image = np.full((side, side, 3), 245, np.uint8)
    x, y, width, height = tissue
    grain = cv2.resize(rng.integers(0, 255, (height // 8, width // 8), np.uint8), (width, height))[..., None] / 255
    image[y : y + height, x : x + width] = np.array([200, 120, 180]) - grain * np.array([120, 90, 60])
    tifffile.imwrite(path, image, tile=(128, 128), photometric="rgb", compression="deflate")


@pytest.fixture(scope="session")
def slides(tmp_path_factory):
    """Folder with four slides of different sizes of tissue, and their table."""
    folder = tmp_path_factory.mktemp("slides")
    boxes = [(96, 96, 320, 256), (64, 64, 256, 320), (128, 64, 400, 448), (32, 32, 256, 256)]
    for k, box in enumerate(boxes):
        write_slide(folder / f"s{k}.tif", k, tissue=box)
    lines = ["slide,patient,mpp,subtype", *(f"s{k}.tif,p{k // 2},{MPP},{'ab'[k % 2]}" for k in range(4))]
    (folder / "cohort.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def cohort(slides):
    return Cohort.read(slides / "cohort.csv")


@pytest.fixture(scope="session")
def encoder():
    """A vision transformer of two blocks, 32 wide."""
    torch.set_num_threads(1)
    config = EncoderConfig(image_size=64, patch_size=16, dim=32, depth=2, heads=2)
    return build_encoder(config, seed=0, name="tiny").eval()


class ColourEncoder(nn.Module):
    """The least that embed() takes: the mean colour of a tile, as (red, green, blue) in [0, 1]."""

    dim = 3

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.batches = []

    def normalise(self, images):
        return images.permute(0, 3, 1, 2).float() / 255

    def forward(self, images):
        self.batches.append(len(images))
        return images.mean((2, 3)) * self.scale


@pytest.fixture(scope="session")
def colour_encoder():
    return ColourEncoder


@pytest.fixture
def colours():
    return ColourEncoder()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def prepared(slides, colour_encoder, tmp_path_factory):
    """A job directory in which tissue and tiles are found already."""
    folder = tmp_path_factory.mktemp("prepared")
    store = embed(slides / "cohort.csv", encoder=colour_encoder(), out=folder, tile_size=64, mpp=MPP, min_tissue=0.5)
    shutil.rmtree(store.folder)
    next(store.tiles.path.glob("_config*")).unlink()
    return folder


@pytest.fixture
def job(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "job")


@pytest.fixture(scope="session")
def region_encoder():
    """A region encoder for regions of the embeddings of ``encoder``."""
    return region_vit()


@pytest.fixture
def reads(monkeypatch):
    """Names of the slides of which tiles were read, one for each tile."""
    seen, whole = [], Slide.read_tile

    def read_tile(self, *args, **kwargs):
        seen.append(self.name)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Slide, "read_tile", read_tile)
    return seen
