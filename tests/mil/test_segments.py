"""Sums, maxima and softmaxes over bags, against loops, on both paths."""

import itertools

import pytest
import torch
from bag_models import as_on_accelerator, make_bags

from gigatome.mil import segments
from gigatome.mil.model import BagBatch
from gigatome.mil.segments import (
    segment_argmax,
    segment_dot,
    segment_extremes,
    segment_max,
    segment_mean,
    segment_pool,
    segment_softmax,
    segment_sum,
)

SIZES = (3, 1, 7, 2)


@pytest.fixture(params=["host", "accelerator"], autouse=True)
def _path(request, monkeypatch):
    if request.param == "accelerator":
        as_on_accelerator(monkeypatch)


@pytest.fixture
def bags():
    return make_bags(SIZES, dim=5, dtype=torch.float64)


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(values, bags):
    return [values[start:end] for start, end in itertools.pairwise(bags.bounds.tolist())]


@pytest.mark.parametrize(
    ("function", "reference"),
    [
        (segment_sum, lambda part: part.sum(0)),
        (segment_mean, lambda part: part.mean(0)),
        (segment_max, lambda part: part.amax(0)),
    ],
)
def test_reductions(bags, function, reference):
    expected = torch.stack([reference(part) for part in parts(bags.x, bags)])
    torch.testing.assert_close(function(bags.x, bags), expected)


def test_softmax(bags):
    expected = torch.cat([part.softmax(0) for part in parts(bags.x, bags)])
    torch.testing.assert_close(segment_softmax(bags.x, bags), expected)


def test_softmax_of_bags_far_apart(bags):
    # a maximum over all bags would leave nothing of the others
    x = bags.x + torch.tensor([-1e4, 0, 1e4, -1e4], dtype=torch.float64)[bags.bag][:, None]
    torch.testing.assert_close(segment_softmax(x, bags), segment_softmax(bags.x, bags), rtol=1e-6, atol=1e-9)


def test_softmax_of_half_precision_sums_to_one(bags):
    weights = segment_softmax(bags.x.bfloat16(), bags)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(segment_sum(weights, bags), torch.ones(4, 5))


def test_pool_and_dot(bags):
    weights, keys = random(13, 3), random(4, 3, 5)
    pooled = torch.stack([weight.T @ x for weight, x in zip(parts(weights, bags), parts(bags.x, bags), strict=True)])
    torch.testing.assert_close(segment_pool(weights, bags.x, bags), pooled)
    products = torch.cat([x @ key.T for x, key in zip(parts(bags.x, bags), keys, strict=True)])
    torch.testing.assert_close(segment_dot(bags.x, keys, bags), products)


def test_gradients(bags):
    weights, keys, x = (tensor.requires_grad_() for tensor in (random(13, 2), random(4, 2, 5), bags.x.clone()))
    for function, values in [
        (lambda w, v: segment_pool(w, v, bags), (weights, x)),
        (lambda v, k: segment_dot(v, k, bags), (x, keys)),
        (lambda v: segment_softmax(v, bags), (x,)),
        (lambda v: segment_sum(v, bags), (x,)),
        (lambda v: segment_mean(v, bags), (x,)),
    ]:
        assert torch.autograd.gradcheck(function, values)
        assert torch.autograd.gradgradcheck(function, values)
    assert torch.autograd.gradcheck(lambda v: segment_max(v, bags), (x,))


def test_only_gradients_that_are_asked_for(bags):
    weights = random(13, 1).requires_grad_()
    x = bags.x.clone()
    segment_pool(weights, x, bags).sum().backward()
    torch.testing.assert_close(weights.grad, x.sum(1, keepdim=True))
    assert x.grad is None


def test_max_sends_its_gradient_to_one_of_equals():
    x = torch.tensor([[2.0], [2.0], [1.0], [5.0]], requires_grad=True)
    bags = BagBatch(x, torch.tensor([0, 3, 4]))
    assert segment_argmax(x, bags).tolist() == [[0], [3]]
    segment_max(x, bags).sum().backward()
    assert x.grad.tolist() == [[1], [0], [0], [1]]


def test_argmax_of_each_column(bags):
    expected = [
        [part[:, column].argmax().item() + start for column in range(5)]
        for start, part in zip(bags.bounds.tolist(), parts(bags.x, bags), strict=False)
    ]
    assert segment_argmax(bags.x, bags).tolist() == expected


def test_empty_segments():
    x = random(4, 3).requires_grad_()
    bags = BagBatch(x, torch.tensor([0, 0, 3, 3, 4, 4]))
    for function in (segment_sum, segment_mean, segment_max):
        reduced = function(x, bags)
        assert (reduced[[0, 2, 4]] == 0).all()
        torch.testing.assert_close(reduced[3], x[3])
        assert torch.autograd.grad(reduced.sum(), x)[0].isfinite().all()
    assert segment_max(x, bags)[1].tolist() == x[:3].amax(0).tolist()
    torch.testing.assert_close(segment_softmax(x, bags)[:3], x[:3].softmax(0))


def test_nothing_but_empty_segments():
    bags = BagBatch(torch.zeros(0, 2), torch.tensor([0, 0, 0]))
    for function in (segment_sum, segment_mean, segment_max):
        assert function(bags.x, bags).tolist() == [[0, 0], [0, 0]]


def test_extremes():
    values = torch.tensor([[3.0, 1], [1, 2], [2, 3], [9, 9], [5, 4], [4, 5], [6, 6], [7, 7], [8, 8]])
    high, low = segment_extremes(values, BagBatch(values, torch.tensor([0, 3, 4, 9])), 2)
    assert high.tolist() == [[[0, 2], [2, 1]], [[3, 3], [3, 3]], [[8, 7], [8, 7]]]
    assert low.tolist() == [[[1, 2], [0, 1]], [[3, 3], [3, 3]], [[5, 4], [4, 5]]]


def test_extremes_of_small_bags_repeat_the_last():
    values = torch.tensor([[1.0], [2], [0]])
    high, low = segment_extremes(values, BagBatch(values, torch.tensor([0, 2, 3])), 4)
    assert high.tolist() == [[[1, 0, 0, 0]], [[2, 2, 2, 2]]]
    assert low.tolist() == [[[0, 1, 1, 1]], [[2, 2, 2, 2]]]


def test_blocks_of_bags_are_put_together(bags, monkeypatch):
    expected = segment_pool(random(13, 2), bags.x, bags)
    monkeypatch.setattr(segments, "_MAX_INDICATORS", 13 * 2 * 3)  # three bags at once, then one
    torch.testing.assert_close(segment_pool(random(13, 2), bags.x, bags), expected)


def test_autocast_leaves_the_sums_alone(bags):
    x = bags.x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = segment_sum(x, bags)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, segment_sum(x, bags))
