"""Extraction: what is written, what is skipped, what fails, and what survives."""

import json
import shutil

import h5py
import numpy as np
import pytest
import torch

from gigatome.core.errors import CohortError, ConfigError, StoreError
from gigatome.embeddings.extract import embed
from gigatome.embeddings.store import WEIGHTS, EmbeddingStore, read_bag, write_bag
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, encoder_name, save_encoder
from gigatome.tiles.grid import read_grid

TILES = {"tile_size": 64, "mpp": 0.5, "min_tissue": 0.5, "threads": 2}


def contents(folder):
    return {path.name: read_bag(path).embeddings.tobytes() for path in sorted(folder.glob("*.h5"))}


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_each_slide_gets_the_file_that_trident_would_write(job, cohort, encoder):
    store = embed(cohort, encoder=encoder, out=job, **TILES)
    assert store.failures == ()
    assert store.names() == ["s0", "s1", "s2", "s3"]
    assert store.folder == job / "20x_64px_0px_overlap" / f"features_{encoder_name(encoder)}"
    assert {path.suffix for path in store.folder.iterdir()} == {".h5"}  # no lock, no temporary file
    with h5py.File(store.path("s2")) as file:
        assert set(file) == {"features", "coords"}
        features, coords = file["features"], file["coords"]
        assert features.dtype == np.float32
        assert features.shape == (len(coords), 32)
        assert features.attrs["encoder"] == store.encoder
        assert features.attrs["name"] == "s2"
        assert features.attrs[WEIGHTS] == encoder_digest(encoder)
        nine = {"patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap"}
        nine |= {"name", "savetodir", "level0_width", "level0_height"}
        assert nine <= set(coords.attrs)
        assert (coords.attrs["patch_size"], coords.attrs["target_magnification"]) == (64, 20)
    np.testing.assert_array_equal(store.read("s2").coords, read_grid(store.tiles.coords("s2")).coords)
    written = json.loads((store.tiles.path / f"_config_feats_{store.encoder}.json").read_text())
    assert (written["encoder"], written["mpp"], written["dim"]) == (store.encoder, 0.5, 32)
    assert EmbeddingStore.open(job).encoder == store.encoder
    assert not (job / "failures.csv").exists()


def test_embeddings_belong_to_their_tiles(job, cohort, colours):
    store = embed(cohort, encoder=colours, out=job, batch_size=7, **TILES)
    for entry in cohort:
        bag = store.read(entry.name)
        assert len(bag) > 3
        with entry.open() as slide:
            for (x, y), found in zip(bag.coords, bag.embeddings, strict=True):
                expected = slide.read_tile(int(x), int(y), 64, 0.5).mean((0, 1)) / 255
                np.testing.assert_allclose(found, expected, atol=1e-5)


def test_batches_run_across_slides(job, cohort, colours):
    store = embed(cohort, encoder=colours, out=job, batch_size=16, **TILES)
    total = sum(len(store.read(name)) for name in store.names())
    sizes = colours.batches[1:]  # the first is the trial
    assert set(sizes[:-1]) == {16}
    assert sum(sizes) == total


def test_embeddings_do_not_depend_on_batches_or_threads(prepared, cohort, encoder, tmp_path):
    bags = []
    for k, options in enumerate([{"batch_size": 3, "threads": 1}, {"batch_size": 16, "threads": 3}]):
        job = shutil.copytree(prepared, tmp_path / str(k))
        bags.append(embed(cohort, encoder=encoder, out=job, **{**TILES, **options}))
    for name in bags[0].names():
        np.testing.assert_allclose(bags[0].read(name).embeddings, bags[1].read(name).embeddings, atol=1e-5, rtol=0)


def test_embeddings_do_not_depend_on_the_company(job, cohort, encoder, prepared, tmp_path):
    together = embed(cohort, encoder=encoder, out=job, batch_size=16, **TILES)
    alone = shutil.copytree(prepared, tmp_path / "alone")
    store = embed(cohort.select(["s1"]), encoder=encoder, out=alone, batch_size=16, **TILES)
    np.testing.assert_allclose(store.read("s1").embeddings, together.read("s1").embeddings, atol=1e-5, rtol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_near(prepared, cohort, encoder, tmp_path, precision):
    exact = embed(cohort, encoder=encoder, out=shutil.copytree(prepared, tmp_path / "fp32"), **TILES)
    store = embed(
        cohort, encoder=encoder, out=shutil.copytree(prepared, tmp_path / "low"), precision=precision, **TILES
    )
    found, expected = store.read("s0").embeddings, exact.read("s0").embeddings
    assert found.dtype == np.float32
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_half_files(job, cohort, encoder):
    store = embed(cohort, encoder=encoder, out=job, dtype="float16", **TILES)
    with h5py.File(store.path("s0")) as file:
        assert file["features"].dtype == np.float16


def test_a_second_call_does_nothing(job, cohort, colours):
    events = []
    store = embed(cohort, encoder=colours, out=job, **TILES)
    before, colours.batches = stamps(store.folder), []
    again = embed(cohort, encoder=colours, out=job, progress=lambda *event: events.append(event), **TILES)
    assert stamps(again.folder) == before
    assert sum(colours.batches) == 1  # the trial
    total = sum(len(store.read(name)) for name in store.names())
    assert [event for event in events if event[0] == "embed"] == [("embed", total, total)]


def test_progress_counts_tiles(job, cohort, colours):
    events = []
    store = embed(cohort, encoder=colours, out=job, progress=lambda *event: events.append(event), **TILES)
    total = sum(len(store.read(name)) for name in store.names())
    done = [event[1] for event in events if event[0] == "embed"]
    assert done == list(range(total + 1))
    assert {event[0] for event in events} >= {"tissue", "tiles", "embed"}


def test_other_weights_of_the_same_name_are_refused(job, cohort, colours):
    store = embed(cohort, encoder=colours, out=job, name="mine", **TILES)
    before = contents(store.folder)
    other = type(colours)(scale=2)
    with pytest.raises(StoreError, match=r"by other weights that are named mine too \(slide s0 and 3 more\)"):
        embed(cohort, encoder=other, out=job, name="mine", **TILES)
    assert contents(store.folder) == before
    replaced = embed(cohort, encoder=other, out=job, name="mine", overwrite=True, **TILES)
    np.testing.assert_allclose(
        replaced.read("s0").embeddings, 2 * np.frombuffer(before["s0.h5"], np.float32).reshape(-1, 3), rtol=1e-6
    )


def test_other_weights_get_another_folder_by_themselves(job, cohort, colours, encoder):
    stores = [embed(cohort, encoder=e, out=job, **TILES) for e in (colours, type(colours)(scale=2), encoder)]
    assert len({store.folder for store in stores}) == 3
    config = EncoderConfig(image_size=64, patch_size=16, dim=32, depth=2, heads=2)
    again = embed(cohort, encoder=build_encoder(config, seed=1, name="tiny"), out=job, **TILES)
    assert again.folder != stores[2].folder


def test_what_trident_embedded_is_kept(job, cohort, colours):
    store = embed(cohort, encoder=colours, out=job, name="uni_v1", **TILES)
    for name in store.names():
        with h5py.File(store.path(name), "r+") as file:
            del file["features"].attrs[WEIGHTS]
            file["features"][:] = 7
    again = embed(cohort, encoder=colours, out=job, name="uni_v1", **TILES)
    assert (again.read("s0").embeddings == 7).all()


def test_damaged_and_outdated_files_are_made_again(job, cohort, colours):
    store = embed(cohort, encoder=colours, out=job, **TILES)
    before = contents(store.folder)
    path = store.path("s0")
    path.write_bytes(path.read_bytes()[:2000])
    bag = store.read("s1")
    write_bag(store.path("s1"), type(bag)(bag.name, bag.encoder, bag.coords + 1, bag.embeddings, {}, bag.encoding))
    embed(cohort, encoder=colours, out=job, **TILES)
    assert contents(store.folder) == before


def test_shards_share_the_work(prepared, cohort, colours, tmp_path):
    job = shutil.copytree(prepared, tmp_path / "sharded")
    parts = [embed(cohort, encoder=colours, out=job, shard=(i, 3), **TILES) for i in range(3)]
    whole = embed(cohort, encoder=colours, out=shutil.copytree(prepared, tmp_path / "whole"), **TILES)
    assert contents(parts[2].folder) == contents(whole.folder)
    assert [len(embed(cohort, encoder=colours, out=tmp_path / f"{i}", shard=(i, 3), **TILES)) for i in (0, 2)] == [2, 1]


def test_the_encoder_is_left_as_it_was(job, cohort, colours):
    colours.train()
    embed(cohort, encoder=colours, out=job, **TILES)
    assert colours.training
    assert colours.scale.requires_grad
    assert not colours.scale.is_inference()
    (colours.scale * 2).backward()  # no inference mode sticks to it


def test_an_encoder_from_its_folder(job, cohort, encoder, tmp_path):
    save_encoder(encoder, tmp_path / "encoder", name="tiny")
    store = embed(cohort, encoder=tmp_path / "encoder", out=job, **TILES)
    assert store.encoder == encoder_name(encoder)


def test_the_result_is_the_encoder_itself(job, cohort, encoder):
    store = embed(cohort, encoder=encoder, out=job, **TILES)
    bag = store.read("s0")
    with cohort.slides[0].open() as slide:
        tiles = np.stack([slide.read_tile(int(x), int(y), 64, 0.5) for x, y in bag.coords])
    with torch.inference_mode():
        expected = encoder(encoder.normalise(torch.from_numpy(tiles))).numpy()
    np.testing.assert_allclose(bag.embeddings, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size and threads must be at least 1"),
        ({"threads": 0}, "batch_size and threads must be at least 1"),
        ({"precision": "int8"}, "there is no precision int8"),
        ({"dtype": "int8"}, "there is no dtype int8"),
        ({"mpp": -1}, "mpp"),
        ({"tile_size": 0}, "tile_size"),
        ({"device": "cuda:99"}, "device cuda:99 cannot be used"),
        ({"device": "abacus"}, "device abacus cannot be used"),
        ({"shard": (2, 2)}, "there is no shard 2 of 2"),
        ({"name": "a/b"}, "an encoder's name holds"),
        ({"tile_size": 60}, "do not divide into patches of 16"),
    ],
)
def test_options_that_do_not_do(cohort, encoder, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        embed(cohort, encoder=encoder, out=tmp_path / "job", **{**TILES, **options})
    assert not (tmp_path / "job").exists()


def test_a_module_that_is_no_encoder(cohort, tmp_path):
    with pytest.raises(ConfigError, match="Linear is no tile encoder: it has no dim"):
        embed(cohort, encoder=torch.nn.Linear(3, 3), out=tmp_path, **TILES)


def test_an_encoder_that_embeds_otherwise_than_it_says(cohort, colours, tmp_path):
    colours.dim = 4
    with pytest.raises(ConfigError, match=r"embeds one tile as \[1, 3\], and should as \[1, 4\]"):
        embed(cohort, encoder=colours, out=tmp_path, **TILES)


def test_nothing_to_embed(cohort, colours, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CohortError, match="empty"):
        embed(tmp_path / "empty", encoder=colours, out=tmp_path / "job")
    with pytest.raises(StoreError, match="no such encoder"):
        embed(cohort, encoder=tmp_path / "none", out=tmp_path / "job")
