import os
from dataclasses import replace

import numpy as np
import pytest
import shapely

from gigatome.core.errors import MissingMppError, StoreError
from gigatome.tiles import position_store
from gigatome.tiles.position_store import PositionStore, SlideTissue
from gigatome.tiles.sampler import TileSampler
from gigatome.tissue.mask import TissueMask

SIDES = np.array([[100.0, 250.5, 0.0, 5000.0]])


@pytest.fixture
def mask():
    shape = shapely.Point(1500, 1200).buffer(900).difference(shapely.Point(1500, 1200).buffer(300))
    return TissueMask.of([shape], 3000, 2500, mpp=0.5)


@pytest.fixture
def outlines(mask, tmp_path):
    mask.write(tmp_path / "a.geojson")
    return tmp_path / "a.geojson"


def refuse(*_, **__):
    raise AssertionError("positions were sought")


def same(one, other):
    return one.possible == other.possible and all(
        (a.side, a.least, a.sure) == (b.side, b.least, b.sure)
        and np.array_equal(a.cells, b.cells)
        and np.array_equal(a.ends, b.ends)
        and np.array_equal(a.tissue.pieces, b.tissue.pieces)
        for a, b in zip(one.scales, other.scales, strict=True)
        if a
    )


def test_stored_tissue_is_as_the_mask(mask, outlines):
    stored, direct = SlideTissue.stored("a", outlines), SlideTissue.of("a", 0.5, mask)
    assert replace(stored, load=None, version="") == replace(direct, load=None)
    assert stored.load() == direct.load() == mask
    assert SlideTissue.stored("a", outlines, mpp=0.4).mpp == 0.4


def test_outlines_of_another_tool_need_the_size_and_mpp(tmp_path):
    path = tmp_path / "other.geojson"
    path.write_text('{"type": "Polygon", "coordinates": [[[0, 0], [300, 0], [300, 200], [0, 200], [0, 0]]]}')
    with pytest.raises(StoreError, match="size of its slide"):
        SlideTissue.stored("other", path)
    with pytest.raises(MissingMppError):
        SlideTissue.stored("other", path, width=1000, height=800)
    known = SlideTissue.stored("other", path, mpp=0.5, width=1000, height=800)
    assert (known.width, known.height, known.area, known.load().area) == (1000, 800, 60_000, 60_000)
    with pytest.raises(StoreError, match="cannot be read"):
        SlideTissue.stored("none", tmp_path / "none.geojson")


def test_a_file_gives_what_was_found(outlines, tmp_path, monkeypatch):
    slides = [SlideTissue.stored("a", outlines)]
    found = PositionStore(slides, SIDES, 0.4, tmp_path / "kept").get(0)
    assert found.possible == (True, True, False, False)
    monkeypatch.setattr(position_store, "find_positions", refuse)
    assert same(PositionStore(slides, SIDES, 0.4, tmp_path / "kept").get(0), found)


@pytest.mark.parametrize("change", ["outlines", "sides", "minimum"])
def test_a_file_of_something_else_is_made_anew(mask, outlines, tmp_path, change):
    folder = tmp_path / "kept"
    before = PositionStore([SlideTissue.stored("a", outlines)], SIDES, 0.4, folder).get(0)
    if change == "outlines":
        TissueMask.of([shapely.box(100, 100, 900, 900)], 3000, 2500, mpp=0.5).write(outlines)
        os.utime(outlines, ns=(1, 1))
    sides = SIDES * 1.01 if change == "sides" else SIDES
    minimum = 0.5 if change == "minimum" else 0.4
    slides = [SlideTissue.stored("a", outlines)]
    after = PositionStore(slides, sides, minimum, folder).get(0)
    assert same(after, PositionStore(slides, sides, minimum).get(0))
    assert not same(after, before)
    assert same(PositionStore(slides, sides, minimum, folder).get(0), after)


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "other"])
def test_a_damaged_file_is_made_anew(outlines, tmp_path, damage):
    slides = [SlideTissue.stored("a", outlines)]
    found = PositionStore(slides, SIDES, 0.4, tmp_path).get(0)
    path = tmp_path / "a.bin"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    path.write_bytes({"empty": b"", "cut": whole[:-16], "bit": bytes(flipped), "other": b"x" * len(whole)}[damage])
    assert same(PositionStore(slides, SIDES, 0.4, tmp_path).get(0), found)
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_done_without(outlines, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    store = PositionStore([SlideTissue.stored("a", outlines)], SIDES, 0.4, tmp_path / "file", memory=0)
    assert store.get(0).possible == (True, True, False, False)
    assert "found anew" in caplog.text


def test_tissue_in_memory_is_not_kept_in_files(mask, tmp_path):
    PositionStore([SlideTissue.of("a", 0.5, mask)], SIDES, 0.4, tmp_path).get(0)
    assert not list(tmp_path.iterdir())


def test_memory_is_bounded_and_the_oldest_goes_first(mask):
    slides = [SlideTissue.of(f"s{index}", 0.5, mask) for index in range(10)]
    size = PositionStore(slides, np.repeat(SIDES, 10, axis=0), 0.4).get(0).nbytes
    store = PositionStore(slides, np.repeat(SIDES, 10, axis=0), 0.4, memory=3 * size)
    first = store.get(0)
    for index in (1, 2):
        store.get(index)
    assert store.get(0) is first
    store.get(3)
    assert list(store._kept) == [2, 0, 3]
    for index in range(10):
        store.get(index)
        assert store.nbytes == sum(kept.nbytes for kept in store._kept.values()) <= 3 * size


def test_a_sampler_keeps_a_folder_for_each_choice(outlines, tmp_path, monkeypatch):
    slides = [SlideTissue.stored("a", outlines)]
    drawn = TileSampler(slides, 64, (0.5, 1.0), seed=0, folder=tmp_path).requests(0, 20)
    TileSampler(slides, 64, (0.5,), seed=0, folder=tmp_path).requests(0, 20)
    assert sorted(path.parent.name for path in tmp_path.glob("*/a.bin")) == ["64px_0.5-1mpp_0.4", "64px_0.5mpp_0.4"]
    monkeypatch.setattr(position_store, "find_positions", refuse)
    assert TileSampler(slides, 64, (0.5, 1.0), seed=0, folder=tmp_path).requests(0, 20) == drawn
