"""RankMe and off-diagonal correlation."""

import numpy as np
import pytest

from gigatome.core.errors import EvaluationError
from gigatome.evaluation.unsupervised import odcorr, rankme


def test_odcorr_is_equation_1_of_kaiko():
    z = np.random.default_rng(0).normal(size=(30, 12))
    r = np.corrcoef(z)
    expected = np.sqrt((np.sum(r**2) - 30) / (30 * 29))
    assert odcorr(z) == pytest.approx(expected, abs=1e-12)
    assert odcorr(z[:5]) == pytest.approx(np.sqrt((np.sum(np.corrcoef(z[:5]) ** 2) - 5) / 20), abs=1e-12)


def test_odcorr_of_the_extremes():
    row = np.random.default_rng(1).normal(size=16)
    assert odcorr(np.stack([row, 3 * row + 2, -row])) == pytest.approx(1.0)
    unrelated = np.array([[1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    assert odcorr(unrelated) == pytest.approx(0.0, abs=1e-7)


def test_odcorr_of_noise_falls_with_the_dimension():
    rng = np.random.default_rng(2)
    for dim in (10, 100, 1000):
        assert odcorr(rng.normal(size=(400, dim))) == pytest.approx((dim - 1) ** -0.5, rel=0.05)


def test_rankme_counts_directions():
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    for rank in (1, 3, 20):
        assert rankme(np.tile(basis[:rank], (4, 1))) == pytest.approx(rank, rel=1e-3)


def test_rankme_is_the_formula_of_its_paper():
    z = np.random.default_rng(4).normal(size=(50, 8)) * np.arange(1, 9)
    values = np.linalg.svd(z)[1]
    share = values / values.sum() + 1e-7
    assert rankme(z) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.parametrize("function", [rankme, odcorr])
def test_what_cannot_be_judged(function):
    with pytest.raises(EvaluationError, match="not finite"):
        function(np.array([[1.0, np.nan], [0.0, 1.0]]))
    with pytest.raises(EvaluationError, match="need at least"):
        function(np.zeros((0, 4)))
    with pytest.raises(ValueError, match="need embeddings"):
        function(np.zeros(4))


def test_embeddings_that_say_nothing():
    with pytest.raises(EvaluationError, match="embedding 1 is the same in every dimension"):
        odcorr(np.array([[1.0, 2.0, 3.0], [0.1, 0.1, 0.1]]))
    with pytest.raises(EvaluationError, match="all embeddings are zero"):
        rankme(np.zeros((3, 4)))
    with pytest.raises(EvaluationError, match="need at least 2"):
        odcorr(np.ones((1, 4)))
