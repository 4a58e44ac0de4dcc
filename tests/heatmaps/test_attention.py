from dataclasses import dataclass, replace

import numpy as np
import pytest
import shapely
import torch

from gigatome.core.errors import ConfigError, DamagedSlideError, NoTissueError
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.heatmaps.attention import AttentionOptions, HeatMap, attention_map, tile_map
from gigatome.tiles.grid import TileGrid
from gigatome.tissue.mask import TissueMask

PATCH, TILE = 8, 32


def grid(coords, *, slide_mpp=0.25, mpp=0.5, overlap=0, tile_size=TILE):
    coords = np.array(coords, np.int64).reshape(-1, 2)
    return TileGrid(
        coords=coords,
        tissue_fraction=np.ones(len(coords), np.float32),
        tile_size=tile_size,
        mpp=mpp,
        overlap=overlap,
        slide_mpp=slide_mpp,
        slide_width=4000,
        slide_height=3000,
    )


class PlaceSlide:
    """A slide whose pixels say where they are: red is level-0 x / 8, green is level-0 y / 8."""

    mpp = 0.25
    uri = "place.svs"

    def read_tile(self, x, y, tile_size, mpp, *, exact=True):
        places = (np.arange(tile_size) + 0.5) * mpp / self.mpp
        tile = np.zeros((tile_size, tile_size, 3), np.uint8)
        tile[..., 0] = np.rint((x + places) / 8)[None, :]
        tile[..., 1] = np.rint((y + places) / 8)[:, None]
        return tile


@dataclass
class Seen:
    """An encoder of two heads, which attend by the red and the green of a patch."""

    patch_size: int = PATCH
    training: bool = True

    def train(self, mode=True):
        self.training = mode

    def eval(self):
        self.train(False)

    def normalise(self, images):
        return images.permute(0, 3, 1, 2).float()

    def attention(self, images):
        assert not self.training
        return torch.nn.functional.avg_pool2d(images[:, :2], PATCH)


class PlaceInTile(Seen):
    """An encoder of one head, which attends by the column of a patch in its tile."""

    def attention(self, images):
        side = images.shape[2] // PATCH
        return torch.arange(float(side)).expand(len(images), 1, side, side)


class Constant(Seen):
    def attention(self, images):
        return torch.full((len(images), 1, 4, 4), 1 / 17)


def cell_centres(heat):
    _, rows, columns = heat.values.shape
    return heat.x + (np.arange(columns) + 0.5) * heat.cell, heat.y + (np.arange(rows) + 0.5) * heat.cell


@pytest.mark.parametrize("shifts", [1, 2, 4])
@pytest.mark.parametrize(("slide_mpp", "mpp"), [(0.25, 0.5), (0.25, 0.3), (0.25, 0.25)])
def test_every_patch_lies_where_it_was_read(shifts, slide_mpp, mpp):
    side = TILE * mpp / slide_mpp
    coords = [(100 + round(i * side), 200 + round(j * side)) for i, j in [(0, 0), (1, 0), (3, 0), (0, 1), (2, 4)]]
    tiles = grid(coords, slide_mpp=slide_mpp, mpp=mpp)
    options = AttentionOptions(rank="none", shifts=shifts, batch_size=2, threads=2)
    heat = attention_map(PlaceSlide(), Seen(), tiles, options)
    assert heat.channels == ("attention_h0", "attention_h1")
    assert heat.values.shape == (2, 5 * 4, 4 * 4)
    assert (heat.x, heat.y, heat.cell, heat.mpp) == (100, 200, side / 4, pytest.approx(PATCH * mpp))
    x, y = cell_centres(heat)
    present = np.isfinite(heat.values[0])
    assert present.sum() == 5 * 16
    assert present[:4, :8].all()
    assert not present[:4, 8:12].any()
    assert present[16:, 8:12].all()
    error = np.abs(heat.values * 8 - np.stack(np.broadcast_arrays(x[None, :], y[:, None])))
    assert error[:, present].max() < 5  # level-0 px; a patch is 10 at the least


def test_shifted_passes_are_averaged():
    # columns 0 1 2 3 of each tile; the pass shifted by half a tile sees the same patches as 2 3 0 1
    heat = attention_map(PlaceSlide(), PlaceInTile(), grid([(0, 0), (64, 0)]), AttentionOptions(rank="none", shifts=2))
    np.testing.assert_allclose(heat.values[0, 0], [0, 1, 1, 2, 1, 2, 1, 2])


def test_rank_in_tile():
    heat = attention_map(PlaceSlide(), PlaceInTile(), grid([(0, 0), (64, 64)]), AttentionOptions(shifts=1))
    expected = (np.arange(4) + 0.5) / 4  # four patches share each value, and the middle of its ranks
    np.testing.assert_allclose(heat.values[0, 0], [*expected, *[np.nan] * 4])
    np.testing.assert_allclose(heat.values[0, 7], [*[np.nan] * 4, *expected])
    flat = attention_map(PlaceSlide(), Constant(), grid([(0, 0)]), AttentionOptions(shifts=1))
    assert (flat.values == 0.5).all()


def test_rank_on_slide():
    heat = attention_map(PlaceSlide(), Seen(), grid([(0, 0), (640, 0)]), AttentionOptions(rank="slide", shifts=1))
    rows = heat.values[0, 0][np.isfinite(heat.values[0, 0])]
    np.testing.assert_allclose(rows, (np.arange(8) + 0.5) / 8)  # red grows over the slide, not within each tile only


def test_real_encoder_and_progress():
    encoder = build_encoder(EncoderConfig("vit_tiny_patch16_224", 32, PATCH, 32, 2, 2), seed=0)
    calls = []
    heat = attention_map(
        PlaceSlide(),
        encoder,
        grid([(0, 0), (64, 0), (128, 0)]),
        AttentionOptions(rank="none", shifts=1, batch_size=2),
        progress=lambda *call: calls.append(call),
    )
    assert calls == [("attention", 2, 3), ("attention", 3, 3)]
    assert encoder.training
    encoder.eval()
    tile = torch.from_numpy(PlaceSlide().read_tile(64, 0, TILE, 0.5))[None]
    with torch.inference_mode():
        expected = encoder.attention(encoder.normalise(tile))[0]
    np.testing.assert_allclose(heat.values[:, :, 4:8], expected.numpy(), rtol=1e-5)
    np.testing.assert_allclose(heat.mean, heat.values.mean(0))


def test_a_tile_that_cannot_be_read():
    class Damaged(PlaceSlide):
        def read_tile(self, x, y, tile_size, mpp, *, exact=True):
            if x > 300:
                raise DamagedSlideError("a.svs", "chunk 7 is damaged")
            return super().read_tile(x, y, tile_size, mpp)

    encoder = Seen()
    with pytest.raises(DamagedSlideError, match="chunk 7"):
        attention_map(Damaged(), encoder, grid([(64 * i, 0) for i in range(40)]), AttentionOptions(batch_size=2))
    assert encoder.training


@pytest.mark.parametrize(
    ("tile_size", "shifts", "message"),
    [(36, 1, "multiple of the patch size"), (32, 5, "5 shifts")],
)
def test_sizes_that_do_not_suit(tile_size, shifts, message):
    with pytest.raises(ConfigError, match=message):
        attention_map(PlaceSlide(), Seen(), grid([(0, 0)], tile_size=tile_size), AttentionOptions(shifts=shifts))


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match="must be at least 1"):
        AttentionOptions(shifts=0)


def test_no_tiles():
    with pytest.raises(NoTissueError, match=r"place\.svs: no tile has 40% of tissue"):
        attention_map(PlaceSlide(), Seen(), replace(grid([]), min_tissue=0.4))
    with pytest.raises(ValueError, match="at least one tile"):
        tile_map(grid([]), [])


def test_tile_map():
    heat = tile_map(grid([(10, 20), (74, 20), (10, 148)]), [1, 2, 3])
    assert (heat.x, heat.y, heat.cell, heat.channels) == (10, 20, 64, ("value",))
    np.testing.assert_array_equal(heat.values, [[[1, 2], [np.nan, np.nan], [3, np.nan]]])
    two = tile_map(grid([(10, 20), (74, 20)]), np.array([[1, 5], [2, 6]]), channels=("a", "b"))
    np.testing.assert_array_equal(two.values, [[[1, 2]], [[5, 6]]])


def test_tile_map_of_overlapping_tiles():
    heat = tile_map(grid([(0, 0), (48, 0)], overlap=8), [1, 2])  # 64 level-0 px, 16 of them shared
    assert heat.cell == 16
    np.testing.assert_allclose(heat.values[0, 0], [1, 1, 1, 1.5, 2, 2, 2])


def test_tile_map_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="2 tiles and 1 channels do not fit"):
        tile_map(grid([(0, 0), (64, 0)]), [1, 2, 3])
    with pytest.raises(ValueError, match="do not fit"):
        tile_map(grid([(0, 0)]), [[1, 2]])


def test_coarser_averages_what_is_there():
    nan = np.nan
    heat = HeatMap(np.array([[[1, 3, 5], [nan, 2, nan], [nan, nan, 7]]], np.float32), ("a",), 10, 20, 4.0, 0.5)
    coarse = heat.coarser(2)
    np.testing.assert_array_equal(coarse.values, [[[2, 5], [nan, 7]]])
    assert (coarse.x, coarse.y, coarse.cell, coarse.mpp) == (10, 20, 8.0, 4.0)
    assert heat.coarser(1) is heat


def test_within_takes_the_glass_out():
    heat = HeatMap(np.ones((2, 2, 3), np.float32), ("a", "b"), 100, 200, 10.0, 0.5)
    heat.values[:, 1, 2] = np.nan
    mask = TissueMask((shapely.box(100, 200, 116, 210), shapely.box(120, 206, 200, 300)), 1000, 1000)
    np.testing.assert_array_equal(heat.within(mask).values[1], [[1, 1, np.nan], [np.nan] * 3])
    np.testing.assert_array_equal(heat.within(mask, min_tissue=0.4).values[0], [[1, 1, 1], [np.nan] * 3])
