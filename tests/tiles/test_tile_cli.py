import csv
import json

import cv2
import numpy as np
import pytest
import tifffile
import typer
from typer.testing import CliRunner

from gigatome.cli.tile import tile
from gigatome.cli.tissue import tissue
from gigatome.core.errors import CohortError, ConfigError
from gigatome.slides.slide import open_slide
from gigatome.tiles.grid import read_grid


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(tissue)
    app.command()(tile)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    """Two slides of pink tissue on glass, without mpp."""
    folder = tmp_path / "slides"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        rgb = np.full((1200, 1600, 3), 244, np.uint8)
        cv2.circle(rgb, (800, 600), 450, (215, 140, 190), -1)
        rgb = (rgb - rng.integers(0, 6, rgb.shape)).astype(np.uint8)
        tifffile.imwrite(folder / f"{name}.tif", rgb, tile=(256, 256), compression="deflate", photometric="rgb")
    return folder


def failures(out):
    with (out / "failures.csv").open() as file:
        return list(csv.DictReader(file))


def test_tissue_outlines_every_slide(run, folder, tmp_path):
    out = tmp_path / "job"
    result = run("tissue", folder, "-o", out, "--slide-mpp", 1.0)
    assert result.exit_code == 0, result.output
    assert "tissue of 2 slides, 34" in result.output
    document = json.loads((out / "contours_geojson" / "one.geojson").read_text())
    assert len(document["features"]) == 1
    assert not (out / "failures.csv").exists()


def test_tile_writes_coordinates_and_images(run, folder, tmp_path):
    out = tmp_path / "job"
    arguments = ("tile", folder, "-o", out, "--slide-mpp", 1, "--mpp", 2, "--tile-size", 64, "--save-images")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    tiles = out / "5x_64px_0px_overlap"
    grid = read_grid(tiles / "patches" / "two_patches.h5")
    assert f"{2 * len(grid)} tiles of 2 slides" in result.output
    x, y = grid.coords[3]
    image = cv2.imread(str(tiles / "images" / "two" / f"{x}_{y}.png"))[..., ::-1]
    with open_slide(folder / "two.tif", mpp=1.0) as slide:
        assert np.array_equal(image, slide.read_tile(int(x), int(y), 64, 2.0))
    assert len(list((tiles / "images" / "two").iterdir())) == len(grid)
    assert run(*arguments).exit_code == 0


def test_a_slide_that_fails_is_listed_and_the_exit_code_is_3(run, folder, tmp_path):
    (folder / "three.svs").write_bytes(b"no slide")
    for command in ("tissue", "tile"):
        out = tmp_path / command
        result = run(command, folder, "-o", out, "--slide-mpp", 1)
        assert result.exit_code == 3, result.output
        assert [(row["slide"], row["error"]) for row in failures(out)] == [("three", "NotASlideError")]
        assert "three: tissue: " in result.output
    (folder / "three.svs").unlink()
    assert run("tissue", folder, "-o", tmp_path / "tissue", "--slide-mpp", 1).exit_code == 0
    assert not (tmp_path / "tissue" / "failures.csv").exists()


def test_slides_without_mpp_fail_with_a_hint(run, folder, tmp_path):
    result = run("tissue", folder, "-o", tmp_path / "job")
    assert result.exit_code == 1
    assert "states no resolution" in result.output
    assert {row["error"] for row in failures(tmp_path / "job")} == {"MissingMppError"}


def test_a_table_wins_over_the_option(run, folder, tmp_path):
    table = tmp_path / "cohort.csv"
    table.write_text("slide,mpp\nslides/one.tif,0.5\nslides/two.tif,\n")
    assert run("tile", table, "-o", tmp_path / "job", "--slide-mpp", 1).exit_code == 0
    tiles = tmp_path / "job" / "20x_256px_0px_overlap" / "patches"
    assert [read_grid(tiles / f"{name}_patches.h5").slide_mpp for name in ("one", "two")] == [0.5, 1.0]


def test_options_of_the_segmentation_can_be_set(run, folder, tmp_path):
    result = run("tissue", folder, "-o", tmp_path / "job", "--slide-mpp", 1, "--set", "min_area=1e9")
    assert result.exit_code == 1
    assert "no tissue found" in result.output


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--set", "min_aera=3"), ConfigError),
        (("--mpp", -1), ConfigError),
        (("--overlap", 256), ConfigError),
    ],
)
def test_wrong_options_are_errors(run, folder, tmp_path, arguments, error):
    result = run("tile", folder, "-o", tmp_path / "job", *arguments)
    assert isinstance(result.exception, error)
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("arguments", [("--tile-size", 0), ("--min-tissue", 1.5), ("--threads", 0)])
def test_wrong_usage_has_exit_code_2(run, folder, tmp_path, arguments):
    assert run("tile", folder, "-o", tmp_path / "job", *arguments).exit_code == 2


def test_an_empty_folder_is_an_error(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert isinstance(run("tissue", tmp_path / "empty", "-o", tmp_path / "job").exception, CohortError)
