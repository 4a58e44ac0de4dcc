import math

import numpy as np
import pytest

from gigatome.training.schedules import Clock, cosine, stairs


def authors_cosine(base, final, steps, warmup_steps):
    """``cosine_scheduler`` of facebookresearch/dino, restated."""
    warmup = np.linspace(0, base, warmup_steps)
    rest = np.arange(steps - warmup_steps)
    return np.concatenate([warmup, final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / len(rest)))])


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0), (100, 1), (100, 10), (7, 6), (1, 0)])
@pytest.mark.parametrize(("start", "end"), [(5e-4, 1e-6), (0.04, 0.4), (0.996, 1.0)])
def test_cosine_is_the_authors(steps, warmup, start, end):
    ours = [cosine(Clock(step, steps, 1), start, end, warmup_steps=warmup) for step in range(steps)]
    np.testing.assert_allclose(ours, authors_cosine(start, end, steps, warmup), rtol=1e-12, atol=1e-15)


def test_cosine_is_half_way_in_the_middle():
    assert math.isclose(cosine(Clock(50, 100, 1), 1.0, 0.0), 0.5)


def test_stairs_are_the_authors():
    theirs = np.concatenate([np.linspace(0.04, 0.07, 30), np.full(70, 0.07)])
    ours = [stairs(Clock(epoch * 5 + 3, 500, 5), 0.04, 0.07, epochs=30) for epoch in range(100)]
    np.testing.assert_allclose(ours, theirs)


@pytest.mark.parametrize(("epochs", "expected"), [(0, [0.07, 0.07, 0.07]), (1, [0.04, 0.07, 0.07])])
def test_short_stairs(epochs, expected):
    assert [stairs(Clock(epoch, 3, 1), 0.04, 0.07, epochs=epochs) for epoch in range(3)] == expected


def test_an_epoch_begins_after_its_last_step():
    assert [Clock(step, 9, 3).epoch for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]
