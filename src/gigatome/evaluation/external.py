"""Learning from one cohort and being tested on another, whose embeddings lie elsewhere."""

from gigatome.evaluation.crossval import FoldRun, Setting, result_of
from gigatome.evaluation.heads import Head, fit_head
from gigatome.evaluation.protocol import Prepared
from gigatome.evaluation.result import EvaluationResult
from gigatome.evaluation.splits import Split, SplitOptions, external_split
from gigatome.evaluation.survival_result import SurvivalResult
from gigatome.evaluation.unit_data import UnitData
from gigatome.evaluation.units import Units


def evaluate_external(
    prepared: Prepared, units: Units, data: UnitData, head: Head, setting: Setting, options: SplitOptions
) -> EvaluationResult | SurvivalResult:
    """Fits a head to a whole cohort and scores it on another.

    Args:
        prepared: the cohort that is learnt from.
        units: of the other, their classes in the same order.
        data: their embeddings.
        head: what learns.
        setting: what the result says of itself.
        options: of which ``val_fraction``, ``train_fraction``, ``train_units``, ``group`` and ``seed`` count.

    Raises:
        EvaluationError: a patient is in both cohorts, the outcomes differ in kind, or the embeddings are by different
            encoders or of different tiles.
    """
    prepared.data.origin.refuse_other(data.origin, data.store.folder)
    both, splits = external_split(prepared.units, units, options)
    split = splits.parts[0]
    fitted = fit_head(
        head, prepared.data, prepared.units.outcome, Split(split.train, split.train, split.val), seed=setting.seed
    )
    training = fitted.predict(prepared.data.select(split.train)).risk
    return result_of(both, splits, [FoldRun(split, fitted.predict(data), training, fitted)], setting)
