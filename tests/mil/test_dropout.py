"""The fast dropout is dropout."""

import numpy as np
import pytest
import torch
from torch import nn

from gigatome.mil.dropout import fast_dropout, with_fast_dropout


@pytest.mark.parametrize("p", [0.25, 0.5, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_scale_and_gradient(p, dtype):
    exact = round(p * 256) / 256
    x = torch.full((301, 1001), 2.0, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    y = fast_dropout(x, p)
    assert y.dtype == dtype
    y.float().sum().backward()
    kept = y != 0
    # 5 standard deviations of the share, of rows and columns too
    assert kept.float().mean().item() == pytest.approx(1 - exact, abs=5 * np.sqrt(exact * (1 - exact) / x.numel()))
    for axis, others in ((0, 301), (1, 1001)):
        share = kept.float().mean(axis)
        assert (share - (1 - exact)).abs().max() < 6 * np.sqrt(exact * (1 - exact) / others)
    scale = torch.tensor(1 / (1 - exact), dtype=dtype)
    assert torch.equal(y[kept], (2 * scale).expand_as(y[kept]))
    assert torch.equal(x.grad, torch.where(kept, scale, torch.zeros((), dtype=dtype)))


def test_neighbours_are_independent():
    torch.manual_seed(0)
    kept = (fast_dropout(torch.ones(1_000_000), 0.5) > 0).double() - 0.5
    for lag in (1, 2, 7, 8, 64):
        assert abs((kept[lag:] * kept[:-lag]).mean().item() * 4) < 0.005


def test_seeds_decide_and_calls_differ():
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append([fast_dropout(torch.ones(20_000), 0.25) for _ in range(2)])
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not torch.equal(draws[0][0], draws[2][0])


def test_extremes_and_small_tensors():
    x = torch.ones(20_000)
    assert torch.equal(fast_dropout(x, 0.0), x)
    assert fast_dropout(x, 1.0).sum() == 0
    assert set(fast_dropout(torch.ones(64), 0.5).tolist()) == {0.0, 2.0}


def test_layers_are_given_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.25)))
    with with_fast_dropout(model):
        assert "forward" in vars(model[1])
        assert "forward" in vars(model[2][0])
        model.eval()
        x = torch.ones(5000, 4)
        assert torch.equal(model[1](x), x)
        assert (model.train()[1](x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert not any("forward" in vars(layer) for layer in model.modules())
