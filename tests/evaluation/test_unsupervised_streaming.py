"""The figures of embeddings that come in parts, and the spread of embeddings."""

import tracemalloc

import numpy as np
import pytest

from gigatome.core.errors import EvaluationError
from gigatome.evaluation.unsupervised import EmbeddingStd, ODCorr, RankMe, embedding_std, odcorr, rankme


def whole_rankme(z):
    values = np.linalg.svd(z, compute_uv=False)
    share = values / values.sum() + 1e-7
    return np.exp(-(share * np.log(share)).sum())


def whole_odcorr(z):
    r = np.corrcoef(z)
    return np.sqrt((np.sum(r**2) - len(z)) / (len(z) * (len(z) - 1)))


def unit_std(z):
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).std(0).mean() * z.shape[1] ** 0.5


WHOLE = [
    (RankMe, whole_rankme),
    (ODCorr, whole_odcorr),
    (EmbeddingStd, lambda z: z.std(0).mean()),
    (lambda: EmbeddingStd(unit=True), unit_std),
]


def parts(z, sizes):
    cuts = np.cumsum(np.resize(sizes, len(z)))
    return np.split(z, cuts[cuts < len(z)])


@pytest.mark.parametrize(("make", "whole"), WHOLE)
@pytest.mark.parametrize("shape", [(3000, 12), (1024, 3), (40, 70), (2, 5)])
def test_parts_give_what_the_whole_gives(make, whole, shape):
    z = np.random.default_rng(0).normal(3, 2, size=shape) * np.arange(1, shape[1] + 1)
    figure = make()
    for part in parts(z, [1, 700, 1500]):
        figure.add(part)
    assert figure.value() == pytest.approx(whole(z), rel=1e-10)
    assert make().add(z).value() == pytest.approx(whole(z), rel=1e-10)
    assert figure.value() == figure.value()  # asking changes nothing


def test_small_singular_values_survive_the_parts():
    """Those of a covariance would be lost: 1e-10 squared is below float64's rounding of 1."""
    rng = np.random.default_rng(1)
    left = np.linalg.qr(rng.normal(size=(9000, 8)))[0]
    right = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    z = left * np.r_[1.0, np.full(7, 1e-10)] @ right
    kept = RankMe(eps=1e-30).add(z)
    share = np.r_[1.0, np.full(7, 1e-10)] / (1 + 7e-10)
    assert np.log(kept.value()) == pytest.approx(-(share * np.log(share)).sum(), rel=1e-4)


def test_files_mapped_into_memory_are_read_in_parts(tmp_path):
    z = np.random.default_rng(2).normal(size=(60_000, 32)).astype(np.float32)
    np.save(tmp_path / "z.npy", z)
    mapped = np.load(tmp_path / "z.npy", mmap_mode="r")
    for figure, expected in ((rankme, whole_rankme(z.astype(np.float64))), (embedding_std, z.std(0).mean())):
        tracemalloc.start()
        assert figure(mapped) == pytest.approx(expected, rel=1e-5)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < z.nbytes  # the matrix in float64 alone would be twice that
    assert odcorr(mapped) == pytest.approx(31**-0.5, rel=0.01)


def test_half_precision_is_enough():
    z = np.random.default_rng(3).normal(size=(500, 20)).astype(np.float16)
    assert rankme(z) == pytest.approx(whole_rankme(z.astype(np.float64)))


def test_spread_of_the_extremes():
    rng = np.random.default_rng(4)
    assert embedding_std(np.tile(rng.normal(size=8), (30, 1))) == pytest.approx(0, abs=1e-12)
    assert embedding_std(rng.normal(size=(5000, 8), scale=3)) == pytest.approx(3, rel=0.02)
    assert embedding_std(rng.normal(size=(5000, 64), scale=3), unit=True) == pytest.approx(1, rel=0.02)
    assert embedding_std(np.outer(np.arange(1, 9), rng.normal(size=8)), unit=True) == pytest.approx(0, abs=1e-7)


def test_std_far_from_zero():
    z = np.random.default_rng(5).normal(1e8, 1, size=(9000, 4))
    assert EmbeddingStd().add(z).value() == pytest.approx(
        z.std(0).mean(), rel=1e-6
    )  # a sum of squares would leave nothing


def test_rows_that_do_not_belong_together():
    figure = RankMe().add(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"need embeddings \[N, 3\], not \(2, 4\)"):
        figure.add(np.ones((2, 4)))
    with pytest.raises(EvaluationError, match="not finite"):
        figure.add(np.full((2, 3), np.inf))


def test_rows_without_figure_are_named_by_their_place_in_the_whole():
    rows = np.random.default_rng(6).normal(size=(10, 4))
    constant = np.vstack([rows[:2], np.ones((1, 4))])
    with pytest.raises(EvaluationError, match="embedding 12 is the same in every dimension"):
        ODCorr().add(rows).add(constant).value()
    with pytest.raises(EvaluationError, match="embedding 11 is zero"):
        EmbeddingStd(unit=True).add(rows).add(np.vstack([rows[:1], np.zeros((1, 4))]))
    with pytest.raises(EvaluationError, match="need at least 1"):
        EmbeddingStd().value()
