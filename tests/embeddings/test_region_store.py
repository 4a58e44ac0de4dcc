"""Files of regions: what is written is read, and what is no such file is said to be none."""

import h5py
import numpy as np
import pytest

from gigatome.core.errors import StoreError
from gigatome.embeddings.regions import (
    REGIONS,
    TILES,
    RegionBag,
    read_mask,
    read_regions,
    region_attributes,
    write_regions,
)
from gigatome.embeddings.store import Bag, EmbeddingStore, read_header, write_bag
from gigatome.tiles.grid import TileGrid, read_grid
from gigatome.tiles.regions import RegionOptions, make_regions


@pytest.fixture
def regions():
    places = np.array([(x, y) for y in range(5) for x in range(7) if (x + 2 * y) % 3])
    grid = TileGrid(places * 128, np.ones(len(places), np.float32), 64, 0.5, 0, 0.25, 900, 640, 0.4, "f" * 16)
    return make_regions(grid, RegionOptions(2, 1))


@pytest.fixture
def bag(regions):
    grids = np.random.default_rng(0).standard_normal((*regions.mask.shape, 6)).astype(np.float32)
    grids[~regions.mask] = 0
    attrs = region_attributes(regions, "a", "there")
    return RegionBag("a", "tiny", regions.coords, grids, regions.mask, attrs, {"encoder_weights": "abc"})


def test_what_is_written_is_read(bag, regions, tmp_path):
    path = tmp_path / "features_tiny" / "a.h5"
    write_regions(path, bag)
    found = read_regions(path)
    assert (found.name, found.encoder, found.encoding) == ("a", "tiny", {"encoder_weights": "abc"})
    for key in ("coords", "grids", "mask"):
        np.testing.assert_array_equal(getattr(found, key), getattr(bag, key))
        assert getattr(found, key).dtype == getattr(bag, key).dtype
    np.testing.assert_array_equal(read_mask(path), regions.mask)
    header = read_header(path)
    assert (header.dim, header.weights) == (6, "abc")
    np.testing.assert_array_equal(header.coords, bag.coords)
    attrs = found.attrs
    assert (attrs[TILES], attrs["region_min_tiles"], attrs["region_background"]) == (2, 1, "mask")
    assert attrs[REGIONS] == regions.digest
    assert (attrs["patch_size"], attrs["patch_size_level0"], attrs["target_mpp"]) == (128, 256, 0.5)
    assert [path.name for path in path.parent.iterdir()] == ["a.h5"]


def test_a_file_is_a_grid_of_tiles_of_the_size_of_regions(bag, regions, tmp_path):
    write_regions(tmp_path / "a.h5", bag)
    grid = read_grid(tmp_path / "a.h5")
    assert (grid.tile_size, grid.mpp, grid.slide_mpp, grid.side) == (128, 0.5, 0.25, 256)
    np.testing.assert_array_equal(grid.coords, regions.coords)


def test_half_files(bag, tmp_path):
    write_regions(tmp_path / "a.h5", bag, dtype="float16")
    found = read_regions(tmp_path / "a.h5").grids
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, bag.grids.astype(np.float16))


def test_the_mean_of_a_slide_is_that_of_its_tiles(bag, regions, tmp_path):
    write_regions(tmp_path / "features_tiny" / "a.h5", bag)
    names, vectors = EmbeddingStore.open(tmp_path / "features_tiny").slide_vectors()
    assert names == ["a"]
    np.testing.assert_allclose(vectors[0], bag.grids[regions.mask].mean(0), atol=1e-6)


def test_shapes_that_do_not_belong_together(bag):
    with pytest.raises(ValueError, match=r"regions need coords \[R, 2\], grids \[R, T, D\] and mask \[R, T\]"):
        RegionBag("a", "tiny", bag.coords, bag.grids, bag.mask[:, :-1])
    with pytest.raises(ValueError, match="a: regions need coords"):
        RegionBag("a", "tiny", bag.coords[1:], bag.grids, bag.mask)


@pytest.mark.parametrize("read", [read_regions, read_mask])
def test_files_that_hold_no_regions(bag, read, tmp_path):
    with pytest.raises(StoreError, match="there is no such file; embed the slide with level region first"):
        read(tmp_path / "none.h5")
    write_bag(tmp_path / "tiles.h5", Bag("a", "tiny", bag.coords, bag.grids[:, 0]))
    with pytest.raises(StoreError, match="holds embeddings of tiles, not of regions"):
        read(tmp_path / "tiles.h5")
    write_regions(tmp_path / "cut.h5", bag)
    (tmp_path / "cut.h5").write_bytes((tmp_path / "cut.h5").read_bytes()[:1500])
    with pytest.raises(StoreError, match="is damaged and cannot be read"):
        read(tmp_path / "cut.h5")


def test_a_file_without_coords_is_damaged(bag, tmp_path):
    write_regions(tmp_path / "a.h5", bag)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["coords"]
    with pytest.raises(StoreError, match="is damaged"):
        read_regions(tmp_path / "a.h5")


def test_a_write_that_fails_leaves_nothing(bag, tmp_path):
    bad = RegionBag("a", "tiny", bag.coords, bag.grids, bag.mask, {}, {"odd": object()})
    with pytest.raises(TypeError):
        write_regions(tmp_path / "a.h5", bad)
    assert list(tmp_path.iterdir()) == []
