"""How often each slide of a cohort is drawn."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import CohortError
from gigatome.core.logs import log
from gigatome.tiles.position_store import SlideTissue

_COLUMN = "column:"


def slide_weights(
    rule: str,
    slides: Sequence[SlideTissue],
    labels: Sequence[Mapping[str, str]],
    *,
    priors: Mapping[str, float] | None = None,
    usable: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """Weights of slides, in proportion.

    Args:
        rule: ``"uniform"``, all alike; ``"tissue"``, by the area of tissue in µm²; ``"column:NAME"``, by the values of
            a column of the cohort: each value as likely as ``priors`` says, the slides of one value all alike.
        slides: the slides.
        labels: of each slide, by column.
        priors: how likely each value is, in proportion; equally by default. Values that are not named have no weight.
            Slides without a value have none either, unless the empty value ``""`` is named.
        usable: bool [S], slides that tiles can be drawn from; the others get no weight.

    Returns:
        float64 [S].

    Raises:
        CohortError: there is no such column, or no slide of a value that ``priors`` names.
        ValueError: the rule is unknown, or a prior is negative.
    """
    usable = np.ones(len(slides), bool) if usable is None else usable
    if rule == "uniform":
        return usable.astype(np.float64)
    if rule == "tissue":
        return np.where(usable, [slide.area * slide.mpp**2 for slide in slides], 0.0)
    if not rule.startswith(_COLUMN):
        raise ValueError(f'slide_weights must be "uniform", "tissue" or "column:" and a column\'s name, not {rule!r}')
    return _by_column(rule[len(_COLUMN) :], labels, priors, usable)


def _by_column(
    column: str, labels: Sequence[Mapping[str, str]], priors: Mapping[str, float] | None, usable: NDArray[np.bool_]
) -> NDArray[np.float64]:
    columns = {name for row in labels for name in row}
    if column not in columns:
        known = ", ".join(sorted(columns)) or "none"
        raise CohortError(f"the cohort has no column {column!r} to weigh slides by; its columns are: {known}")
    values = [row.get(column, "") for row in labels]
    counts = Counter(value for value, good in zip(values, usable.tolist(), strict=True) if good)
    if priors is None:
        priors = {value: 1.0 for value in counts if value}
    if any(not (np.isfinite(prior) and prior >= 0) for prior in priors.values()):
        raise ValueError(f"priors must be numbers that are not negative, not {dict(priors)}")
    absent = [value for value, prior in priors.items() if prior and not counts[value]]
    if absent:
        raise CohortError(f"no slide that can be used has {column} = {', '.join(absent)}, to which a prior was given")
    unnamed = sum(count for value, count in counts.items() if value not in priors)
    if unnamed:
        log.warning("%d of %d slides have no weight: their %s is empty or has no prior", unnamed, len(values), column)
    return np.where(usable, [priors.get(value, 0.0) / max(counts[value], 1) for value in values], 0.0)
