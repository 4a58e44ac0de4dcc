import itertools
import math
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from conftest import HEIGHT, WIDTH, write_slide
from gigatome.core.errors import DamagedSlideError, StoreError
from gigatome.core.geometry import Box
from gigatome.slides.slide import Slide, open_slide
from gigatome.tiles.slide_images import SlideImageOptions, read_slide_image, slide_frame
from tiff_files import aperio_pages, picture, write_tiff


@pytest.fixture
def slide(tmp_path):
    """1600 × 1200 px, of no known mpp; red and green tell the place."""
    with open_slide(write_slide(tmp_path / "slide.tif", seed=7)) as opened:
        yield opened


def place(image):
    """Level-0 x and y that each pixel shows, from red and green: float [H, W, 2], to about 8 pixels."""
    return 8.0 * image[..., :2] + 4


def test_the_whole_slide_is_centred_on_white(slide):
    image = read_slide_image(slide, slide_frame(slide, SlideImageOptions(64)))
    assert (image.pixels.shape, image.pixels.dtype, image.damaged) == ((64, 64, 3), np.uint8, "")
    shown = image.pixels[8:56]  # 1200 of 1600 rows
    assert (image.pixels[:8] == 255).all()
    assert (image.pixels[56:] == 255).all()
    centres = 25 * (np.arange(64) + 0.5)
    assert np.abs(place(shown)[..., 0] - centres).max() <= 9
    assert np.abs(place(shown)[..., 1] - centres[:48, None]).max() <= 9
    assert (shown[..., 2] == 7).all()


def test_a_stretched_slide_fills_the_square(slide):
    pixels = read_slide_image(slide, slide_frame(slide, SlideImageOptions(64, "stretch"))).pixels
    where = place(pixels)
    assert np.abs(where[..., 0] - 25 * (np.arange(64) + 0.5)).max() <= 9
    assert np.abs(where[..., 1] - 18.75 * (np.arange(64)[:, None] + 0.5)).max() <= 9
    assert (pixels[..., 2] == 7).all()


def test_only_the_scanned_part_is_shown(slide):
    slide.bounds = Box(200, 100, 400, 800)
    stretched = place(read_slide_image(slide, slide_frame(slide, SlideImageOptions(40, "stretch"))).pixels)
    assert np.abs(stretched[0, 0] - (205, 110)).max() <= 9
    assert np.abs(stretched[-1, -1] - (595, 890)).max() <= 9
    kept = slide_frame(slide, SlideImageOptions(40))
    assert (kept.x.start, kept.y.start, kept.x.step, kept.y.step) == (0.0, 100.0, 20.0, 20.0)


@pytest.mark.parametrize("size", [1, 7, 333, 1000, 4096])
def test_nothing_is_cut_off(slide, size):
    for aspect in ("keep", "stretch"):
        frame = slide_frame(slide, SlideImageOptions(size, aspect))
        for axis, side in ((frame.x, WIDTH), (frame.y, HEIGHT)):
            assert axis.count == size
            assert axis.start <= 0
            assert axis.start + size * axis.step >= side


def crops(slide, options, count=400):
    rng = np.random.default_rng(0)
    return [slide_frame(slide, options, rng) for _ in range(count)]


def test_crops_keep_what_they_promise(slide):
    kept = crops(slide, SlideImageOptions(100, crop=(0.5, 1)))
    for frame in kept:
        assert frame.x.step == frame.y.step
        assert frame.x.start >= 0
        assert frame.y.start >= -192
        assert frame.x.start + 100 * frame.x.step <= 1600.1
        assert frame.y.start + 100 * frame.y.step <= 1408.1  # 12 rows of 16 px above, 13 below
    shares = np.array([(frame.x.step / 16) ** 2 for frame in kept])
    assert 0.49 < shares.min() < 0.52
    assert 0.98 < shares.max() <= 1.0001
    assert shares.mean() == pytest.approx(0.75, abs=0.03)
    assert len({frame.x.start for frame in kept}) > 20
    assert not any(frame.mirrored for frame in kept)


def test_stretched_crops_are_torchvisions(slide):
    transforms = pytest.importorskip("torchvision.transforms")
    torch = pytest.importorskip("torch")
    drawn = crops(slide, SlideImageOptions(100, "stretch", crop=(0.3, 1)), 3000)
    ours = np.array([(f.x.start / 16, f.y.start / 12, f.x.step / 16 * 100, f.y.step / 12 * 100) for f in drawn])
    torch.manual_seed(0)
    boxes = [transforms.RandomResizedCrop.get_params(torch.zeros(1, 100, 100), [0.3, 1], [0.75, 4 / 3]) for _ in drawn]
    theirs = np.array([(left, top, width, height) for top, left, height, width in boxes])
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 1.0
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 0.7
    assert math.isclose((ours[:, 2] / ours[:, 3]).max(), 4 / 3, abs_tol=0.03)


def test_crops_show_their_place_and_may_be_mirrored(slide):
    options = SlideImageOptions(50, "stretch", crop=(0.2, 0.5), flip=True)
    frames = crops(slide, options, 12)
    assert {frame.mirrored for frame in frames} == {False, True}
    for frame in frames:
        where = place(read_slide_image(slide, frame).pixels)
        x = frame.x.start + frame.x.step * (np.arange(50) + 0.5)
        y = frame.y.start + frame.y.step * (np.arange(50) + 0.5)
        assert np.abs(where[..., 0] - (x[::-1] if frame.mirrored else x)).max() <= 9
        assert np.abs(where[..., 1] - y[:, None]).max() <= 9


def test_without_a_generator_nothing_is_drawn(slide):
    options = SlideImageOptions(50, crop=(0.1, 0.2), flip=True)
    assert slide_frame(slide, options) == slide_frame(slide, SlideImageOptions(50))
    first, again = (slide_frame(slide, options, np.random.default_rng(3)) for _ in range(2))
    assert first == again != slide_frame(slide, options, np.random.default_rng(4))


@pytest.mark.parametrize("aspect", ["keep", "stretch"])
def test_rows_are_those_of_the_whole(tmp_path, aspect):
    path = write_tiff(tmp_path / "slide.svs", aperio_pages(picture(900, 700)))
    with open_slide(path) as slide, ThreadPoolExecutor(3) as pool:
        for number in range(6):
            options = SlideImageOptions(int((96, 450, 1100)[number % 3]), aspect, crop=(0.3, 1), flip=True)
            frame = slide_frame(slide, options, np.random.default_rng(number))
            whole = read_slide_image(slide, frame).pixels
            assert np.array_equal(read_slide_image(slide, frame, pool=pool).pixels, whole)
            cuts = [0, 32, 33, 80, options.image_size]
            shares = [range(*cut) for cut in itertools.pairwise(cuts)]
            parts = [read_slide_image(slide, frame, rows=rows, pool=pool).pixels for rows in shares]
            assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("rows", [range(-1, 4), range(60, 65), range(0, 10, 2)])
def test_rows_that_are_not_there_are_refused(slide, rows):
    with pytest.raises(ValueError, match="64 rows"):
        read_slide_image(slide, slide_frame(slide, SlideImageOptions(64)), rows=rows)


def test_memory_is_that_of_the_image_and_a_piece(slide):
    frame = slide_frame(slide, SlideImageOptions(3072))
    read_slide_image(slide, frame, rows=range(8))
    tracemalloc.start()
    try:
        image = read_slide_image(slide, frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert image.pixels.nbytes == 3 * 3072**2
    assert peak < image.pixels.nbytes + 12_000_000


def damaged_pair(folder):
    """A slide, and the same with a chunk of its first level cut to pieces."""
    pages = aperio_pages(picture(900, 700))
    intact = write_tiff(folder / "intact.svs", pages)
    pages[0].chunks[50] = b"\xff\xd8\xff\xd9"
    return intact, write_tiff(folder / "damaged.svs", pages)


@pytest.mark.parametrize("threads", [0, 2])
def test_damage_is_white_and_said(tmp_path, threads):
    intact, damaged = damaged_pair(tmp_path)
    with open_slide(intact) as one, open_slide(damaged) as other, ThreadPoolExecutor(threads or 1) as pool:
        frame = slide_frame(one, SlideImageOptions(900))
        expected = read_slide_image(one, frame)
        image = read_slide_image(other, frame, pool=pool if threads else None)
    assert expected.damaged == ""
    assert "chunk 5, 3 of level 0" in image.damaged
    wrong = (image.pixels != expected.pixels).any(2)
    rows, columns = np.nonzero(wrong)
    # 64² pixels in pieces of 64² or less that touch them; rows are 100 lower as the square is padded.
    assert (image.pixels[wrong] == 255).all()
    assert wrong[100 + 192 : 100 + 256, 320:384].mean() > 0.95
    assert wrong.sum() <= 9 * 64**2
    assert rows.min() >= 100 + 192 - 64
    assert columns.max() < 384 + 64


def test_other_errors_are_raised(slide, monkeypatch):
    def fail(self, x, y):
        raise StoreError(f"{self.name}: cannot be read")

    monkeypatch.setattr(Slide, "read_axes", fail)
    with ThreadPoolExecutor(2) as pool, pytest.raises(StoreError, match="slide: cannot be read"):
        read_slide_image(slide, slide_frame(slide, SlideImageOptions(2500)), pool=pool)


def test_a_slide_that_cannot_be_read_at_all_is_white(slide, monkeypatch):
    def fail(self, x, y):
        raise DamagedSlideError(self.name, "is no more")

    monkeypatch.setattr(Slide, "read_axes", fail)
    image = read_slide_image(slide, slide_frame(slide, SlideImageOptions(500)), rows=range(100, 233))
    assert image.pixels.shape == (133, 500, 3)
    assert (image.pixels == 255).all()
    assert image.damaged == "is no more"


@pytest.mark.parametrize(
    "fields", [{"image_size": 0}, {"crop": (0.0, 1.0)}, {"crop": (0.8, 0.5)}, {"crop": (0.5, 1.1)}]
)
def test_wrong_options_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SlideImageOptions(**fields)
