"""The protocol: embeddings and labels in, patient-grouped splits, scores with intervals out."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gigatome import config
from gigatome.core.errors import CohortError, EvaluationError
from gigatome.core.logs import Progress, log, silent
from gigatome.embeddings.bags import check_bags
from gigatome.embeddings.slide_store import Embeddings, SlideStore, open_store
from gigatome.embeddings.store import EmbeddingStore
from gigatome.evaluation.cox import Cox
from gigatome.evaluation.crossval import FoldRun, Setting, cross_validate, result_of
from gigatome.evaluation.heads import Head, find_head
from gigatome.evaluation.probes import Probe
from gigatome.evaluation.result import EvaluationResult, Level
from gigatome.evaluation.split_tables import read_splits
from gigatome.evaluation.splits import Group, SplitOptions, Splits, make_splits
from gigatome.evaluation.survival_result import SurvivalResult
from gigatome.evaluation.tables import read_labels
from gigatome.evaluation.tile_level import evaluate_tiles
from gigatome.evaluation.unit_data import UnitData
from gigatome.evaluation.units import ClassTarget, SurvivalTarget, Units, make_units
from gigatome.slides.cohort import Cohort, CohortSlide, patient_of

Target: TypeAlias = str | ClassTarget | SurvivalTarget
Folds: TypeAlias = int | str | Path | SplitOptions
Omics: TypeAlias = Mapping[str, tuple[NDArray[np.float32], ...]]

FOLDS = 10
"""How many folds there are if nobody says."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a head learns from.

    Attributes:
        units: what is predicted.
        splits: who trains and who is tested.
        data: the embeddings.
        unlabelled: slides, or patients, of the cohort without the outcome.
    """

    units: Units
    splits: Splits
    data: UnitData
    unlabelled: int


def evaluate(
    store: Embeddings | str | Path,
    cohort: Cohort | str | Path,
    *,
    target: Target,
    head: "str | Head" = "linear",
    options: Mapping[str, Any] | None = None,
    folds: Folds = FOLDS,
    seed: int = 0,
    level: Level | None = None,
    leaks: Literal["error", "warn"] = "error",
    tiles_per_slide: int | None = None,
    resamples: int = 2000,
    progress: Progress = silent,
) -> EvaluationResult | SurvivalResult:
    """Says how well a head on frozen embeddings predicts an outcome, by cross-validation over patients.

    A patient's slides are never in both the training and the test part of a fold. Every score comes with a 95 %
    interval of a bootstrap over patients, its variance raised by Nadeau and Bengio's factor, 1 + tested / trained, for
    the chance in which patients the folds' heads learnt from. It is about the score expected of a head that learns from
    as many patients of this kind: in simulated cohorts of 60 to 240 patients it held the expected AUROC in 93 to 100 of
    100, where the plain bootstrap held it in 80 to 93. A single split has one head; its interval is the plain
    bootstrap's and about that head. For the difference between two encoders use
    :func:`~gigatome.evaluation.comparison.compare_results`.

    Args:
        store: embeddings, or what :func:`~gigatome.embeddings.slide_store.open_store` takes.
        cohort: slides, patients and labels, or a table of them, also as HIPT, CLAM, MCAT, Giga-SSL, Patho-Bench or
            STAMP have it.
        target: a column of classes, or a :class:`SurvivalTarget`. Slides without it are left out.
        head: name of a probe (``"linear"``, ``"knn"``, ``"prototype"``, ``"cox"`` …), which sees the mean embedding,
            or of a model of bags (``"abmil"``, ``"clam_sb"`` …); or its options.
        options: of a model of bags, as of :class:`~gigatome.evaluation.bag_head.BagHead`, nested.
        folds: how many stratified folds; ``"patient"`` to leave one patient out at a time, for classes of very few
            patients: as the one left out is then missing from its own class, a head that learns nothing scores below
            chance; published splits, a table or folder; or :class:`SplitOptions`.
        seed: of folds, training, sampling and resampling.
        level: ``"slide"`` or ``"patient"``, whose bag is that of all its slides: by default patients for survival, and
            slides for classes. ``"tile"`` classifies tiles, each with the label of its slide, and then slides by them.
        leaks: what to do with published splits that have a patient on both sides: refuse them, or warn.
        tiles_per_slide: for level ``"tile"``, the most tiles of a slide, drawn at random; all by default.
        resamples: bootstrap resamples of patients.
        progress: called after each fold.

    Raises:
        CohortError: there is no such column, or no such cohort.
        StoreError: the embeddings cannot be found or read.
        EvaluationError: no labelled slide has embeddings, or the labels and patients do not allow these folds.
        ConfigError: an option of the head does not exist or does not fit.
        RunError: the training of a head fails.
    """
    store = open_store(store) if isinstance(store, str | Path) else store
    name, found = find_head(head, options)
    if level == "tile":
        if not isinstance(store, EmbeddingStore):
            raise EvaluationError(f"{store.folder}: holds embeddings of slides, and level tile takes those of tiles")
        if not isinstance(found, Probe) or isinstance(target, SurvivalTarget):
            raise EvaluationError(f"level tile is for probes of classes; {name} works on slides and patients")
        if tiles_per_slide is not None and tiles_per_slide < 1:
            raise EvaluationError(f"tiles_per_slide must be at least 1, not {tiles_per_slide}")
        prepared = prepare(store, cohort, target, folds, seed=seed, level="slide", leaks=leaks)
        setting = setting_of(store, target, name, found, seed, resamples)
        return evaluate_tiles(
            store, prepared.units, prepared.splits, found, setting,
            tiles_per_slide=tiles_per_slide, unlabelled=prepared.unlabelled, progress=progress,
        )  # fmt: skip
    if level not in (None, "slide", "patient"):
        raise EvaluationError(f"there is no level {level}; there are slide, patient and tile")
    prepared = prepare(store, cohort, target, folds, seed=seed, level=level, leaks=leaks)
    return learn(prepared, store, target, name, found, seed=seed, resamples=resamples, progress=progress)[0]


def learn(
    prepared: Prepared,
    store: Embeddings,
    target: Target,
    name: str,
    head: Head,
    *,
    seed: int,
    resamples: int,
    permute: bool = False,
    progress: Progress = silent,
) -> tuple[EvaluationResult | SurvivalResult, list[FoldRun]]:
    """The result of one head, and its folds; see :func:`evaluate` and :func:`cross_validate`."""
    units, splits = prepared.units, prepared.splits
    runs = cross_validate(prepared.data, units, splits, head, seed=seed, permute=permute, progress=progress)
    setting = setting_of(store, target, name, head, seed, resamples)
    return result_of(units, splits, runs, setting, unlabelled=prepared.unlabelled), runs


def prepare(
    store: Embeddings,
    cohort: Cohort | str | Path,
    target: Target,
    folds: Folds = FOLDS,
    *,
    seed: int = 0,
    leaks: Literal["error", "warn"] = "error",
    group: Group = "patient",
    **options: Any,
) -> Prepared:
    """Reads outcomes and splits.

    The arguments are those of :func:`evaluate` and the options of :func:`read_units`; ``group`` is what must be on one
    side of published splits.
    """
    units, data = read_units(store, cohort, target, **options)
    return Prepared(units, splits_of(units, folds, seed, leaks, group), data, len(units.excluded.get("no label", ())))


def read_units(
    store: Embeddings,
    cohort: Cohort | str | Path,
    target: Target,
    *,
    level: Literal["slide", "patient"] | None = None,
    label_map: Mapping[str, str] | None = None,
    site: str | None = None,
    classes: Sequence[str] | None = None,
    available: Collection[str] | None = None,
    omics: Omics | None = None,
) -> tuple[Units, UnitData]:
    """Reads outcomes, and finds the embeddings of those who have one; who has not is excluded, with the reason.

    Args:
        store: embeddings.
        cohort: slides, patients and labels.
        target: what is predicted.
        level: of slides or patients; patients for survival and slides for classes by default.
        label_map: see :func:`make_units`, as for ``site`` and ``classes``.
        site: column of the site.
        classes: names and order of the classes, where another cohort fixes them.
        available: slides that may be used; all of the store by default.
        omics: values of each patient, as :func:`~gigatome.evaluation.omics.read_omics` gives them; patients without
            are excluded.
    """
    target = ClassTarget(target) if isinstance(target, str) else target
    cohort = _read_cohort(cohort, store)
    level = level or ("patient" if isinstance(target, SurvivalTarget) else "slide")
    asked = labelled_slides(cohort, target, level)
    there = set(store.names()) & set(store.names() if available is None else available)
    checked = check_bags(store, sorted(there & asked))
    unusable = {name: reason for reason, names in checked.items() for name in names}
    units = make_units(
        cohort, target, available=there - set(unusable), level=level, label_map=label_map, site=site, classes=classes
    )
    units = replace(units, excluded=_reasons(units.excluded, unusable))
    if omics is not None:
        lost = {name for name, patient in zip(units.names, units.patients, strict=True) if patient not in omics}
        units = units.without(lost, "no omics") if lost else units
    for reason, names in units.excluded.items():
        if reason != "no label":
            shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
            log.warning("%s: %d are left out, %s: %s", cohort.source, len(names), reason, shown)
    groups = zip(*(omics[patient] for patient in units.patients), strict=True) if omics is not None else ()
    omic_groups = tuple(np.stack(group).astype(np.float64) for group in groups)
    return units, UnitData(store, units.names, units.slides, omic_groups)


def labelled_slides(
    cohort: Cohort, target: ClassTarget | SurvivalTarget, level: Literal["slide", "patient"]
) -> set[str]:
    """Names of the slides with an outcome, and of the others of their patients where patients are predicted."""
    labelled = cohort.column(target.column if isinstance(target, ClassTarget) else target.time)
    known = {slide.patient for slide in cohort if slide.name in labelled}
    return {s.name for s in cohort if s.name in labelled or (level == "patient" and s.patient in known)}


def setting_of(store: Embeddings, target: Target, name: str, head: Head, seed: int, resamples: int) -> Setting:
    """What a result says about how it was made."""
    spelt = target if isinstance(target, str) else target.spelt
    options = asdict(head) if isinstance(head, Probe | Cox) else config.to_dict(head)
    return Setting(spelt, name, options, store.encoder, seed, resamples)


def _read_cohort(source: Cohort | str | Path, store: Embeddings) -> Cohort:
    """The cohort; or, from a table that names slides or patients without saying where they lie, the store's slides."""
    if isinstance(source, Cohort):
        return source
    try:
        if str(source).lower().endswith((".zip", ".xlsx", ".xlsm")):
            raise CohortError(f"{source}: does not say where slides lie")
        return Cohort.read(source)
    except CohortError:
        if not store.names() or not Path(str(source)).exists():
            raise
    try:
        labelled = read_labels(source)
    except CohortError:  # it names patients
        return read_labels(source, store_cohort(store))
    there = set(store.names())
    return labelled if any(slide.name in there for slide in labelled) else read_labels(source, store_cohort(store))


def store_cohort(store: Embeddings) -> Cohort:
    """The slides of a store, without labels; patients as files of slides name them, or by their TCGA barcodes."""
    known = store.patients if isinstance(store, SlideStore) else {}
    slides = (CohortSlide(name, name, known.get(name) or patient_of(name)) for name in store.names())
    return Cohort(tuple(slides), str(store.folder))


def _reasons(excluded: Mapping[str, tuple[str, ...]], unusable: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The exclusions, those of slides with unusable embeddings under the reason."""
    found: dict[str, list[str]] = {}
    for reason, names in excluded.items():
        for name in names:
            found.setdefault(unusable.get(name, reason), []).append(name)
    return {reason: tuple(names) for reason, names in found.items()}


def splits_of(units: Units, folds: Folds, seed: int, leaks: Literal["error", "warn"], group: Group) -> Splits:
    """Splits of units; the arguments are those of :func:`evaluate` and :func:`prepare`."""
    if isinstance(folds, SplitOptions):
        return make_splits(units, folds)
    if folds == "patient":
        return make_splits(units, SplitOptions(kind="leave_one_out", seed=seed))
    if isinstance(folds, int):
        return make_splits(units, SplitOptions(folds=folds, seed=seed))
    return read_splits(folds, units, leaks=leaks, group=group)
