import gc
import itertools
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely

from gigatome import config
from gigatome.core.errors import CohortError, ConfigError, DamagedSlideError, NoTissueError
from gigatome.core.job import Job
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.slides.slide import Slide
from gigatome.tiles.handles import OpenSlides
from gigatome.tiles.pipeline import _Memory
from gigatome.tiles.pixel_filter import HsvFilter, keeps
from gigatome.tiles.stream import StreamOptions, TileStream
from gigatome.tissue.mask import TissueMask
from range_server import serve

OPTIONS = StreamOptions(tile_size=32, mpp=(0.5, 1.0), threads=2, prefetch=2)


def take(stream, count, start=0):
    batches = stream.batches(start)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def same(a, b):
    return a.step == b.step and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("images", "slides", "coords", "mpp")
    )


def threads():
    names = ("tiles", "plans", "slides", "fetch")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def served(cohort):
    """A web server with the slides of a cohort, and the cohort there."""
    files = {Path(slide.uri).name: Path(slide.uri).read_bytes() for slide in cohort}

    def remote(server):
        return replace(cohort, slides=tuple(replace(s, uri=f"{server.url}/{Path(s.uri).name}") for s in cohort))

    return serve(files), remote


def test_batches_hold_the_tiles_they_say(cohort, masks):
    stream = TileStream(cohort, OPTIONS, batch_size=24, seed=0, masks=masks)
    batches = take(stream, 4)
    assert [batch.step for batch in batches] == [0, 1, 2, 3]
    for batch in batches:
        assert batch.images.shape == (24, 32, 32, 3)
        assert batch.images.dtype == np.uint8
        assert (batch.slides.dtype, batch.coords.dtype, batch.mpp.dtype) == (np.int64, np.int64, np.float64)
        assert batch.coords.shape == (24, 2)
        for image, index, (x, y), mpp in zip(batch.images, batch.slides, batch.coords, batch.mpp, strict=True):
            assert abs(float(image[..., 2].mean()) - 60 * index) < 1  # the slide it came from
            assert abs(image[0, 0, 0] - x / 8) <= 1
            assert abs(image[0, 0, 1] - y / 8) <= 1
            assert image[0, -1, 0] - float(image[0, 0, 0]) == pytest.approx(31 * mpp / 0.5 / 8, abs=1.5)
            assert masks[cohort.slides[index].name].overlap(x, y, 32 * mpp / 0.5)[0] >= 0.4
    assert set(np.concatenate([batch.slides for batch in batches])) == {0, 1, 2, 3}


def test_batches_do_not_depend_on_threads_prefetch_or_start(cohort, masks):
    one = take(TileStream(cohort, OPTIONS, batch_size=20, seed=3, masks=masks, threads=1, prefetch=1), 6)
    many = take(
        TileStream(cohort, OPTIONS, batch_size=20, seed=3, masks=masks, threads=5, prefetch=4, open_slides=1), 6
    )
    assert all(map(same, one, many))
    resumed = take(TileStream(cohort, OPTIONS, batch_size=20, seed=3, masks=masks), 2, start=4)
    assert all(map(same, one[4:], resumed))
    other = take(TileStream(cohort, OPTIONS, batch_size=20, seed=4, masks=masks), 1)
    assert not same(one[0], other[0])


def test_ranks_share_the_batch(cohort, masks):
    whole = take(TileStream(cohort, OPTIONS, batch_size=12, seed=0, masks=masks), 2)
    parts = [
        take(TileStream(cohort, OPTIONS, batch_size=12, seed=0, masks=masks, rank=rank, world_size=3), 2)
        for rank in range(3)
    ]
    for step, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([part[step].images for part in parts]), batch.images)
        assert np.array_equal(np.concatenate([part[step].coords for part in parts]), batch.coords)


@pytest.mark.parametrize(
    ("batch_size", "rank", "world_size"), [(0, 0, 1), (10, 0, 3), (9, 3, 3), (9, -1, 3), (8, 0, 0)]
)
def test_wrong_shares_are_refused(cohort, masks, batch_size, rank, world_size):
    with pytest.raises(ValueError, match="world_size"):
        TileStream(cohort, OPTIONS, batch_size=batch_size, masks=masks, rank=rank, world_size=world_size)


def test_options_can_be_given_by_name(cohort, masks):
    stream = TileStream(cohort, tile_size=48, mpp=[0.5], batch_size=4, seed=0, masks=masks)
    assert stream.options == StreamOptions(tile_size=48, mpp=(0.5,))
    with pytest.raises(ConfigError, match="unknown key tilesize; did you mean tile_size"):
        TileStream(cohort, tilesize=48)
    with pytest.raises(ConfigError, match="mpp must be one or more positive"):
        TileStream(cohort, mpp=[0.5, -1])


@pytest.mark.parametrize(
    "bad",
    [
        {"tile_size": 0},
        {"mpp": ()},
        {"mpp_weights": (1.0,)},
        {"mpp_weights": (0.0, 0.0, 0.0, 0.0)},
        {"mpp_weights": (1.0, 1.0, 1.0, -1.0)},
        {"min_tissue": -0.1},
        {"threads": 0},
        {"prefetch": 0},
        {"open_slides": 0},
    ],
)
def test_wrong_options_are_refused(bad):
    with pytest.raises(ValueError, match="must"):
        StreamOptions(**bad)


def test_closing_dropping_and_interrupting_end_the_threads(cohort, masks):
    stream = TileStream(cohort, OPTIONS, batch_size=8, seed=0, masks=masks)
    batches = stream.batches()
    next(batches)
    assert threads()
    batches.close()
    assert not threads()

    batches = iter(stream)
    next(batches)
    del batches
    gc.collect()
    assert not threads()

    def interrupted():
        for _ in stream:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    gc.collect()
    assert not threads()

    with stream:
        batches = stream.batches()
        next(batches)
        assert threads()
    assert not threads()
    assert take(stream, 1)[0].step == 0  # and can be used again


def test_only_so_many_batches_are_read_ahead(cohort, masks, monkeypatch):
    seen = []
    real = Slide.plan_tile
    monkeypatch.setattr(Slide, "plan_tile", lambda self, *a, **k: seen.append(a) or real(self, *a, **k))
    batches = TileStream(cohort, OPTIONS, batch_size=8, seed=0, masks=masks, prefetch=3).batches()
    next(batches)
    batches.close()
    assert len(seen) <= 24


def test_tiles_that_cannot_be_read_are_replaced_the_same_way_every_time(cohort, masks, monkeypatch, caplog):
    real = Slide.plan_tile

    def read(self, x, y, tile_size, mpp, **options):
        if self.name == "s1" and x < 800:
            raise DamagedSlideError(self.uri, "a chunk is damaged")
        return real(self, x, y, tile_size, mpp, **options)

    healthy = take(TileStream(cohort, OPTIONS, batch_size=32, seed=0, masks=masks), 4)
    monkeypatch.setattr(Slide, "plan_tile", read)
    options = replace(OPTIONS, quarantine=1000)
    streams = [TileStream(cohort, options, batch_size=32, seed=0, masks=masks, threads=n) for n in (1, 6)]
    one, six = (take(stream, 4) for stream in streams)
    assert all(map(same, one, six))
    replaced = 0
    for before, after in zip(healthy, one, strict=True):
        bad = (before.slides == 1) & (before.coords[:, 0] < 800)
        replaced += bad.sum()
        assert np.array_equal(before.images[~bad], after.images[~bad])
        assert not ((after.slides == 1) & (after.coords[:, 0] < 800)).any()
    assert replaced > 5
    for stream in streams:
        assert [(f.slide, f.stage, f.error) for f in stream.failures] == [("s1", "tiles", "DamagedSlideError")]
    assert caplog.text.count("a chunk is damaged") == 2


def test_a_slide_that_cannot_be_opened_is_replaced(cohort, masks, tmp_path):
    gone = CohortSlide(str(tmp_path / "gone.tif"), "gone", "gone", 0.5)
    mixed = Cohort((gone, *cohort.slides[1:]))
    masks = {"gone": masks["s0"], **masks}
    stream = TileStream(mixed, OPTIONS, batch_size=32, seed=0, masks=masks)
    again = TileStream(mixed, OPTIONS, batch_size=32, seed=0, masks=masks, threads=1)
    batches = take(stream, 3)
    assert all(map(same, batches, take(again, 3)))
    assert {*np.concatenate([batch.slides for batch in batches])} == {1, 2, 3}
    assert [(f.slide, f.error) for f in stream.failures] == [("gone", "StoreError")]


def test_all_slides_failing_is_an_error_that_names_one(cohort, masks, tmp_path):
    gone = [CohortSlide(str(tmp_path / f"s{index}.svs"), f"s{index}", "p", 0.5) for index in range(4)]
    stream = TileStream(Cohort(tuple(gone), "nothing"), OPTIONS, batch_size=8, seed=0, masks=masks)
    with pytest.raises(CohortError, match=r"nothing: no slide can be read any more; s\d: "):
        next(stream.batches())
    assert not threads()


def test_slides_without_a_mask_are_left_out(cohort, masks):
    stream = TileStream(cohort, OPTIONS, batch_size=32, seed=0, masks={name: masks[name] for name in ("s1", "s3")})
    assert {*take(stream, 1)[0].slides.tolist()} == {1, 3}
    with pytest.raises(CohortError, match="four slides: none of the 4 slides can be used"):
        TileStream(cohort, OPTIONS, masks={})


def test_a_slide_of_unknown_resolution_is_left_out(cohort, masks):
    slides = tuple(CohortSlide(s.uri, s.name, s.patient, None if s.name == "s2" else 0.5) for s in cohort)
    masks = masks | {"s2": TissueMask(masks["s2"].polygons, 1600, 1200)}
    stream = TileStream(Cohort(slides), OPTIONS, batch_size=32, seed=0, masks=masks)
    assert [(f.slide, f.error) for f in stream.failures] == [("s2", "MissingMppError")]
    assert {*take(stream, 1)[0].slides.tolist()} == {0, 1, 3}


def test_no_tissue_anywhere_is_an_error(cohort):
    speck = TissueMask.of([shapely.box(0, 0, 5, 5)], 1600, 1200, mpp=0.5)
    with pytest.raises(NoTissueError, match="s0, s1, s2, s3"):
        TileStream(cohort, OPTIONS, masks={f"s{index}": speck for index in range(4)})


def test_an_empty_cohort_is_an_error():
    with pytest.raises(CohortError, match="empty"):
        TileStream(Cohort(()), OPTIONS)


def test_tissue_is_found_and_kept_if_not_given(cohort, tmp_path):
    stream = TileStream(cohort, OPTIONS, batch_size=8, seed=0, job=tmp_path / "job")
    assert Job(tmp_path / "job").tissue("s0").is_file()
    again = TileStream(cohort, OPTIONS, batch_size=8, seed=0, job=Job(tmp_path / "job"))
    unkept = TileStream(cohort, OPTIONS, batch_size=8, seed=0)
    assert same(take(stream, 1)[0], take(again, 1)[0])
    assert same(take(stream, 1)[0], take(unkept, 1)[0])


def test_few_slides_stay_open(cohort):
    slides = OpenSlides(cohort.slides, limit=2)
    with slides.use(0) as first:
        for index in (1, 2, 3):
            with slides.use(index):
                pass
        assert len(slides) == 2
        assert first.read_tile(0, 0, 8, 0.5).shape == (8, 8, 3)  # in use, so not closed
    with slides.use(0) as again:
        assert again is first
    slides.close()
    assert len(slides) == 0


def bad_everywhere(name):
    real = Slide.plan_tile

    def plan(self, *arguments, **options):
        if self.name == name:
            raise DamagedSlideError(self.uri, "a chunk is damaged")
        return real(self, *arguments, **options)

    return plan


def test_a_slide_of_many_bad_tiles_is_given_up_at_the_same_step_and_after_a_restart(cohort, masks, monkeypatch):
    plan, tried = bad_everywhere("s1"), []
    monkeypatch.setattr(Slide, "plan_tile", lambda self, *a, **k: tried.append(self.name) or plan(self, *a, **k))
    streams = [
        TileStream(cohort, OPTIONS, batch_size=16, seed=0, masks=masks, threads=n, prefetch=2, quarantine=6)
        for n in (1, 5)
    ]
    runs = [take(stream, 8) for stream in streams]
    assert all(map(same, *runs))
    state = streams[0].state()
    assert state == streams[1].state()
    assert 6 <= len(state["s1"]) < 30  # it was not tried again and again
    assert tried.count("s1") == 2 * len(state["s1"])
    resumed = TileStream(cohort, OPTIONS, batch_size=16, seed=0, masks=masks, prefetch=2, quarantine=6)
    resumed.restore({"s1": [step for step in state["s1"] if step < 5]})
    tried.clear()
    assert all(map(same, take(resumed, 3, start=5), runs[0][5:]))
    assert "s1" not in tried


def test_workers_share_the_batches_of_a_rank(cohort, masks):
    alone = take(TileStream(cohort, OPTIONS, batch_size=8, seed=0, masks=masks), 6)
    stream = TileStream(cohort, OPTIONS, batch_size=8, seed=0, masks=masks)
    shares = [list(itertools.islice(stream.batches(worker=w, workers=2), 3)) for w in range(2)]
    assert all(map(same, alone, itertools.chain(*zip(*shares, strict=True))))
    with pytest.raises(ValueError, match="below workers"):
        next(stream.batches(worker=2, workers=2))


def test_the_pixel_filter_has_other_tiles_drawn(cohort, masks):
    wanted = HsvFilter(hue=(0, 180), saturation=(0, 255), value=(120, 255), share=0.5)
    plain = take(TileStream(cohort, OPTIONS, batch_size=16, seed=0, masks=masks), 2)
    passes = [[keeps(image, wanted) for image in batch.images] for batch in plain]
    assert 0 < sum(map(sum, passes)) < 32
    stream = TileStream(cohort, OPTIONS, batch_size=16, seed=0, masks=masks, hsv=config.to_dict(wanted))
    for before, after, good in zip(plain, take(stream, 2), passes, strict=True):
        assert all(keeps(image, wanted) for image in after.images)
        assert np.array_equal(before.images[good], after.images[good])
    assert stream.report().filtered >= 32 - sum(map(sum, passes))


def test_priors_of_a_column(cohort, masks):
    labelled = replace(cohort, slides=tuple(replace(s, labels={"kind": s.name[-1]}) for s in cohort))
    stream = TileStream(
        labelled, OPTIONS, batch_size=64, masks=masks, slide_weights="column:kind", slide_priors={"0": 1, "2": 3}
    )
    drawn = np.concatenate([batch.slides for batch in take(stream, 4)])
    assert set(drawn) == {0, 2}
    assert 0.6 < (drawn == 2).mean() < 0.9


def test_remote_slides_give_the_same_batches(cohort, masks):
    serving, remote = served(cohort)
    with serving as server:
        stream = TileStream(remote(server), OPTIONS, batch_size=16, seed=0, masks=masks)
        assert all(map(same, take(stream, 3), take(TileStream(cohort, OPTIONS, batch_size=16, masks=masks), 3)))
        report = stream.report()
    assert report.network > 0
    assert report.disk == 0
    assert 0 < report.needed <= report.fetched <= 1.05 * report.needed
    assert report.requests > 0
    assert not threads()


def test_a_remote_slide_that_may_no_longer_be_read_is_replaced(cohort, masks):
    serving, remote = served(cohort)
    with serving as server:
        stream = TileStream(remote(server), OPTIONS, batch_size=8, seed=0, masks=masks, prefetch=1)
        batches = stream.batches()
        next(batches)
        server.faults["s1.tif"] = 403
        for _ in range(3):
            assert not (next(batches).slides == 1).any()
        batches.close()
    assert [failure.slide for failure in stream.failures] == ["s1"]
    assert "403" in stream.failures[0].message


def test_the_report_counts_what_was_done(cohort, masks):
    stream = TileStream(cohort, OPTIONS, batch_size=16, seed=0, masks=masks)
    take(stream, 3)
    report = stream.report()
    assert (report.batches, report.tiles, report.threads) == (3, 48, OPTIONS.threads)
    assert report.opened == len(cohort)
    assert report.decoding > 0
    assert 0 < report.waited <= report.seconds


def test_memory_of_a_batch_is_used_again_only_when_nobody_holds_it():
    memory = _Memory()
    first = memory.take(24)
    part = first.reshape(2, 4, 3)[1:, 2]
    place = first.ctypes.data
    part[...] = 7
    del first
    assert memory.take(24).ctypes.data != place
    assert (part == 7).all()
    del part
    assert place in {memory.take(24).ctypes.data, memory.take(24).ctypes.data, memory.take(25).ctypes.data}
    assert memory.take(0).size == 0
