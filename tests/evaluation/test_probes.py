"""The simple classifiers, against scikit-learn as the papers used it."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from gigatome.core.errors import EvaluationError
from gigatome.evaluation.probes import PROBES, Knn, LinearProbe, find_probe, fit_predict


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    y = np.r_[0, 1, 2, rng.integers(0, 3, 77)]
    x = (rng.normal(size=(80, 10)) + 0.7 * np.eye(10)[y]) * np.arange(1, 11)
    return x[:60].astype(np.float32), y[:60], x[60:].astype(np.float32)


def test_linear_is_logistic_regression_on_standardised_features(data):
    x, y, x_test = data
    scaler = StandardScaler().fit(x.astype(np.float64))
    expected = LogisticRegression(C=1.0, max_iter=1000).fit(scaler.transform(x.astype(np.float64)), y)
    found = fit_predict(LinearProbe(), x, y, x_test, 3)
    np.testing.assert_allclose(found, expected.predict_proba(scaler.transform(x_test.astype(np.float64))), atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1)


def test_giga_is_that_of_the_paper(data):
    x, y, x_test = (part.astype(np.float64) if part.dtype == np.float32 else part for part in data)
    expected = LogisticRegression(C=10, max_iter=1000, class_weight="balanced").fit(x, y).predict_proba(x_test)
    np.testing.assert_allclose(fit_predict(PROBES["giga"], *data, 3), expected, atol=1e-6)


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
    with pytest.raises(EvaluationError, match="there is no head abmil; there are linear, knn, giga, hipt"):
        find_probe("abmil")


@pytest.mark.parametrize(
    "make", [lambda: Knn(0), lambda: Knn(metric="cos"), lambda: LinearProbe(C=0), lambda: LinearProbe(max_iter=0)]
)
def test_options_that_make_no_sense(make):
    with pytest.raises(EvaluationError, match="needs"):
        make()
