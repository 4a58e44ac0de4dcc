"""The losses against the authors' own outputs (DINOLoss: 64 outputs, 2 global and 8 local crops of 4 images; DINOv2's
class-token loss of two student views, iBOT patch loss of 4 views of 16 patches, KoLeo of 16 embeddings).
"""

import numpy as np
import pytest
import torch

from gigatome.selfsup.losses import (
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
    teacher_probabilities,
    update_center,
)
from gigatome.selfsup.masking import masked_patches
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


def test_dinov2(reference, seeded):
    expected = reference("losses")
    teacher = torch.from_numpy(seeded.input("dinov2.teacher", (8, 64), 0.3))
    student = torch.from_numpy(seeded.input("dinov2.student", (2, 8, 64), 0.3))
    targets = sinkhorn_knopp(teacher, 0.07)
    np.testing.assert_allclose(targets, expected["dinov2.sinkhorn"], atol=TOLERANCE, rtol=TOLERANCE)
    # the teacher's own view is not compared with its targets: a third one stands for it
    loss = dino_loss(torch.cat([teacher[None], student]), targets[None], 0.1)
    np.testing.assert_allclose(2 * loss, expected["dinov2.cls_loss_sum"], rtol=TOLERANCE)


def test_ibot(reference, seeded):
    expected = reference("losses")
    masks = torch.from_numpy(seeded.input("ibot.mask", (4, 16))) > 0
    np.testing.assert_array_equal(masks, expected["ibot.mask"])
    count = int(masks.sum())
    student = torch.from_numpy(seeded.input("ibot.student", (count, 64), 0.3))
    teacher = torch.from_numpy(seeded.input("ibot.teacher", (count, 64), 0.3))
    loss = ibot_loss(student, (teacher / 0.07).softmax(-1), masked_patches(masks)[1], 0.1)
    np.testing.assert_allclose(loss, expected["ibot.loss"], rtol=TOLERANCE)


def test_koleo(reference, seeded):
    expected = reference("losses")
    x = torch.from_numpy(seeded.input("koleo.x", (16, 32))).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    np.testing.assert_allclose(loss.detach(), expected["koleo.loss"], rtol=TOLERANCE)
    np.testing.assert_allclose(x.grad, expected["koleo.grad"], atol=TOLERANCE * np.abs(expected["koleo.grad"]).max())
