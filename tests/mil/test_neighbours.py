import itertools

import numpy as np
import pytest
import torch

from gigatome.core.errors import EvaluationError
from gigatome.mil import neighbours
from gigatome.mil.neighbours import knn_edges


def plainly(points, k, bounds):
    """The same by looking at all pairs, in float64."""
    edges = []
    for start, stop in itertools.pairwise(bounds):
        for row in range(start, stop):
            distance = ((points[start:stop].astype(np.float64) - points[row]) ** 2).sum(1)
            distance[row - start] = -1
            order = np.lexsort((np.arange(stop - start), distance))[1 : k + 1]
            edges += [(start + int(near), row) for near in order]
    return np.array(edges, np.int64).reshape(-1, 2).T


@pytest.mark.parametrize("dims", [2, 3, 16])
def test_neighbours_are_the_nearest_of_the_same_bag(dims):
    points = np.random.default_rng(0).standard_normal((90, dims)).astype(np.float32)
    bounds = [0, 1, 4, 40, 90]  # of one instance, of fewer than k, of more
    edges = knn_edges(points, 8, np.array(bounds))
    assert edges.dtype == torch.int64
    np.testing.assert_array_equal(edges, plainly(points, 8, bounds))
    assert edges.shape[1] == 0 + 3 * 2 + 36 * 8 + 50 * 8


@pytest.mark.parametrize("dims", [2, 12])
def test_ties_go_to_the_lower_row(dims):
    grid = np.stack(np.meshgrid(np.arange(9), np.arange(7)), -1).reshape(-1, 2) * 256
    points = np.concatenate([grid, np.zeros((63, dims - 2), int)], 1)
    points[40] = points[3]  # two instances at one place
    np.testing.assert_array_equal(knn_edges(points, 8), plainly(points, 8, [0, 63]))
    np.testing.assert_array_equal(knn_edges(points, 5), plainly(points, 5, [0, 63]))


@pytest.mark.parametrize("dims", [2, 12])
def test_many_duplicates_are_no_neighbours_of_themselves(dims):
    points = np.zeros((60, dims))
    edges = knn_edges(points, 4)
    assert edges.shape == (2, 240)
    assert (edges[0] != edges[1]).all()
    assert torch.equal(edges[1].bincount(), torch.full((60,), 4))
    assert len(edges.unique(dim=1).T) == 240


def test_blocks_change_nothing(monkeypatch):
    points = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    whole = knn_edges(points, 5)
    monkeypatch.setattr(neighbours, "_BLOCK", 7 * 50)
    assert torch.equal(knn_edges(points, 5), whole)


def test_embeddings_far_from_the_origin_keep_their_neighbours():
    points = np.random.default_rng(1).standard_normal((80, 32)).astype(np.float32)
    shifted = (points + 300).astype(np.float32)
    np.testing.assert_array_equal(knn_edges(shifted, 6), plainly(shifted, 6, [0, 80]))


def test_edges_may_lead_to_the_neighbours():
    points = np.random.default_rng(0).standard_normal((20, 2))
    assert torch.equal(knn_edges(points, 3, towards="neighbour"), knn_edges(points, 3).flip(0))
    # a far one is nobody's neighbour, but has neighbours itself
    points[7] = 100
    assert 7 not in knn_edges(points, 3, towards="neighbour")[1]
    assert (knn_edges(points, 3)[1] == 7).sum() == 3


@pytest.mark.parametrize("dims", [2, 12])
def test_a_value_that_is_not_finite_is_named(dims):
    points = np.zeros((10, dims))
    points[6, 1] = np.nan
    with pytest.raises(EvaluationError, match=r"instance 6 .*not finite"):
        knn_edges(points, 3)


@pytest.mark.parametrize("bounds", [[0, 5], [1, 10], [0, 7, 3, 10]])
def test_bounds_of_other_points_are_refused(bounds):
    with pytest.raises(EvaluationError, match="10 instances"):
        knn_edges(np.zeros((10, 2)), 3, np.array(bounds))
