"""``gigatome embed --level region`` as a user meets it: what it prints, and how it exits."""

import shutil

import numpy as np
import pytest
import typer
from small_regions import SIDE, vectors_of
from typer.testing import CliRunner

from gigatome.cli.embed import embed
from gigatome.embeddings.regions import read_regions
from gigatome.embeddings.store import EmbeddingStore
from gigatome.encoders.region_zoo import RegionCard, save_region_encoder
from gigatome.encoders.zoo import encoder_digest, encoder_name, save_encoder

app = typer.Typer()
app.command()(embed)

OPTIONS = ["--tile-size", "64", "--min-tissue", "0.5", "--threads", "2", "--batch-size", "16"]
REGIONS = ["--level", "region", "--region-tiles", str(SIDE), "--min-tiles", "2"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def encoders(encoder, region_encoder, tmp_path_factory):
    """Folders of a tile encoder and of its region encoder."""
    folder = tmp_path_factory.mktemp("encoders")
    save_encoder(encoder, folder / "tiles")
    tile = encoder_name(encoder), encoder_digest(encoder)
    save_region_encoder(
        region_encoder, folder / "regions", RegionCard("upper", region_encoder.config, "", "", *tile, 64, 0.5, SIDE)
    )
    return folder


def test_regions_with_their_embeddings(slides, encoders, region_encoder, tmp_path):
    arguments = [slides / "cohort.csv", "--encoder", encoders / "tiles", "-o", tmp_path, *OPTIONS, *REGIONS]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    grids = EmbeddingStore.open(tmp_path)
    assert result.stdout == f"{grids.folder}: grids of 4 slides by {grids.encoder}\n"
    result = run(*arguments, "--region-encoder", encoders / "regions", "--region-name", "both")
    assert result.exit_code == 0, result.output
    vectors = EmbeddingStore.open(tmp_path, encoder="both")
    assert result.stdout.splitlines()[1] == f"{vectors.folder}: regions of 4 slides by both"
    assert "embed: " in result.stderr
    bag = read_regions(grids.path("s1"))
    np.testing.assert_allclose(vectors.read("s1").embeddings, vectors_of(region_encoder, bag), atol=1e-5)
    assert not bag.mask.all()


def test_background_and_half(slides, encoders, tmp_path):
    result = run(slides / "cohort.csv", "--encoder", encoders / "tiles", "-o", tmp_path, *OPTIONS, *REGIONS,
                 "--background", "encode", "--half")  # fmt: skip
    assert result.exit_code == 0, result.output
    bag = read_regions(EmbeddingStore.open(tmp_path).path("s0"))
    assert bag.grids.dtype == np.float16
    assert bag.mask[0].all()


def test_it_exits_with_3_when_slides_failed(slides, encoders, tmp_path):
    folder = shutil.copytree(slides, tmp_path / "slides")
    (folder / "s1.tif").write_bytes(b"gone")
    result = run(folder / "cohort.csv", "--encoder", encoders / "tiles", "-o", tmp_path / "job", *OPTIONS, *REGIONS)
    assert result.exit_code == 3
    assert "grids of 3 slides" in result.stdout
    assert "s1: " in result.stdout


def test_it_exits_with_1_when_nothing_came_of_it(slides, encoders, tmp_path):
    result = run(slides / "s0.tif", "--encoder", encoders / "tiles", "-o", tmp_path / "job", *OPTIONS, *REGIONS)
    assert result.exit_code == 1  # the file states no mpp
    assert "mpp" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--level", "area"], "there is no level area; there are tile, region"),
        (["--level", "region", "--overlap", "8"], "regions are made of tiles side by side"),
        (["--region-encoder", "x"], "is of --level region"),
        (["--level", "region", "--region-tiles", "2", "--min-tiles", "5"], "min_tiles from 1 to tiles²"),
        (["--level", "region", "--background", "white"], "background is mask or encode"),
    ],
)
def test_options_that_do_not_do(slides, encoders, tmp_path, arguments, message):
    result = run(slides / "cohort.csv", "--encoder", encoders / "tiles", "-o", tmp_path / "job", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "job").exists()
