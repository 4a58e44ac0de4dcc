"""Several workers share one job directory and are killed at random moments: nothing is lost, halved or done wrong."""

import multiprocessing
import shutil
import time

import numpy as np
import pytest
import torch

from gigatome.embeddings.extract import embed
from gigatome.embeddings.store import read_bag

TILES = {"tile_size": 64, "mpp": 0.5, "min_tissue": 0.5, "threads": 1, "batch_size": 8}

fork = multiprocessing.get_context("fork")


def work(cohort, encoder, out):
    torch.set_num_threads(1)
    embed(cohort, encoder=encoder(), out=out, **TILES)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of forking with threads about
@pytest.mark.parametrize(("count", "workers", "kills"), [(8, 2, 6), pytest.param(100, 4, 50, marks=pytest.mark.slow)])
def test_workers_that_are_killed(count, workers, kills, slides, colour_encoder, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    originals = sorted(slides.glob("*.tif"))
    for k in range(count):
        shutil.copy(originals[k % len(originals)], folder / f"t{k:03}.tif")
    table = "\n".join(["slide,mpp", *(f"t{k:03}.tif,0.5" for k in range(count))])
    (folder / "cohort.csv").write_text(table)
    torch.set_num_threads(1)

    class Slow(colour_encoder):
        def forward(self, images):
            time.sleep(0.1)
            return super().forward(images)

    expected = embed(folder / "cohort.csv", encoder=colour_encoder(), out=tmp_path / "calm", name="colour", **TILES)
    job = shutil.copytree(tmp_path / "calm", tmp_path / "job")
    shutil.rmtree(job / expected.folder.relative_to(tmp_path / "calm"))
    rng = np.random.default_rng(0)
    seen, hit = set(), 0
    running = []
    for _ in range(kills):
        while len(running) < workers:
            running.append(fork.Process(target=work, args=(folder / "cohort.csv", Slow, job)))
            running[-1].start()
        time.sleep(rng.uniform(0.05, 0.4))
        victim = running.pop(rng.integers(len(running)))
        hit += victim.is_alive()
        victim.kill()
        victim.join()
        seen |= {path.suffix for path in job.rglob("features_*/*")}
    for process in running:
        process.join()
    store = embed(folder / "cohort.csv", encoder=Slow(), out=job, **TILES)
    assert store.failures == ()
    assert hit >= 0.8 * kills
    assert ".lock" in seen  # some were killed in the middle of a slide
    assert sorted(path.name for path in store.folder.iterdir()) == [f"t{k:03}.h5" for k in range(count)]
    for name in store.names():
        np.testing.assert_array_equal(read_bag(store.path(name)).embeddings, expected.read(name).embeddings)
    before = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    embed(folder / "cohort.csv", encoder=Slow(), out=job, **TILES)
    assert {path: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before
