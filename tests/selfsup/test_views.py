"""Views: what is drawn, against torchvision's draws and the distributions stated, and the whole."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy.stats import ks_2samp
from torchvision import transforms

from gigatome.selfsup.views import ViewOptions, draw_view, multi_crop

B = 20_000
THEIRS = 3000
PLAIN = ViewOptions(horizontal_flip=0, jitter=0, grayscale=0, blur=(0, 0, 0), solarize=(0, 0, 0))
NAMES = ["dino", "dinov2", "moco_v2", "moco_v3"]
PRESETS = [ViewOptions.dino(), ViewOptions.dinov2(), ViewOptions.moco_v2(), ViewOptions.moco_v3()]


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """Waves of all hues, uint8 [64, 80, 3]."""
    y, x = np.mgrid[:64, :80] / 64
    waves = [np.sin(5 * x + 3 * y + phase) * 0.3 + np.sin(40 * x - 31 * y + phase) * 0.1 + 0.5 for phase in (0, 2, 4)]
    return (np.stack(waves, -1) * 255).astype(np.uint8)


def draw(options: ViewOptions, kind: int = 0, seed: int = 0, batch: int = B, height: int = 100, width: int = 100):
    return draw_view(options, kind, batch, height, width, torch.Generator().manual_seed(seed))


def alike(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether two samples may have one distribution; chance alone denies it once in ten thousand times."""
    return ks_2samp(np.asarray(ours), np.asarray(theirs)).pvalue > 1e-4


# Draws


@pytest.mark.parametrize("options", PRESETS, ids=NAMES)
@pytest.mark.parametrize(("kind", "height", "width"), [(0, 1000, 1000), (2, 1000, 1000), (0, 600, 1400)])
def test_crops_are_distributed_as_torchvisions(options, kind, height, width):
    drawn = draw(options, kind, height=height, width=width)  # a large tile: theirs are rounded to whole pixels
    scale = list(options.local_scale if kind == 2 else options.global_scale)
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    get = transforms.RandomResizedCrop.get_params
    theirs = np.array([get(image, scale, list(options.ratio)) for _ in range(THEIRS)]).T
    ours = np.stack([drawn.y, drawn.x, drawn.height, drawn.width])
    # on an oblong tile its fallback lies in the middle, ours anywhere
    rows = slice(0 if height == width else 2, 4)
    for mine, other in zip(ours[rows], theirs[rows], strict=True):
        assert alike(mine.round(), other)
    assert (drawn.x >= 0).all()
    assert (drawn.y >= 0).all()
    assert (drawn.x + drawn.width <= width + 1e-2).all()
    assert (drawn.y + drawn.height <= height + 1e-2).all()


@pytest.mark.parametrize("options", PRESETS, ids=NAMES)
def test_amounts_are_distributed_as_torchvisions(options):
    amounts = (options.brightness, options.contrast, options.saturation, options.hue)
    jitter = transforms.ColorJitter(*amounts)
    torch.manual_seed(0)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = np.array([jitter.get_params(*ranges)[1:] for _ in range(THEIRS)]).T
    drawn = draw(replace(options, jitter=1.0))
    for mine, other in zip((drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue), theirs, strict=True):
        assert alike(mine, other)
    sigmas = [transforms.GaussianBlur.get_params(*options.blur_sigma) for _ in range(THEIRS)]
    assert alike(drawn.sigma, sigmas)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("options", PRESETS, ids=NAMES)
def test_chances_are_torchvisions(options, kind):
    drawn = draw(options, kind, seed=kind)
    torch.manual_seed(kind)
    image = torch.tensor([0.1, 0.2, 0.9]).view(3, 1, 1) * torch.tensor([1.0, 0.5])
    rates = [
        (drawn.mirror_x, transforms.RandomHorizontalFlip(options.horizontal_flip)),
        (drawn.gray, transforms.RandomGrayscale(options.grayscale)),
        (drawn.solarize, transforms.RandomSolarize(0.5, options.solarize[kind])),
        (drawn.brightness != 1, transforms.RandomApply([torch.neg], options.jitter)),
        (drawn.blur, transforms.RandomApply([torch.neg], options.blur[kind])),
    ]
    for mine, transform in rates:
        other = np.mean([not torch.equal(transform(image), image) for _ in range(THEIRS)])
        share = float(mine.float().mean())
        spread = np.sqrt(max(share * (1 - share), 1e-9) * (1 / B + 1 / THEIRS))
        assert abs(share - other) <= 4 * spread, transform
    assert not drawn.mirror_y.any()
    assert not drawn.transpose.any()
    assert not drawn.angle.any()
    assert not drawn.stain.any()


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


def test_angles_and_stains_are_uniform_where_wanted():
    drawn = draw(ViewOptions(rotation=30.0, hed_probability=0.3, hed=0.2))
    quantiles = np.linspace(0, 1, 9)
    np.testing.assert_allclose(np.quantile(drawn.angle, quantiles), 60 * quantiles - 30, atol=1)
    assert abs(float(drawn.stain.float().mean()) - 0.3) < 0.013
    for amounts, middle in ((drawn.stain_scale, 1), (drawn.stain_shift, 0)):
        assert amounts.shape == (B, 3)
        for stain in amounts.T:
            np.testing.assert_allclose(np.quantile(stain, quantiles), middle + 0.4 * quantiles - 0.2, atol=0.01)
    assert (
        abs(np.corrcoef(np.concatenate([drawn.stain_scale, drawn.stain_shift], 1).T)[np.triu_indices(6, 1)]).max()
        < 0.03
    )


# The whole


class Reference:
    """DINO's augmentation by torchvision and Pillow, an image at a time, for one kind of view."""

    def __init__(self, options: ViewOptions, kind: int, size: int):
        scale = options.local_scale if kind == 2 else options.global_scale
        jitter = transforms.ColorJitter(options.brightness, options.contrast, options.saturation, options.hue)
        self.crop = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(options.horizontal_flip),
                transforms.RandomApply([jitter], options.jitter),
                transforms.RandomGrayscale(options.grayscale),
            ]
        )
        self.options, self.kind = options, kind

    def __call__(self, image: Image.Image) -> np.ndarray:
        image = self.crop(image)
        if random.random() < self.options.blur[self.kind]:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(*self.options.blur_sigma)))
        if random.random() < self.options.solarize[self.kind]:
            image = ImageOps.solarize(image)
        return np.asarray(image) / 255


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_views_look_as_those_of_the_usual_pipeline(photo, kind):
    count, size = 800, 16 if kind == 2 else 40
    options = replace(ViewOptions(), global_size=40, local_size=16, local_views=1)
    torch.manual_seed(kind)
    random.seed(kind)
    reference, image = Reference(options, kind, size), Image.fromarray(photo)
    theirs = np.stack([reference(image) for _ in range(count)])
    images = torch.from_numpy(photo)[None].expand(count, -1, -1, -1)
    ours = multi_crop(images, options, torch.Generator().manual_seed(kind))[kind].permute(0, 2, 3, 1).numpy()
    statistics = {
        "red": lambda views: views[..., 0].mean((1, 2)),
        "blue": lambda views: views[..., 2].mean((1, 2)),
        "contrast": lambda views: views.std((1, 2, 3)),
        "colour": lambda views: np.ptp(views, 3).mean((1, 2)),
        "tilt": lambda views: (views[:, :, size // 2 :] - views[:, :, : size // 2]).mean((1, 2, 3)),
        "sharpness": lambda views: np.abs(np.diff(views, axis=2)).mean((1, 2, 3)),
    }
    for name, statistic in statistics.items():
        assert alike(statistic(ours), statistic(theirs)), name


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


def test_presets_differ_where_the_papers_do():
    dino, dinov2, moco_v2, moco_v3 = PRESETS
    assert dino == ViewOptions()
    assert (dinov2.global_scale, dinov2.local_scale, dinov2.local_views) == ((0.32, 1.0), (0.05, 0.32), 8)
    assert dinov2.blur == dino.blur
    assert ViewOptions.dinov2("released") == replace(dinov2, blur=(0.0, 0.9, 0.5))
    for moco in (moco_v2, moco_v3):
        views = multi_crop(torch.zeros(2, 40, 40, 3, dtype=torch.uint8), moco, torch.Generator().manual_seed(0))
        assert [tuple(view.shape) for view in views] == [(2, 3, 224, 224)] * 2
    assert (moco_v2.saturation, moco_v2.solarize, moco_v2.global_scale) == (0.4, (0.0, 0.0, 0.0), (0.2, 1.0))
    assert (moco_v3.saturation, moco_v3.solarize, moco_v3.global_scale) == (0.2, (0.0, 0.2, 0.0), (0.08, 1.0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_scale": (0.0, 1.0)},
        {"local_scale": (0.5, 0.4)},
        {"ratio": (2.0, 1.0)},
        {"hue": 0.6},
        {"local_views": -1},
        {"local_size": 0},
        {"rotation": 181.0},
        {"hed": -0.1},
        {"blur_sigma": (0.1, 17.0)},
        {"jitter": 1.1},
        {"blur": (0.5, -0.1, 0.5)},
    ],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must|range"):
        ViewOptions(**wrong)
