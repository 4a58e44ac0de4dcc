"""The report of a stream names what limits it, in streams of which one part is made slow."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from gigatome.slides.cohort import CohortSlide
from gigatome.slides.tile_plan import TilePlan
from gigatome.tiles.bench_stream import bench_stream
from gigatome.tiles.sampler import TileSampler
from gigatome.tiles.stream import TileStream
from gigatome.tiles.stream_report import Stopwatches, StreamReport
from range_server import serve

REPORT = StreamReport(seconds=10.0, threads=2, batches=10, tiles=640)


def streamed(cohort, masks, *, step=0.0, **options):
    """What a stream of small tiles reports."""
    options = {"tile_size": 32, "mpp": [0.5], "threads": 2, "prefetch": 2} | options
    return bench_stream(TileStream(cohort, batch_size=8, masks=masks, **options), seconds=0.2, step=step)


def slowed(function, seconds):
    def slow(*arguments, **keywords):
        time.sleep(seconds)
        return function(*arguments, **keywords)

    return slow


def test_a_slow_user_is_the_limit(cohort, masks):
    report = streamed(cohort, masks, step=0.1)
    assert report.limit == "consumer"
    assert "the stream is not the limit" in report.sentence()


def test_slow_decoding_is_the_limit(cohort, masks, monkeypatch):
    monkeypatch.setattr(TilePlan, "finish", slowed(TilePlan.finish, 0.01))
    report = streamed(cohort, masks)
    assert report.limit == "decoding"
    assert "decoding is the limit: its threads (2) had work" in report.sentence()
    assert "more threads help" in report.sentence()


def test_too_few_batches_read_ahead_leave_decoding_the_limit(cohort, masks, monkeypatch):
    """Eight threads for a batch of one tile: one decodes, which is the limit though most idle."""
    monkeypatch.setattr(TilePlan, "finish", slowed(TilePlan.finish, 0.01))
    report = streamed(cohort, masks, threads=8, prefetch=1)
    assert report.decoding < 0.5 * report.threads * report.seconds
    assert report.limit == "decoding"
    assert "a higher prefetch" in report.sentence()


def test_a_slow_disk_is_the_limit(cohort, masks, monkeypatch):
    real = TilePlan.finish

    def finish(self, *arguments):
        time.sleep(0.01)
        real(self, *arguments)
        self.waited += 0.01

    monkeypatch.setattr(TilePlan, "finish", finish)
    assert streamed(cohort, masks).limit == "disk"


@pytest.mark.parametrize("threads", [1, 8])
def test_opening_slides_anew_is_the_limit(cohort, masks, monkeypatch, threads):
    monkeypatch.setattr(CohortSlide, "open", slowed(CohortSlide.open, 0.03))
    assert streamed(cohort, masks, threads=threads).limit != "opening"  # they stay open
    report = streamed(cohort, masks, threads=threads, open_slides=1)
    assert report.limit == "opening"
    assert f"{report.opened} openings took" in report.sentence()


def test_slow_drawing_is_the_limit(cohort, masks, monkeypatch):
    monkeypatch.setattr(TileSampler, "requests", slowed(TileSampler.requests, 0.05))
    assert streamed(cohort, masks).limit == "planning"


@pytest.mark.parametrize("prefetch", [1, 4])
def test_a_slow_server_is_the_limit(cohort, masks, prefetch):
    files = {Path(slide.uri).name: Path(slide.uri).read_bytes() for slide in cohort}
    with serve(files, dict.fromkeys(files, lambda header: time.sleep(0.05))) as server:
        slides = tuple(replace(slide, uri=f"{server.url}/{Path(slide.uri).name}") for slide in cohort)
        report = streamed(replace(cohort, slides=slides), masks, threads=4, prefetch=prefetch)
    assert report.limit == "network"
    assert report.fetching > 0.04 * report.tiles
    assert "the bytes of a tile took" in report.sentence()


@pytest.mark.parametrize(
    ("limit", "numbers"),
    [
        ("consumer", {"waited": 0.1, "decoding": 19.0}),
        ("decoding", {"waited": 9.0, "decoding": 17.0, "disk": 1.0}),
        ("decoding", {"waited": 9.0, "decoding": 17.0, "network": 10.0, "fetching": 6400.0}),
        ("disk", {"waited": 9.0, "decoding": 4.0, "disk": 15.0}),
        ("opening", {"waited": 9.0, "decoding": 16.0, "planning": 1.0, "opening": 18.0}),
        ("planning", {"waited": 9.0, "decoding": 6.0, "planning": 14.0, "opening": 5.0}),
        ("network", {"waited": 9.0, "decoding": 6.0, "network": 9.5, "fetching": 640.0, "opening": 2.0}),
        ("opening", {"waited": 9.0, "decoding": 6.0, "network": 9.5, "fetching": 64.0, "opening": 12.0}),
    ],
)
def test_limit(limit, numbers):
    report = replace(REPORT, **numbers)
    assert report.limit == limit
    assert report.sentence().startswith("64 tiles/s: ")


def test_nothing_has_happened_yet():
    assert StreamReport().limit == "consumer"
    assert StreamReport().tiles_per_second == 0
    assert "waited 0.0% of the time" in StreamReport().sentence()


def test_since():
    later = replace(REPORT, seconds=14.0, tiles=1000, opened=5, disk=2.5)
    difference = later.since(replace(REPORT, opened=2))
    assert difference == StreamReport(seconds=4.0, threads=2, tiles=360, opened=3, disk=2.5)


def test_tiles_on_their_way_are_timed_once_and_one_by_one(monkeypatch):
    now = 100.0
    monkeypatch.setattr("gigatome.tiles.stream_report.perf_counter", lambda: now)
    watches = Stopwatches()
    watches.start()
    for at, change in ((101.0, 1), (102.0, 1), (104.0, -1), (107.0, -1), (110.0, 1)):
        now = at
        watches.request(change)
    now = 112.0
    report = watches.report(3)
    assert (report.seconds, report.network, report.fetching) == (12.0, 8.0, 10.0)
    assert watches.report(3) == report
