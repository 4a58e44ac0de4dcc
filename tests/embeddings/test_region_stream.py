"""The stream of regions: which regions, in which order, from which files."""

import resource
import sys
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import pytest

from gigatome.core.errors import StoreError
from gigatome.core.seeding import generator
from gigatome.embeddings.region_stream import RegionStream, RegionStreamOptions
from gigatome.embeddings.regions import read_regions
from gigatome.embeddings.store import Bag, EmbeddingStore, write_bag

sys.path.insert(0, str(Path(__file__).parent))
from made_regions import ENCODER, HASH, make_store

SIZES = (5, 1, 0, 7)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"), SIZES, absent=0.3)


def drawn(stream, steps, start=0):
    """(slide, region) of each of the regions of some steps, in order."""
    batches = list(islice(stream.batches(start), steps))
    assert [batch.step for batch in batches] == list(range(start, start + steps))
    pairs = [zip(batch.slides.tolist(), batch.regions.tolist(), strict=True) for batch in batches]
    return [(stream.names[slide], region) for batch in pairs for slide, region in batch]


def test_a_batch_holds_the_grids_of_its_regions(store):
    stream = RegionStream(store, batch_size=4, seed=1)
    assert (stream.names, stream.sizes.tolist(), len(stream)) == (("s0", "s1", "s3"), [5, 1, 7], 13)
    assert (stream.encoder, stream.weights, stream.dim) == (ENCODER, HASH, 8)
    assert (stream.tiles, stream.tile_size, stream.mpp) == (6, 256, 0.5)
    bags = [read_regions(store.path(name)) for name in stream.names]
    for batch in islice(stream.batches(), 8):
        assert batch.images.dtype == np.float16
        for image, slide, region in zip(batch.images, batch.slides, batch.regions, strict=True):
            np.testing.assert_array_equal(image.reshape(36, 8), bags[slide].grids[region])


def test_every_region_comes_once_in_each_round(store):
    places = drawn(RegionStream(store, batch_size=4, seed=1), 13)  # four rounds of 13 regions
    every = sorted((name, region) for name, count in zip(("s0", "s1", "s3"), (5, 1, 7), strict=True)
                   for region in range(count))  # fmt: skip
    rounds = [places[start : start + 13] for start in range(0, 52, 13)]
    assert all(sorted(one) == every for one in rounds)
    assert len({tuple(one) for one in rounds}) == 4
    order = generator(1, "regions", 2).permutation(13)
    assert rounds[2] == [every[index] for index in order]


def test_every_slide_comes_once_in_each_round_if_slides_are_alike(store):
    stream = RegionStream(store, RegionStreamOptions(slide_weights="slides"), batch_size=3, seed=1)
    places = drawn(stream, 200)
    rounds = [places[start : start + 3] for start in range(0, 600, 3)]
    assert all(sorted(name for name, _ in one) == ["s0", "s1", "s3"] for one in rounds)
    counts = np.bincount([region for name, region in places if name == "s3"], minlength=7)
    assert counts.min() > 10
    assert counts.max() < 55


@pytest.mark.parametrize("weights", ["regions", "slides"])
def test_a_batch_is_of_its_number_and_the_seed_alone(store, weights):
    def stream(seed=5, **options):
        return RegionStream(store, RegionStreamOptions(slide_weights=weights, **options), batch_size=4, seed=seed)

    whole = drawn(stream(), 12)
    assert drawn(stream(threads=1, prefetch=1), 12) == whole
    assert drawn(stream(threads=3, prefetch=7), 5, start=7) == whole[28:]
    assert drawn(stream(seed=6), 12) != whole
    used = stream()
    drawn(used, 3)
    assert drawn(used, 12) == whole


def test_ranks_share_a_batch(store):
    whole = drawn(RegionStream(store, batch_size=6, seed=2), 5)
    parts = [drawn(RegionStream(store, batch_size=6, seed=2, rank=rank, world_size=3), 5) for rank in range(3)]
    together = [pair for step in range(5) for part in parts for pair in part[step * 2 : step * 2 + 2]]
    assert together == whole
    with pytest.raises(ValueError, match="multiple of world_size"):
        RegionStream(store, batch_size=4, world_size=3)


def test_a_batch_may_be_larger_than_the_store(tmp_path):
    stream = RegionStream(make_store(tmp_path, (2, 1)), batch_size=8)
    places = drawn(stream, 3)
    assert all(sorted(places[start : start + 3]) == [("s0", 0), ("s0", 1), ("s1", 0)] for start in range(0, 24, 3))


def test_regions_with_few_tiles_are_not_drawn(store):
    options = RegionStreamOptions(min_tiles=26)
    stream = RegionStream(store, options, batch_size=4)
    counts = {name: read_regions(store.path(name)).mask.sum(1) for name in ("s0", "s1", "s3")}
    enough = {(name, region) for name, count in counts.items() for region in np.flatnonzero(count >= 26).tolist()}
    assert 0 < len(enough) < 13
    assert set(drawn(stream, 12)) == enough
    with pytest.raises(StoreError, match="no slide has a region with 37 tiles or more"):
        RegionStream(store, RegionStreamOptions(min_tiles=37), batch_size=4)


def test_state_and_report(store):
    stream = RegionStream(store, batch_size=4)
    drawn(stream, 5)
    stream.restore(stream.state())
    report = stream.report()
    assert report.regions == 20
    assert 0 <= report.waited <= report.seconds
    assert report.reading > 0
    assert "regions/s" in report.sentence()


def test_threads_end_with_the_stream(store):
    with RegionStream(store, batch_size=4) as stream:
        batches = stream.batches()
        next(batches)
    with pytest.raises(RuntimeError):
        list(islice(batches, 9))
    assert len(drawn(stream, 2)) == 8


def test_the_digest_tells_stores_apart(store, tmp_path):
    digest = RegionStream(store).digest()
    assert digest == RegionStream(EmbeddingStore.open(store.folder)).digest()
    assert digest != RegionStream(store, RegionStreamOptions(min_tiles=26)).digest()
    others = [
        {"weights": "f" * 16},
        {"encoder": "other"},
        {"dim": 6},
        {"tiles": 5},
        {"mpp": 0.25},
        {"dtype": "float32"},
        {"absent": 0.2},  # as many regions, of other tiles
    ]
    for number, change in enumerate(others):
        made = make_store(tmp_path / str(number), SIZES, **{"absent": 0.3, **change})
        assert RegionStream(made).digest() != digest, change


def test_more_slides_than_files_that_may_be_open(tmp_path):
    stream = RegionStream(make_store(tmp_path, [1] * 60, tiles=2, dim=2), batch_size=60)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/dev/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 12, before[1]))
    try:
        batches = list(islice(stream.batches(), 4))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert all(len(set(batch.slides.tolist())) == 60 for batch in batches)


def test_a_damaged_slide_is_left_out_and_named(tmp_path):
    store = make_store(tmp_path, (3, 2, 2, 2))
    path = store.path("s0")
    path.write_bytes(path.read_bytes()[:3000])
    with h5py.File(store.path("s1"), "r+") as file:
        del file["mask"]
    with h5py.File(store.path("s2"), "r+") as file:
        del file["mask"]
        file["mask"] = np.ones((2, 5), np.uint8)
    stream = RegionStream(store, batch_size=2)
    assert stream.names == ("s3",)
    assert [(failure.slide, failure.stage) for failure in stream.failures] == [(f"s{n}", "regions") for n in range(3)]
    assert all("delete it and embed the slide again" in failure.message for failure in stream.failures)
    store.path("s3").write_bytes(b"")
    with pytest.raises(StoreError, match=r"no slide has a region.*; s3: .*damaged"):
        RegionStream(store, batch_size=2)


def test_a_region_that_is_not_finite_ends_the_stream_and_names_the_slide(tmp_path):
    store = make_store(tmp_path, (2, 3))
    with h5py.File(store.path("s1"), "r+") as file:
        file["features"][1, 4, 2] = np.nan
    with pytest.raises(StoreError, match=r"s1: 1 of . embeddings are not finite"):
        drawn(RegionStream(store, batch_size=5), 1)


def test_a_file_that_changes_ends_the_stream(tmp_path):
    store = make_store(tmp_path, (2, 3))
    stream = RegionStream(store, batch_size=5)
    with h5py.File(store.path("s1"), "r+") as file:
        file["more"] = 1
    with pytest.raises(StoreError, match=r"s1\.h5: has changed"):
        drawn(stream, 1)


def test_other_stores_are_refused(tmp_path):
    tiles = tmp_path / "tiles" / "20x_256px_0px_overlap" / "features_tiny" / "s0.h5"
    write_bag(tiles, Bag("s0", "tiny", np.zeros((3, 2), np.int64), np.ones((3, 4), np.float32)))
    with pytest.raises(StoreError, match=r"holds embeddings \[3, 4\] of tiles, .* embed the slides with level region"):
        RegionStream(EmbeddingStore.open(tmp_path / "tiles"))
    for change, message in [
        ({"weights": "f" * 16}, "different weights"), ({"dim": 6}, "differ in size"),
        ({"mpp": 0.25}, "the regions of the slides differ .*256 px at 0.25 mpp"),
    ]:  # fmt: skip
        mixed, name = make_store(tmp_path / message, (2, 2)), "20x_1536px_0px_overlap"
        other = make_store(tmp_path / f"other {message}", (2, 2), **change)
        (mixed.folder / "s1.h5").write_bytes(other.path("s1").read_bytes())
        assert name in str(mixed.folder)
        with pytest.raises(StoreError, match=message):
            RegionStream(mixed)


@pytest.mark.parametrize("changes", [{"min_tiles": 0}, {"threads": 0}, {"prefetch": 0}])
def test_options_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match="at least 1"):
        RegionStreamOptions(**changes)
