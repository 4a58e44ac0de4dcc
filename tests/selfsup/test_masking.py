import numpy as np
import pytest
import torch

from gigatome.selfsup.masking import MaskOptions, block_masks, masked_patches


def draw(views: int, side: int, seed: int = 0, **options) -> torch.Tensor:
    return block_masks(views, side, MaskOptions(**options), torch.Generator().manual_seed(seed))


def test_half_of_the_views_lose_10_to_50_percent_of_their_patches():
    masks = torch.cat([draw(64, 14, seed) for seed in range(20)])
    assert masks.shape == (64 * 20, 196)
    assert masks.dtype == torch.bool
    shares = masks.float().mean(1)
    masked = shares[shares > 0]
    assert len(masked) == 32 * 20
    assert masked.min() > 0.05
    assert masked.max() < 0.5
    # spread evenly over the range; blocks may fall short of what was wanted, never exceed it
    np.testing.assert_allclose(masked.quantile(torch.tensor([0.25, 0.5, 0.75])), [0.2, 0.3, 0.4], atol=0.015)


def test_each_batch_spans_the_range():
    for seed in range(10):
        counts = draw(16, 14, seed).sum(1).sort().values[8:]
        bounds = np.linspace(0.1, 0.5, 9) * 196
        assert (counts.numpy() <= bounds[1:]).all()
        assert (counts.numpy() >= bounds[:-1] - 4).all()  # where less than a least block was left to mask


def test_which_views_and_patches_are_masked_is_chance():
    masks = torch.stack([draw(8, 14, seed) for seed in range(400)])
    np.testing.assert_allclose(masks.any(2).float().mean(0), 0.5, atol=0.1)
    where = masks.float().mean((0, 1)).view(14, 14)
    np.testing.assert_allclose(where, where.flip(0), atol=0.025)
    np.testing.assert_allclose(where, where.T, atol=0.025)
    assert where.min() > 0.01  # corners least


def test_blocks_are_rectangles_of_the_wanted_shape():
    """With room for one block only, its size and sides are as drawn."""
    sides = []
    for seed in range(300):
        mask = draw(1, 20, seed, share=1.0, ratio=(0.1, 0.1), min_patches=36, max_block=0.1).view(20, 20)
        assert mask.sum() <= 40
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
        if mask.sum() == height * width and mask.sum() >= 30:
            sides.append((height, width))
    assert len(sides) > 100
    ratios = np.array([height / width for height, width in sides])
    assert 0.2 < ratios.min() < 0.5
    assert 2 < ratios.max() < 5
    assert 0.8 < np.exp(np.log(ratios).mean()) < 1.25


def test_the_generator_decides():
    assert torch.equal(draw(8, 14, seed=1), draw(8, 14, seed=1))
    assert not torch.equal(draw(8, 14, seed=1), draw(8, 14, seed=2))


@pytest.mark.parametrize("side", [1, 2, 3])
def test_small_grids_end(side):
    assert draw(4, side).shape == (4, side * side)


def test_at_least_one_view_is_masked():
    assert draw(2, 14, share=0.1).any(1).sum() == 1


def test_masked_patches_count_by_view():
    masks = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    index, weights = masked_patches(masks)
    assert index.tolist() == [0, 2, 11]
    torch.testing.assert_close(weights, torch.tensor([1 / 6, 1 / 6, 1 / 3]))


def test_without_masks_two_patches_count_nothing():
    index, weights = masked_patches(torch.zeros(2, 4, dtype=torch.bool))
    assert index.tolist() == [0, 1]
    assert weights.tolist() == [0, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"share": 0.0},
        {"share": 1.1},
        {"ratio": (0.5, 0.1)},
        {"ratio": (0.1, 1.0)},
        {"min_patches": 0},
        {"min_aspect": 2.0},
        {"max_block": 0.0},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"masks\."):
        MaskOptions(**options)
