"""Which charts a study has: from its arms and what was found of them to figures with names and words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from gigatome.evaluation.calibration import calibration, expected_calibration_error, reliability
from gigatome.evaluation.canvas import INK
from gigatome.evaluation.curves import Kind, confusion, curve_band, learning_curves
from gigatome.evaluation.result import EvaluationResult
from gigatome.evaluation.study import Arm, FewShot, Study
from gigatome.evaluation.study_charts import (
    Dot,
    Group,
    Line,
    calibration_panel,
    confusion_panel,
    curve_panel,
    dots_panel,
    learning_panel,
    survival_panel,
)
from gigatome.evaluation.study_files import Headline, file_names, p_value
from gigatome.evaluation.study_panel import Style, styles
from gigatome.evaluation.survival_curves import kaplan_meier
from gigatome.evaluation.survival_result import SurvivalPredictions, SurvivalResult

_MOST_ARMS, _MOST_CLASSES, _FEW_ROWS = 4, 8, 20_000
_AXES = {"roc": ("false positive rate", "true positive rate"), "precision_recall": ("recall", "precision")}
_AREAS = {"roc": "AUROC", "precision_recall": "average precision"}


@dataclass(frozen=True)
class Figure:
    """A chart with its name.

    Attributes:
        name: of its file, without an ending.
        svg: one SVG element.
        caption: how to read it.
        alt: what it shows, for those who cannot see it.
    """

    name: str
    svg: str
    caption: str
    alt: str


@final
class Figures:
    """Draws the charts of a study and remembers them.

    Curves, calibration and confusion are drawn of the first four arms that are not null, scores of all arms.

    Args:
        arms: of the study.
    """

    def __init__(self, arms: Sequence[Arm]):
        self._styles = dict(zip((arm.label for arm in arms), styles([arm.null for arm in arms]), strict=True))
        self._files = file_names([arm.label for arm in arms])
        known = [arm for arm in arms if not arm.null] or list(arms)
        self.shown = tuple(known[:_MOST_ARMS])
        self.omitted = len(known) - len(self.shown)
        self.drawn: list[Figure] = []

    @property
    def level(self) -> str:
        """What was predicted: slides, patients or tiles."""
        return f"{self.shown[0].result.level}s"

    def scores(self, study: Study, found: Mapping[str, Headline]) -> list[Figure]:
        """Scores of all arms; and all differences that were tested."""
        reported = any(arm.reported is not None for arm in study.arms)
        dots = [
            Dot(
                f"{arm.label} (null)" if arm.null else arm.label,
                found[arm.label].pooled,
                *found[arm.label].ci,
                self._styles[arm.label],
                found[arm.label].folds if len(found[arm.label].folds) <= 20 else (),
                arm.reported,
            )
            for arm in study.arms
        ]
        metric = found[study.arms[0].label].metric
        notes = ["small dots are folds"] if any(dot.folds for dot in dots) else []
        notes += ["the diamond is the reported value"] if reported else []
        words = "; ".join(["Pooled score with its 95 % interval", *notes]) + "."
        svg = dots_panel(metric, dots, line=0.5, word="chance")
        figures = [self._keep("scores", svg, words, f"{metric} of each arm with its interval")]
        if study.comparisons:
            kinds = {(c.metric, c.test) for c in study.comparisons}
            one = len({c.first for c in study.comparisons}) == 1
            tested = [
                Dot(
                    (c.second if one else f"{c.first} − {c.second}")
                    + (f" ({c.metric}, {c.test})".replace("_", " ") if len(kinds) > 1 else ""),
                    c.value,
                    *c.ci,
                    Style(INK),
                )
                for c in study.comparisons
            ]
            title = f"{study.comparisons[0].first} minus …" if one else "Differences"
            svg = dots_panel(title, tested, line=0.0, word="none", signed=True)
            figures.append(
                self._keep(
                    "differences",
                    svg,
                    "First arm minus second, with its 95 % interval.",
                    "differences between arms with their intervals",
                )
            )
        return figures

    def curves(self) -> list[Figure]:
        """ROC and precision–recall curves; with several classes their mean, then one against the rest."""
        arms = _of_classes(self.shown)
        if not arms:
            return []
        classes = arms[0][1].classes
        if len(classes) == 2:
            return [self._curve("roc", 1, ""), self._curve("precision_recall", 1, "")]
        figures = [self._curve("roc", None, "mean over classes"), self._curve("precision_recall", None, "mean")]
        if len(classes) <= _MOST_CLASSES:
            figures += [self._curve("roc", k, f"{name} against the rest") for k, name in enumerate(classes)]
        return figures

    def calibration(self) -> list[Figure]:
        """Reliability of each arm: of the positive class, or with several classes of the predicted one.

        With few patients there are fewer bins, so that each could hold ten of them.
        """
        figures = []
        for arm, result in _of_classes(self.shown):
            rows, p = result.predictions, result.predictions.probabilities
            if len(result.classes) == 2:
                outcome, probability, names = rows.y == 1, p[:, 1], ("predicted", f"share of {result.classes[1]}")
            else:
                outcome, probability = p.argmax(1) == rows.y, p.max(1)
                names = ("probability of the predicted class", "share predicted right")
            bins = max(1, min(10, len(set(rows.patients)) // 10))
            found = reliability(outcome, probability, bins=bins, patients=rows.patients, seed=result.seed)
            error = expected_calibration_error(outcome, probability)
            shares = np.histogram(probability, 20, (0.0, 1.0))[0] / len(probability)
            style = self._styles[arm.label]
            svg = calibration_panel(arm.label, found, style, shares=shares, error=error, axes_names=names)
            name = f"calibration_{self._files[arm.label]}"
            words = _recalibrated(outcome, probability, rows.patients) if len(result.classes) == 2 else ""
            figures.append(self._keep(name, svg, words, f"calibration of {arm.label}, error {error:.3f}"))
        return figures

    def confusion(self) -> list[Figure]:
        """Confusion matrix of each arm."""
        figures = []
        for arm, result in _of_classes(self.shown):
            matrix = confusion(result.predictions.y, result.predictions.probabilities)
            svg = confusion_panel(arm.label, matrix, result.classes, self._styles[arm.label])
            words = f"confusion of {arm.label}: {int(np.trace(matrix)):,} of {int(matrix.sum()):,} right"
            figures.append(self._keep(f"confusion_{self._files[arm.label]}", svg, "", words))
        return figures

    def survival(self) -> list[Figure]:
        """Kaplan–Meier curves of high and low risk of each arm."""
        high, low = styles((False, False))[::-1]
        figures = []
        for arm in self.shown:
            if not isinstance(arm.result, SurvivalResult) or not len(arm.result.predictions):
                continue
            rows, weights = arm.result.predictions, _once(arm.result.predictions)
            groups = [
                Group(name, kaplan_meier(rows.time[inside], rows.event[inside], weights[inside]), style)
                for name, inside, style in (("low", ~rows.high, low), ("high", rows.high, high))
                if inside.any()
            ]
            p = p_value(arm.result.scores.logrank_p).replace("\N{NO-BREAK SPACE}", " ")
            note = f"log-rank p {p if p.startswith('<') else '= ' + p}" if p != "–" else ""
            unit = arm.result.unit
            medians = [
                f"{group.label} {group.curve.median:.3g} {unit}" for group in groups if np.isfinite(group.curve.median)
            ]
            caption = f"Median survival: {', '.join(medians)}." if medians else "Neither median was reached."
            svg = survival_panel(arm.label, groups, unit=unit, note=note)
            words = f"survival of high and low risk by {arm.label}; {note or 'no log-rank test'}"
            figures.append(self._keep(f"survival_{self._files[arm.label]}", svg, caption, words))
        return figures

    def few_shot(self, points: Sequence[FewShot]) -> list[Figure]:
        """Learning curves: of slides in all, and of slides of each class."""
        figures = []
        metric = "c-index" if isinstance(self.shown[0].result, SurvivalResult) else "AUROC"
        for per_class in (False, True):
            curves = learning_curves([point for point in points if point.per_class == per_class])
            if not curves:
                continue
            spare = styles([False] * len(curves))
            styled = [(c, self._styles.get(c.label, spare[k])) for k, c in enumerate(curves)]
            axis = "training slides of each class" if per_class else "training slides"
            svg = learning_panel(metric, styled, axis=axis, chance=0.5)
            name = "few_shot_per_class" if per_class else "few_shot"
            figures.append(self._keep(name, svg, "", f"{metric} against the number of {axis}"))
        return figures

    def _curve(self, kind: Kind, positive: int | None, of: str) -> Figure:
        lines, shares = [], []
        for arm, result in _of_classes(self.shown):
            rows = result.predictions
            band = curve_band(
                kind,
                rows.y,
                rows.probabilities,
                rows.patients,
                positive=positive,
                seed=result.seed,
                resamples=1000 if len(rows) <= _FEW_ROWS else 200,
            )
            pooled = kind == "roc" and (positive is None or len(result.classes) == 2)
            low, high = result.scores.auroc_ci if pooled else band.area_ci
            note = f"{band.area:.3f}  ({low:.3f}–{high:.3f})" if np.isfinite(low) else f"{band.area:.3f}"
            lines.append(Line(arm.label, band, self._styles[arm.label], note))
            each = [(rows.y == k).mean() for k in range(len(result.classes))]
            shares.append(float(np.mean(each)) if positive is None else float(each[positive]))
        word = {"roc": "ROC", "precision_recall": "Precision and recall"}[kind]
        title = f"{word}, {of}" if of else word
        baseline = None if kind == "roc" else shares[0]
        svg = curve_panel(title, lines, axes_names=_AXES[kind], baseline=baseline, heading=_AREAS[kind])
        end = "" if positive is None or not of else f"_{positive}"
        areas = ", ".join(f"{line.label} {line.band.area:.3f}" for line in lines)
        return self._keep(f"{kind}{end}", svg, "", f"{title}: {_AREAS[kind]} {areas}")

    def _keep(self, name: str, svg: str, caption: str, alt: str) -> Figure:
        figure = Figure(name, svg, caption, alt)
        self.drawn.append(figure)
        return figure


def _of_classes(arms: Sequence[Arm]) -> list[tuple[Arm, EvaluationResult]]:
    return [(arm, arm.result) for arm in arms if isinstance(arm.result, EvaluationResult)]


def _recalibrated(outcome: NDArray[np.bool_], probability: NDArray[np.float64], patients: Sequence[str]) -> str:
    """Calibration slope and intercept with their intervals, as far as there are any."""
    if outcome.all() or not outcome.any():
        return ""
    found = calibration(outcome, probability, patients=patients)
    said = [
        f"{name} {value:.2f} ({low:.2f} to {high:.2f})".replace("-", "−")
        for name, value, (low, high) in (
            ("slope", found.slope, found.slope_ci),
            ("intercept", found.intercept, found.intercept_ci),
        )
        if np.isfinite((value, low, high)).all()
    ]
    if not np.isfinite(found.slope):
        said.insert(0, "no slope, as the classes are perfectly separated or all probabilities equal")
    words = ", ".join(said)
    return f"{words[:1].upper()}{words[1:]}."


def _once(rows: SurvivalPredictions) -> NDArray[np.float64]:
    """Weights [N] with which each patient or slide counts once, however many splits test it."""
    _, place, counts = np.unique(np.asarray(rows.names), return_inverse=True, return_counts=True)
    return 1.0 / counts[place]
