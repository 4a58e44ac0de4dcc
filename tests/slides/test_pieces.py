"""A part of an image has exactly the pixels of the whole."""

import numpy as np
import pytest

from gigatome.core.native import NATIVE
from gigatome.slides.reader import TiffReader
from gigatome.slides.resample import Axis
from gigatome.slides.slide import Slide, open_slide
from tiff_files import aperio_pages, halved, picture, raw_page, write_tiff

WIDTH, HEIGHT = 1000, 731
IMAGE = picture(WIDTH, HEIGHT)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """One slide without loss of a single level, one of JPEG, one whose second level is no whole factor smaller."""
    folder = tmp_path_factory.mktemp("pieces")
    odd = np.ascontiguousarray(halved(IMAGE, 3)[:-1, :-2])
    return {
        "raw": write_tiff(folder / "raw.tif", [raw_page(IMAGE, 128)]),
        "jpeg": write_tiff(folder / "jpeg.svs", aperio_pages(IMAGE)),
        "odd": write_tiff(folder / "odd.tif", [raw_page(IMAGE, 128), raw_page(odd, 128, t254=(4, [1]))]),
    }


@pytest.fixture(params=[True, False], ids=["extension", "libraries"])
def native(request):
    if request.param and NATIVE is None:
        pytest.skip("the C extension is not built")
    return request.param


def overlaps(start, step, count, side):
    """Share of each output pixel that lies on each source pixel: float64 [count, side]."""
    edges = start + step * np.arange(count + 1)
    pixels = np.arange(side)
    shared = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return shared.clip(0) / step


def mean_on_white(x, y):
    """What the docs promise, by plain matrices: the mean of level 0, white beyond it."""
    across, down = overlaps(x.start, x.step, x.count, WIDTH), overlaps(y.start, y.step, y.count, HEIGHT)
    picture = np.einsum("yh,hwc,xw->yxc", down, IMAGE.astype(float), across, optimize=True)
    return picture + 255 * (1 - down.sum(1)[:, None, None] * across.sum(1)[None, :, None])


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (Axis(0.0, 7.3, 100), Axis(0.0, 5.1, 100)),
        (Axis(-40.5, 3.0, 400), Axis(17.25, 9.7, 100)),
        (Axis(-12.0, 4.0, 260), Axis(-8.0, 4.0, 200)),
        (Axis(500.0, 1.0, 70), Axis(700.0, 2.0, 30)),
        (Axis(-300.0, 2000.0, 2), Axis(-300.0, 2000.0, 3)),
    ],
)
def test_pixels_are_means_of_the_slide_on_white(paths, x, y):
    with open_slide(paths["raw"]) as slide:
        pixels = slide.read_axes(x, y)
    assert (pixels.shape, pixels.dtype) == ((y.count, x.count, 3), np.uint8)
    assert np.abs(pixels - mean_on_white(x, y)).max() <= 0.51


def test_outside_is_white_and_enlarged_is_smooth(paths):
    with open_slide(paths["raw"]) as slide:
        assert (slide.read_axes(Axis(-900.0, 3.0, 90), Axis(0.0, 3.0, 20)) == 255).all()
        assert (slide.read_axes(Axis(0.0, 3.0, 90), Axis(5000.0, 3.0, 20)) == 255).all()
        large = slide.read_axes(Axis(300.0, 0.25, 200), Axis(200.0, 0.5, 100)).astype(int)
    assert np.abs(large[1::2, 1:-1:4].astype(int) - IMAGE[200:250, 300:350]).mean() < 4
    assert np.abs(np.diff(large, axis=1)).max() <= np.abs(np.diff(IMAGE[198:252, 298:352].astype(int), axis=1)).max()


def axes(rng):
    """Axes that reach over the slide's edges: whole and odd steps, aligned and not, equal in both directions or not."""
    step = float(rng.choice([0.7, 1, 1.5, 2, 3, 3.0000301, 4, 4.01, 6, 8, 8.7]))
    other = step if rng.random() < 0.6 else step * float(rng.choice([1.3, 2]))
    starts = [-step * float(rng.choice([3, 2.5, rng.uniform(0, 9)])) for _ in range(2)]
    if rng.random() < 0.3:
        starts = [20.0, 36.0]
    return (
        Axis(starts[0], step, int(WIDTH / step) + int(rng.integers(8))),
        Axis(starts[1], other, int(HEIGHT / other) + int(rng.integers(8))),
    )


@pytest.mark.parametrize("name", ["raw", "jpeg", "odd"])
@pytest.mark.parametrize("exact", [False, True])
def test_parts_are_those_of_the_whole(paths, native, name, exact):
    rng = np.random.default_rng(0)
    with open_slide(paths[name], native=native) as slide:
        for _ in range(12 if native else 4):
            x, y = axes(rng)
            whole = slide.read_axes(x, y, exact=exact)
            for _ in range(4):
                top, foot = sorted(rng.integers(y.count + 1, size=2).tolist())
                part = slide.read_axes(x, y.part(top, foot - top), exact=exact)
                assert np.array_equal(part, whole[top:foot]), (x, y, top, foot)
            left = int(rng.integers(x.count - 70))
            part = slide.read_axes(x.part(left, 70), y, exact=exact)
            assert np.array_equal(part, whole[:, left : left + 70]), (x, y, left)


def test_parts_of_several_blocks_are_those_of_the_whole(tmp_path):
    image = np.zeros((300, 9000, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(9000) // 36, np.random.default_rng(0).integers(256, size=(300, 9000))
    with open_slide(write_tiff(tmp_path / "wide.tif", [raw_page(image, 256)])) as slide:
        for step in (1.0, 1.37, 2.0):
            x, y = Axis(-5.0, step, int(9100 / step)), Axis(-5.0, step, int(310 / step))
            whole = slide.read_axes(x, y)
            assert np.array_equal(slide.read_axes(x, y.part(40, 60)), whole[40:100])
            assert np.array_equal(slide.read_axes(x.part(3000, 1500), y), whole[:, 3000:4500])


def test_the_level_is_that_of_other_reads(paths, monkeypatch):
    used = []
    read = TiffReader.read_level
    monkeypatch.setattr(
        TiffReader, "read_level", lambda self, level, *rest: used.append(level) or read(self, level, *rest)
    )
    with open_slide(paths["odd"]) as slide:
        slide.read_axes(Axis(0.0, 6.0, 100), Axis(0.0, 6.0, 100))
        slide.read_axes(Axis(0.0, 6.0, 100), Axis(0.0, 6.0, 100), exact=True)
        slide.read_axes(Axis(0.0, 6.0, 100), Axis(0.0, 1.0, 100))
    assert used == [1, 0, 0]
    assert isinstance(slide, Slide)
