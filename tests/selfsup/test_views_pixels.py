"""Pixels of views against Pillow and torchvision, with the C extension and without."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode

from gigatome.core.native import NATIVE
from gigatome.selfsup import colours
from gigatome.selfsup.render import ViewDraw, render_views
from gigatome.selfsup.views import ViewOptions, draw_view

extension = pytest.mark.skipif(NATIVE is None, reason="no C extension")


@pytest.fixture(params=[False, pytest.param(True, marks=extension)])
def native(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A smooth picture with all hues and a few edges, uint8 [64, 80, 3]."""
    y, x = np.mgrid[:64, :80] / 64
    waves = [np.sin(5 * x + 3 * y + phase) * 0.4 + 0.5 for phase in (0, 2, 4)]
    picture = (np.stack(waves, -1) * 255).astype(np.uint8)
    picture[20:30, 40:60] = (240, 20, 90)
    picture[:, 10] = 0
    return picture


@pytest.fixture(scope="module")
def square(photo) -> np.ndarray:
    return np.ascontiguousarray(photo[:, :64])


def nothing(batch: int, height: int, width: int) -> ViewDraw:
    """A draw that crops everything and changes nothing."""
    values: dict[str, torch.Tensor] = {field.name: torch.zeros(batch) for field in fields(ViewDraw)[:-1]}
    for name in ("mirror_x", "mirror_y", "transpose", "stain", "gray", "blur", "solarize"):
        values[name] = values[name].bool()
    for name in ("brightness", "contrast", "saturation", "sigma"):
        values[name] = torch.ones(batch)
    values |= {"width": torch.full((batch,), width), "height": torch.full((batch,), height)}
    values |= {"stain_scale": torch.ones(batch, 3), "stain_shift": torch.zeros(batch, 3)}
    return ViewDraw(**values, order=(0, 1, 2, 3))


def render(picture: np.ndarray, size: int, native: bool, batch: int = 1, **changes: object) -> np.ndarray:
    """Views [B, size, size, 3] of one picture."""
    draw = replace(nothing(batch, *picture.shape[:2]), **changes)
    images = torch.from_numpy(picture)[None].repeat(batch, 1, 1, 1)
    (view,) = render_views(images, [draw], [size], native=native)
    return view.permute(0, 2, 3, 1).numpy()


def planes(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1) / 255


def test_the_whole_tile_at_its_own_size_is_unchanged(square, native):
    np.testing.assert_allclose(render(square, 64, native)[0], square / 255, atol=1e-5)


@pytest.mark.parametrize("size", [24, 33, 96])
@pytest.mark.parametrize("box", [(0.0, 0.0, 80.0, 64.0), (7.25, 11.5, 61.75, 40.0)])
def test_crops_resample_as_pillow_does(photo, box, size, native):
    left, top, right, bottom = (torch.tensor([edge]) for edge in box)
    view = render(photo, size, native, x=left, y=top, width=right - left, height=bottom - top)[0] * 255
    expected = np.asarray(Image.fromarray(photo).resize((size, size), Image.Resampling.BICUBIC, box=box))
    assert np.abs(view - expected).max() <= 1.5  # Pillow rounds twice, and in fixed point


def test_crops_of_whole_pixels_are_torchvisions_but_at_their_edges(photo, native):
    place = dict(zip(("x", "y", "width", "height"), torch.tensor([[9.0], [13.0], [50.0], [44.0]]), strict=True))
    view = render(photo, 32, native, **place)[0]
    expected = reference.resized_crop(
        planes(photo), 13, 9, 44, 50, [32, 32], InterpolationMode.BICUBIC, antialias=True
    ).clamp(0, 1)
    np.testing.assert_allclose(view[3:-3, 3:-3], expected.permute(1, 2, 0)[3:-3, 3:-3], atol=1e-4)


def test_mirrors_and_quarter_turns(square, native):
    yes, no = torch.tensor([True]), torch.tensor([False])
    for mirror_x, mirror_y, transpose, expected in [
        (yes, no, no, square[:, ::-1]),
        (no, yes, no, square[::-1]),
        (no, no, yes, square.transpose(1, 0, 2)),
        (yes, no, yes, np.rot90(square)),
        (no, yes, yes, np.rot90(square, 3)),
        (yes, yes, no, np.rot90(square, 2)),
    ]:
        view = render(square, 64, native, mirror_x=mirror_x, mirror_y=mirror_y, transpose=transpose)
        np.testing.assert_allclose(view[0], expected / 255, atol=1e-5)


def test_a_view_turned_by_90_degrees_is_a_quarter_turn(square, native):
    views = render(square, 64, native, 3, angle=torch.tensor([90.0, -90.0, 180.0]))
    for view, quarters in zip(views, (1, 3, 2), strict=True):
        np.testing.assert_allclose(view, np.rot90(square, quarters) / 255, atol=1e-3)


def test_a_turned_view_is_pillows_within_and_tissue_at_its_corners(native):
    y, x = np.mgrid[:96, :96] / 96
    smooth = np.stack([np.sin(9 * x + 4 * y + phase) * 100 + 128 for phase in (0, 2, 4)], -1).astype(np.uint8)
    inner = {
        name: torch.tensor([value]) for name, value in [("x", 24.0), ("y", 24.0), ("width", 48.0), ("height", 48.0)]
    }
    view = render(smooth, 48, native, angle=torch.tensor([33.0]), **inner)[0] * 255
    turned = np.asarray(Image.fromarray(smooth).rotate(33.0, Image.Resampling.BICUBIC))
    np.testing.assert_allclose(view, turned[24:72, 24:72], atol=2.5)  # the whole tile turned, then cropped
    edge = render(smooth, 48, native, angle=torch.tensor([33.0]))[0] * 255
    assert edge.min() > 20  # nothing black


@pytest.mark.parametrize(
    ("name", "values", "function"),
    [
        ("brightness", [0.6, 1.0, 1.4], reference.adjust_brightness),
        ("contrast", [0.6, 1.0, 1.4], reference.adjust_contrast),
        ("saturation", [0.8, 1.0, 1.2], reference.adjust_saturation),
        ("hue", [-0.1, 0.0, 0.07, 0.5], reference.adjust_hue),
    ],
)
def test_colour_changes_are_torchvisions(square, name, values, function, native):
    views = render(square, 64, native, len(values), **{name: torch.tensor(values)})
    for view, value in zip(views, values, strict=True):
        expected = function(planes(square), value).permute(1, 2, 0)
        np.testing.assert_allclose(view, expected, atol=2e-4)  # its luma has 0.2989 for red, not 0.299


def test_colour_changes_are_done_in_the_order_drawn(square, native):
    functions = [
        (reference.adjust_brightness, 1.4),
        (reference.adjust_contrast, 0.6),
        (reference.adjust_saturation, 1.2),
        (reference.adjust_hue, 0.1),
    ]
    amounts = {function.__name__.removeprefix("adjust_"): torch.tensor([value]) for function, value in functions}
    for order in [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)]:
        expected = planes(square)
        for change in order:
            expected = functions[change][0](expected, functions[change][1])
        view = render(square, 64, native, order=order, **amounts)[0]
        np.testing.assert_allclose(view, expected.permute(1, 2, 0), atol=1e-3)


def test_gray_blur_and_solarize_touch_the_chosen_images_only(square, native):
    chosen = torch.tensor([False, True])
    gray = render(square, 64, native, 2, gray=chosen)
    solarized = render(square, 64, native, 2, solarize=chosen)
    blurred = render(square, 64, native, 2, blur=chosen, sigma=torch.tensor([5.0, 1.5]))
    for views in (gray, solarized, blurred):
        np.testing.assert_allclose(views[0], square / 255, atol=1e-5)
    image = planes(square)
    np.testing.assert_allclose(gray[1], reference.rgb_to_grayscale(image, 3).permute(1, 2, 0), atol=2e-4)
    np.testing.assert_allclose(solarized[1], np.asarray(ImageOps.solarize(Image.fromarray(square))) / 255, atol=1e-5)
    inner = (slice(6, -6), slice(6, -6))
    gaussian = reference.gaussian_blur(image, [13, 13], [1.5, 1.5]).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(blurred[1][inner], gaussian[inner], atol=1e-3)
    pillow = np.asarray(Image.fromarray(square).filter(ImageFilter.GaussianBlur(1.5)))
    assert np.abs(blurred[1] * 255 - pillow)[inner].mean() < 1.5  # Pillow's is three box blurs


@pytest.mark.parametrize("sigma", [0.1, 2.0, 16.0])
def test_a_blur_keeps_a_flat_image_flat(sigma, native):
    flat = np.full((32, 32, 3), 51, np.uint8)
    views = render(flat, 32, native, blur=torch.tensor([True]), sigma=torch.tensor([sigma]))
    np.testing.assert_allclose(views, 0.2, atol=1e-6)


def test_stains_are_moved_along_their_own_colours(native):
    haematoxylin, white = 10 ** -np.array([0.65, 0.70, 0.29]), np.ones(3)
    pixels = np.round(np.stack([haematoxylin, white]) * 255).astype(np.uint8)
    picture = np.repeat(pixels[None], 2, 0)
    picture = np.kron(picture, np.ones((8, 8, 1), np.uint8))
    scale, shift = torch.tensor([[2.0, 1.0, 1.0]] * 3), torch.tensor([[0.0] * 3, [0.0, 0.1, 0.0], [0.0] * 3])
    scale[1] = 1
    changed = {"stain": torch.tensor([True, True, False]), "stain_scale": scale, "stain_shift": shift}
    views = render(picture, 16, native, 3, **changed)
    for view, left, right in zip(
        views,
        (haematoxylin**2, haematoxylin * 10 ** -np.array([0.007, 0.099, 0.011]), haematoxylin),
        (white, 10 ** -np.array([0.007, 0.099, 0.011]), white),
        strict=True,
    ):
        np.testing.assert_allclose(view[0, 0], left, atol=5e-3)
        np.testing.assert_allclose(view[0, -1], right, atol=5e-3)


def test_views_are_normalised_if_asked(square, native):
    images = torch.from_numpy(square)[None]
    mean, std = torch.tensor([100.0, 120.0, 140.0]).view(3, 1, 1), torch.tensor([50.0, 60.0, 70.0]).view(3, 1, 1)
    (view,) = render_views(images, [nothing(1, 64, 64)], [64], mean, std, native=native)
    np.testing.assert_allclose(view[0], (planes(square) * 255 - mean) / std, atol=1e-4)
    assert images[0].equal(torch.from_numpy(square))


@extension
@pytest.mark.parametrize(("threads", "rotation"), [(1, 0.0), (3, 0.0), (3, 180.0)])
def test_everything_at_once_is_the_same_on_both_paths(photo, threads, rotation):
    options = ViewOptions(rotation=rotation, quarter_turns=True, vertical_flip=0.5, hed_probability=0.5)
    options = replace(options, solarize=(0.0, 0.0, 0.0))  # rounding may decide which side of 0.5 a pixel lies
    images = torch.from_numpy(photo)[None].repeat(13, 1, 1, 1)
    draws = [draw_view(options, kind, 13, 64, 80, torch.Generator().manual_seed(kind)) for kind in range(3)]
    sizes, before = [50, 61, 24], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fast = render_views(images, draws, sizes)
    finally:
        torch.set_num_threads(before)
    for view, expected in zip(fast, render_views(images, draws, sizes, native=False), strict=True):
        np.testing.assert_allclose(view, expected, atol=2e-4)


def test_the_darkest_pixel_can_be_stained():
    black = torch.zeros(1, 3, 4, 4)
    stained = colours.restain(black, torch.full((1, 3), 1.2), torch.zeros(1, 3))
    assert torch.isfinite(stained).all()
    assert stained.max() <= 1 / 255


@extension
def test_arrays_that_do_not_fit_are_refused_by_the_extension():
    pixels, boxes = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 7), np.float32)
    boxes[:, 2:4] = 8
    out, amounts = np.zeros((2, 3, 4, 4), np.float32), np.ones((2, 7), np.float32)
    order, scaling = np.arange(4, dtype=np.uint8), np.ones((2, 3), np.float32)
    NATIVE.crop_views(pixels, boxes, out)
    NATIVE.recolour_views(out, amounts, order, scaling)
    bad = boxes.copy()
    for column, value in [(0, np.nan), (0, 1e9), (2, 0.0), (3, -1.0), (3, np.inf)]:
        bad[:] = boxes
        bad[1, column] = value
        with pytest.raises(ValueError, match="out of range"):
            NATIVE.crop_views(pixels, bad, out)
    for arrays in [(pixels[:1], boxes, out), (pixels, boxes[:, :6].copy(), out), (pixels, boxes, out[:, :, :3].copy())]:
        with pytest.raises(ValueError, match="do not fit"):
            NATIVE.crop_views(*arrays)
    for column, value in [(3, 1.5), (3, np.nan), (5, 17.0), (5, -1.0), (5, np.nan)]:
        wrong = amounts.copy()
        wrong[1, column] = value
        with pytest.raises(ValueError, match="out of range"):
            NATIVE.recolour_views(out, wrong, order, scaling)
    with pytest.raises(ValueError, match="out of range"):
        NATIVE.recolour_views(out, amounts, order + 1, scaling)
