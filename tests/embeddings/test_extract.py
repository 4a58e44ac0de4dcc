"""Extraction: what is written, what is skipped, what fails, and what survives."""

import csv
import json
import os
import shutil
import socket
import time

import h5py
import numpy as np
import pytest
import torch

from gigatome.core.errors import CohortError, ConfigError, StoreError
from gigatome.core.job import Job
from gigatome.embeddings import extract
from gigatome.embeddings.extract import embed
from gigatome.embeddings.store import WEIGHTS, EmbeddingStore, read_bag, write_bag
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, encoder_name, save_encoder
from gigatome.tiles.grid import read_grid

TILES = {"tile_size": 64, "mpp": 0.5, "min_tissue": 0.5, "threads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def prepared(slides, colour_encoder, tmp_path_factory):
    """A job directory in which tissue and tiles are found already."""
    folder = tmp_path_factory.mktemp("prepared")
    store = embed(slides / "cohort.csv", encoder=colour_encoder(), out=folder, **TILES)
    shutil.rmtree(store.folder)
    next(store.tiles.path.glob("_config*")).unlink()
    return folder


@pytest.fixture
def job(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "job")


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


def test_an_interrupted_call_goes_on(job, cohort, colours, monkeypatch):
    """The machine stops in the middle of the third slide: what is done stays, nothing half done does."""
    calls = []

    def stop(path, bag, *, dtype):
        calls.append(bag.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_bag(path, bag, dtype=dtype)

    monkeypatch.setattr(extract, "write_bag", stop)
    with pytest.raises(KeyboardInterrupt):
        embed(cohort, encoder=colours, out=job, batch_size=4, **TILES)
    store = EmbeddingStore.open(job)
    assert store.names() == ["s0", "s1"]
    assert {path.suffix for path in store.folder.iterdir()} == {".h5"}
    before = stamps(store.folder)
    monkeypatch.undo()
    embed(cohort, encoder=colours, out=job, batch_size=4, **TILES)
    assert store.names() == ["s0", "s1", "s2", "s3"]
    assert {name: stamp for name, stamp in stamps(store.folder).items() if name in before} == before


def test_progress_counts_tiles(job, cohort, colours):
    events = []
    store = embed(cohort, encoder=colours, out=job, progress=lambda *event: events.append(event), **TILES)
    total = sum(len(store.read(name)) for name in store.names())
    done = [event[1] for event in events if event[0] == "embed"]
    assert done == list(range(total + 1))
    assert {event[0] for event in events} >= {"tissue", "tiles", "embed"}


def test_a_damaged_slide_fails_alone(prepared, slides, colours, tmp_path):
    """It was whole when its tiles were laid; now half of it is gone."""
    folder = shutil.copytree(slides, tmp_path / "slides")
    job = shutil.copytree(prepared, tmp_path / "job")
    data = (folder / "s2.tif").read_bytes()
    (folder / "s2.tif").write_bytes(data[: len(data) // 2])
    (folder / "s1.tif").write_bytes(b"gone")
    store = embed(folder / "cohort.csv", encoder=colours, out=job, batch_size=8, **TILES)
    assert store.names() == ["s0", "s3"]
    assert sorted(failure.slide for failure in store.failures) == ["s1", "s2"]
    rows = list(csv.DictReader((job / "failures.csv").open()))
    assert sorted(row["slide"] for row in rows) == ["s1", "s2"]
    assert all(row["error"] in ("DamagedSlideError", "NotASlideError") for row in rows)
    shutil.copy(slides / "s1.tif", folder)
    shutil.copy(slides / "s2.tif", folder)
    assert embed(folder / "cohort.csv", encoder=colours, out=job, **TILES).failures == ()
    assert not (job / "failures.csv").exists()
    assert store.names() == ["s0", "s1", "s2", "s3"]


def test_an_error_that_nobody_thought_of_fails_one_slide(job, cohort, colours, monkeypatch):
    from gigatome.slides.slide import Slide

    whole = Slide.read_tile

    def read_tile(self, x, y, tile_size, mpp):
        if self.name == "s1":
            raise ZeroDivisionError("the decoder divides by the width of nothing")
        return whole(self, x, y, tile_size, mpp)

    monkeypatch.setattr(Slide, "read_tile", read_tile)
    store = embed(cohort, encoder=colours, out=job, **TILES)
    assert store.names() == ["s0", "s2", "s3"]
    (failure,) = store.failures
    assert (failure.slide, failure.stage, failure.error) == ("s1", "embed", "ZeroDivisionError")


def test_embeddings_that_are_not_finite_fail_their_slide(job, cohort, colours):
    with cohort.slides[1].open() as slide:
        x, y = (int(v) for v in read_grid(Job(job).tiles(64, 0.5).coords("s1")).coords[2])
        poison = torch.from_numpy(slide.read_tile(x, y, 64, 0.5).mean((0, 1)) / 255).float()

    class Poisoned(type(colours)):
        def forward(self, images):
            found = super().forward(images)
            found[(found - poison).abs().amax(1) < 1e-6] = float("nan")
            return found

    store = embed(cohort, encoder=Poisoned(), out=job, **TILES)
    assert store.names() == ["s0", "s2", "s3"]
    (failure,) = store.failures
    assert failure.slide == "s1"
    assert failure.message.startswith("1 of ")
    assert f"not finite, first at ({x}, {y})" in failure.message
    assert "precision" not in failure.message


def test_embeddings_too_large_for_half_files_fail_with_advice(job, cohort, colours):
    store = embed(cohort, encoder=type(colours)(scale=1e6), out=job, dtype="float16", **TILES)
    assert len(store) == 0
    assert len(store.failures) == 4
    assert "try precision fp32 and dtype float32" in store.failures[0].message


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


def hold(store, name, **owner):
    lock = store.folder / f"{name}.h5.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    content = {"pid": os.getppid(), "hostname": socket.gethostname(), "created_at": time.time(), **owner}
    lock.write_text(json.dumps(content))
    return lock


def test_a_slide_that_somebody_holds_is_left_to_them(job, cohort, colours):
    store = EmbeddingStore(job, Job(job).tiles(64, 0.5), "mine")
    lock = hold(store, "s1")
    found = embed(cohort, encoder=colours, out=job, name="mine", **TILES)
    assert found.names() == ["s0", "s2", "s3"]
    (failure,) = found.failures
    assert (failure.slide, failure.error) == ("s1", "Locked")
    assert f"held by process {os.getppid()} on {socket.gethostname()}" in failure.message
    assert lock.exists()
    lock.unlink()
    assert embed(cohort, encoder=colours, out=job, name="mine", **TILES).failures == ()


def test_a_slide_that_somebody_finishes_meanwhile_is_done(job, cohort, colours, monkeypatch):
    """Held when its turn comes, embedded when it is looked at again."""
    done = embed(cohort, encoder=colours, out=job, name="mine", **TILES)
    whole = done.path("s1").read_bytes()
    shutil.rmtree(done.folder)
    lock = hold(done, "s1")

    def finish(path, bag, *, dtype):
        if bag.name == "s3":
            done.path("s1").write_bytes(whole)
            lock.unlink()
        write_bag(path, bag, dtype=dtype)

    monkeypatch.setattr(extract, "write_bag", finish)
    found = embed(cohort, encoder=colours, out=job, name="mine", **TILES)
    assert found.failures == ()
    assert found.names() == ["s0", "s1", "s2", "s3"]


def test_the_lock_and_the_leavings_of_the_dead_are_cleared(job, cohort, colours):
    store = EmbeddingStore(job, Job(job).tiles(64, 0.5), "mine")
    hold(store, "s1", created_at=0)  # its process cannot have run then
    hold(store, "s2", hostname="elsewhere", created_at=time.time() - 25 * 3600)
    (store.folder / ".s1.h5.4711-99.tmp").write_text("half a file")
    found = embed(cohort, encoder=colours, out=job, name="mine", **TILES)
    assert found.failures == ()
    assert sorted(path.name for path in store.folder.iterdir()) == ["s0.h5", "s1.h5", "s2.h5", "s3.h5"]


def test_shards_share_the_work(prepared, cohort, colours, tmp_path):
    job = shutil.copytree(prepared, tmp_path / "sharded")
    parts = [embed(cohort, encoder=colours, out=job, shard=(i, 3), **TILES) for i in range(3)]
    whole = embed(cohort, encoder=colours, out=shutil.copytree(prepared, tmp_path / "whole"), **TILES)
    assert contents(parts[2].folder) == contents(whole.folder)
    assert [len(embed(cohort, encoder=colours, out=tmp_path / f"{i}", shard=(i, 3), **TILES)) for i in (0, 2)] == [2, 1]


def test_failures_of_shards_do_not_overwrite_each_other(prepared, slides, colours, tmp_path):
    folder = shutil.copytree(slides, tmp_path / "slides")
    for name in ("s0", "s1"):
        (folder / f"{name}.tif").write_bytes(b"gone")
    for i in range(2):
        embed(folder / "cohort.csv", encoder=colours, out=tmp_path / "job", shard=(i, 2), **TILES)
    written = {p.name: p.read_text() for p in (tmp_path / "job").glob("failures*")}
    assert set(written) == {"failures_0_of_2.csv", "failures_1_of_2.csv"}
    assert "s0" in written["failures_0_of_2.csv"]
    assert "s1" in written["failures_1_of_2.csv"]


def test_a_slide_without_tiles_gets_an_empty_file(job, cohort, colours, monkeypatch):
    """No grid of ours is empty, but one that another tool left in the job directory may be."""
    from dataclasses import replace

    whole = extract.tile_cohort

    def with_empty(*args, **kwargs):
        grids, failures = whole(*args, **kwargs)
        grids["s1"] = replace(grids["s1"], coords=np.zeros((0, 2), np.int64), tissue_fraction=np.zeros(0, np.float32))
        return grids, failures

    monkeypatch.setattr(extract, "tile_cohort", with_empty)
    store = embed(cohort, encoder=colours, out=job, **TILES)
    assert store.names() == ["s0", "s1", "s2", "s3"]
    assert store.read("s1").embeddings.shape == (0, 3)
    assert store.slide_vectors()[0] == ["s0", "s2", "s3"]
    assert store.failures == ()


def test_a_slide_without_tissue_is_a_failure(colours, tmp_path):
    import tifffile

    for name, value in (("white", 245), ("also", 250)):
        image = np.full((512, 512, 3), value, np.uint8)
        tifffile.imwrite(tmp_path / f"{name}.tif", image, tile=(128, 128), photometric="rgb")
    (tmp_path / "cohort.csv").write_text("slide,mpp\nwhite.tif,0.5\nalso.tif,0.5\n")
    store = embed(tmp_path / "cohort.csv", encoder=colours, out=tmp_path / "job", **TILES)
    assert len(store) == 0
    assert {(failure.slide, failure.error) for failure in store.failures} == {
        ("white", "NoTissueError"),
        ("also", "NoTissueError"),
    }


def test_a_slide_without_mpp_is_a_failure_that_says_how_to_give_one(slides, colours, tmp_path):
    store = embed(slides / "s0.tif", encoder=colours, out=tmp_path / "job", **TILES)
    (failure,) = store.failures
    assert failure.error == "MissingMppError"
    assert "mpp" in failure.message


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
