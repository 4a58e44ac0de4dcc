"""NT-Xent against the authors' own output (Giga-SSL: 12 pairs of 32 numbers)."""

import numpy as np
import pytest
import torch

from gigatome.selfsup.contrastive import ntxent

TOLERANCE = 1e-4


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_ntxent(reference, seeded, temperature):
    expected = reference("losses")
    first, second = (torch.from_numpy(seeded.input(f"ntxent.{name}", (12, 32))) for name in ("z1", "z2"))
    loss = ntxent(first.requires_grad_(), second, temperature)
    loss.backward()
    np.testing.assert_allclose(loss.detach(), expected[f"ntxent.loss.t{temperature}"], atol=TOLERANCE, rtol=TOLERANCE)
    gradient = expected[f"ntxent.grad.t{temperature}"]
    assert np.abs(first.grad.numpy() - gradient).max() <= TOLERANCE * np.abs(gradient).max()
