import math

import numpy as np
import pytest
import torch

from gigatome.selfsup.losses import ibot_loss, kde_loss, koleo_loss, sinkhorn_knopp


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(0))


def test_sinkhorn_knopp_uses_all_prototypes_alike(x):
    favoured = x.clone()
    favoured[:, 2] += 3
    few, many = sinkhorn_knopp(favoured, 0.5, 3), sinkhorn_knopp(favoured, 0.5, 100)
    torch.testing.assert_close(few.sum(1), torch.ones(12))
    torch.testing.assert_close(many.sum(0), torch.full((5,), 12 / 5), rtol=1e-3, atol=0)
    plain = (favoured / 0.5).softmax(1).sum(0)
    assert (few.sum(0) - 12 / 5).abs().max() < 0.05 * (plain - 12 / 5).abs().max()


def test_sinkhorn_knopp_is_scaling_in_turns(x):
    q = np.exp(x.double().numpy() / 0.3)
    for _ in range(2):
        q /= q.sum(0)
        q /= q.sum(1, keepdims=True)
    np.testing.assert_allclose(sinkhorn_knopp(x, 0.3, 2), q, rtol=1e-4)


def test_sinkhorn_knopp_neither_overflows_nor_has_a_gradient(x):
    logits = (x * 1000).requires_grad_()
    targets = sinkhorn_knopp(logits, 0.04)
    assert torch.isfinite(targets).all()
    assert not targets.requires_grad
    torch.testing.assert_close(targets.sum(1), torch.ones(12))


def test_ibot_is_a_weighted_cross_entropy(x):
    targets = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)).softmax(1)
    weights = torch.rand(12)
    expected = sum(
        w * torch.nn.functional.cross_entropy(s / 0.1, t) for w, s, t in zip(weights, x, targets, strict=True)
    )
    torch.testing.assert_close(ibot_loss(x, targets, weights, 0.1), expected)


def test_koleo_is_the_distance_to_the_nearest(x):
    unit = (x / x.norm(dim=1, keepdim=True)).double().numpy()
    distances = np.linalg.norm(unit[:, None] - unit, axis=2) + 9 * np.eye(12)
    np.testing.assert_allclose(koleo_loss(x), -np.log(distances.min(1)).mean(), rtol=1e-4)


def test_kde_is_the_density_of_the_batch(x):
    unit = (x / x.norm(dim=1, keepdim=True)).double().numpy()
    np.testing.assert_allclose(kde_loss(x, 4.0), np.log(np.exp(4 * unit @ unit.T).mean(1)).mean(), rtol=1e-4)
    assert kde_loss(torch.ones(6, 3)) == pytest.approx(5.0)  # all in one place


@pytest.mark.parametrize("loss", [koleo_loss, kde_loss])
def test_less_is_wider_spread(loss, x):
    angles = torch.arange(12) * 2 * math.pi / 12
    ring = torch.stack([angles.cos(), angles.sin()], 1)
    crowd = ring + torch.tensor([3.0, 0.0])
    assert loss(ring) < loss(crowd) - 0.3
    start = crowd.clone().requires_grad_()
    loss(start).backward()
    assert loss(start.detach() - 0.1 * start.grad) < loss(crowd)


def test_two_tiles_that_look_alike_do_not_explode_kde(x):
    twins = x.clone()
    twins[1] = twins[0] + 1e-6 * x[2]
    gradients = {}
    for loss in (koleo_loss, kde_loss):
        value = twins.clone().requires_grad_()
        loss(value).backward()
        gradients[loss] = float(value.grad.norm())
    assert gradients[kde_loss] < 10 < 1e4 < gradients[koleo_loss]
