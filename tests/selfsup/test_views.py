"""Views: pixels against Pillow and torchvision, draws against their distributions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image, ImageFilter
from torchvision.transforms import RandomResizedCrop

from gigatome.selfsup.views import ViewDraw, ViewOptions, draw_view, multi_crop, render_view

B = 20_000
PLAIN = ViewOptions(horizontal_flip=0, jitter=0, grayscale=0, blur=(0, 0, 0), solarize=(0, 0, 0))


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A smooth picture with all hues and a few edges, uint8 [64, 80, 3]."""
    y, x = np.mgrid[:64, :80] / 64
    waves = [np.sin(5 * x + 3 * y + phase) * 0.4 + 0.5 for phase in (0, 2, 4)]
    picture = (np.stack(waves, -1) * 255).astype(np.uint8)
    picture[20:30, 40:60] = (240, 20, 90)
    picture[:, 10] = 0
    return picture


def pixels(picture: np.ndarray, batch: int = 1) -> torch.Tensor:
    return torch.from_numpy(picture)[None].repeat(batch, 1, 1, 1).float() / 255


def nothing(batch: int, height: int, width: int) -> ViewDraw:
    """A draw that crops everything and changes nothing."""
    none = torch.zeros(batch, dtype=torch.bool)
    one, zero = torch.ones(batch), torch.zeros(batch)
    return ViewDraw(
        zero,
        zero,
        one * width,
        one * height,
        none,
        none,
        none,
        one,
        one,
        one,
        zero,
        none,
        none,
        one,
        none,
        (0, 1, 2, 3),
    )


def draw(options: ViewOptions, kind: int = 0, seed: int = 0, batch: int = B, height: int = 100, width: int = 100):
    return draw_view(options, kind, batch, height, width, torch.Generator().manual_seed(seed))


# Pixels


def test_the_whole_tile_at_its_own_size_is_unchanged(photo):
    square = photo[:64, :64]
    view = render_view(pixels(square), nothing(1, 64, 64), 64)
    np.testing.assert_allclose(view[0].permute(1, 2, 0), square / 255, atol=1e-5)


@pytest.mark.parametrize("size", [24, 33, 96])
@pytest.mark.parametrize("box", [(0.0, 0.0, 80.0, 64.0), (7.25, 11.5, 61.75, 40.0)])
def test_crops_resample_as_pillow_does(photo, box, size):
    left, top, right, bottom = box
    crop = replace(
        nothing(1, 64, 80),
        x=torch.tensor([left]),
        y=torch.tensor([top]),
        width=torch.tensor([right - left]),
        height=torch.tensor([bottom - top]),
    )
    expected = np.asarray(Image.fromarray(photo).resize((size, size), Image.Resampling.BICUBIC, box=box))
    view = render_view(pixels(photo), crop, size)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(view - expected).max() <= 1.5  # Pillow rounds twice, and in fixed point


def test_mirrors_and_quarter_turns(photo):
    square, yes, no = photo[:64, :64], torch.tensor([True]), torch.tensor([False])
    for mirror_x, mirror_y, transpose, expected in [
        (yes, no, no, square[:, ::-1]),
        (no, yes, no, square[::-1]),
        (no, no, yes, square.transpose(1, 0, 2)),
        (yes, no, yes, np.rot90(square)),
        (no, yes, yes, np.rot90(square, 3)),
        (yes, yes, no, np.rot90(square, 2)),
    ]:
        turned = replace(nothing(1, 64, 64), mirror_x=mirror_x, mirror_y=mirror_y, transpose=transpose)
        view = render_view(pixels(square), turned, 64)
        np.testing.assert_allclose(view[0].permute(1, 2, 0), expected / 255, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "values", "function"),
    [
        ("brightness", [0.6, 1.0, 1.4], reference.adjust_brightness),
        ("contrast", [0.6, 1.0, 1.4], reference.adjust_contrast),
        ("saturation", [0.8, 1.0, 1.2], reference.adjust_saturation),
        ("hue", [-0.1, 0.0, 0.07, 0.5], reference.adjust_hue),
    ],
)
def test_colour_changes_are_torchvisions(photo, name, values, function):
    square = photo[:64, :64]
    changed = replace(nothing(len(values), 64, 64), **{name: torch.tensor(values)})
    views = render_view(pixels(square, len(values)), changed, 64)
    image = pixels(square)[0].permute(2, 0, 1)
    for view, value in zip(views, values, strict=True):
        np.testing.assert_allclose(view, function(image, value), atol=2e-4)  # its luma has 0.2989 for red, not 0.299


def test_gray_blur_and_solarize_touch_the_chosen_images_only(photo):
    square, chosen = photo[:64, :64], torch.tensor([False, True])
    plain = nothing(2, 64, 64)
    gray = render_view(pixels(square, 2), replace(plain, gray=chosen), 64)
    solarized = render_view(pixels(square, 2), replace(plain, solarize=chosen), 64)
    blurred = render_view(pixels(square, 2), replace(plain, blur=chosen, sigma=torch.tensor([5.0, 1.5])), 64)
    expected = pixels(square)[0].permute(2, 0, 1)
    for views in (gray, solarized, blurred):
        np.testing.assert_allclose(views[0], expected, atol=1e-5)
    np.testing.assert_allclose(gray[1], reference.rgb_to_grayscale(expected, 3), atol=2e-4)
    np.testing.assert_allclose(solarized[1], reference.solarize(expected, 0.5), atol=1e-5)
    pillow = np.asarray(Image.fromarray(square).filter(ImageFilter.GaussianBlur(1.5)))
    difference = np.abs(blurred[1].permute(1, 2, 0).numpy() * 255 - pillow)[6:-6, 6:-6]
    assert difference.mean() < 1.5  # Pillow's is three box blurs


def test_a_blur_keeps_a_flat_image_flat():
    flat = torch.full((1, 32, 32, 3), 0.25)
    blurred = replace(nothing(1, 32, 32), blur=torch.tensor([True]), sigma=torch.tensor([2.0]))
    np.testing.assert_allclose(render_view(flat, blurred, 32), 0.25, atol=1e-6)


# Draws


@pytest.mark.parametrize(("kind", "height", "width"), [(0, 100, 100), (2, 100, 100), (0, 60, 140)])
def test_crops_are_distributed_as_torchvisions(kind, height, width):
    options = ViewOptions()
    drawn = draw(options, kind, height=height, width=width)
    scale = list(options.local_scale if kind == 2 else options.global_scale)
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, list(options.ratio)) for _ in range(4000)]).T
    ours = np.stack([drawn.y, drawn.x, drawn.height, drawn.width])
    # on an oblong tile its fallback lies in the middle, ours anywhere
    rows = slice(0 if height == width else 2, 4)
    for mine, other in zip(ours[rows], theirs[rows], strict=True):
        quantiles = np.linspace(0.05, 0.95, 10)
        np.testing.assert_allclose(np.quantile(mine, quantiles), np.quantile(other, quantiles), atol=2.5)
    assert (drawn.x >= 0).all()
    assert (drawn.y >= 0).all()
    assert (drawn.x + drawn.width <= width + 1e-3).all()
    assert (drawn.y + drawn.height <= height + 1e-3).all()


def test_local_crops_have_uniform_area_and_log_uniform_ratio():
    drawn = draw(ViewOptions(), kind=2)
    area, ratio = drawn.width * drawn.height / 100**2, drawn.width / drawn.height
    quantiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(area.quantile(quantiles), 0.05 + 0.35 * quantiles, atol=0.005)
    np.testing.assert_allclose(ratio.log().quantile(quantiles) / np.log(4 / 3), 2 * quantiles - 1, atol=0.03)


def test_a_crop_that_never_fits_falls_back_to_the_largest():
    drawn = draw(ViewOptions(global_scale=(1.0, 1.0), ratio=(2.0, 3.0)), batch=50)
    assert (drawn.width == 100).all()
    np.testing.assert_allclose(drawn.height, 50)


def test_chances_are_those_of_the_options():
    rates = {"jitter": 0.8, "gray": 0.2}
    for kind, blur, solarize in [(0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0)]:
        drawn = draw(ViewOptions(), kind, seed=kind)
        seen = {
            "jitter": (drawn.brightness != 1).float().mean(),
            "gray": drawn.gray.float().mean(),
            "mirror": drawn.mirror_x.float().mean(),
            "blur": drawn.blur.float().mean(),
            "solarize": drawn.solarize.float().mean(),
        }
        for name, rate in {**rates, "mirror": 0.5, "blur": blur, "solarize": solarize}.items():
            assert abs(float(seen[name]) - rate) < 0.013, (kind, name)  # four standard errors
        assert not drawn.mirror_y.any()
        assert not drawn.transpose.any()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1), ("sigma", 0.1, 2)],
)
def test_amounts_are_uniform(name, low, high):
    drawn = draw(ViewOptions(jitter=1.0))
    quantiles = torch.linspace(0, 1, 9)
    seen = getattr(drawn, name).quantile(quantiles)
    np.testing.assert_allclose(seen, low + (high - low) * quantiles, atol=0.02 * (high - low))


def test_every_order_of_colour_changes_comes_up():
    assert len({draw(ViewOptions(), seed=seed, batch=1).order for seed in range(300)}) == 24


def test_quarter_turns_and_flips_make_all_eight_symmetries_alike():
    drawn = draw(ViewOptions(quarter_turns=True, vertical_flip=0.5))
    kinds = drawn.mirror_x * 4 + drawn.mirror_y * 2 + drawn.transpose
    np.testing.assert_allclose(torch.bincount(kinds, minlength=8) / B, 1 / 8, atol=0.01)


def test_images_of_a_batch_have_their_own_draws():
    drawn = draw(ViewOptions(), batch=64)
    for name in ("x", "y", "width", "height", "sigma"):
        assert len(getattr(drawn, name).unique()) == 64


# The whole


def test_multi_crop_shapes_range_and_seed(photo):
    images = torch.from_numpy(photo)[None].repeat(5, 1, 1, 1)
    options = ViewOptions(global_size=32, local_size=16, local_views=3)
    first, again, other = (multi_crop(images, options, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert [tuple(view.shape) for view in first] == [(5, 3, 32, 32)] * 2 + [(5, 3, 16, 16)] * 3
    assert all(view.dtype == torch.float32 and view.min() >= 0 and view.max() <= 1 for view in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert images.eq(torch.from_numpy(photo)).all()  # the tiles themselves are untouched


def test_plain_options_give_crops_alone(photo):
    flat = torch.full((2, 40, 40, 3), 51, dtype=torch.uint8)
    for view in multi_crop(flat, replace(PLAIN, global_size=16, local_size=8), torch.Generator().manual_seed(0)):
        np.testing.assert_allclose(view, 0.2, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [{"global_scale": (0.0, 1.0)}, {"local_scale": (0.5, 0.4)}, {"hue": 0.6}, {"local_views": -1}, {"local_size": 0}],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must|range"):
        ViewOptions(**wrong)
