"""Each loss against its formula written out with loops, and its behaviour where numbers are extreme."""

import math

import numpy as np
import pytest
import torch

from gigatome.core.errors import ConfigError, EvaluationError
from gigatome.mil.losses import (
    class_weights,
    cox,
    cross_entropy,
    ranking,
    risk,
    survival_curve,
    survival_nll,
    time_bins,
)
from gigatome.mil.model import Targets


def survival_targets(time, event, y=None):
    time = torch.tensor(time, dtype=torch.float64)
    return Targets(torch.zeros(len(time), dtype=torch.int64) if y is None else y, time, torch.tensor(event) > 0)


TIED = survival_targets([2, 1, 2, 3, 2, 1, 4, 4, 5], [1, 1, 1, 0, 0, 1, 1, 1, 0])
LOGITS = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 1)))


def cox_by_hand(ties):
    """−log of the partial likelihood, event by event."""
    risks, time, event = LOGITS[:, 0].exp().tolist(), TIED.time.tolist(), TIED.event.tolist()
    total = 0.0
    for t in sorted({t for t, e in zip(time, event, strict=True) if e}):
        at_risk = sum(r for r, u in zip(risks, time, strict=True) if u >= t)
        dying = [r for r, u, e in zip(risks, time, event, strict=True) if e and u == t]
        for i, r in enumerate(dying):
            less = i / len(dying) * sum(dying) if ties == "efron" else 0.0
            total -= math.log(r) - math.log(at_risk - less)
    return total / sum(event)


def test_cross_entropy():
    logits, y = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 3.0]]), torch.tensor([0, 1])
    logs = logits.log_softmax(1)
    picked = -logs[torch.arange(2), y]
    assert cross_entropy()(logits, Targets(y)) == pytest.approx(picked.mean())
    smooth = 0.7 * picked + 0.3 * -logs.mean(1)
    assert cross_entropy(smoothing=0.3)(logits, Targets(y)) == pytest.approx(smooth.mean())
    weighted = cross_entropy(weights=(3.0, 0.5, 1.0))
    assert weighted(logits, Targets(y)) == pytest.approx((3 * picked[0] + 0.5 * picked[1]) / 2)
    # the weight of a bag alone counts, which PyTorch's own mean would cancel
    assert weighted(logits[:1], Targets(y[:1])) == pytest.approx(3 * picked[0])
    assert cross_entropy()(logits.bfloat16(), Targets(y)).dtype == torch.float32


def test_cross_entropy_refuses():
    for arguments in ({"smoothing": 1.0}, {"smoothing": -0.1}, {"weights": (1.0, math.nan)}, {"weights": (1.0, -1.0)}):
        with pytest.raises(ConfigError):
            cross_entropy(**arguments)
    with pytest.raises(ConfigError, match="3 classes and 2 class weights"):
        cross_entropy(weights=(1.0, 2.0))(torch.zeros(1, 3), Targets(torch.tensor([0])))


def test_class_weights_balance():
    y = np.array([0, 0, 0, 2])
    weights = class_weights(y, 4)
    assert weights == pytest.approx((4 / 6, 0.0, 2.0, 0.0))
    assert np.mean([weights[label] for label in y]) == pytest.approx(1)


def test_survival_nll_is_the_likelihood():
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 4)))
    targets = survival_targets([1, 2, 3], [1, 0, 1], torch.tensor([0, 2, 3]))
    h = logits.sigmoid().tolist()
    costs = [
        -math.log(h[0][0]),
        -math.log((1 - h[1][0]) * (1 - h[1][1]) * (1 - h[1][2])),
        -math.log((1 - h[2][0]) * (1 - h[2][1]) * (1 - h[2][2]) * h[2][3]),
    ]
    assert survival_nll()(logits, targets) == pytest.approx(sum(costs) / 3)
    assert survival_nll(0.25)(logits, targets) == pytest.approx((costs[0] + 0.75 * costs[1] + costs[2]) / 3)
    assert survival_nll(1.0)(logits, targets) == pytest.approx((costs[0] + costs[2]) / 3)
    with pytest.raises(ConfigError, match="alpha"):
        survival_nll(1.5)


def test_saturated_hazards_still_learn():
    logits = torch.tensor([[-200.0, -200.0], [200.0, 200.0]], requires_grad=True)
    loss = survival_nll()(logits, survival_targets([1, 2], [1, 0], torch.tensor([0, 1])))
    loss.backward()
    assert loss.item() == pytest.approx((200 + 400) / 2)
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.5, 0.0], [0.5, 0.5]]))


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_cox(ties):
    assert cox(ties)(LOGITS, TIED) == pytest.approx(cox_by_hand(ties))
    assert torch.autograd.gradcheck(lambda x: cox(ties)(x, TIED), LOGITS.clone().requires_grad_())
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert cox(ties)(LOGITS[order], TIED[order]) == pytest.approx(cox_by_hand(ties))
    assert cox(ties)(LOGITS + 1000, TIED) == pytest.approx(cox_by_hand(ties))


def test_ties_matter_here():
    assert cox_by_hand("efron") < cox_by_hand("breslow") - 0.1


@pytest.mark.parametrize("criterion", [cox(), cox("breslow"), ranking()])
@pytest.mark.parametrize(
    ("time", "event"), [([1.0, 2.0], [0, 0]), ([1.0], [1]), ([2.0, 2.0], [1, 0]), ([1.0, 2.0], [1, 1])]
)
def test_extreme_risks_and_batches_without_pairs_have_finite_gradients(criterion, time, event):
    logits = torch.tensor([[500.0], [-500.0]])[: len(time)].requires_grad_()
    loss = criterion(logits, survival_targets(time, event))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    if not any(event) or len(time) == 1:
        assert loss == 0


def test_ranking_bounds_the_discordance():
    time, event, risks = TIED.time.tolist(), TIED.event.tolist(), LOGITS[:, 0].tolist()
    costs, wrong = [], []
    for i in range(9):
        for j in range(9):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                costs.append(math.log2(1 + math.exp(-(risks[i] - risks[j]) / 0.5)))
                wrong.append(risks[i] < risks[j])
    assert len(costs) > 10
    assert ranking(0.5)(LOGITS, TIED) == pytest.approx(np.mean(costs))
    assert np.mean(costs) > np.mean(wrong)
    bins = torch.from_numpy(np.random.default_rng(2).normal(size=(9, 4)))
    assert ranking()(bins, TIED) == pytest.approx(ranking()(risk(bins)[:, None], TIED))
    with pytest.raises(ConfigError, match="positive"):
        ranking(0.0)


def test_risk_and_survival():
    logits = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    torch.testing.assert_close(survival_curve(logits)[0], torch.tensor([0.5, 0.25]))
    assert risk(logits)[0] == pytest.approx(-0.75)
    assert risk(logits)[1] > risk(logits)[0]
    assert risk(torch.tensor([[3.0]])).tolist() == [3.0]
    assert (survival_curve(torch.full((1, 4), 50.0)) >= 0).all()


def test_losses_of_survival_need_it_and_one_output():
    with pytest.raises(ConfigError, match="time and event"):
        survival_nll()(torch.zeros(1, 4), Targets(torch.tensor([0])))
    with pytest.raises(ConfigError, match="1 output"):
        cox()(torch.zeros(9, 4), TIED)


def test_time_bins_are_quartiles_of_events():
    time = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 0.5, 30])
    event = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    bins = time_bins(time, event)
    assert len(bins) == 4
    np.testing.assert_allclose(bins.edges, [0.5 - 1e-6, 2.75, 4.5, 6.25, 30 + 1e-6])
    assert bins.of(time).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0, 3]
    # an edge belongs to the bin above it, and what lies outside to the outer bins
    assert bins.of([4.5, -3, 99]).tolist() == [2, 0, 3]


def test_time_bins_refuse():
    with pytest.raises(EvaluationError, match="3 events at 2 different times do not make 4"):
        time_bins([1, 1, 2, 9], [1, 1, 1, 0])
    with pytest.raises(EvaluationError, match="0 events"):
        time_bins([1, 2], [0, 0])
    with pytest.raises(ConfigError, match="at least 2"):
        time_bins([1, 2], [1, 1], bins=1)
