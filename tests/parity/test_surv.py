"""The survival loss of time bins against MCAT's own outputs, value and gradient."""

import numpy as np
import pytest
import torch

from gigatome.mil.losses import survival_nll
from gigatome.mil.model import Targets

TOLERANCE = 1e-5


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_survival_nll(reference, seeded, alpha):
    expected = reference("losses")
    logits = torch.from_numpy(seeded.input("surv.logits", (10, 4))).requires_grad_()
    bins = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 1, 2])
    censored = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 0, 0]) > 0
    loss = survival_nll(alpha)(logits, Targets(bins, torch.ones(10), ~censored))
    loss.backward()
    np.testing.assert_allclose(loss.detach(), expected[f"surv.nll.a{alpha}"], rtol=TOLERANCE)
    gradient = expected[f"surv.grad.a{alpha}"]
    np.testing.assert_allclose(logits.grad, gradient, atol=TOLERANCE * np.abs(gradient).max())
