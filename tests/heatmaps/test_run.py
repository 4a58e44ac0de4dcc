import json

import numpy as np
import pytest
import tifffile
import typer
from made_chains import make_heads
from PIL import Image
from typer.testing import CliRunner

from gigatome.cli.heatmap import heatmap as command
from gigatome.core.errors import ConfigError, MissingMppError, NotASlideError, NoTissueError, StoreError
from gigatome.core.geometry import Box
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.region_zoo import RegionCard, save_region_encoder
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, encoder_name, save_encoder
from gigatome.heatmaps.attention import AttentionOptions, tile_map
from gigatome.heatmaps.hierarchy import HierarchyOptions
from gigatome.heatmaps.render import OverlayOptions, write_overlay
from gigatome.heatmaps.run import heatmap, hierarchical_heatmap
from gigatome.slides.slide import open_slide
from gigatome.slides.synthetic import SyntheticOptions, make_slide
from gigatome.tiles.grid import GridOptions, make_grid
from gigatome.tissue.segment import segment

OPTIONS = SyntheticOptions(width=900, height=800, pen=0, bubbles=0, fat=0, pale=0)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return make_slide(tmp_path_factory.mktemp("slides") / "case.1.svs", "glandular", 1, OPTIONS)


@pytest.fixture(scope="module")
def encoder():
    return build_encoder(EncoderConfig("vit_tiny_patch16_224", 64, 16, 32, 2, 2), seed=0).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("run")
    save_encoder(encoder, folder / "encoder")
    return folder


def test_folder_gets_picture_and_objects(tmp_path, slide, run):
    heat = heatmap(slide, run, tmp_path / "out", geojson=True, attention=AttentionOptions(shifts=1))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["case.1.geojson", "case.1.png"]
    picture = np.asarray(Image.open(tmp_path / "out" / "case.1.png"))
    assert picture.shape[1] == 900
    with open_slide(slide) as opened:
        changed = (picture[:800] != opened.thumbnail(900)).any(-1)
        tissue = segment(opened)
    rows, columns = np.nonzero(changed)
    assert tissue.overlap(columns, rows, 1).mean() > 0.95  # the glass around the tissue stays as it is
    assert heat.cell == 16
    found = json.loads((tmp_path / "out" / "case.1.geojson").read_text())["features"]
    assert all(
        set(item["properties"]["measurements"]) == {"attention", "attention_h0", "attention_h1"} for item in found
    )
    corners = np.array([item["geometry"]["coordinates"][0][0] for item in found])
    assert (corners % 64 == 0).all()
    assert np.isfinite(heat.values).any()


def test_suffix_decides_what_is_written(tmp_path, slide, run):
    heatmap(slide, run, tmp_path / "a.png", attention=AttentionOptions(shifts=1))
    heatmap(slide, run, tmp_path / "b.geojson", attention=AttentionOptions(shifts=1), patches_per_object=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.geojson"]


def test_part_of_a_slide_and_values_of_tiles(tmp_path, slide):
    with open_slide(slide) as opened:
        grid = make_grid(opened, segment(opened), GridOptions(tile_size=64))
        heat = tile_map(grid, np.arange(len(grid)), channels=("contribution",))
        x, y = grid.coords[0].tolist()
        write_overlay(tmp_path / "a.png", opened, heat, OverlayOptions(legend=False), box=Box(x, y, 64, 32))
    assert Image.open(tmp_path / "a.png").size == (64, 32)


def invoke(*arguments):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command(tmp_path, slide, run):
    result = invoke(slide, "--model", run, "-o", tmp_path / "out", "--geojson", "--shifts", 1, "--head", 1)
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "out") in result.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["case.1.geojson", "case.1.png"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--head", "7"], ConfigError, "attention heads 0 to 1, not 7"),
        (["--tile-size", "60"], ConfigError, "multiple of the patch size"),
        (["--tile-size", "0"], ConfigError, "tile_size must be positive"),
        (["--mpp", "-1"], ConfigError, "mpp is µm per pixel and must be positive"),
        (["--rank", "best"], ConfigError, "rank"),
        (["--shifts", "0"], ConfigError, "at least 1"),
        (["--mpp", "16"], NoTissueError, "no tile has 40%"),
        (["--model", "nowhere"], StoreError, "no such encoder"),
        (["-o", "out.png", "--geojson"], ConfigError, "give a folder to have both"),
        (["--device", "no-such-device"], ConfigError, "try device cpu"),
    ],
)
def test_command_with_what_does_not_suit(tmp_path, monkeypatch, slide, run, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    result = invoke(slide, "--model", run, "-o", "out", *arguments)
    assert type(result.exception) is error
    with pytest.raises(error, match=message):
        raise result.exception
    assert list(tmp_path.iterdir()) == []


def test_command_on_what_is_no_slide(tmp_path, run):
    (tmp_path / "notes.svs").write_text("hello")
    assert type(invoke(tmp_path / "notes.svs", "--model", run, "-o", tmp_path / "out").exception) is NotASlideError


def test_command_on_a_slide_without_resolution(tmp_path, run):
    tifffile.imwrite(tmp_path / "a.tif", np.full((512, 512, 3), 240, np.uint8), tile=(256, 256), photometric="rgb")
    arguments = [tmp_path / "a.tif", "--model", run, "-o", tmp_path / "out"]
    error = invoke(*arguments).exception
    assert type(error) is MissingMppError
    assert "--slide-mpp" in str(error)
    assert type(invoke(*arguments, "--slide-mpp", 0.5).exception) is NoTissueError


@pytest.fixture(scope="module")
def hierarchy(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("hierarchy")
    config = RegionVitConfig(input_dim=32, dim=12, depth=2, heads=3, grid=2)
    card = RegionCard("upper", config, tile_size=64, mpp=0.5, tiles=2)
    save_region_encoder(RegionVit(config), folder / "run" / "encoder", card, tile=encoder)
    save_region_encoder(RegionVit(config), folder / "alone", card)
    weights = encoder_digest(encoder)
    origin = {"encoder": encoder_name(encoder), "weights": weights, "dim": 32, "tiling": {"region_tiles": 2.0}}
    heads = make_heads("hipt_none_fc", 32, origin, options={"hidden": 8})
    return folder, heads


def test_levels_of_a_slide(tmp_path, monkeypatch, slide, hierarchy):
    folder, heads = hierarchy
    monkeypatch.setattr("gigatome.heatmaps.slide_model.open_slide_model", lambda _: heads)
    arguments = [
        "--levels",
        "cell, tile,region",
        "--slide-model",
        "heads",
        "--combine",
        "product",
        "--region-shifts",
        2,
    ]
    options = ["--shifts", 1, "--geojson", "--ome", "--values"]
    result = invoke(slide, "--model", folder / "run", "-o", tmp_path / "out", *arguments, *options)
    assert result.exit_code == 0, result.output
    pictures = [f"case.1_{name}.png" for name in ("cell", "combined", "region", "tile")]
    files = ["case.1.geojson", *pictures, "case.1_overlay.ome.tif", "case.1_values.ome.tif"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(files)
    shown = [np.asarray(Image.open(tmp_path / "out" / name)) for name in pictures]
    assert len({picture.tobytes() for picture in shown}) == 4
    found = json.loads((tmp_path / "out" / "case.1.geojson").read_text())["features"]
    heads = [f"{level}_h{head}" for level, count in (("cell", 2), ("tile", 3)) for head in range(count)]
    complete = [item for item in found if "tile" in item["properties"]["measurements"]]
    assert len(complete) > 4
    assert set(complete[0]["properties"]["measurements"]) == {*heads, "cell", "tile", "region", "combined"}
    corners = np.array([item["geometry"]["coordinates"][0] for item in found])
    assert (corners[:, 2] - corners[:, 0] == 64).all()
    assert (corners % 64 == 0).all()
    with tifffile.TiffFile(tmp_path / "out" / "case.1_values.ome.tif") as tiff:
        assert tiff.series[0].shape == (7, 50, 57)
        combined = tiff.series[0].asarray()[-1]
    assert np.nanmean(combined) == pytest.approx(1, abs=0.2)  # without the glass inside the tiles
    with open_slide(tmp_path / "out" / "case.1_overlay.ome.tif") as overlay, open_slide(slide) as opened:
        assert overlay.mpp == pytest.approx(2)
        assert overlay.width == round(900 * opened.mpp / 2)


def test_one_level_from_python(tmp_path, slide, hierarchy, encoder):
    maps = hierarchical_heatmap(
        slide,
        hierarchy[0] / "alone",
        tmp_path / "out",
        levels=["tile"],
        tile_encoder=encoder,
        attention=AttentionOptions(shifts=1),
        hierarchy=HierarchyOptions(region_shifts=2),
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["case.1_tile.png"]
    assert maps.channels == ("tile_h0", "tile_h1", "tile_h2")
    assert maps.heat("tile").cell == 64
    assert 0 < np.nanmin(maps.heat("tile").values) < np.nanmax(maps.heat("tile").values) < 1


def test_cells_of_a_tile_encoder_as_levels(tmp_path, slide, run):
    result = invoke(slide, "--model", run, "-o", tmp_path / "out", "--ome", "--shifts", 1, "--head", 1)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["case.1_cell.png", "case.1_overlay.ome.tif"]


def test_cells_of_the_tile_encoder_that_a_region_encoder_keeps(tmp_path, slide, hierarchy):
    result = invoke(slide, "--model", hierarchy[0] / "run", "-o", tmp_path / "out", "--shifts", 1)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["case.1_cell.png"]


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        ("run", ["--levels", "cell,slide"], ConfigError, "no level slide"),
        ("run", ["--levels", "tile,region"], ConfigError, "--slide-model"),
        ("alone", ["--levels", "tile"], ConfigError, "--tile-encoder"),
        ("run/encoder/tile", ["--levels", "cell,tile"], ConfigError, "needs a region encoder"),
        ("run", ["--levels", "cell,tile", "--weights", "cell=a"], ConfigError, "weights.cell"),
        ("run", ["--levels", "cell,tile", "--weights", "slide=1"], ConfigError, "no level slide"),
        ("run", ["--levels", "cell,tile", "--combine", "sum"], ConfigError, "combine"),
        ("run", ["--levels", "cell,tile", "--head", "2"], ConfigError, "level cell has attention heads 0 to 1, not 2"),
        ("run", ["--levels", "tile", "--region-shifts", "4"], ConfigError, "regions of 2 tiles have no 4 shifts"),
        ("run", ["--levels", "tile", "-o", "map.png"], ConfigError, "give a folder"),
        ("run", ["--levels", "tile", "--tile-size", "0"], ConfigError, "tile_size must be positive"),
    ],
)
def test_levels_that_do_not_suit(tmp_path, monkeypatch, slide, hierarchy, model, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    shifts = [] if "--region-shifts" in arguments else ["--region-shifts", 1]
    result = invoke(slide, "--model", hierarchy[0] / model, "-o", "out", *shifts, *arguments)
    assert type(result.exception) is error
    with pytest.raises(error, match=message):
        raise result.exception
    assert list(tmp_path.iterdir()) == []


def test_real_slide(tmp_path, shared_data, encoder):
    source = shared_data / "regions" / "liver_glycogenstorage.tif"
    with open_slide(source, mpp=0.5) as opened:
        heat = heatmap(opened, encoder, tmp_path / "a.png", mpp=4.0, attention=AttentionOptions(shifts=1))
    assert heat.cell == 128
    assert 0.4 < np.isfinite(heat.mean).mean() < 0.6  # a core biopsy across the picture
