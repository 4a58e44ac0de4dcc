"""Heads of both kinds through the protocol: classes, survival, slides, patients, null rows, and what is refused."""

import numpy as np
import pytest
from made_stores import make

from gigatome.core.errors import ConfigError, EvaluationError
from gigatome.evaluation.heads import find_head, restore_head
from gigatome.evaluation.protocol import evaluate, learn, prepare
from gigatome.evaluation.splits import SplitOptions
from gigatome.evaluation.unit_data import UnitData
from gigatome.evaluation.units import SurvivalTarget

SURVIVAL = SurvivalTarget("survival_months", censorship="censorship")
FAST = {"fit": {"epochs": 6, "lr": 3e-3, "batch_bags": 4}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"), patients=60)


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """Two classes told apart with ease, of which one dies much sooner."""
    return make(tmp_path_factory.mktemp("lives"), patients=60, hazard=3.0, share=1.0)


@pytest.mark.parametrize("head", ["linear", "prototype", "abmil", "clam_sb", "deep_attn_misl", "patch_gcn"])
def test_a_signal_in_some_tiles_is_found(made, head):
    small = {"deep_attn_misl": {"options": {"clusters": 3}}}.get(head, {})
    options = None if head in ("linear", "prototype") else {**FAST, **small}
    result = evaluate(made.store, made.cohort, target="subtype", head=head, options=options, folds=3, resamples=50)
    assert result.auroc > 0.85
    assert result.head == head
    assert result.n_slides == 60


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("cox", None),
        ("abmil", {"fit": {"epochs": 10, "lr": 1e-3, "batch_bags": 4}, "bins": 3}),
        ("abmil", {"fit": {"epochs": 10, "lr": 1e-3, "batch_bags": 16}, "survival_loss": "cox"}),
        ("mean", {"fit": {"epochs": 10, "lr": 3e-2, "batch_bags": 16}, "survival_loss": "ranking"}),
    ],
)
def test_a_hazard_that_differs_is_found(lives, head, options):
    result = evaluate(lives.store, lives.cohort, target=SURVIVAL, head=head, options=options, folds=3, resamples=50)
    assert result.target == "survival_months, event if censorship = 0"
    assert result.scores.c_index > 0.7  # the true classes score 0.77
    assert result.scores.logrank_p < 0.01
    assert result.scores.events == sum(slide.labels["censorship"] == "0" for slide in lives.cohort)
    rows = result.predictions
    assert rows.survival.shape == rows.edges.shape
    assert rows.survival.shape[1] == (3 if head == "abmil" and "bins" in options else 0)
    assert (np.diff(rows.survival, axis=1) <= 0).all()
    assert 0 < rows.high.mean() < 1


def test_patients_are_their_slides_together(tmp_path):
    made = make(tmp_path, patients=20, slides=2)
    prepared = prepare(made.store, made.cohort, "subtype", 2, level="patient")
    assert prepared.units.level == "patient"
    assert len(prepared.units) == 20
    first = prepared.units.slides[0]
    assert first == ("s000_0", "s000_1")
    every = np.concatenate([made.store.read(name).embeddings for name in first])
    np.testing.assert_allclose(prepared.data.vectors[0], every.mean(0), atol=1e-5)
    for head, options in (("linear", None), ("abmil", FAST)):
        result = evaluate(
            made.store, made.cohort, target="subtype", head=head, options=options, folds=2, level="patient", resamples=9
        )
        assert result.level == "patient"
        assert (result.n_slides, len(result.predictions)) == (40, 20)


def test_shuffled_outcomes_teach_nothing(made):
    prepared = prepare(made.store, made.cohort, "subtype", 5)
    scores = []
    for seed in range(12):
        _, head = find_head("linear")
        result, _ = learn(prepared, made.store, "subtype", "linear", head, seed=seed, resamples=2, permute=True)
        scores.append(result.scores.auroc)
    assert np.mean(scores) == pytest.approx(0.5, abs=0.12)
    assert np.std(scores) > 0


def test_tuning_units_are_for_early_stopping(made):
    options = {"fit": {"epochs": 30, "lr": 3e-3, "batch_bags": 4, "patience": 2, "select": "best"}}
    splits = SplitOptions(folds=3, val_fraction=0.25)
    result = evaluate(
        made.store, made.cohort, target="subtype", head="abmil", options=options, folds=splits, resamples=9
    )
    assert result.auroc > 0.8
    with pytest.raises(ConfigError, match="validation"):
        evaluate(made.store, made.cohort, target="subtype", head="abmil", options=options, folds=3)


@pytest.mark.parametrize(("head", "target"), [("linear", "subtype"), ("cox", SURVIVAL), ("abmil", SURVIVAL)])
def test_a_head_that_is_saved_says_the_same(made, head, target):
    prepared = prepare(made.store, made.cohort, target, 2)
    name, found = find_head(head, {"bins": 2, **FAST} if head == "abmil" else None)
    _, runs = learn(prepared, made.store, target, name, found, seed=0, resamples=2)
    values, arrays = runs[0].fitted.saved()
    again = restore_head(values, arrays).predict(prepared.data)
    first = runs[0].fitted.predict(prepared.data)
    np.testing.assert_array_equal(again.probabilities, first.probabilities)
    np.testing.assert_array_equal(again.risk, first.risk)


def test_attention_is_of_every_tile_of_every_slide(tmp_path):
    made = make(tmp_path, patients=8, slides=2)
    prepared = prepare(made.store, made.cohort, "subtype", 2, level="patient")
    name, head = find_head("abmil", FAST)
    _, runs = learn(prepared, made.store, "subtype", name, head, seed=0, resamples=2)
    data = UnitData(made.store, prepared.units.names, prepared.units.slides)
    weights = runs[0].fitted.predict(data, attention=True).attention
    for unit, slides in enumerate(prepared.units.slides):
        assert len(weights[unit]) == sum(len(made.store.read(slide).coords) for slide in slides)
        np.testing.assert_allclose(weights[unit].sum(0), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": "nothing"}, EvaluationError, "there is no head nothing; there are linear, .*cox, .*abmil"),
        ({"head": "cox"}, EvaluationError, "cox predicts survival"),
        ({"head": "linear", "target": SURVIVAL}, EvaluationError, "predicts classes"),
        ({"head": "linear", "options": {"fit": {}}}, ConfigError, "linear: unknown key fit"),
        ({"head": "abmil", "options": {"epochs": 3}}, ConfigError, "unknown key epochs"),
        ({"head": "abmil", "options": {"options": {"width": 3}}}, ConfigError, "unknown key width"),
        ({"head": "abmil", "level": "tile"}, EvaluationError, "level tile is for probes"),
        ({"head": "mcat"}, ConfigError, "omic"),
        ({"head": "abmil", "target": SURVIVAL, "options": {"survival_loss": "cox"}}, ConfigError, "batch_bags"),
    ],
)
def test_heads_that_do_not_fit(made, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(made.store, made.cohort, **{"target": "subtype", "folds": 3, **options})
