"""Views of slides beside a slow reference that moves tile after tile."""

import math

import numpy as np
import pytest
import torch

from gigatome.selfsup.slide_views import SlideViewOptions, draw_matrices, move_places, plane_maps, slide_views

PAPER, CODE, NONE = SlideViewOptions.paper(), SlideViewOptions.code(), SlideViewOptions.none()


def pairs(batch=6, tiles=5, dim=3, seed=0):
    random = np.random.default_rng(seed)
    places = random.integers(0, 300, (batch, 2, tiles, 2))
    values = random.standard_normal((batch, 2, tiles, dim))
    return torch.from_numpy(np.concatenate([values, places], -1).astype(np.float32))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slowly(places, flip_x, flip_y, degrees, scale_x, scale_y, truncate):
    """Where tiles come to lie, by complex numbers."""
    moved = []
    for x, y in places:
        turned = complex(-x if flip_x else x, -y if flip_y else y) * (
            math.cos(math.radians(degrees)) + 1j * math.sin(math.radians(degrees))
        )
        moved.append((turned.real * scale_x, turned.imag * scale_y))
    least = [min(place[axis] for place in moved) for axis in (0, 1)]
    cell = math.floor if truncate else round
    return [[cell(round(place[axis] - least[axis], 4)) for axis in (0, 1)] for place in moved]


@pytest.mark.parametrize("options", [PAPER, CODE, SlideViewOptions(1.0, 0.0, rotation=False, scale=(0.9, 0.9))])
def test_views_beside_the_reference(options):
    images = pairs()
    views = slide_views(images, options, generator(3))
    random = torch.rand(6, 2, 5, generator=generator(3), dtype=torch.float64)
    for slide in range(6):
        for number in range(2):
            flip_x, flip_y, turn, *scales = random[slide, number].tolist()
            least, most = options.scale
            expected = slowly(
                images[slide, number, :, -2:].tolist(),
                flip_x < options.horizontal_flip,
                flip_y < options.vertical_flip,
                turn * 360 if options.rotation else 0,
                *(least + (most - least) * scale for scale in scales),
                options.round == "truncate",
            )
            difference = views[number][slide, :, -2:] - torch.tensor(expected)
            assert (difference != 0).sum() <= 1  # one in float32 may fall on the other side of a half
            assert difference.abs().max() <= 1
    assert [view.dtype for view in views] == [torch.float32] * 2
    for number, view in enumerate(views):
        assert torch.equal(view[..., :-2], images[:, number, :, :-2])
        assert torch.equal(view[..., -2:].amin(1), torch.zeros(6, 2))
        assert torch.equal(view[..., -2:], view[..., -2:].round())


def test_without_augmentation_tiles_stay_where_they_are():
    images = pairs()
    for number, view in enumerate(slide_views(images, NONE, generator())):
        places = images[:, number, :, -2:]
        assert torch.equal(view[..., -2:], places - places.amin(1, keepdim=True))


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("quarters", [-3, -1, 0, 1, 2, 3, 4])
@pytest.mark.parametrize("flips", [(1, 1), (-1, 1), (1, -1)])
def test_flips_and_quarter_turns_are_exact(quarters, flips, rounding):
    grid = np.zeros((7, 9), int)
    x, y = np.array([0, 3, 8, 5, 2]), np.array([6, 0, 2, 2, 5])
    grid[y, x] = np.arange(1, 6)
    angle = torch.tensor(quarters * math.pi / 2, dtype=torch.float64)
    matrix = plane_maps(torch.tensor(flips, dtype=torch.float64), angle, torch.ones(2, dtype=torch.float64))
    places = torch.from_numpy(np.stack([x, y], -1)).float() + 1000
    moved = move_places(places, matrix.float(), rounding).long().numpy()
    expected = np.rot90(grid[:: flips[1], :: flips[0]], -quarters)  # y runs downwards: from x towards y is clockwise
    assert moved[:, 1].max() < expected.shape[0]
    np.testing.assert_array_equal(expected[moved[:, 1], moved[:, 0]], np.arange(1, 6))


def test_a_truncated_place_may_be_one_less_and_never_more():
    matrix = torch.diag(torch.tensor([0.7, 1.0]))
    places = torch.tensor([[0.0, 0.0], [4.0, 0.0], [5.0, 1.0]])
    assert move_places(places, matrix, "nearest").tolist() == [[0, 0], [3, 0], [4, 1]]
    assert move_places(places, matrix, "truncate").tolist() == [[0, 0], [2, 0], [3, 1]]


def test_every_view_of_every_slide_has_its_own_draw_in_the_range():
    matrices = draw_matrices((4000, 2), PAPER, generator())
    scales = matrices.norm(dim=-1)
    assert scales.min() >= 0.5
    assert scales.max() <= 2
    assert abs(float(scales.mean()) - 1.25) < 0.02
    assert len(matrices.flatten(0, 1).flatten(1).unique(dim=0)) == 8000
    mirrored = (torch.linalg.det(matrices) < 0).double().mean()
    assert abs(float(mirrored) - 0.5) < 0.03
    angle = torch.atan2(matrices[..., 1, 0] / scales[..., 1], matrices[..., 0, 0] / scales[..., 0])
    counts = torch.histc(angle.float(), 8, -math.pi, math.pi)
    assert counts.min() > 850  # of 1000


def test_the_same_generator_gives_the_same_views():
    images = pairs()
    first, again, other = (torch.stack(slide_views(images, PAPER, generator(seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_presets():
    assert SlideViewOptions(0.5, 0.5, rotation=True, scale=(0.5, 2.0), round="nearest") == PAPER
    assert (CODE.scale, CODE.round) == ((0.7, 1.3), "truncate")


@pytest.mark.parametrize(
    ("values", "message"),
    [({"scale": (0.0, 1.0)}, "scale must be positive"), ({"scale": (2.0, 1.0)}, "the least first"),
     ({"vertical_flip": 1.5}, "must lie within 0 to 1")],
)  # fmt: skip
def test_options_that_make_no_sense(values, message):
    with pytest.raises(ValueError, match=message):
        SlideViewOptions(**values)
