"""The alarm at a collapse, on made-up runs."""

import math

import numpy as np
import pytest

from gigatome.evaluation.collapse import CollapseLimits, find_collapse
from gigatome.evaluation.unsupervised import embedding_std, rankme

K = 256


def history(count=20, **columns):
    """Lines of a run of 10 × count steps; a column is a value or one for each line."""
    return [
        {"step": 10 * (k + 1), **{name: v[k] if np.ndim(v) else v for name, v in columns.items()}} for k in range(count)
    ]


def alarm(lines, **arguments):
    return find_collapse(lines, steps=lines[-1]["step"], prototypes=K, **arguments)


def figures(z):
    return {"rankme": rankme(z), "unit_std": embedding_std(z, unit=True)}


def test_a_sound_run_is_left_alone():
    """Figures of 170 steps of the demo recipe on real tissue: nearly flat, as runs are at first, but no collapse."""
    entropy = [1.83, 1.07, 0.50, 0.56, 0.77, 0.94, 1.23, 2.1, 2.67, 3.25, 3.23, 3.35, 3.39, 3.56, 3.39, 3.31, 3.44]
    ranks = [5.0, 3.2, 2.8, 2.6, 2.43, 2.40, 2.39, *[2.39] * 10]
    stds = [0.20, 0.157, 0.128, 0.104, 0.089, 0.085, *[0.084] * 11]
    lines = history(17, teacher_entropy=entropy, rankme=ranks, unit_std=stds, spread=0.5)
    assert [alarm(lines[:end]) for end in range(1, 18)] == [None] * 17


def test_one_embedding_for_all():
    rng = np.random.default_rng(0)
    same = rng.normal(size=32) + 1e-4 * rng.normal(size=(200, 32))
    said = alarm(history(rankme=30.0, unit_std=0.8)[:10] + history(**figures(same))[10:])
    assert "All tiles get nearly the same embedding (unit_std 0.0001" in said
    assert "lower the learning rate" in said
    assert "same embedding" in alarm(history(unit_std=0.001))
    assert "same embedding" in alarm(history(rankme=1.01))


def test_one_direction_of_any_sign_is_one_embedding_too():
    rng = np.random.default_rng(1)
    line = np.outer(rng.normal(size=200), rng.normal(size=32))  # well spread, by its length and sign alone
    assert embedding_std(line, unit=True) > 0.5
    assert "same embedding" in alarm(history(**figures(line)))


def test_directions_are_lost():
    rng = np.random.default_rng(2)
    full, flat = rng.normal(size=(300, 64)), rng.normal(size=(300, 3)) @ rng.normal(size=(3, 64))
    said = alarm(history(**figures(full))[:10] + history(**figures(flat))[10:])
    assert "ever fewer directions" in said
    assert "KoLeo" in said
    assert alarm(history(**figures(flat))) is None  # few from the start is not lost


@pytest.mark.parametrize(("entropy", "words"), [(5.544, "lower teacher_temperature"), (0.07, "center_momentum")])
def test_a_teacher_that_says_nothing(entropy, words):
    """The demo recipe with a teacher temperature of 1, and without centring, comes to these within 100 steps."""
    lines = history(teacher_entropy=entropy)
    assert words in alarm(lines)
    assert find_collapse(lines, steps=200) is None  # of how many prototypes?
    assert alarm(history(teacher_entropy=math.log(K) / 2)) is None


def test_keys_of_moco_that_are_alike():
    assert "All keys are alike (spread 0.001" in alarm(history(spread=0.001))


def test_embeddings_without_figures():
    assert "zero or not finite" in alarm([*history(rankme=9.0), {"step": 210, "rankme": None}])


def test_one_bad_evaluation_is_no_alarm():
    stds = [0.5] * 18 + [0.001] * 2
    assert alarm(history(unit_std=stds)) is None
    assert "same embedding" in alarm(history(unit_std=stds), limits=CollapseLimits(repeats=2))


def test_nothing_is_said_at_the_start():
    lines = history(unit_std=0.001)
    assert find_collapse(lines, steps=3000) is None
    assert find_collapse(lines, steps=3000, limits=CollapseLimits(grace=0)) is not None
    assert find_collapse([], steps=10) is None


def test_lines_without_the_figures_do_not_count():
    """Evaluations are rarer than lines."""
    lines = history(30, unit_std=[0.001 if k % 10 == 9 else None for k in range(30)])
    assert "same embedding" in alarm(lines)


def test_several_signs_are_all_named():
    said = alarm(history(unit_std=0.001, teacher_entropy=math.log(K)))
    assert said.index("teacher_temperature") < said.index("same embedding")


@pytest.mark.parametrize("options", [{"repeats": 0}, {"grace": 1.0}])
def test_limits_that_make_no_sense(options):
    with pytest.raises(ValueError, match="repeats must be at least 1 and grace within 0 to 1"):
        CollapseLimits(**options)
