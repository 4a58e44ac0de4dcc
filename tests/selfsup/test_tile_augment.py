"""Augmentations of tiles: which tiles are drawn, what is drawn for them, and that each image has its own."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from gigatome.core.native import NATIVE
from gigatome.core.seeding import generator
from gigatome.selfsup.render import ViewDraw, render_views
from gigatome.selfsup.tile_augment import TileAugmentOptions, draw_augmentations, draw_tiles, gather_draws

extension = pytest.mark.skipif(NATIVE is None, reason="no C extension")
MANY = {"name": "a", "grid": 40, "tile_size": 100, "augmentations": 60, "tiles": 8}


def same(one: ViewDraw, other: ViewDraw, rows: slice = slice(None)) -> bool:
    return all(torch.equal(getattr(one, f.name)[rows], getattr(other, f.name)[rows]) for f in fields(ViewDraw))


# Options


def test_the_code_does_what_the_paper_lists_but_flips_and_turns():
    paper, code = TileAugmentOptions.paper(), TileAugmentOptions.code()
    assert paper == TileAugmentOptions()
    changed = {"horizontal_flip": 0.0, "vertical_flip": 0.0, "quarter_turns": False, "drawing": "with_replacement"}
    assert code == replace(paper, **changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"jitter": 1.5}, "probabilities"),
        ({"blur": -0.1}, "probabilities"),
        ({"hue": 0.6}, "hue"),
        ({"size": 0}, "size must be positive"),
        ({"drawing": "some"}, "no drawing some; there are distinct, with_replacement"),
    ],
)
def test_options_that_are_none(change, message):
    with pytest.raises(ValueError, match=message):
        TileAugmentOptions(**change)


@pytest.mark.parametrize(("sharing", "augmentations"), [("shared", 800), ("each", 200)])
def test_draws_are_distributed_as_stated(sharing, augmentations):
    draws = draw_augmentations(
        TileAugmentOptions(), **{**MANY, "augmentations": augmentations, "tiles": 20}, sharing=sharing
    )
    views = draws.views
    share = views.width * views.height / 100**2
    assert share.min() >= 0.499
    assert share.max() <= 1.0001
    jittered = views.brightness != 1
    for chosen, chance in ((jittered, 0.8), (views.gray, 0.2), (views.blur, 0.5), (views.transpose, 0.5)):
        assert abs(float(chosen.float().mean()) - chance) < 5 * 0.5 / len(share) ** 0.5
    for amount, reach in ((views.brightness - 1, 0.4), (views.contrast - 1, 0.4), (views.saturation - 1, 0.4),
                          (views.hue, 0.2)):  # fmt: skip
        assert 0.97 * reach < float(amount.abs().max()) <= reach + 1e-6
    assert 0.1 <= float(views.sigma.min()) < 0.12
    assert 0.97 < float(views.sigma.max()) <= 1
    assert not views.solarize.any()
    assert len({tuple(order) for order in views.order.tolist()}) == 24
    assert (views.order.sort(1).values == torch.arange(4)).all()


def test_the_code_never_flips():
    views = draw_augmentations(TileAugmentOptions.code(), **MANY).views
    assert not (views.mirror_x | views.mirror_y | views.transpose).any()


# Which tiles


def test_distinct_tiles():
    drawn = draw_tiles(40, 40, "distinct", generator(0))
    assert sorted(drawn) == list(range(40))
    assert list(drawn) != list(range(40))
    few = np.stack([draw_tiles(40, 8, "distinct", generator(seed)) for seed in range(2000)])
    assert all(len(set(row)) == 8 for row in few)
    counts = np.bincount(few.ravel(), minlength=40)
    assert np.abs(counts - 400).max() < 5 * 20


def test_a_slide_of_fewer_tiles_than_asked_for():
    drawn = draw_tiles(5, 12, "distinct", generator(0))
    assert drawn.shape == (12,)
    assert set(drawn) == set(range(5))
    assert len({tuple(sorted(draw_tiles(5, 12, "distinct", generator(seed)))) for seed in range(20)}) > 10
    assert draw_tiles(1, 3, "distinct", generator(0)).tolist() == [0, 0, 0]


def test_tiles_with_replacement():
    drawn = np.stack([draw_tiles(40, 40, "with_replacement", generator(seed)) for seed in range(500)])
    assert (drawn.min(), drawn.max()) == (0, 39)
    unseen = np.mean([40 - len(set(row)) for row in drawn]) / 40
    assert abs(unseen - (1 - 1 / 40) ** 40) < 0.01


# Draws


def test_a_draw_depends_on_seed_slide_and_number_alone():
    whole = draw_augmentations(TileAugmentOptions(), **MANY)
    part = draw_augmentations(TileAugmentOptions(), **{**MANY, "augmentations": 3})
    np.testing.assert_array_equal(whole.tiles[:3], part.tiles)
    assert same(whole.views, part.views, slice(0, 3))
    for change in ({"name": "b"}, {"seed": 1}):
        other = draw_augmentations(TileAugmentOptions(), **{**MANY, "augmentations": 3, **change})
        assert not np.array_equal(part.tiles, other.tiles)
        assert not torch.isin(part.views.x, other.views.x).any()
    assert len(set(whole.views.x.tolist())) == 60
    assert len({tuple(row) for row in whole.tiles}) == 60


def test_shared_or_each():
    shared, each = (draw_augmentations(TileAugmentOptions(), **MANY, sharing=kind) for kind in ("shared", "each"))
    np.testing.assert_array_equal(shared.tiles, each.tiles)
    pairs = np.array([0, 7, 8, 479])
    assert shared.rows(pairs).tolist() == [0, 0, 1, 59]
    assert each.rows(pairs).tolist() == [0, 7, 8, 479]
    assert len(set(each.views.x.tolist())) == 480


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=extension)])
def test_images_of_many_draws_are_rendered_as_if_each_were_alone(native):
    images = torch.randint(0, 256, (9, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, second = (draw_augmentations(TileAugmentOptions(), **MANY, seed=seed).views for seed in (0, 1))
    parts = [(first, torch.tensor([5, 3, 3, 9])), (second, torch.tensor([5, 0, 1, 2, 3]))]
    at_once = render_views(images, [gather_draws(parts)], [32], native=native)[0]
    rows = [(draw, row) for draw, rows in parts for row in rows.tolist()]
    assert len({tuple(draw.order[row].tolist()) for draw, row in rows}) > 4
    for image, view, (draw, row) in zip(images, at_once, rows, strict=True):
        one = gather_draws([(draw, slice(row, row + 1))])
        alone = render_views(image[None], [replace(one, order=tuple(draw.order[row].tolist()))], [32], native=native)
        torch.testing.assert_close(view, alone[0][0], atol=1e-5, rtol=0)
