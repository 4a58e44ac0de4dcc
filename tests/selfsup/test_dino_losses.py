import math

import pytest
import torch

from gigatome.selfsup.losses import dino_loss, entropy, teacher_probabilities, update_center


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(5, 3, 7), torch.randn(2, 3, 7)


def test_the_loss_is_the_mean_over_pairs_of_different_views(logits):
    student, teacher = logits
    targets = teacher_probabilities(teacher, torch.zeros(1, 7), 0.05)
    pairs = [
        -(targets[g] * (student[v] / 0.1).log_softmax(-1)).sum(-1).mean() for g in range(2) for v in range(5) if v != g
    ]
    torch.testing.assert_close(dino_loss(student, targets, 0.1), sum(pairs) / len(pairs))


def test_a_view_is_never_compared_with_itself(logits):
    _, teacher = logits
    student = teacher.clone().requires_grad_()
    dino_loss(student, teacher_probabilities(teacher[:1], torch.zeros(1, 7), 0.05), 0.1).backward()
    assert student.grad[0].eq(0).all()
    assert student.grad[1].ne(0).any()


def test_targets_have_no_gradient_and_sum_to_one(logits):
    teacher = logits[1].requires_grad_()
    targets = teacher_probabilities(teacher, torch.randn(1, 7), 0.04)
    assert not targets.requires_grad
    torch.testing.assert_close(targets.sum(-1), torch.ones(2, 3))


def test_the_centre_takes_from_what_wins_everywhere(logits):
    favoured = logits[1].clone()
    favoured[..., 2] += 10
    center = torch.zeros(1, 7)
    for _ in range(100):
        center = update_center(center, favoured, 0.9)
    torch.testing.assert_close(center, favoured.mean((0, 1))[None], rtol=1e-3, atol=1e-3)
    assert teacher_probabilities(favoured, torch.zeros(1, 7), 0.04)[..., 2].min() > 0.99
    assert teacher_probabilities(favoured, center, 0.04)[..., 2].max() < 1


def test_the_loss_is_float32_under_autocast(logits):
    student, teacher = logits
    targets = teacher_probabilities(teacher, torch.zeros(1, 7), 0.05)
    expected = dino_loss(student, targets, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dino_loss(student, targets, 0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_entropy():
    assert float(entropy(torch.full((4, 8), 1 / 8))) == pytest.approx(math.log(8))
    assert float(entropy(torch.eye(8))) == 0
