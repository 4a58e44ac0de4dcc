"""Probes of mean embeddings as heads: what they learn from, what they predict, and how they are kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import EvaluationError, StoreError
from gigatome.evaluation.cox import Cox, FittedCox, fit_cox
from gigatome.evaluation.heads import Outcome, Prediction
from gigatome.evaluation.probes import FittedProbe, Probe, fit_probe
from gigatome.evaluation.unit_data import UnitData
from gigatome.evaluation.units import ClassOutcome


@final
@dataclass(frozen=True, eq=False)
class FittedProbeHead:
    """A probe that has learnt from mean embeddings.

    Attributes:
        fitted: the probe.
    """

    fitted: FittedProbe | FittedCox

    @property
    def needs(self) -> frozenset[str]:
        """See :attr:`FittedHead.needs`."""
        return frozenset()

    def predict(self, data: UnitData, *, attention: bool = False) -> Prediction:
        """See :meth:`FittedHead.predict`; a probe has no attention."""
        found = self.fitted.predict(data.vectors)
        if isinstance(self.fitted, FittedProbe):
            return Prediction(found)
        return Prediction(np.zeros((len(data), 0)), found, np.zeros((len(data), 0)))

    def saved(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """See :meth:`FittedHead.saved`."""
        fitted = self.fitted
        options = fitted.options() if isinstance(fitted, FittedProbe) else fitted.saved()
        return {"kind": "probe", "probe": options}, fitted.tensors()


def fit_probe_head(probe: Probe | Cox, data: UnitData, outcome: Outcome, train: NDArray[np.int64]) -> FittedProbeHead:
    """Fits a probe to the mean embeddings of the training units; raises :class:`EvaluationError`."""
    x = data.vectors[train]
    if isinstance(outcome, ClassOutcome):
        if isinstance(probe, Cox):
            raise EvaluationError("the head cox predicts survival; for classes use linear, knn, or a model of bags")
        return FittedProbeHead(fit_probe(probe, x, outcome.y[train], len(outcome.classes)))
    if not isinstance(probe, Cox):
        raise EvaluationError("this probe predicts classes; for survival use cox, or a model of bags such as abmil")
    return FittedProbeHead(fit_cox(probe, x, outcome.time[train], outcome.event[train]))


def restore_probe_head(values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> FittedProbeHead:
    """The head that :meth:`FittedProbeHead.saved` describes; raises :class:`StoreError` for what is none."""
    options = values.get("probe", {})
    kind = FittedCox if options.get("kind") == "cox" else FittedProbe
    try:
        return FittedProbeHead(kind.from_tensors(options, arrays))
    except EvaluationError as error:
        raise StoreError(f"the saved probe cannot be restored ({error}); train it again") from error
