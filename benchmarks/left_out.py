"""Heads that classify parts of slides and have not seen their patients, for the scripts on real tissue."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gigatome.evaluation.probes import Knn, LinearProbe, Probe, fit_predict
from gigatome.evaluation.splits import leave_one_out

LINEAR, KNN = LinearProbe(C=0.01, balanced=True), Knn(k=20)


@dataclass(frozen=True)
class Labelled:
    """Parts of slides, and what is known of the slides.

    Attributes:
        slide: [N], which slide.
        target: of each slide, as a number.
        patients: of each slide.
        classes: names of the targets.
    """

    slide: NDArray[np.int64]
    target: NDArray[np.int64]
    patients: tuple[str, ...]
    classes: tuple[str, ...]


def left_out(samples: Labelled, x: NDArray[np.float32], probe: Probe) -> NDArray[np.float64]:
    """Probabilities [N, classes] of the target, each tile's by a head that has not seen its patient."""
    labels = [samples.classes[target] for target in samples.target]
    y, p = samples.target[samples.slide], np.full((len(x), len(samples.classes)), np.nan)
    for train_slides, test_slides in leave_one_out(samples.patients, labels):
        known, tested = np.isin(samples.slide, train_slides), np.isin(samples.slide, test_slides)
        scaled = (x - x[known].mean(0)) / (x[known].std(0) + 1e-9)
        found = fit_predict(probe, scaled[known], y[known], scaled[tested], len(samples.classes))
        if isinstance(probe, Knn):
            found = found / np.bincount(y[known])
            found /= found.sum(1, keepdims=True)
        p[tested] = found
    return p
