"""Extraction of regions called again: what is not read twice, what is made anew, and what survives."""

import json
import logging
import multiprocessing
import os
import shutil
import socket
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from small_regions import REGIONS_OF, SIDE, region_vit, stamps, vectors_of

from gigatome.core.errors import StoreError
from gigatome.embeddings import extract_regions
from gigatome.embeddings.extract_regions import embed_regions
from gigatome.embeddings.regions import read_regions, write_regions
from gigatome.embeddings.store import EmbeddingStore, write_bag
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, encoder_name, load_encoder
from gigatome.tiles.grid import read_grid
from gigatome.tiles.regions import RegionOptions, make_regions

fork = multiprocessing.get_context("fork")


def test_grids_that_are_there_are_not_read_again(job, cohort, encoder, region_encoder, reads):
    embed_regions(cohort, encoder=encoder, out=job, **REGIONS_OF)
    assert reads
    reads.clear()
    events = []
    made = embed_regions(
        cohort,
        encoder=encoder,
        out=job,
        region_encoder=region_encoder,
        progress=lambda *e: events.append(e),
        **REGIONS_OF,
    )
    assert reads == []
    total = sum(int(read_regions(made.grids.path(name)).mask.sum()) for name in made.grids.names())
    assert {event for event in events if event[0] == "embed"} == {("embed", total, total)}
    alone = embed_regions(cohort, encoder=encoder, out=job.parent / "new", region_encoder=region_encoder, **REGIONS_OF)
    for name in made.grids.names():
        np.testing.assert_allclose(made.vectors.read(name).embeddings, alone.vectors.read(name).embeddings, atol=2e-6)
    other = embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_vit(1), **REGIONS_OF)
    assert other.vectors.folder != made.vectors.folder
    before = stamps(made.grids.folder) | stamps(made.vectors.folder)
    embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, **REGIONS_OF)
    assert stamps(made.grids.folder) | stamps(made.vectors.folder) == before


def stop_at(monkeypatch, writer, count):
    """The machine stops when ``writer`` is called for the ``count``-th time."""
    calls, whole = [], {"write_regions": write_regions, "write_bag": write_bag}[writer]

    def write(path, bag, *, dtype):
        calls.append(bag.name)
        if len(calls) == count:
            raise KeyboardInterrupt
        whole(path, bag, dtype=dtype)

    monkeypatch.setattr(extract_regions, writer, write)


@pytest.mark.parametrize(
    ("writer", "grids", "vectors"),
    [("write_regions", ["s0", "s1"], ["s0", "s1"]), ("write_bag", ["s0", "s1", "s2"], ["s0", "s1"])],
)
def test_an_interrupted_call_goes_on(job, cohort, encoder, region_encoder, monkeypatch, reads, writer, grids, vectors):
    whole = embed_regions(
        cohort, encoder=encoder, out=job.parent / "whole", region_encoder=region_encoder, **REGIONS_OF
    )
    stop_at(monkeypatch, writer, 3)
    call = {"encoder": encoder, "out": job, "region_encoder": region_encoder, "batch_size": 4, **REGIONS_OF}
    with pytest.raises(KeyboardInterrupt):
        embed_regions(cohort, **call)
    store = EmbeddingStore(job, whole.grids.tiles, whole.grids.encoder)
    store = replace(store, tiles=replace(store.tiles, path=job / whole.grids.tiles.path.name))
    upper_store = replace(store, encoder=whole.vectors.encoder)
    assert (store.names(), upper_store.names()) == (grids, vectors)
    before = stamps(store.folder) | stamps(upper_store.folder)
    monkeypatch.setattr(extract_regions, writer, {"write_regions": write_regions, "write_bag": write_bag}[writer])
    reads.clear()
    made = embed_regions(cohort, **call)
    assert set(reads) == {"s0", "s1", "s2", "s3"} - set(grids)
    after = stamps(store.folder) | stamps(upper_store.folder)
    assert {path: after[path] for path in before} == before
    for name in whole.grids.names():
        found, expected = (read_regions(each.grids.path(name)) for each in (made, whole))
        np.testing.assert_allclose(found.grids, expected.grids, atol=2e-6)
        np.testing.assert_allclose(made.vectors.read(name).embeddings, whole.vectors.read(name).embeddings, atol=1e-5)


def test_damaged_grids_are_made_again(job, cohort, encoder, region_encoder, reads, caplog):
    made = embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, **REGIONS_OF)
    cut, altered = made.grids.path("s0"), made.grids.path("s1")
    expected = {name: read_regions(made.grids.path(name)).grids for name in ("s0", "s1")}
    cut.write_bytes(cut.read_bytes()[:2000])
    with h5py.File(altered, "r+") as file:
        del file["mask"]
    (made.grids.folder / ".s2.h5.4711-99.tmp").write_text("half a file")
    made.vectors.path("s2").unlink()
    reads.clear()
    with caplog.at_level(logging.INFO, "gigatome"):
        embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, **REGIONS_OF)
    assert set(reads) == {"s0", "s1"}
    for name, grids in expected.items():
        np.testing.assert_allclose(read_regions(made.grids.path(name)).grids, grids, atol=2e-6)
    assert "s0.h5: is damaged" in caplog.text
    assert "it is embedded again" in caplog.text
    assert not list(made.grids.folder.glob(".*"))


@pytest.mark.parametrize("changed", [RegionOptions(SIDE, 9), RegionOptions(SIDE, 2, "encode")])
def test_other_regions_are_embedded_again(job, cohort, encoder, region_encoder, reads, caplog, changed):
    embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, **REGIONS_OF)
    reads.clear()
    options = {**REGIONS_OF, "regions": changed}
    with caplog.at_level(logging.INFO, "gigatome"):
        made = embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, **options)
    assert reads
    assert "embedded again" in caplog.text
    for name in set(reads):
        found = read_regions(made.grids.path(name))
        expected = make_regions(read_grid(job / "20x_64px_0px_overlap" / "patches" / f"{name}_patches.h5"), changed)
        np.testing.assert_array_equal(found.mask, expected.mask)
        np.testing.assert_allclose(made.vectors.read(name).embeddings, vectors_of(region_encoder, found), atol=1e-5)


def test_region_embeddings_of_other_tiles_are_not_taken_for_those_of_these(job, cohort, encoder, region_encoder):
    """The corners of the regions are the same; the tiles in them are not, and grids alone were made anew."""
    embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, **REGIONS_OF)
    options = {**REGIONS_OF, "regions": RegionOptions(SIDE, 2, "encode")}
    embed_regions(cohort, encoder=encoder, out=job, **options)
    made = embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, **options)
    for name in made.grids.names():
        found = read_regions(made.grids.path(name))
        np.testing.assert_allclose(made.vectors.read(name).embeddings, vectors_of(region_encoder, found), atol=1e-5)


def test_regions_of_another_size_lie_elsewhere(job, cohort, encoder):
    first = embed_regions(cohort, encoder=encoder, out=job, **REGIONS_OF)
    second = embed_regions(cohort, encoder=encoder, out=job, **{**REGIONS_OF, "regions": RegionOptions(2, 1)})
    assert second.grids.folder == job / "20x_128px_0px_overlap" / first.grids.folder.name


def test_other_weights_of_the_same_name_are_refused(job, cohort, encoder, region_encoder, reads):
    names = {"name": "tiles", "region_name": "regions"}
    made = embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, **names, **REGIONS_OF)
    config = EncoderConfig(image_size=64, patch_size=16, dim=32, depth=2, heads=2)
    other = build_encoder(config, seed=1, name="tiny").eval()
    before, kept = stamps(made.grids.folder) | stamps(made.vectors.folder), encoder_digest(encoder)
    with pytest.raises(StoreError, match=r"features_tiles: holds embeddings by other weights that are named tiles too"):
        embed_regions(cohort, encoder=other, out=job, region_encoder=region_encoder, **names, **REGIONS_OF)
    with pytest.raises(StoreError, match=r"features_regions: .* named regions too \(slide s0 and 3 more\)"):
        embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_vit(1), **names, **REGIONS_OF)
    assert stamps(made.grids.folder) | stamps(made.vectors.folder) == before
    assert encoder_digest(load_encoder(made.grids.encoder_folder)) == kept
    reads.clear()
    again = {**names, **REGIONS_OF, "overwrite": True}
    embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_vit(1), **again)
    assert reads == []  # the grids were good
    expected = vectors_of(region_vit(1), read_regions(made.grids.path("s0")))
    np.testing.assert_allclose(made.vectors.read("s0").embeddings, expected, atol=1e-5)
    embed_regions(cohort, encoder=other, out=job, region_encoder=region_encoder, **again)
    assert set(reads) == {"s0", "s1", "s2", "s3"}
    assert encoder_digest(load_encoder(made.grids.encoder_folder)) == encoder_digest(other)


def test_a_copy_of_the_tile_encoder_is_kept_once(job, cohort, encoder, colours, monkeypatch):
    made = embed_regions(cohort, encoder=encoder, out=job, **REGIONS_OF)
    assert encoder_name(load_encoder(made.grids.encoder_folder)) == made.grids.encoder
    saved = []
    monkeypatch.setattr(extract_regions, "save_encoder", lambda *args, **kwargs: saved.append(args))
    embed_regions(cohort, encoder=made.grids.encoder_folder, out=job, **REGIONS_OF)
    assert saved == []
    foreign = embed_regions(cohort, encoder=colours, out=job, **REGIONS_OF)
    assert saved == []
    assert not foreign.grids.encoder_folder.exists()


def hold(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = {"pid": os.getppid(), "hostname": socket.gethostname(), "created_at": time.time()}
    path.write_text(json.dumps(owner))
    return path


def test_what_somebody_holds_is_left_to_them(job, cohort, encoder, region_encoder):
    made = embed_regions(cohort.select(["s0"]), encoder=encoder, out=job, region_encoder=region_encoder, **REGIONS_OF)
    shutil.rmtree(made.grids.encoder_folder)
    locks = [hold(made.grids.folder / name) for name in ("s1.h5.lock", "encoder.lock")]
    found = embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, **REGIONS_OF)
    assert found.grids.names() == found.vectors.names() == ["s0", "s2", "s3"]
    assert [(failure.slide, failure.error) for failure in found.failures] == [("s1", "Locked")]
    assert not found.grids.encoder_folder.exists()
    assert all(lock.exists() for lock in locks)


def work(table, encoder, upper, out):
    torch.set_num_threads(1)
    embed_regions(table, encoder=encoder, out=out, region_encoder=upper, **REGIONS_OF)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of forking with threads about
def test_several_that_begin_at_once(job, cohort, encoder, region_encoder, reads):
    processes = [fork.Process(target=work, args=(cohort, encoder, region_encoder, job)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    made = embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, **REGIONS_OF)
    assert reads == []
    assert made.failures == ()
    assert encoder_name(load_encoder(made.grids.encoder_folder)) == made.grids.encoder
    assert {path.suffix for path in made.grids.folder.iterdir()} == {".h5", ""}
