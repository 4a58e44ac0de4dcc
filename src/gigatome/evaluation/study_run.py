"""Runs a study: encoders × heads on one outcome and one set of splits, with null rows, tests and learning curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gigatome import config
from gigatome.core.errors import EvaluationError, GigatomeError, RunError, StoreError
from gigatome.core.logs import Progress, log, silent
from gigatome.embeddings.store import EmbeddingStore
from gigatome.evaluation.attended import attended_tiles
from gigatome.evaluation.comparison import Comparison, adjusted, compare_results
from gigatome.evaluation.crossval import FoldRun
from gigatome.evaluation.external import evaluate_external
from gigatome.evaluation.heads import Head, find_head, is_probe
from gigatome.evaluation.omics import read_omics
from gigatome.evaluation.protocol import Omics, Prepared, learn, prepare, read_units, setting_of
from gigatome.evaluation.saved import CARD, save_model
from gigatome.evaluation.split_tables import write_splits
from gigatome.evaluation.splits import make_splits
from gigatome.evaluation.study import Arm, AttendedTile, FewShot, Study
from gigatome.evaluation.study_files import file_names, headline
from gigatome.evaluation.study_options import Reported, StudyOptions
from gigatome.evaluation.study_report import write_study
from gigatome.evaluation.units import ClassOutcome
from gigatome.slides.cohort import Cohort

MODELS = "models"
"""Folder of a study that holds the heads of each arm."""


@dataclass(frozen=True, eq=False)
class _Learnt:
    """An arm, and what it was made of."""

    arm: Arm
    prepared: Prepared
    runs: list[FoldRun]
    head: Head


def run_study(
    options: StudyOptions,
    out: str | Path,
    *,
    cohort: Cohort | None = None,
    command: str = "",
    progress: Progress = silent,
) -> Study:
    """Runs a study and writes it: the report, its figures and tables, the splits, and the heads for new slides.

    Arms that are compared must be tested on the same units, so units without embeddings in any of the stores are left
    out of all.

    Args:
        options: what to do.
        out: folder to write to.
        cohort: in place of ``options.labels``.
        command: that makes the study again, for the report.
        progress: called after each fold of each arm.

    Raises:
        EvaluationError: labels, splits or heads do not allow it.
        CohortError: the labels cannot be read.
        StoreError: embeddings cannot be read, or the folder cannot be written.
        ConfigError: an option of a head does not exist or does not fit.
    """
    out = Path(out)
    stores = [EmbeddingStore.open(path) for path in (*options.embeddings, *options.null_embeddings)]
    names = _store_names(stores)
    if len(set(names)) < len(names):
        raise EvaluationError(
            f"embeddings {stores[0].folder} are named twice" if len(names) == 2 else "embeddings repeat"
        )
    _make_room(out)
    heads = {name: find_head(name, options.options.get(name))[1] for name in options.heads}
    prepared = _prepare(options, stores, cohort)
    learnt: list[_Learnt] = []
    for k, (store, given) in enumerate(zip(stores, prepared, strict=True)):
        null = k >= len(options.embeddings)
        for name, head in heads.items():
            label = f"{name} on {names[k]}" if len(stores) > 1 else name
            learnt.append(_learn(options, store, given, label, name, head, null=null, progress=progress))
    if options.shuffled:
        name, head = next(iter(heads.items()))
        label = f"{name}, shuffled outcomes"
        learnt.append(
            _learn(options, stores[0], prepared[0], label, name, head, null=True, permute=True, progress=progress)
        )
    learnt += _external(options, learnt)
    study = Study(
        title=_title(options, cohort),
        arms=tuple(item.arm for item in learnt),
        comparisons=_compared(learnt, options) if options.compare else (),
        few_shot=_few_shot(options, stores[0], prepared[0], heads, progress),
        tiles=_attended(learnt, options, cohort),
        settings=_settings(options, learnt),
        excluded=prepared[0].units.excluded,
        command=command,
    )
    files = file_names([item.arm.label for item in learnt])
    for item in learnt:
        if item.runs and not item.arm.null:
            folder = out / MODELS / files[item.arm.label]
            save_model(folder, item.prepared.units, item.prepared.data, item.runs, item.arm.result)
    write_splits(out / "splits.tsv", prepared[0].units, prepared[0].splits)
    write_study(study, out)
    return study


def _make_room(out: Path) -> None:
    """Makes the folder before anything is trained, and takes heads of an earlier study away."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for card in (out / MODELS).glob(f"*/{CARD}"):
            card.unlink()
    except OSError as error:
        raise StoreError(f"{out}: cannot be written ({error.strerror})") from error


def _external(options: StudyOptions, learnt: Sequence[_Learnt]) -> list[_Learnt]:
    """Each arm again, learnt from the whole cohort and tested on the external one."""
    if options.external is None:
        return []
    outcome, omics = learnt[0].prepared.units.outcome, _omics(options)
    others = {
        EmbeddingStore.open(path).folder: read_units(
            EmbeddingStore.open(other), options.external.labels, options.outcome,
            level=learnt[0].prepared.units.level, label_map=options.label_map, site=options.site,
            classes=outcome.classes if isinstance(outcome, ClassOutcome) else None, omics=omics,
        )
        for path, other in zip(options.embeddings, options.external.embeddings, strict=True)
    }  # fmt: skip
    found = []
    for item in learnt:
        result, store = item.arm.result, item.prepared.data.store
        if item.arm.null:
            continue
        units, data = others[store.folder]
        setting = setting_of(store, options.outcome, result.head, item.head, options.seed, options.resamples)
        tested = evaluate_external(item.prepared, units, data, item.head, setting, options.splits)
        label = f"{item.arm.label}, tested on {Path(options.external.labels).name}"
        found.append(_Learnt(Arm(label, tested), item.prepared, [], item.head))
    return found


def _omics(options: StudyOptions) -> Omics | None:
    return read_omics(options.omics, options.signatures) if options.omics and options.signatures else None


def _prepare(options: StudyOptions, stores: Sequence[EmbeddingStore], cohort: Cohort | None) -> list[Prepared]:
    """Units and splits, the same for all stores."""
    common = set.intersection(*(set(store.names()) for store in stores))
    folds = Path(options.split_file) if options.split_file else replace(options.splits, seed=options.seed)
    omics = _omics(options)
    given = [
        prepare(
            store, cohort or options.labels, options.outcome, folds, available=common, seed=options.seed,
            level=options.level, leaks=options.leaks, group=options.splits.group, label_map=options.label_map,
            site=options.site, omics=omics,
        )
        for store in stores
    ]  # fmt: skip
    different = next((k for k, one in enumerate(given) if one.splits.digest != given[0].splits.digest), None)
    if different is not None:
        lost = set(given[0].units.names) ^ set(given[different].units.names)
        raise EvaluationError(
            f"{stores[0].folder} and {stores[different].folder} have usable embeddings of different slides, such as "
            f"{', '.join(sorted(lost)[:5])}; embed them with both, or leave them out of the labels"
        )
    return given


def _learn(
    options: StudyOptions,
    store: EmbeddingStore,
    prepared: Prepared,
    label: str,
    name: str,
    head: Head,
    *,
    null: bool,
    permute: bool = False,
    progress: Progress,
) -> _Learnt:
    result, runs = learn(
        prepared, store, options.outcome, name, head,
        seed=options.seed, resamples=options.resamples, permute=permute, progress=progress,
    )  # fmt: skip
    reported = None if null else _reported(options, store, name)
    arm = Arm(
        label,
        result,
        null=null,
        reported=reported.value if reported else None,
        reported_sd=reported.sd if reported else None,
        source=reported.source if reported else "",
    )
    return _Learnt(arm, prepared, runs, head)


def _reported(options: StudyOptions, store: EmbeddingStore, head: str) -> Reported | None:
    first = EmbeddingStore.open(options.embeddings[0]).folder
    for reported in options.reproduces:
        of = EmbeddingStore.open(reported.embeddings).folder if reported.embeddings else first
        if reported.head == head and of == store.folder:
            return reported
    return None


def _compared(learnt: Sequence[_Learnt], options: StudyOptions) -> tuple[Comparison, ...]:
    first = learnt[0].arm
    tests = [
        test
        for item in learnt[1:]
        if item.runs  # an external cohort is another one
        for test in compare_results(
            first.result, item.arm.result, (first.label, item.arm.label),
            seed=options.seed, resamples=options.resamples,
        )
    ]  # fmt: skip
    return adjusted(tests)


def _few_shot(
    options: StudyOptions, store: EmbeddingStore, prepared: Prepared, heads: Mapping[str, Head], progress: Progress
) -> tuple[FewShot, ...]:
    """Learning curves of each head on the first embeddings; a number of units that cannot be had is left out."""
    points = []
    for name, head in heads.items():
        for count in options.few_shot:
            scores = []
            for repeat in range(options.repeats):
                seed = options.seed + repeat
                try:
                    splits = make_splits(prepared.units, replace(options.splits, train_units=count, seed=seed))
                    result, _ = learn(
                        replace(prepared, splits=splits), store, options.outcome, name, head,
                        seed=seed, resamples=1, progress=progress,
                    )  # fmt: skip
                except (EvaluationError, RunError) as error:
                    log.warning("learning curve of %s with %d training units: %s", name, count, error)
                    break
                scores.append(headline(result).value)
            if len(scores) == options.repeats:
                points.append(FewShot(name, count, tuple(scores)))
    return tuple(points)


def _attended(learnt: Sequence[_Learnt], options: StudyOptions, cohort: Cohort | None) -> tuple[AttendedTile, ...]:
    """Tiles of the first arm with attention; none if the slides cannot be read."""
    if not options.tiles:
        return ()
    for item in learnt:
        if item.arm.null or not item.runs or is_probe(item.arm.result.head):
            continue
        try:
            source = cohort or Cohort.read(options.labels)
            return attended_tiles(source, item.prepared.units, item.prepared.data, item.runs, options.tiles)
        except GigatomeError as error:
            log.warning("no tiles are shown: %s", error)
    return ()


def _settings(options: StudyOptions, learnt: Sequence[_Learnt]) -> dict[str, Any]:
    """Everything that decides the result."""
    prepared = learnt[0].prepared
    return {
        "study": config.to_dict(options),
        "digest": config.digest(options),
        "outcome": getattr(options.outcome, "spelt", str(options.outcome)),
        "splits": {
            "name": prepared.splits.name,
            "digest": prepared.splits.digest,
            "warnings": list(prepared.splits.warnings),
        },
        "embeddings": [
            {
                "folder": str(item.prepared.data.store.folder),
                "encoder": item.prepared.data.reader.encoder,
                "weights": item.prepared.data.reader.weights,
                "tiles": int(item.prepared.data.reader.sizes.sum()),
            }
            for item in {id(item.prepared): item for item in learnt}.values()
        ],
        "heads": {item.arm.label: dict(item.arm.result.options) for item in learnt},
        "warnings": list(prepared.units.warnings),
    }


def _title(options: StudyOptions, cohort: Cohort | None) -> str:
    what = options.target or "survival"
    return f"{what} of {Path(options.labels).name or (cohort.source if cohort else '')}"


def _store_names(stores: Sequence[EmbeddingStore]) -> list[str]:
    """What the report calls each store: its encoder, and its tiling too where encoders repeat."""
    short = [store.encoder for store in stores]
    if len(set(short)) == len(short):
        return short
    tiled = [f"{store.encoder} ({store.folder.parent.name})" for store in stores]
    return tiled if len(set(tiled)) == len(tiled) else [str(store.folder) for store in stores]
