"""``gigatome embed --level slide`` as a user meets it: from pixels, from a job, and what it refuses."""

import numpy as np
import pytest
import tifffile
import torch
import typer
from typer.testing import CliRunner

from gigatome.cli.embed import embed
from gigatome.embeddings.slide_store import SlideStore
from gigatome.embeddings.store import EmbeddingStore
from gigatome.encoders.giga import GigaConfig, build_giga
from gigatome.encoders.gigapath import GigapathConfig, build_gigapath
from gigatome.encoders.gigapath_zoo import GigapathCard, save_gigapath
from gigatome.encoders.slide_zoo import SlideCard, save_slide_encoder
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, load_encoder, save_encoder

app = typer.Typer()
app.command()(embed)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A slide, a tile encoder, and two slide encoders: the first keeps the tile encoder with it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("given")
    image = np.full((512, 512, 3), 245, np.uint8)
    image[64:320, 64:384] = np.random.default_rng(0).integers((110, 40, 110), (200, 120, 190), (256, 320, 3))
    tifffile.imwrite(folder / "a.tif", image, tile=(128, 128), photometric="rgb", compression="deflate")
    tile = build_encoder(EncoderConfig(image_size=48, patch_size=16, dim=32, depth=1, heads=2), seed=0, name="tiny")
    save_encoder(tile, folder / "tile")
    config = GigaConfig(pooling="mlp", input_dim=32, dim=16)
    for name, weights, kept in (("run", encoder_digest(tile), tile), ("other", "xyz", None)):
        card = SlideCard("giga", config, tile_encoder="tiny", tile_weights=weights, tile_size=48, mpp=0.5, tiles=4)
        save_slide_encoder(build_giga(config, 0), folder / name, card, tile=kept)
    return folder


@pytest.fixture(scope="module")
def first(given, tmp_path_factory):
    """A job, made from pixels with the encoder's own tiles."""
    job = tmp_path_factory.mktemp("job")
    return job, run(
        given / "a.tif", "--slide-mpp", 0.5, "--level", "slide", "--slide-encoder", given / "run", "-o", job,
        "--min-tissue", 0.5, "--views", 6,
    )  # fmt: skip


def test_from_pixels_with_the_encoders_tiles(first):
    job, result = first
    assert result.exit_code == 0, result.output
    store = SlideStore.open(job)
    assert result.stdout == f"{store.folder}: embeddings of 1 slides by {store.encoder}\n"
    assert store.folder.parent.name == "20x_48px_0px_overlap"
    assert np.linalg.norm(store.embeddings) == pytest.approx(1, abs=1e-6)
    assert store.attributes("a")["view_tiles"] == 4
    assert len(EmbeddingStore.open(job)) == 1


def test_from_a_job_without_its_slides(given, first, tmp_path):
    job, _ = first
    arguments = [job, "--level", "slide", "-o", tmp_path]
    result = run(*arguments, "--slide-encoder", given / "run", "--views", 6)
    assert result.exit_code == 0, result.output
    assert np.array_equal(SlideStore.open(tmp_path).embeddings, SlideStore.open(job).embeddings)
    result = run(*arguments, "--slide-encoder", given / "run", "--drawing", "all", "--seed", 3)
    assert "made otherwise" in str(result.exception)
    result = run(*arguments, "--slide-encoder", given / "run", "--drawing", "all", "--seed", 3, "--name", "whole")
    assert result.exit_code == 0, result.output
    assert SlideStore.open(tmp_path, encoder="whole").attributes("a")["view_tiles"] == 0
    result = run(*arguments, "--pooling", "mean", "--name", "mean")
    assert result.exit_code == 0, result.output
    assert SlideStore.open(tmp_path, encoder="mean").embeddings == pytest.approx(
        EmbeddingStore.open(job).slide_vectors()[1], abs=1e-6
    )
    refused = run(*arguments, "--slide-encoder", given / "other")
    assert "giga was trained on those by tiny (weights xyz)" in str(refused.exception)


@pytest.fixture(scope="module")
def gigapath(given, tmp_path_factory):
    """Prov-GigaPath's encoder with a tile encoder, and the same as the authors' file."""
    folder = tmp_path_factory.mktemp("gigapath")
    config = GigapathConfig(input_dim=32, dim=32, depth=1, ffn_dim=8, tile_size=48)
    encoder = build_gigapath(config, 0)
    save_gigapath(encoder, folder / "path", GigapathCard("path", config, mpp=0.5), tile=load_encoder(given / "tile"))
    torch.save({"model": encoder.state_dict()}, folder / "slide_encoder.pth")
    return folder


def test_prov_gigapath_from_pixels_and_from_a_job(given, gigapath, first, tmp_path):
    arguments = ["--level", "slide", "--slide-encoder"]
    slide = [given / "a.tif", "--slide-mpp", 0.5, "--min-tissue", 0.5]
    result = run(*slide, *arguments, f"{gigapath}/path?final=encoder_states", "-o", tmp_path / "a")
    assert result.exit_code == 0, result.output
    whole = SlideStore.open(tmp_path / "a")
    assert (whole.folder.parent.name, whole.embeddings.shape) == ("20x_48px_0px_overlap", (1, 32))
    states = f"{gigapath}/slide_encoder.pth?model=gigapath&final=encoder_states"
    result = run(first[0], *arguments, states, "-o", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert SlideStore.open(tmp_path / "b").embeddings == pytest.approx(whole.embeddings, abs=1e-6)
    result = run(first[0], *arguments, states, "-o", tmp_path / "b", "--precision", "bf16", "--name", "half")
    assert result.exit_code == 0, result.output
    assert SlideStore.open(tmp_path / "b", encoder="half").embeddings == pytest.approx(whole.embeddings, abs=0.1)
    refused = run(first[0], *arguments, states, "-o", tmp_path / "c", "--views", 3)
    assert "gigapath sees all tiles of a slide at once" in str(refused.exception)
    refused = run(first[0], *arguments, f"{gigapath}/slide_encoder.pth", "-o", tmp_path / "c")
    assert "for weights of Prov-GigaPath write" in str(refused.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--level", "slide"], "--level slide: give --slide-encoder, or --pooling mean"),
        (["--level", "slide", "--pooling", "max"], "--pooling: there is no max; there is mean"),
        (["--level", "slide", "--pooling", "mean"], "--encoder: give the encoder of the tiles"),
        (["--level", "slide", "--pooling", "mean", "--tiles", "3"], "--tiles: is of --level tile"),
        (["--level", "tile", "--encoder", "e", "--views", "3"], "--views: is of --level slide"),
        (["--level", "region", "--encoder", "e", "--slide-encoder", "x"], "--slide-encoder: is of --level slide"),
        ([], "--encoder: give the encoder of the tiles"),
    ],
)
def test_what_does_not_go_together(given, tmp_path, arguments, message):
    result = run(given / "a.tif", "-o", tmp_path / "job", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "job").exists()
