"""A study in words and numbers: ``study.json``, and how a page spells scores."""

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gigatome.core.version import __version__
from gigatome.evaluation.result import EvaluationResult, plain
from gigatome.evaluation.study import Arm, Result, Study

_FIRM = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Headline:
    """The main score of a result.

    Attributes:
        metric: what it is called, "AUROC" or "c-index".
        pooled: of all test predictions.
        ci: its 95 % interval over patients.
        mean: over folds; NaN where no fold has one.
        sd: standard deviation over folds (n − 1).
        folds: of each fold; NaN where it is not defined.
    """

    metric: str
    pooled: float
    ci: tuple[float, float]
    mean: float
    sd: float
    folds: tuple[float, ...]

    @property
    def value(self) -> float:
        """What stands beside a paper's value: the mean over folds, or the pooled score where there is no mean."""
        return self.mean if math.isfinite(self.mean) else self.pooled


def headline(result: Result) -> Headline:
    """The main score of a result: AUROC of a class, Harrell's c-index of survival."""
    if isinstance(result, EvaluationResult):
        folds = tuple(fold.auroc for fold in result.folds)
        return Headline("AUROC", result.scores.auroc, result.scores.auroc_ci, *result.fold_auroc, folds)
    folds = tuple(fold.c_index for fold in result.folds)
    return Headline("c-index", result.scores.c_index, result.scores.c_index_ci, *result.fold_c_index, folds)


def file_names(labels: Sequence[str]) -> dict[str, str]:
    """For each label a name that any file system takes; names of different labels differ, also in lower case."""
    found: dict[str, str] = {}
    for label in labels:
        ascii_only = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
        name = re.sub(r"[^A-Za-z0-9]+", "_", ascii_only).strip("_").lower()[:60] or "arm"
        number, candidate = 2, name
        while candidate in found.values():
            candidate, number = f"{name}_{number}", number + 1
        found[label] = candidate
    return found


def study_json(study: Study, figures: Sequence[str]) -> dict[str, Any]:
    """Everything of a study but pictures and predictions, as JSON holds it; what is not defined is None.

    Args:
        study: the study.
        figures: names of its figures, below its folder.
    """
    names = file_names([arm.label for arm in study.arms])
    tiles = [
        {name: value for name, value in vars(tile).items() if name != "image"} for tile in study.tiles
    ]  # the page shows the images
    return plain(
        {
            "gigatome": __version__,
            "title": study.title,
            "command": study.command,
            "arms": [_arm(arm, f"predictions_{names[arm.label]}.csv") for arm in study.arms],
            "comparisons": [asdict(comparison) for comparison in study.comparisons],
            "few_shot": [asdict(point) for point in study.few_shot],
            "tiles": tiles,
            "excluded": study.excluded,
            "settings": study.settings,
            "figures": list(figures),
        }
    )


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings with their keys joined by dots."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def spelt(value: Any) -> str:
    """A setting as a reader takes it."""
    value = plain(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(spelt, value)) or "–"
    return str(value) if value != {} else "–"


def spread(mean: float, sd: float) -> str:
    """0.874 ± 0.060, as the papers print it; it does not break."""
    if not math.isfinite(mean):
        return "–"
    return f"{mean:.3f} ± {sd:.3f}".replace(" ", _FIRM) if math.isfinite(sd) else f"{mean:.3f}"


def interval(ends: tuple[float, float], *, plus: bool = False) -> str:
    """0.812 to 0.931, with ``plus`` +0.012 to +0.131; it does not break."""
    if not all(map(math.isfinite, ends)):
        return "–"
    return f"{_FIRM}to{_FIRM}".join(signed(end) if plus else f"{end:.3f}" for end in ends)


def scored(value: float, ends: tuple[float, float]) -> str:
    """0.874 (0.812 to 0.931)."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.3f} ({interval(ends)})" if all(map(math.isfinite, ends)) else f"{value:.3f}"


def signed(value: float) -> str:
    """+0.012, −0.012."""
    return "–" if not math.isfinite(value) else f"{value:+.3f}".replace("-", "−")


def p_value(p: float) -> str:
    """Three decimals, and below that only that it is below."""
    return "–" if not math.isfinite(p) else f"<{_FIRM}0.001" if p < 0.001 else f"{p:.3f}"


def _arm(arm: Arm, predictions: str) -> dict[str, Any]:
    found = headline(arm.result)
    return {
        "label": arm.label,
        "null": arm.null,
        "score": {**asdict(found), "folds": list(found.folds)},
        "reported": arm.reported,
        "reported_sd": arm.reported_sd,
        "difference": None if arm.reported is None else found.value - arm.reported,
        "source": arm.source,
        "predictions": predictions,
        "result": arm.result.to_dict(),
    }
