"""The simple classifiers, against scikit-learn as the papers used it."""

import json
import logging

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from gigatome.core.errors import EvaluationError
from gigatome.evaluation.logistic import fit_logistic, probabilities
from gigatome.evaluation.probes import (
    PROBES,
    FittedProbe,
    Knn,
    LinearProbe,
    Prototype,
    find_probe,
    fit_predict,
    fit_probe,
)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    y = np.r_[0, 1, 2, rng.integers(0, 3, 77)]
    x = (rng.normal(size=(80, 10)) + 0.7 * np.eye(10)[y]) * np.arange(1, 11)
    return x[:60].astype(np.float32), y[:60], x[60:].astype(np.float32)


def test_linear_is_logistic_regression_on_standardised_features(data):
    x, y, x_test = data
    scaler = StandardScaler().fit(x.astype(np.float64))
    expected = LogisticRegression(C=1.0, max_iter=10_000, tol=1e-10).fit(scaler.transform(x.astype(np.float64)), y)
    found = fit_predict(LinearProbe(), x, y, x_test, 3)
    np.testing.assert_allclose(found, expected.predict_proba(scaler.transform(x_test.astype(np.float64))), atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1)


def test_giga_is_that_of_the_paper(data):
    x, y, x_test = (part.astype(np.float64) if part.dtype == np.float32 else part for part in data)
    expected = LogisticRegression(C=10, max_iter=10_000, tol=1e-10, class_weight="balanced").fit(x, y)
    found = fit_predict(PROBES["giga"], *data, 3)
    np.testing.assert_allclose(found, expected.predict_proba(x_test), atol=2e-6)


def test_hipt_is_the_default_of_scikit_learn(data):
    expected = KNeighborsClassifier().fit(data[0], data[1]).predict_proba(data[2])
    np.testing.assert_allclose(fit_predict(PROBES["hipt"], *data, 3), expected)


def test_cosine_neighbours_ignore_length(data):
    x, y, x_test = data
    rng = np.random.default_rng(1)
    stretched = x * rng.uniform(0.1, 10, (len(x), 1)).astype(np.float32)
    np.testing.assert_allclose(fit_predict(Knn(), stretched, y, x_test, 3), fit_predict(Knn(), x, y, x_test, 3))
    expected = KNeighborsClassifier(5, metric="cosine").fit(x, y).predict_proba(x_test)
    np.testing.assert_allclose(fit_predict(Knn(), x, y, x_test, 3), expected)


def test_nothing_is_learnt_from_the_test_samples(data):
    x, y, x_test = data
    alone = np.concatenate([fit_predict(LinearProbe(), x, y, row[None], 3) for row in x_test])
    np.testing.assert_allclose(alone, fit_predict(LinearProbe(), x, y, x_test, 3), atol=1e-12)


def test_a_constant_feature_changes_nothing(data):
    x, y, x_test = data
    value = np.float32(0.1)
    padded, padded_test = (np.c_[part, np.full(len(part), value)] for part in (x, x_test))
    padded_test[:, -1] = 1e6
    expected = fit_predict(LinearProbe(), x, y, x_test, 3)
    np.testing.assert_allclose(fit_predict(LinearProbe(), padded, y, padded_test, 3), expected, atol=1e-5)


def test_a_class_without_training_sample(data):
    with pytest.raises(EvaluationError, match="class 3 has no training sample"):
        fit_predict(LinearProbe(), *data, 4)


def test_more_neighbours_than_samples():
    x = np.zeros((3, 2), np.float32)
    with pytest.raises(EvaluationError, match="5 nearest neighbours among 3 training samples"):
        fit_predict(Knn(), x, np.array([0, 1, 1]), x, 2)


def test_heads_by_name():
    assert find_probe("linear") == ("linear", LinearProbe())
    assert find_probe(Knn(3)) == ("knn", Knn(3))
    assert find_probe(LinearProbe(C=2))[0] == "linear"
    assert find_probe("prototype") == find_probe(Prototype()) == ("prototype", Prototype())
    with pytest.raises(EvaluationError, match="there is no head abmil; there are linear, knn, giga, hipt"):
        find_probe("abmil")


@pytest.mark.parametrize(
    "make", [lambda: Knn(0), lambda: Knn(metric="cos"), lambda: LinearProbe(C=0), lambda: LinearProbe(max_iter=0)]
)
def test_options_that_make_no_sense(make):
    with pytest.raises(EvaluationError, match="needs"):
        make()


@pytest.mark.parametrize("probe", [LinearProbe(), PROBES["giga"], LinearProbe(C=100.0)])
@pytest.mark.parametrize(("n", "dim", "classes"), [(400, 96, 2), (300, 64, 4), (40, 128, 2), (60, 128, 3)])
def test_the_optimum_is_that_of_scikit_learn(probe, n, dim, classes):
    """Wide and tall, two classes and more; scikit-learn to a far finer tolerance than its own."""
    rng = np.random.default_rng(n)
    mix = rng.normal(size=(dim, dim)) * np.arange(1, dim + 1) ** -0.7
    x = rng.normal(size=(n + 50, dim)) @ mix + 1
    y = np.r_[np.arange(classes), np.digitize(x[classes:, 0], np.quantile(x[:, 0], np.arange(1, classes) / classes))]
    y[rng.random(len(y)) < 0.2] = 0
    x, x_test, y = x[:n].astype(np.float32), x[n:].astype(np.float32), y[:n]
    wide, wide_test = x.astype(float), x_test.astype(float)
    if probe.scale:
        scaler = StandardScaler().fit(wide)
        wide, wide_test = scaler.transform(wide), scaler.transform(wide_test)
    weight = "balanced" if probe.balanced else None
    expected = LogisticRegression(C=probe.C, class_weight=weight, tol=1e-10, max_iter=100_000).fit(wide, y)
    found = fit_predict(probe, x, y, x_test, classes)
    np.testing.assert_allclose(found, expected.predict_proba(wide_test), atol=2e-5)


def test_separated_classes_converge(caplog):
    x = np.r_[np.full((20, 1), -1.0), np.full((20, 1), 1.0)]
    y = np.repeat([0, 1], 20)
    with caplog.at_level(logging.WARNING, "gigatome"):
        coefficients, intercept = fit_logistic(x, y, 2, penalty=1e-4)
    expected = LogisticRegression(C=1e4, tol=1e-12, max_iter=10_000).fit(x, y).coef_[0, 0]
    assert coefficients[0, 0] == pytest.approx(expected, rel=1e-3)
    assert intercept[0] == pytest.approx(0, abs=1e-5)
    assert not caplog.records


def test_too_few_steps_are_said(data, caplog):
    with caplog.at_level(logging.WARNING, "gigatome"):
        fit_predict(LinearProbe(max_iter=1), *data, 3)
    assert "has not converged in 1 steps" in caplog.text


def test_large_embeddings_stay_float32(data, monkeypatch):
    x, y, x_test = data
    expected = fit_predict(LinearProbe(), x, y, x_test, 3)
    for module in ("probes", "logistic"):
        monkeypatch.setattr(f"gigatome.evaluation.{module}.LARGE", 10)
    found = fit_predict(LinearProbe(), x, y, x_test, 3)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.dtype == np.float64
    assert not np.array_equal(found, expected)


def test_probabilities_of_large_logits():
    np.testing.assert_allclose(probabilities(np.array([[-1e4], [0], [1e4]])), [[1, 0], [0.5, 0.5], [0, 1]])
    np.testing.assert_allclose(probabilities(np.array([[1e4, 0, -1e4]])), [[1, 0, 0]])


@pytest.mark.parametrize("name", [*PROBES, "scaled", "euclidean"])
def test_a_fitted_probe_is_saved_and_restored(data, name):
    x, y, x_test = data
    given = {"scaled": LinearProbe(C=3.0, balanced=True), "euclidean": Prototype("euclidean", center=False)}
    probe = given.get(name) or PROBES[name]
    fitted = fit_probe(probe, x, y, 3)
    again = FittedProbe.from_tensors(json.loads(json.dumps(fitted.options())), fitted.tensors())
    assert (again.probe, again.classes) == (probe, 3)
    np.testing.assert_array_equal(again.predict(x_test), fit_predict(probe, x, y, x_test, 3))
    assert again.predict(x_test).shape == (20, 3)


def test_what_is_no_saved_probe(data):
    fitted = fit_probe(LinearProbe(), *data[:2], 3)
    for options in ({}, {"kind": "abmil"}, {"kind": "linear", "k": 3}):
        with pytest.raises(EvaluationError, match="not the options of a probe"):
            FittedProbe.from_tensors(options, fitted.tensors())
    with pytest.raises(EvaluationError, match="a knn probe has mean, x, y, not coefficients, intercept"):
        FittedProbe.from_tensors({"kind": "knn", "classes": 3}, fitted.tensors())


@pytest.mark.parametrize("name", PROBES)
def test_embeddings_of_another_encoder(data, name):
    with pytest.raises(EvaluationError, match=r"takes embeddings \[M, 10\], not \(20, 9\)"):
        fit_probe(PROBES[name], *data[:2], 3).predict(data[2][:, :9])


@pytest.mark.parametrize("name", PROBES)
def test_embeddings_that_are_not_finite(data, name):
    x, y, _ = data
    x[3, 2] = np.nan
    with pytest.raises(EvaluationError, match="not finite"):
        fit_probe(PROBES[name], x, y, 3)


def test_the_nearest_prototype_by_hand():
    x = np.array([[2.0, 0], [4, 0], [0, 3]])
    y = np.array([0, 0, 1])
    plain = fit_predict(Prototype("cosine", center=False, temperature=1.0), x, y, np.array([[1.0, 0], [5, 5]]), 2)
    np.testing.assert_allclose(plain[:, 1], [1 / (1 + np.e), 0.5])
    spread = 2 / 3  # squares 1, 1 and 0
    near = fit_predict(Prototype("euclidean", center=False, temperature=1.0), x, y, np.array([[3.0, 3.0]]), 2)
    assert near[0, 1] == pytest.approx(1 / (1 + np.exp((9 - 9) / spread)))
    near = fit_predict(Prototype("euclidean", center=False, temperature=2.0), x, y, np.array([[3.0, 1.0]]), 2)
    assert near[0, 1] == pytest.approx(1 / (1 + np.exp((13 - 1) / spread / 2)))


def test_one_sample_a_class_is_enough_for_a_prototype():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 32))
    y = np.arange(90) % 3
    x = centres[y] + 0.3 * rng.normal(size=(90, 32))
    for probe in (Prototype(), Prototype("euclidean")):
        p = fit_predict(probe, x[:3], y[:3], x[3:], 3)
        assert (p.argmax(1) == y[3:]).all()
        np.testing.assert_allclose(p.sum(1), 1)


@pytest.mark.parametrize("options", [{"metric": "cos"}, {"temperature": 0.0}])
def test_prototypes_that_make_no_sense(options):
    with pytest.raises(EvaluationError, match="a prototype needs"):
        Prototype(**options)
