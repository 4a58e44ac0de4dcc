"""Heat-maps as OME-TIFF: the pixels, the pyramid and the resolution, as tifffile and as our own reader find them."""

import matplotlib
import numpy as np
import pytest
import tifffile
from tifffile import TiffFile

from gigatome.core.errors import ConfigError
from gigatome.core.geometry import Box
from gigatome.heatmaps.attention import HeatMap
from gigatome.heatmaps.ome import write_ome_overlay, write_ome_values
from gigatome.heatmaps.render import OverlayOptions, overlay
from gigatome.slides.slide import open_slide

WIDTH, HEIGHT = 2500, 1900
NAN = np.nan


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT // 50, WIDTH // 50, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("slide") / "case.tif"
    options = {"tile": (256, 256), "photometric": "rgb", "resolution": (40000, 40000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels.repeat(50, 0).repeat(50, 1), **options)
    return path


@pytest.fixture
def slide(path):
    with open_slide(path) as opened:
        assert opened.mpp == pytest.approx(0.25)
        yield opened


@pytest.fixture(scope="module")
def heat():
    values = np.random.default_rng(1).random((2, 30, 40)).astype(np.float32)
    values[:, :10, :5] = NAN
    return HeatMap(values, ("a_h0", "a_h1"), 100, 200, 50.0, 0.25)


def test_overlay_equals_the_picture_of_the_whole(tmp_path, slide, heat):
    options = OverlayOptions(legend=False, limits=(0.0, 1.0), alpha=0.4)
    write_ome_overlay(tmp_path / "a.ome.tif", slide, heat, options, mpp=0.5, compression="deflate")
    width, height = WIDTH // 2, HEIGHT // 2
    image = slide.read(Box(0, 0, WIDTH, HEIGHT), mpp=0.5, exact=False)
    expected = overlay(image, Box(0, 0, WIDTH, HEIGHT), heat, options)
    with TiffFile(tmp_path / "a.ome.tif") as tiff:
        assert tiff.is_ome
        series = tiff.series[0]
        assert [level.shape for level in series.levels] == [
            (height, width, 3), (475, 625, 3), (238, 313, 3)
        ]  # fmt: skip
        assert all(page.is_tiled for level in series.levels for page in level.pages)
        np.testing.assert_array_equal(series.asarray(), expected)
        assert len(np.unique(expected.reshape(-1, 3), axis=0)) > 1000


@pytest.mark.parametrize(("compression", "loss"), [("jpeg", 5), ("deflate", 0.1)])
def test_our_own_reader_opens_it(tmp_path, slide, heat, compression, loss):
    options = OverlayOptions(channel=1)
    write_ome_overlay(tmp_path / "a.ome.tif", slide, heat, options, mpp=0.5, compression=compression, quality=95)
    with open_slide(tmp_path / "a.ome.tif") as opened, TiffFile(tmp_path / "a.ome.tif") as tiff:
        assert (opened.vendor, opened.reader, opened.mpp) == ("ome-tiff", "tiff", pytest.approx(0.5))
        assert [(level.width, level.height) for level in opened.levels] == [(1250, 950), (625, 475), (313, 238)]
        stored = tiff.series[0].asarray().astype(float)
        read = opened.read_level(0, 0, 0, 1250, 950).astype(float)
        assert np.abs(read - stored).mean() < 2  # colours are not swapped or shifted
        # no legend, and colours that end at percentiles of the cells
        low, high = np.percentile(heat.values[1][np.isfinite(heat.values[1])], (1, 99))
        plain = OverlayOptions(channel=1, limits=(low, high), legend=False)
        image = slide.read(Box(0, 0, WIDTH, HEIGHT), mpp=0.5, exact=False)
        whole = overlay(image, Box(0, 0, WIDTH, HEIGHT), heat, plain)
        assert np.abs(read - whole).mean() < loss
        small = opened.read_level(1, 0, 0, 625, 475).astype(float)
        assert np.abs(small - whole.reshape(475, 2, 625, 2, 3).mean((1, 3))).mean() < 4 + loss


def test_a_small_picture_is_one_chunk(tmp_path, slide, heat):
    write_ome_overlay(tmp_path / "a.ome.tif", slide, heat, mpp=4.0)
    with open_slide(tmp_path / "a.ome.tif") as opened:
        assert [(level.width, level.height) for level in opened.levels] == [(156, 119)]
        assert opened.mpp == pytest.approx(4)


def test_colour_of_a_cell(tmp_path, slide):
    one = HeatMap(np.ones((1, 1, 1), np.float32), ("v",), 600, 700, 400.0, 0.25)
    options = OverlayOptions(alpha=1.0, limits=(0.0, 1.0), colormap="viridis")
    write_ome_overlay(tmp_path / "a.ome.tif", slide, one, options, mpp=1.0, compression="deflate")
    picture = tifffile.imread(tmp_path / "a.ome.tif")
    colour = np.rint(np.array(matplotlib.colormaps["viridis"](255)[:3]) * 255)
    assert (picture[175:275, 150:250] == colour).all()
    assert (picture[:175] != colour).any(-1).all()
    assert (picture[:, 250:] != colour).any(-1).all()


def test_values_by_channel(tmp_path, slide, heat):
    asked = []

    def single(name):
        asked.append(name)
        index = heat.channels.index(name)
        return HeatMap(heat.values[index][None], (name,), heat.x, heat.y, heat.cell, heat.slide_mpp)

    write_ome_values(tmp_path / "v.ome.tif", slide, heat.channels, single)
    with TiffFile(tmp_path / "v.ome.tif") as tiff:
        series = tiff.series[0]
        assert (series.axes, series.dtype, series.shape) == ("CYX", np.float32, (2, 38, 50))
        expected = np.full((2, 38, 50), NAN, np.float32)
        expected[:, 4:34, 2:42] = heat.values
        np.testing.assert_array_equal(series.asarray(), expected)
        text = tiff.ome_metadata
        assert 'Name="a_h0"' in text
        assert 'Name="a_h1"' in text
        assert 'PhysicalSizeX="12.5"' in text
    assert set(asked) == {"a_h0", "a_h1"}


def test_pyramid_of_values(tmp_path, slide):
    fine = np.random.default_rng(2).random((1, 950, 1250)).astype(np.float32)
    fine[0, :3, :3] = NAN
    heat = HeatMap(fine, ("v",), 0, 0, 2.0, 0.25)
    write_ome_values(tmp_path / "v.ome.tif", slide, ["v"], lambda name: heat)
    with TiffFile(tmp_path / "v.ome.tif") as tiff:
        levels = tiff.series[0].levels
        assert [level.shape[-2:] for level in levels] == [(950, 1250), (475, 625), (238, 313)]
        np.testing.assert_array_equal(levels[0].asarray().squeeze(), fine[0])
        for index in (1, 2):
            np.testing.assert_allclose(levels[index].asarray().squeeze(), heat.coarser(2**index).values[0], rtol=1e-6)


def test_what_cannot_be_written(tmp_path, slide, heat):
    with pytest.raises(ConfigError, match="must be positive, not 0"):
        write_ome_overlay(tmp_path / "a.ome.tif", slide, heat, mpp=0)
    with pytest.raises(ConfigError, match="channels 0 to 1, not 2"):
        write_ome_overlay(tmp_path / "a.ome.tif", slide, heat, OverlayOptions(channel=2))
    assert not list(tmp_path.iterdir())
