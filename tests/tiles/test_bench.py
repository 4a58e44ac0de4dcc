"""Measuring: what is compared, on which tiles, and the arithmetic; never how fast this machine is."""

import json
import os
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tifffile

from gigatome.core.errors import NoTissueError, SlideError
from gigatome.core.native import NATIVE
from gigatome.slides.slide import open_slide
from gigatome.slides.synthetic import SyntheticOptions, make_slide
from gigatome.tiles import bench, bench_readers
from gigatome.tiles.bench import bench_read
from gigatome.tiles.bench_readers import GIGATOME, LIMIT, OPENSLIDE, PORTABLE, Reader
from gigatome.tiles.bench_result import HEADINGS, remarks, rows
from gigatome.tissue.segment import segment


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """JPEG, 0.25 mpp and a quarter and a sixteenth of that."""
    path = tmp_path_factory.mktemp("bench") / "a.svs"
    return make_slide(path, "solid", 3, SyntheticOptions(2400, 2300, mpp=0.25))


@pytest.fixture
def peers(monkeypatch):
    """Replaces the peers by functions that read a level."""

    def install(**readers):
        def opener(read):
            return lambda path, levels: (read, lambda: None)

        found = {name: (("numpy",), opener(read)) for name, read in readers.items()}
        monkeypatch.setattr(bench_readers, "_PEERS", found)

    return install


def test_every_installed_reader_at_each_resolution(slide):
    pytest.importorskip("openslide")
    reading = bench_read(slide, rounds=2, tiles=3)
    assert [(case.mpp, case.level_mpp) for case in reading.cases] == [(0.25, 0.25), (0.5, 0.25)]
    for case in reading.cases:
        rates = {rate.reader: rate for rate in case.rates}
        assert {GIGATOME, OPENSLIDE, LIMIT} <= set(rates)
        assert rates[OPENSLIDE].times_openslide == rates[LIMIT].times_limit == 1
        assert rates[case.best_peer].times_best_peer == 1
        assert rates[OPENSLIDE].difference == 0
        assert rates[LIMIT].difference is None
        assert min(rate.tiles_per_cpu_second for rate in case.rates) > 0
    assert set(reading.opening_ms) == {GIGATOME, OPENSLIDE}
    if len(bench._cores()) > 1:
        assert {GIGATOME, OPENSLIDE, "SHA-256 alone"} <= set(reading.two_threads)
    assert json.loads(json.dumps(reading.as_json()))["cases"][1]["mpp"] == 0.5
    table = rows(reading)
    assert len(table) == sum(len(case.rates) for case in reading.cases)
    assert {len(row) for row in table} == {len(HEADINGS)}
    assert any(OPENSLIDE in remark for remark in remarks(reading))


def test_all_read_the_same_new_tiles_each_round_on_tissue(slide, peers):
    seen = {"one": [], "two": []}
    with open_slide(slide) as own:
        mask = segment(own)

        def reads(name):
            def read(level, x, y, side):
                seen[name].append((level, x, y, side))
                return own.read_level(level, x, y, side, side)

            return read

        peers(one=reads("one"), two=reads("two"))
        bench_read(slide, rounds=3, tiles=20)
    assert seen["one"] == seen["two"]
    assert len(set(seen["one"])) == len(seen["one"]) == 2 * (8 + 3 * 20)
    assert {side for *_, side in seen["one"]} == {256, 512}
    for _, x, y, side in seen["one"]:
        assert mask.overlap(x, y, side) >= 0.4
        assert x + side <= 2400
        assert y + side <= 2300
    assert len({x % 240 for _, x, _, _ in seen["one"]}) > 60


def test_peers_that_are_absent_wrong_or_broken_are_left_out_by_name(slide, peers, monkeypatch):
    def broken(level, x, y, side):
        raise RuntimeError("no decoder")

    peers(wrong=lambda level, x, y, side: np.zeros((side, side, 3), np.uint8), broken=broken)
    absent = {"absent": (("no-such-distribution",), None)}
    monkeypatch.setattr(bench_readers, "_PEERS", bench_readers._PEERS | absent)
    reading = bench_read(slide, rounds=1, tiles=1)
    for case in reading.cases:
        assert {rate.reader for rate in case.rates} - {PORTABLE} == {GIGATOME, LIMIT}
        assert case.best_peer is None
        assert {(rate.times_openslide, rate.times_best_peer) for rate in case.rates} == {(None, None)}
    assert reading.left_out["absent"] == "ImportError: not installed"
    assert "grey levels" in reading.left_out["wrong"]
    assert "no decoder" in reading.left_out["broken"]


def test_figures_are_medians_and_ratios_of_rounds(slide, monkeypatch):
    """The clock is the readers': each tile takes what the reader says, the last round of three four times that."""
    clock, read = SimpleNamespace(now=0.0), SimpleNamespace(tiles=0)
    monkeypatch.setattr(bench, "time", SimpleNamespace(process_time=lambda: clock.now, perf_counter=lambda: clock.now))
    monkeypatch.setattr(bench, "_two_threads", lambda *_: {})
    with open_slide(slide) as own:

        def takes(name, seconds):
            def tile(case, x, y):
                read.tiles += 1
                clock.now += seconds
                pixels = own.read_level(case.level, x, y, case.side, case.side)
                return bench.box_filter(pixels, case.shrink)

            return Reader(name, "1", tile, lambda: None)

        readers = [takes(GIGATOME, 0.01), takes(OPENSLIDE, 0.05), takes("fast", 0.02), takes(LIMIT, 0.04)]
        monkeypatch.setattr(bench, "open_readers", lambda *_: (readers, {}))
        reading = bench_read(slide, rounds=3, tiles=4)
    assert read.tiles == 2 * 4 * (8 + 3 * 4)
    for case in reading.cases:
        ours = case.rates[0]
        assert case.best_peer == "fast"
        assert ours.tiles_per_cpu_second == pytest.approx(100)
        found = (ours.times_openslide, ours.times_best_peer, ours.times_limit)
        assert found == pytest.approx((5, 2, 4))


@pytest.mark.skipif(NATIVE is None, reason="the C extension is not built")
def test_without_the_extension_is_a_reader_of_its_own(slide, peers, monkeypatch):
    peers()
    opened = []
    real = bench_readers.open_slide
    monkeypatch.setattr(
        bench_readers, "open_slide", lambda *a, **k: opened.append(k.get("native", True)) or real(*a, **k)
    )
    monkeypatch.setattr(bench, "_two_threads", lambda *_: {})
    reading = bench_read(slide, rounds=1, tiles=2)
    assert [rate.reader for rate in reading.cases[0].rates] == [GIGATOME, PORTABLE, LIMIT]
    assert opened == [True, False]


def test_a_level_is_shrunk_only_where_no_other_serves_and_chunks_that_are_not_jpeg_have_no_limit(tmp_path, peers):
    peers()
    reading = bench_read(disc(tmp_path / "a.tif", 2400, mpp=0.5), rounds=1, tiles=1)
    assert [(case.mpp, case.level_mpp) for case in reading.cases] == [(0.5, 0.5), (1.0, 1.0)]
    assert LIMIT not in reading.versions
    assert {rate.times_limit for case in reading.cases for rate in case.rates} == {None}


def test_what_cannot_be_measured_is_said(tmp_path, peers):
    peers()
    with pytest.raises(SlideError, match="remote"):
        bench_read("https://example.org/a.svs")
    with pytest.raises(SlideError, match="1024 px"):
        bench_read(disc(tmp_path / "small.tif", 900))
    with pytest.raises(NoTissueError, match="hardly any"):
        bench_read(disc(tmp_path / "little.tif", 2400, radius=160), tiles=20)


def test_the_process_is_given_back_as_it_was(slide, peers):
    peers()
    before = bench._cores(), cv2.getNumThreads()
    bench_read(slide, rounds=1, tiles=1)
    assert (bench._cores(), cv2.getNumThreads()) == before
    if hasattr(os, "sched_getaffinity"):
        with bench._on(before[0][:1]):
            assert bench._cores() == before[0][:1]


def disc(path, side, mpp=0.5, radius=None):
    """A round piece of tissue; two levels, deflate."""
    rgb = np.full((side, side, 3), 244, np.uint8)
    cv2.circle(rgb, (side // 2, side // 2), radius or side * 2 // 5, (215, 140, 190), -1)
    noise = np.random.default_rng(0).integers(0, 6, rgb.shape, dtype=np.uint8)
    pixels = rgb - noise
    options = {"tile": (256, 256), "compression": "deflate", "photometric": "rgb"}
    with tifffile.TiffWriter(path) as tiff:
        for factor in (1, 2):
            resolution = (1e4 / (mpp * factor),) * 2
            tiff.write(pixels[::factor, ::factor], resolution=resolution, resolutionunit="CENTIMETER", **options)
    return path
