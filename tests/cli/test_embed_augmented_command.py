"""``gigatome embed --augmentations`` as a user meets it: what it prints, how it exits, what it refuses."""

import json

import numpy as np
import pytest
import tifffile
import torch
import typer
from typer.testing import CliRunner

from gigatome.cli.embed import embed
from gigatome.core.errors import ConfigError
from gigatome.embeddings.augmented import SHARING, AugmentedStore
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import save_encoder
from gigatome.selfsup.embed_augmented import OPTIONS

app = typer.Typer()
app.command()(embed)

TILES = ["--tile-size", "64", "--min-tissue", "0.5", "--threads", "2"]
DRAWS = ["--augmentations", "2", "--tiles", "5"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Arguments: a slide of something like stained tissue, and an encoder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("given")
    image = np.full((512, 512, 3), 245, np.uint8)
    image[64:320, 64:384] = np.random.default_rng(0).integers((110, 40, 110), (200, 120, 190), (256, 320, 3))
    tifffile.imwrite(folder / "a.tif", image, tile=(128, 128), photometric="rgb", compression="deflate")
    config = EncoderConfig(image_size=48, patch_size=16, dim=32, depth=1, heads=2)
    save_encoder(build_encoder(config, seed=0, name="tiny"), folder / "encoder")
    return [folder / "a.tif", "--slide-mpp", "0.5", "--encoder", folder / "encoder", *TILES]


def test_by_default_the_papers_way(given, tmp_path):
    result = run(*given, "-o", tmp_path, "--level", "tile", *DRAWS)
    assert result.exit_code == 0, result.output
    store = AugmentedStore.open(tmp_path)
    assert result.stdout == f"{store.folder}: augmented tiles of 1 slides by {store.encoder}\n"
    assert "embed: " in result.stderr
    bag = store.read("a")
    assert (bag.embeddings.shape, bag.encoding[SHARING]) == ((2, 5, 32), "shared")
    said = json.loads(bag.encoding[OPTIONS])
    assert (said["seed"], said["vertical_flip"], said["quarter_turns"]) == (0, 0.5, True)
    again = run(*given, "-o", tmp_path, *DRAWS, "--tiles", "6")
    assert "other augmentations" in str(again.exception)


def test_every_choice_arrives(given, tmp_path):
    result = run(
        *given, "-o", tmp_path, *DRAWS, "--augmentation", "each", "--augment-as", "code", "--seed", 3, "--name", "ns"
    )
    assert result.exit_code == 0, result.output
    bag = AugmentedStore.open(tmp_path, encoder="ns").read("a")
    said = json.loads(bag.encoding[OPTIONS])
    assert (said["augmentation"], said["seed"]) == (bag.encoding[SHARING], 3)
    assert (bag.encoding[SHARING], said["drawing"]) == ("each", "with_replacement")
    assert said["vertical_flip"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiles", "5"], "--tiles: goes with --augmentations alone"),
        (["--augmentation", "each"], "--augmentation: goes with --augmentations alone"),
        (["--augment-as", "code"], "--augment-as: goes with --augmentations alone"),
        (["--seed", "0"], "--seed: goes with --augmentations alone"),
        (["--level", "region", *DRAWS], "--augmentations: is of --level tile"),
        (["--level", "region", "--seed", "1"], "--seed: is of --level tile"),
        ([*DRAWS, "--region-encoder", "x"], "--region-encoder: is of --level region"),
        ([*DRAWS, "--augment-as", "both"], "--augment-as: there is no both; there are paper, code"),
    ],
)
def test_what_does_not_go_together(given, tmp_path, arguments, message):
    result = run(*given, "-o", tmp_path / "job", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "job").exists()


def test_no_draws(given, tmp_path):
    result = run(*given, "-o", tmp_path, "--augmentations", "0")
    assert isinstance(result.exception, ConfigError)
    assert "at least 1, not 0 and 256" in str(result.exception)
