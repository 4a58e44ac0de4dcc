"""Prov-GigaPath's encoder sees all tiles of a slide once, in their places; what it cannot see is refused or named."""

import json
import logging
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from made_augmented import made_bag, made_store
from made_slides import ATTRS, made_tiles

from gigatome.core.errors import ConfigError, StoreError
from gigatome.embeddings.slide_vectors import SlideVectorOptions, embed_slide_vectors, tiles_for
from gigatome.embeddings.store import write_bag
from gigatome.encoders.gigapath import GigapathConfig, build_gigapath
from gigatome.encoders.gigapath_zoo import GigapathCard, save_gigapath
from gigatome.encoders.slide_zoo import SlideCard

CONFIG = GigapathConfig(input_dim=4, dim=16, depth=2, ffn_dim=24, grid=25, segments=(8, 16), ratios=(1, 4))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def made(folder=None, **more):
    encoder = build_gigapath(replace(CONFIG, **more), seed=1).eval()
    card = GigapathCard("tiny path", encoder.config, "here", "own", "tiny", "abc", 1.0)
    if folder is not None:
        save_gigapath(encoder, folder, card)
    return encoder, card


def whole(encoder, bag, side=1024):
    """A slide's vector by its definition."""
    places = torch.from_numpy(bag.coords // side)[None]
    with torch.inference_mode():
        return encoder(torch.from_numpy(bag.embeddings)[None], places)[0].numpy()


@pytest.mark.parametrize("more", [{}, {"pooling": "mean"}, {"final": "encoder_states", "layer": 1}])
def test_a_vector_is_that_of_all_tiles(tmp_path, more):
    store, given = made_tiles(tmp_path, [30, 3, 1, 200]), made(**more)
    found = embed_slide_vectors(store, slide_encoder=given)
    assert found.names() == store.names()
    for name, vector in zip(*found.slide_vectors(), strict=True):
        assert vector == pytest.approx(whole(given[0], store.read(name)), abs=1e-6)
    assert found.encoder.startswith("tiny-path-")


def test_files_go_on_where_they_stopped_and_tell_what_they_are(tmp_path):
    store, _ = made_tiles(tmp_path / "job", [30, 12]), made(tmp_path / "encoder")
    found = embed_slide_vectors(store, slide_encoder=tmp_path / "encoder")
    first, second = (found.folder / f"{name}.h5" for name in found.names())
    with h5py.File(first) as file:
        attrs = dict(file["features"].attrs)
    assert (attrs["view_tiles"], attrs["tile_encoder"], attrs["target_mpp"]) == (0, "tiny", 1.0)
    assert json.loads(attrs["slide_options"]) == {"drawing": "all", "precision": "fp32"}
    stamp = second.stat().st_mtime_ns
    first.unlink()
    again = embed_slide_vectors(store, slide_encoder=tmp_path / "encoder")
    assert second.stat().st_mtime_ns == stamp
    assert np.array_equal(again.embeddings, found.embeddings)
    with pytest.raises(StoreError, match="made otherwise"):
        embed_slide_vectors(store, slide_encoder=tmp_path / "encoder", precision="bf16")
    half = embed_slide_vectors(store, slide_encoder=tmp_path / "encoder", precision="bf16", name="half")
    assert half.embeddings == pytest.approx(found.embeddings, abs=0.2)
    assert not np.array_equal(half.embeddings, found.embeddings)
    other = embed_slide_vectors(store, slide_encoder=f"{tmp_path}/encoder?pooling=mean")
    assert other.folder != found.folder


@pytest.mark.parametrize(
    "attrs",
    [
        {"patch_size": 256, "overlap": 0, "level0_magnification": 40.0, "target_magnification": 10.0},  # TRIDENT's
        ATTRS | {"overlap": 128},  # places are of tiles, not of steps
        ATTRS | {"mpp_level0": 0.25001},  # level-0 pixels that were rounded
    ],
)
def test_places_by_what_the_tiling_states(tmp_path, attrs):
    store, given = made_tiles(tmp_path, [30], weights="", attrs=attrs), made()
    found = embed_slide_vectors(store, slide_encoder=given)
    assert found.embeddings[0] == pytest.approx(whole(given[0], store.read("s00")), abs=1e-6)


def test_slides_without_places_are_named(tmp_path):
    store = made_tiles(tmp_path, [30, 9, 0])
    bag = store.read("s01")
    bag.coords[4] = (0, 25 * 1024)
    write_bag(store.path("s01"), bag)
    found = embed_slide_vectors(store, slide_encoder=made())
    assert found.names() == ["s00"]
    told = {failure.slide: failure.message for failure in found.failures}
    assert "s01.h5: places of tiles run from" in told["s01"]
    assert "25, but Prov-GigaPath's grid from 0 to 24" in told["s01"]
    assert told["s02"] == "has no tiles"
    nowhere = embed_slide_vectors(made_tiles(tmp_path / "b", [8], attrs={}), slide_encoder=made())
    assert "does not state 'patch_size'" in nowhere.failures[0].message


def test_what_it_does_not_take(tmp_path):
    store = made_tiles(tmp_path / "a", [8])
    for options in (SlideVectorOptions(views=3), SlideVectorOptions(drawing="replacement")):
        with pytest.raises(ConfigError, match="tiny path sees all tiles of a slide at once"):
            embed_slide_vectors(store, slide_encoder=made(), options=options)
    assert len(embed_slide_vectors(store, slide_encoder=made(), options=SlideVectorOptions(drawing="all"))) == 1
    with pytest.raises(ConfigError, match="embeddings of 5 numbers by tiny; tiny path takes 4 by tiny"):
        embed_slide_vectors(made_tiles(tmp_path / "b", [8], dim=5), slide_encoder=made())
    augmented = made_store(tmp_path / "c", [made_bag(0)])
    encoder, card = made(input_dim=augmented.read(augmented.names()[0]).embeddings.shape[-1])
    with pytest.raises(ConfigError, match="give it no augmented tiles"):
        embed_slide_vectors(augmented, slide_encoder=(encoder, replace(card, tile_weights="")))
    with pytest.raises(ConfigError, match="a slide encoder and its own card"):
        embed_slide_vectors(store, slide_encoder=(made()[0], SlideCard("other", made()[0].config)))


def test_among_several_embeddings_those_of_the_right_size_are_taken(tmp_path):
    made_tiles(tmp_path, [8], dim=5, encoder="wide", weights="xyz")
    made_tiles(tmp_path, [8], weights="def")
    assert tiles_for(tmp_path, replace(made()[1], tile_weights="")).encoder == "tiny"


def test_out_of_memory_says_what_to_do(tmp_path, monkeypatch):
    given = made()

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(given[0], "forward", full)
    with pytest.raises(ConfigError, match="s00: cpu lacks the memory for its 8 tiles; compute in bf16"):
        embed_slide_vectors(made_tiles(tmp_path, [8]), slide_encoder=given)


def test_tiles_unlike_those_of_training_are_worth_a_word(tmp_path, caplog):
    encoder, card = made()
    with caplog.at_level(logging.WARNING, "gigatome"):
        embed_slide_vectors(made_tiles(tmp_path, [8]), slide_encoder=(encoder, replace(card, mpp=0.5)))
    assert "trained on embeddings of tiles of 256 px at 0.5 mpp; these are of 256 px at 1 mpp" in caplog.text
