import json

import matplotlib
import numpy as np
import pytest
from PIL import Image

from gigatome.core.errors import ConfigError
from gigatome.core.geometry import Box
from gigatome.heatmaps.attention import HeatMap
from gigatome.heatmaps.render import OverlayOptions, overlay, write_geojson

NAN = np.nan
BARE = OverlayOptions(alpha=1.0, limits=(0.0, 1.0), legend=False)


def heat(values, *, x=0, y=0, cell=10.0, channels=None):
    values = np.array(values, np.float32)
    names = channels or tuple(f"attention_h{head}" for head in range(len(values)))
    return HeatMap(values, names, x, y, cell, 0.5)


def colour(value, name="coolwarm"):
    return np.rint(np.array(matplotlib.colormaps[name](round(value * 255))[:3]) * 255)


def grey(height, width):
    return np.full((height, width, 3), 100, np.uint8)


def test_colours_lie_where_the_cells_are():
    # level-0 px 40 to 60 in x and 20 to 40 in y, on a picture at a quarter of the scale
    picture = overlay(grey(25, 25), Box(0, 0, 100, 100), heat([[[0, 1], [NAN, 0.5]]], x=40, y=20), BARE)
    assert (picture[5:7, 10:12] == colour(0)).all()
    assert (picture[5:7, 13:15] == colour(1)).all()
    assert (picture[8:10, 13:15] == colour(0.5)).all()
    touched = (picture != 100).any(-1)
    assert not touched[:5].any()
    assert not touched[10:].any()
    assert not touched[:, :10].any()
    assert not touched[:, 15:].any()
    assert not touched[8:10, 10:12].any()


def test_part_of_a_slide_enlarged():
    picture = overlay(grey(40, 80), Box(45, 20, 20, 10), heat([[[0, 1]]], x=40, y=20), BARE)
    assert (picture[:, :20] == colour(0)).all()
    assert (picture[:, 20:60] == colour(1)).all()
    assert (picture[:, 60:] == 100).all()


def test_pixels_that_cover_many_cells_show_their_mean():
    board = np.indices((40, 40)).sum(0) % 2
    picture = overlay(grey(10, 10), Box(0, 0, 400, 400), heat([board]), BARE)
    assert (picture == colour(0.5)).all()


def test_blend_limits_and_channel():
    values = heat([[[2, 4]], [[6, 6]]])
    box, image = Box(0, 0, 20, 10), grey(1, 2)
    mean = overlay(image, box, values, OverlayOptions(alpha=0.5, limits=(4, 5), legend=False))
    np.testing.assert_allclose(mean[0], [(colour(0) + 100) / 2, (colour(1) + 100) / 2], atol=1)
    head = overlay(image, box, values, OverlayOptions(channel=0, alpha=1, limits=(0, 8), legend=False, colormap="jet"))
    np.testing.assert_array_equal(head[0], [colour(0.25, "jet"), colour(0.5, "jet")])
    clipped = overlay(image, box, values, OverlayOptions(channel=0, alpha=1, limits=(2.5, 3), legend=False))
    np.testing.assert_array_equal(clipped[0], [colour(0), colour(1)])


def test_extreme_values_do_not_use_up_the_colours():
    values = np.linspace(0, 1, 400).reshape(20, 20)
    values[0, 0] = -1000
    picture = overlay(grey(20, 20), Box(0, 0, 200, 200), heat([values]), OverlayOptions(alpha=1, legend=False))
    np.testing.assert_allclose(picture[10, 0], colour(0.5), atol=4)


def test_nothing_to_show_and_nothing_to_tell_apart():
    empty = overlay(grey(4, 4), Box(0, 0, 40, 40), heat([np.full((4, 4), NAN)]))
    assert (empty[:4] == 100).all()
    flat = overlay(grey(4, 4), Box(0, 0, 40, 40), heat([np.full((4, 4), 0.3)]), OverlayOptions(alpha=1, legend=False))
    assert (flat == colour(0)).all()


def test_legend_is_added_below():
    image = grey(60, 300)
    with_legend = overlay(image, Box(0, 0, 300, 60), heat([np.full((1, 1), NAN)]))
    assert with_legend.shape[0] > 60
    assert (with_legend[:60] == image).all()
    strip = with_legend[60:].reshape(-1, 3)
    for end in (0, 1):
        assert (np.abs(strip - colour(end)).sum(1) < 6).any()


def features(path):
    return json.loads(path.read_text())["features"]


def test_geojson_for_qupath(tmp_path):
    values = heat([[[0.25, NAN], [0.5, 1]], [[0.75, NAN], [0.5, 0]]], x=100, y=200)
    assert write_geojson(tmp_path / "a.geojson", values, slide="case 1") == 3
    first, _, last = features(tmp_path / "a.geojson")
    assert first["properties"] == {
        "objectType": "tile",
        "measurements": {"attention": 0.5, "attention_h0": 0.25, "attention_h1": 0.75},
    }
    assert first["geometry"] == {
        "type": "Polygon",
        "coordinates": [[[100, 200], [110, 200], [110, 210], [100, 210], [100, 200]]],
    }
    assert last["geometry"]["coordinates"][0][0] == [110, 210]
    assert len({feature["id"] for feature in features(tmp_path / "a.geojson")}) == 3
    before = (tmp_path / "a.geojson").read_bytes()
    write_geojson(tmp_path / "a.geojson", values, slide="case 1")
    assert (tmp_path / "a.geojson").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.geojson"]


def test_geojson_counts_from_the_origin_it_is_given(tmp_path):
    write_geojson(tmp_path / "a.geojson", heat([[[1]]], x=100, y=200), slide="a", origin=(30, 50))
    assert features(tmp_path / "a.geojson")[0]["geometry"]["coordinates"][0][0] == [70, 150]
    assert json.loads((tmp_path / "a.geojson").read_text())["origin"] == [30, 50]


def test_geojson_of_larger_cells(tmp_path):
    values = heat([[[1, 2, 3], [4, NAN, 6]]], channels=("score",))
    assert write_geojson(tmp_path / "a.geojson", values, slide="a", cell=21.0) == 2
    left, right = features(tmp_path / "a.geojson")
    assert left["properties"]["measurements"] == {"score": pytest.approx(7 / 3, abs=1e-6)}
    assert right["properties"]["measurements"] == {"score": 4.5}
    assert left["geometry"]["coordinates"][0][2] == [20, 20]


def test_geojson_of_a_map_without_values(tmp_path):
    assert write_geojson(tmp_path / "a.geojson", heat([[[NAN]]]), slide="a") == 0
    assert features(tmp_path / "a.geojson") == []


def test_a_picture_opens(tmp_path):
    picture = overlay(grey(30, 40), Box(0, 0, 40, 30), heat([[[0, 1]]]))
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (OverlayOptions(channel=2), "channels 0 to 1, not 2"),
        (OverlayOptions(channel=-1), "channels 0 to 1, not -1"),
        (OverlayOptions(colormap="rainbow 7"), "no colour map rainbow 7"),
    ],
)
def test_what_cannot_be_drawn(options, message):
    with pytest.raises(ConfigError, match=message):
        overlay(grey(1, 2), Box(0, 0, 20, 10), heat([[[0, 1]], [[0, 1]]]), options)


def test_alpha_is_a_share():
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        OverlayOptions(alpha=50)
