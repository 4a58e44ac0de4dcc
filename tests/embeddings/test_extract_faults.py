"""Extraction when things go wrong: damaged slides, embeddings that are none, interruptions, and other workers."""

import csv
import json
import os
import shutil
import socket
import time
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch

from gigatome.core.job import Job
from gigatome.embeddings import extract
from gigatome.embeddings.extract import embed
from gigatome.embeddings.store import EmbeddingStore, write_bag
from gigatome.slides.slide import Slide
from gigatome.tiles.grid import read_grid

TILES = {"tile_size": 64, "mpp": 0.5, "min_tissue": 0.5, "threads": 2}


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


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
    whole = Slide.read_tile

    def read_tile(self, x, y, tile_size, mpp, *, exact=True):
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
