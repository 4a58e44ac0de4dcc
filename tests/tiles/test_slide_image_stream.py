import contextlib
import itertools
import logging
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import write_slide
from gigatome.core.errors import ConfigError, NotASlideError, StoreError
from gigatome.slides.cohort import CohortSlide
from gigatome.slides.slide import Slide
from gigatome.tiles.slide_image_stream import (
    Order,
    SlideImageReport,
    SlideImageStream,
    damage,
    images_or_errors,
    slide_images,
)
from gigatome.tiles.slide_images import SlideImageOptions, read_slide_image, slide_frame
from tiff_files import aperio_pages, picture, write_tiff

OPTIONS = SlideImageOptions(48, "stretch", crop=(0.5, 1), flip=True)
ORDER = Order(4, 2, seed=0)


@pytest.fixture
def slides(cohort):
    """Four units of a slide each; the blue channel tells which."""
    return [[slide] for slide in cohort]


def take(stream, count, start=0):
    batches = stream.batches(start)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def same(one, other):
    return (
        one.step == other.step and np.array_equal(one.images, other.images) and np.array_equal(one.units, other.units)
    )


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(("images", "pieces"))]


def damaged(folder, name="bad"):
    pages = aperio_pages(picture(900, 700))
    pages[0].chunks[50] = pages[2].chunks[4] = b"\xff\xd8\xff\xd9"
    path = write_tiff(folder / f"{name}.svs", pages)
    return CohortSlide(str(path), name, name)


def test_an_order_gives_each_unit_once_an_epoch():
    order = Order(11, 4, seed=5)
    assert order.epoch_steps == 2
    epochs = [np.concatenate([order(2 * epoch), order(2 * epoch + 1)]) for epoch in range(60)]
    assert epochs[0].dtype == np.int64
    assert all(len(set(epoch.tolist())) == 8 for epoch in epochs)
    assert set(np.concatenate(epochs).tolist()) == set(range(11))
    assert len({tuple(epoch) for epoch in epochs}) == 60
    assert np.array_equal(order(7), Order(11, 4, seed=5)(7))
    assert not np.array_equal(epochs[0], np.concatenate([Order(11, 4, seed=6)(step) for step in range(2)]))


def test_parts_of_an_order_make_up_the_whole():
    for step in range(5):
        parts = [Order(11, 6, 0, part, 3)(step) for part in range(3)]
        assert [len(part) for part in parts] == [2, 2, 2]
        assert np.array_equal(np.concatenate(parts), Order(11, 6, 0)(step))


def test_wrong_orders_are_refused():
    with pytest.raises(ConfigError, match="batch of 6 needs as many to train on, and there are 5"):
        Order(5, 6, 0)
    with pytest.raises(ConfigError, match="batch of 6 cannot be shared by 4"):
        Order(9, 6, 0, 0, 4)
    with pytest.raises(ValueError, match="below parts"):
        Order(9, 6, 0, 2, 2)


def test_batches_hold_the_units_of_the_order(slides):
    with SlideImageStream(slides, ORDER, OPTIONS, seed=1) as stream:
        batches = take(stream, 4)
    assert [batch.step for batch in batches] == [0, 1, 2, 3]
    for batch in batches:
        assert (batch.images.shape, batch.images.dtype) == ((2, 48, 48, 3), np.uint8)
        assert np.array_equal(batch.units, ORDER(batch.step))
        assert np.array_equal(batch.images[..., 2], np.broadcast_to(60 * batch.units[:, None, None], (2, 48, 48)))
    views = {image.tobytes() for batch in batches for image in batch.images}
    assert len(views) == 8  # crop and flip are drawn anew each time


def test_batches_do_not_depend_on_threads_ahead_or_start(slides):
    one = take(SlideImageStream(slides, ORDER, OPTIONS, seed=1, threads=1), 6)
    many = take(SlideImageStream(slides, ORDER, OPTIONS, seed=1, threads=5, ahead=3), 6)
    assert all(map(same, one, many))
    resumed = SlideImageStream(slides, ORDER, OPTIONS, seed=1)
    resumed.restore(SlideImageStream(slides, ORDER, OPTIONS, seed=1).state())
    assert all(map(same, one[4:], take(resumed, 2, start=4)))
    assert not same(one[0], take(SlideImageStream(slides, ORDER, OPTIONS, seed=2), 1)[0])


def test_processes_that_share_slides_read_parts_of_one_image(slides):
    (whole,) = take(SlideImageStream(slides, ORDER, OPTIONS, seed=1), 1, start=3)
    parts = [
        take(SlideImageStream(slides, ORDER, OPTIONS, seed=1, rows=rows, threads=2), 1, start=3)[0].images
        for rows in (range(16), range(16, 32), range(32, 48))
    ]
    assert np.array_equal(np.concatenate(parts, axis=1), whole.images)


def test_processes_that_share_a_batch_draw_what_one_would(slides):
    whole = take(SlideImageStream(slides, Order(4, 4, 0), OPTIONS, seed=1), 2)
    parts = [take(SlideImageStream(slides, Order(4, 4, 0, part, 2), OPTIONS, seed=1), 2) for part in range(2)]
    for step, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([part[step].images for part in parts]), batch.images)


def test_one_of_several_slides_is_drawn_each_time(slides):
    several = [slides[0] + slides[1] + slides[2], slides[3]]
    batches = take(SlideImageStream(several, Order(2, 2, 0), OPTIONS, seed=0), 40)
    shown = [(batch.images[batch.units.tolist().index(unit), 0, 0, 2] // 60) for batch in batches for unit in (0, 1)]
    drawn, alone = shown[::2], set(shown[1::2])
    assert set(drawn) == {0, 1, 2}
    assert min(drawn.count(slide) for slide in range(3)) >= 5
    assert alone == {3}


def test_the_next_batch_is_read_while_one_is_used(slides, monkeypatch):
    opened, read_axes = [], Slide.read_axes

    def note(self, *axes, **how):
        opened.append(self.name)
        return read_axes(self, *axes, **how)

    monkeypatch.setattr(Slide, "read_axes", note)
    with SlideImageStream(slides, Order(4, 1, 0), OPTIONS, seed=0) as stream:
        batches = stream.batches()
        next(batches)
        until = time.monotonic() + 20
        while len(opened) < 2 and time.monotonic() < until:
            time.sleep(0.01)
    assert opened == [f"s{int(Order(4, 1, 0)(step)[0])}" for step in range(2)]  # and no more than that


def test_damage_is_listed_and_said_once(slides, tmp_path, caplog):
    units = [[damaged(tmp_path)], slides[0]]
    stream = SlideImageStream(units, Order(2, 2, 0), SlideImageOptions(450), seed=0)
    with caplog.at_level(logging.WARNING, "gigatome"):
        batches = take(stream, 3)
    (failure,) = stream.failures
    assert (failure.slide, failure.stage, failure.error) == ("bad", "images", "DamagedSlideError")
    assert failure == damage("bad", failure.message)
    assert "chunk" in failure.message
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["bad"]
    bad = batches[0].images[batches[0].units.tolist().index(0)]
    assert (bad[50 + 96 : 50 + 128, 160:192] == 255).mean() > 0.9
    assert (bad[50:90] < 255).mean() > 0.9


def test_a_slide_that_cannot_be_opened_is_named(slides, tmp_path):
    (tmp_path / "none.svs").write_bytes(b"no slide at all" * 10)
    bad = CohortSlide(str(tmp_path / "none.svs"), "none", "none")
    with pytest.raises(NotASlideError, match=r"none\.svs"):
        take(SlideImageStream([[bad], *slides], Order(5, 5, 0), OPTIONS, seed=0), 1)
    images = slide_images([slides[0][0], bad, slides[1][0]], OPTIONS)
    assert (next(images).pixels[..., 2] == 0).all()
    with pytest.raises(NotASlideError, match=r"none\.svs"):
        next(images)
    gone = replace(slides[0][0], uri=str(tmp_path / "gone.svs"))
    with pytest.raises(StoreError, match=r"gone\.svs"):
        list(slide_images([gone], OPTIONS))
    assert not own_threads()


def test_threads_end_and_the_stream_may_be_used_again(slides):
    stream = SlideImageStream(slides, ORDER, OPTIONS, seed=0)
    batches = stream.batches()
    first = next(batches)
    assert own_threads()
    stream.close()
    assert not own_threads()
    assert same(first, take(stream, 1)[0])
    assert not own_threads()
    images = slide_images([unit[0] for unit in slides], OPTIONS)
    next(images)
    images.close()
    assert not own_threads()


def test_a_stream_closes_while_it_reads(slides, monkeypatch):
    begun, go, read_axes = threading.Event(), threading.Event(), Slide.read_axes

    def slow(self, *axes, **how):
        begun.set()
        assert go.wait(20)
        return read_axes(self, *axes, **how)

    monkeypatch.setattr(Slide, "read_axes", slow)
    stream = SlideImageStream(slides, Order(4, 1, 0), SlideImageOptions(2100), seed=0, threads=1)

    def use():
        with contextlib.suppress(CancelledError):
            next(stream.batches())

    reading, closing = threading.Thread(target=use, daemon=True), threading.Thread(target=stream.close, daemon=True)
    reading.start()
    assert begun.wait(20)
    closing.start()
    time.sleep(0.2)  # the other eight pieces wait for the one thread; they are cancelled
    go.set()
    for thread in (closing, reading):
        thread.join(20)
        assert not thread.is_alive()
    assert not own_threads()


def test_the_report_says_how_fast_it_is(slides):
    stream = SlideImageStream(slides, ORDER, OPTIONS, seed=0)
    assert stream.report() == SlideImageReport(threads=4)
    take(stream, 3)
    report = stream.report()
    assert report.images == 6
    assert 0 < report.waited < report.seconds
    assert SlideImageReport(10, 0.1, 5).sentence().startswith("0.5 slides/s: the stream is not the limit")
    assert "reading is the limit: its user waited 60.0%" in SlideImageReport(10, 6, 5, 2).sentence()


def test_whole_images_for_prediction(slides):
    entries = [unit[0] for unit in slides]
    images = list(slide_images(entries, OPTIONS, threads=2))
    assert len(images) == 4
    for entry, image in zip(entries, images, strict=True):
        with entry.open() as slide:
            whole = read_slide_image(slide, slide_frame(slide, SlideImageOptions(48, "stretch"))).pixels
        assert np.array_equal(image.pixels, whole)
    rows = list(slide_images(entries, OPTIONS, rows=range(10, 20)))
    assert np.array_equal(rows[2].pixels, images[2].pixels[10:20])
    assert list(slide_images([], OPTIONS)) == []


def test_an_error_takes_the_place_of_an_image(slides, tmp_path):
    (tmp_path / "none.svs").write_bytes(b"no slide at all" * 10)
    bad = CohortSlide(str(tmp_path / "none.svs"), "none", "none")
    gone = replace(bad, uri=str(tmp_path / "gone.svs"))
    first, broken, second, missing = images_or_errors([slides[1][0], bad, slides[2][0], gone], OPTIONS)
    assert isinstance(broken, NotASlideError)
    assert isinstance(missing, StoreError)
    for image, slide in ((first, slides[1][0]), (second, slides[2][0])):
        (alone,) = slide_images([slide], OPTIONS)
        assert np.array_equal(image.pixels, alone.pixels)
    assert not own_threads()


def test_damage_is_said_in_prediction(tmp_path, caplog):
    good = CohortSlide(str(write_slide(tmp_path / "good.tif")), "good", "good")
    with caplog.at_level(logging.WARNING, "gigatome"):
        bad, fine = slide_images([damaged(tmp_path), good], SlideImageOptions(450))
    assert "chunk" in bad.damaged
    assert fine.damaged == ""
    assert "bad: " in caplog.text


@pytest.mark.parametrize("more", [{"threads": 0}, {"ahead": 0}])
def test_wrong_numbers_are_refused(slides, more):
    with pytest.raises(ValueError, match="at least 1"):
        SlideImageStream(slides, ORDER, OPTIONS, seed=0, **more)


def test_a_unit_without_slides_is_refused(slides):
    with pytest.raises(ValueError, match="needs a slide"):
        SlideImageStream([slides[0], []], ORDER, OPTIONS, seed=0)


def test_real_slides(shared_data):
    paths = sorted((shared_data / "whole").glob("*.tif"))
    entries = [CohortSlide(str(path), path.stem, path.stem) for path in paths]
    images = list(slide_images(entries, SlideImageOptions(256)))
    assert [image.damaged for image in images] == [""] * len(paths)
    assert all(image.pixels.std() > 5 for image in images)
    assert isinstance(paths[0], Path)
