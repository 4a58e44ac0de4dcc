"""Losses of slide-level models: classes with cross-entropy; survival by time bins, by Cox's likelihood, by ranking.

Each of :func:`cross_entropy`, :func:`survival_nll`, :func:`cox` and :func:`ranking` makes a criterion: logits
[B, outputs] and targets of B bags → scalar mean. All are computed in float32 or wider, whatever the logits are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gigatome.core.errors import ConfigError, EvaluationError
from gigatome.mil.model import Criterion, Targets

_MARGIN = 1e-6


@final
@dataclass(frozen=True)
class Comparing:
    """A criterion that compares the bags of a batch with one another, and so says nothing of a single bag.

    Attributes:
        criterion: the criterion.
    """

    criterion: Criterion

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """Scalar mean loss."""
        return self.criterion(logits, targets)


def cross_entropy(*, smoothing: float = 0.0, weights: Sequence[float] | None = None) -> Criterion:
    """Cross-entropy of classes.

    Args:
        smoothing: share of each label that is spread evenly over all classes, in [0, 1).
        weights: factor of each class. The mean is over bags, not over weights as PyTorch takes it, which would make
            the weights of a batch of one bag do nothing.

    Raises:
        ConfigError: smoothing is out of range, or a weight is negative.
    """
    if not 0 <= smoothing < 1:
        raise ConfigError(f"label smoothing is in [0, 1), not {smoothing:g}")
    if weights is not None and not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ConfigError(f"class weights are finite and not negative, not {list(weights)}")

    def criterion(logits: Tensor, targets: Targets) -> Tensor:
        logits = _wide(logits)
        if weights is not None and len(weights) != logits.shape[1]:
            raise ConfigError(f"there are {logits.shape[1]} classes and {len(weights)} class weights")
        factors = None if weights is None else logits.new_tensor(weights)
        return F.cross_entropy(logits, targets.y, factors, reduction="none", label_smoothing=smoothing).mean()

    return criterion


def class_weights(y: ArrayLike, classes: int) -> tuple[float, ...]:
    """Weights for :func:`cross_entropy` that let each class count alike: mean 1 over ``y``, int [N]; 0 if absent."""
    counts = np.bincount(np.asarray(y, np.int64), minlength=classes)
    present = np.count_nonzero(counts)
    return tuple(float(counts.sum() / (present * count)) if count else 0.0 for count in counts)


def survival_nll(alpha: float = 0.0) -> Criterion:
    """Negative log-likelihood of discrete time bins; logits [B, bins] are of the hazards, ``targets.y`` is the bin.

    With hazards h = σ(logits) and survival S(k) = Π_{j ≤ k} (1 − h_j), a bag with an event in bin y costs
    −log S(y − 1) − log h_y, one censored in bin y costs −log S(y).

    Source: MCAT, ``utils.nll_loss``; differs: sums of log-sigmoids in place of logarithms clamped at 1e-7, so that a
    saturated hazard still has a gradient.

    Args:
        alpha: weight taken from censored bags, in [0, 1]: the loss is (1 − alpha) · all + alpha · events.

    Raises:
        ConfigError: alpha is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha of the survival loss is in [0, 1], not {alpha:g}")

    def criterion(logits: Tensor, targets: Targets) -> Tensor:
        _, event = _survival(targets)
        logits = _wide(logits)
        bins = targets.y[:, None]
        survived = F.logsigmoid(-logits).cumsum(1)  # log S
        before = F.pad(survived, (1, 0)).gather(1, bins)[:, 0]
        seen = -(before + F.logsigmoid(logits).gather(1, bins)[:, 0])
        censored = -survived.gather(1, bins)[:, 0]
        return torch.where(event, seen, (1 - alpha) * censored).mean()

    return criterion


def cox(ties: Literal["efron", "breslow"] = "efron") -> Comparing:
    """Negative log partial likelihood of Cox, over the number of events; logits [B, 1] are log-risks.

    The bags at risk are those of the batch, so batches should be large. A batch without events costs 0.

    Source: Efron, J. Am. Stat. Assoc. 72 (1977) 557; Breslow, Biometrics 30 (1974) 89.

    Args:
        ties: how events at the same time are handled.

    Raises:
        ConfigError: there is no such handling.
    """
    if ties not in ("efron", "breslow"):
        raise ConfigError(f"ties are handled as efron or breslow, not {ties}")

    def criterion(logits: Tensor, targets: Targets) -> Tensor:
        time, event = _survival(targets)
        risk_B = _log_risk(logits)
        at_risk = time[None, :] >= time[:, None]
        log_sum = risk_B.expand(len(risk_B), -1).masked_fill(~at_risk, -math.inf).logsumexp(1)
        if ties == "efron":
            tied = (time[None, :] == time[:, None]) & (event[None, :] & event[:, None] | _diagonal(event))
            log_tied = risk_B.expand(len(risk_B), -1).masked_fill(~tied, -math.inf).logsumexp(1)
            count = tied.sum(1)
            place = tied.tril(-1).sum(1)
            log_sum = log_sum + torch.log1p(-(place / count) * (log_tied - log_sum).exp())
        terms = torch.where(event, log_sum - risk_B, 0.0)
        return terms.sum() / event.sum().clamp(min=1)

    return Comparing(criterion)


def ranking(scale: float = 1.0) -> Comparing:
    """Logistic loss of pairs of which one is known to have had the event first: an upper bound on 1 − c-index.

    The mean over pairs of log2(1 + exp(−(risk_i − risk_j) / scale)), where i had an event before j's event or, at the
    latest, when j was censored. Risk is :func:`risk`. A batch without such pairs costs 0.

    Source: Steck et al., On ranking in survival analysis: bounds on the concordance index, NIPS 2007, eq. 7.

    Args:
        scale: difference of risks that counts as clear, > 0.

    Raises:
        ConfigError: scale is not positive.
    """
    if not scale > 0:
        raise ConfigError(f"the scale of the ranking loss is positive, not {scale:g}")

    def criterion(logits: Tensor, targets: Targets) -> Tensor:
        time, event = _survival(targets)
        risks = risk(logits)
        sooner = (time[:, None] < time[None, :]) | ((time[:, None] == time[None, :]) & ~event[None, :])
        pairs = sooner & event[:, None]
        costs = F.softplus((risks[None, :] - risks[:, None]) / scale) / math.log(2)
        return torch.where(pairs, costs, 0.0).sum() / pairs.sum().clamp(min=1)

    return Comparing(criterion)


def risk(logits: Tensor) -> Tensor:
    """Risk [B] of logits: −Σ S over time bins, as MCAT has it; of a single output, the log-risk of Cox, itself."""
    return _log_risk(logits) if logits.shape[1] == 1 else -survival_curve(logits).sum(1)


def survival_curve(logits: Tensor) -> Tensor:
    """Probability [B, bins] of surviving each time bin, of logits [B, bins] of the hazards."""
    return F.logsigmoid(-_wide(logits)).cumsum(1).exp()


@final
@dataclass(frozen=True, eq=False)
class TimeBins:
    """Bins of time, each with its lower edge and without its upper one.

    Attributes:
        edges: float64 [bins + 1], ascending; the outer ones lie just beyond the times that made them.
    """

    edges: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def of(self, time: ArrayLike) -> NDArray[np.int64]:
        """int64 [N], bin of each time; what lies beyond the outer edges belongs to the outer bins."""
        return np.searchsorted(self.edges[1:-1], np.asarray(time, np.float64), side="right").astype(np.int64)


def time_bins(time: ArrayLike, event: ArrayLike, bins: int = 4) -> TimeBins:
    """Bins that hold equally many events: quantiles of the times of those who had one.

    Give the times of the training part alone. MCAT and HIPT give those of the whole cohort, of whose test part a model
    thereby learns a little.

    Source: MCAT, ``datasets/dataset_survival.py``: quartiles of uncensored times, outer edges 1e-6 beyond all times.

    Args:
        time: [N], positive.
        event: [N], whether it was seen.
        bins: how many, ≥ 2.

    Raises:
        ConfigError: fewer than two bins are asked for.
        EvaluationError: too few different times of events for so many bins.
    """
    if bins < 2:
        raise ConfigError(f"there must be at least 2 time bins, not {bins}")
    times, seen = np.asarray(time, np.float64), np.asarray(event, bool)
    uncensored = times[seen]
    edges = np.quantile(uncensored, np.linspace(0, 1, bins + 1)) if len(uncensored) else np.zeros(bins + 1)
    if (np.diff(edges) <= 0).any():
        raise EvaluationError(
            f"{len(uncensored)} events at {len(np.unique(uncensored))} different times do not make {bins} time bins; "
            "use fewer bins, or the Cox loss"
        )
    edges[0], edges[-1] = times.min() - _MARGIN, times.max() + _MARGIN
    return TimeBins(edges)


def _survival(targets: Targets) -> tuple[Tensor, Tensor]:
    if targets.event is None or targets.time is None:
        raise ConfigError("a survival loss needs the time and event of each bag")
    return targets.time, targets.event


def _log_risk(logits: Tensor) -> Tensor:
    if logits.shape[1] != 1:
        raise ConfigError(f"a log-risk is 1 output, not {logits.shape[1]}; the head's outputs and the loss do not fit")
    return _wide(logits)[:, 0]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _diagonal(event: Tensor) -> Tensor:
    return torch.eye(len(event), dtype=torch.bool, device=event.device)
