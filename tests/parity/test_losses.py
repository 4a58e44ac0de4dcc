"""The losses against the authors' own outputs (DINOLoss: 64 outputs, 2 global and 8 local crops of 4 images)."""

import numpy as np
import pytest
import torch

from gigatome.selfsup.losses import dino_loss, teacher_probabilities, update_center
from gigatome.training.schedules import Clock, stairs

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def dino_steps(seeded):
    """Loss, gradient and centre of three steps in a row, at epochs 0, 15 and 60."""
    steps, center = [], torch.zeros(1, 64)
    for i, epoch in enumerate((0, 15, 60)):
        student = torch.from_numpy(seeded.input(f"dino.student{i}", (40, 64), 0.3)).requires_grad_()
        teacher = torch.from_numpy(seeded.input(f"dino.teacher{i}", (8, 64), 0.3)).view(2, 4, 64)
        temperature = stairs(Clock(epoch, 100, epoch_steps=1), 0.04, 0.07, epochs=30)
        loss = dino_loss(student.view(10, 4, 64), teacher_probabilities(teacher, center, temperature), 0.1)
        loss.backward()
        center = update_center(center, teacher, 0.9)
        steps.append({"loss": loss.detach(), "grad": student.grad, "center": center})
    return steps


@pytest.mark.parametrize("what", ["loss", "grad", "center"])
@pytest.mark.parametrize("step", range(3))
def test_dino(reference, dino_steps, what, step):
    expected = reference("losses")[f"dino.{what}{step}"]
    np.testing.assert_allclose(dino_steps[step][what], expected, atol=TOLERANCE, rtol=TOLERANCE)
    # the gradient's entries are themselves near 1e-3: hold it to its own size as well
    assert np.abs(dino_steps[step][what].numpy() - expected).max() <= TOLERANCE * np.abs(expected).max()
