"""Runs a study: encoders × heads on one outcome and one set of splits, with null rows, tests and learning curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gigatome import config
from gigatome.core.errors import EvaluationError, GigatomeError, RunError, StoreError
from gigatome.core.logs import Progress, log, silent
from gigatome.embeddings.joined import open_embeddings
from gigatome.embeddings.slide_store import Embeddings
from gigatome.evaluation.attended import attended_tiles
from gigatome.evaluation.comparison import Comparison, adjusted, compare_results
from gigatome.evaluation.cox import Cox
from gigatome.evaluation.crossval import FoldRun
from gigatome.evaluation.external import evaluate_external
from gigatome.evaluation.heads import Head, find_head, is_probe
from gigatome.evaluation.omics import read_omics
from gigatome.evaluation.probes import Probe
from gigatome.evaluation.protocol import Omics, Prepared, learn, prepare, read_units, setting_of
from gigatome.evaluation.saved import CARD, save_model
from gigatome.evaluation.split_tables import write_splits
from gigatome.evaluation.splits import make_splits, with_fewer
from gigatome.evaluation.study import Arm, AttendedTile, FewShot, Study
from gigatome.evaluation.study_files import file_names, headline
from gigatome.evaluation.study_options import Reported, StudyOptions
from gigatome.evaluation.study_report import write_study
from gigatome.evaluation.units import ClassOutcome
from gigatome.slides.cohort import Cohort

MODELS = "models"
"""Folder of a study that holds the heads of each arm."""

JOINED = "embeddings"
"""Folder of a study that holds mean embeddings which it has joined."""


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
    stores = _open([*options.embeddings, *options.null_embeddings], out)
    names = _store_names(stores)
    if len(set(names)) < len(names):
        raise EvaluationError(
            f"embeddings {stores[0].folder} are named twice" if len(names) == 2 else "embeddings repeat"
        )
    _make_room(out)
    heads = {name: _head(name, options) for name in options.heads}
    prepared = _prepare(options, stores, cohort)
    learnt: list[_Learnt] = []
    for k, (store, given) in enumerate(zip(stores, prepared, strict=True)):
        null = k >= len(options.embeddings)
        for name, head in heads.items():
            if k not in options.on(name):
                continue
            label = f"{name} on {names[k]}" if len(stores) > 1 else name
            reported = None if null else _reported(options, name, k)
            learnt.append(_learn(options, store, given, label, name, head, reported, null=null, progress=progress))
    if options.shuffled:
        name, head = next(iter(heads.items()))
        label, k = f"{name}, shuffled outcomes", options.on(name)[0]
        learnt.append(
            _learn(options, stores[k], prepared[k], label, name, head, None, null=True, permute=True, progress=progress)
        )
    learnt += _external(options, stores[: len(options.embeddings)], learnt, out)
    study = Study(
        title=_title(options, cohort),
        arms=tuple(item.arm for item in learnt),
        comparisons=_compared(learnt, options) if options.compare else (),
        few_shot=_few_shot(options, stores[0], prepared[0], heads, progress) if options.few_shot else (),
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


def _open(embeddings: Sequence[str], out: Path) -> list[Embeddings]:
    """The stores; those that are joined of two are written below ``out``."""
    return [open_embeddings(path, out / JOINED / config.digest(path)) for path in embeddings]


def _head(name: str, options: StudyOptions) -> Head:
    given = options.options.get(name, {})
    if options.fit and not is_probe(str(given.get("model", name))):
        given = {**given, "fit": {**options.fit, **given.get("fit", {})}}
    return find_head(name, given)[1]


def _make_room(out: Path) -> None:
    """Makes the folder before anything is trained, and takes heads of an earlier study away."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for card in (out / MODELS).glob(f"*/{CARD}"):
            card.unlink()
    except OSError as error:
        raise StoreError(f"{out}: cannot be written ({error.strerror})") from error


def _external(
    options: StudyOptions, stores: Sequence[Embeddings], learnt: Sequence[_Learnt], out: Path
) -> list[_Learnt]:
    """Each arm again, learnt from the whole cohort and tested on the external one."""
    if options.external is None:
        return []
    outcome, omics = learnt[0].prepared.units.outcome, _omics(options)
    others = {
        store.folder: read_units(
            other, options.external.labels, options.outcome,
            level=learnt[0].prepared.units.level, label_map=options.label_map, site=options.site,
            classes=outcome.classes if isinstance(outcome, ClassOutcome) else None, omics=omics,
        )
        for store, other in zip(stores, _open(options.external.embeddings, out), strict=True)
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


def _prepare(options: StudyOptions, stores: Sequence[Embeddings], cohort: Cohort | None) -> list[Prepared]:
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
    if options.split_file:
        given = [replace(one, splits=with_fewer(one.units, one.splits, options.splits)) for one in given]
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
    store: Embeddings,
    prepared: Prepared,
    label: str,
    name: str,
    head: Head,
    reported: Reported | None,
    *,
    null: bool,
    permute: bool = False,
    progress: Progress,
) -> _Learnt:
    result, runs = learn(
        prepared, store, options.outcome, name, head,
        seed=options.seed, resamples=options.resamples, permute=permute, progress=progress,
    )  # fmt: skip
    arm = Arm(
        label,
        result,
        null=null,
        reported=reported.value if reported else None,
        reported_sd=reported.sd if reported else None,
        source=reported.source if reported else "",
    )
    return _Learnt(arm, prepared, runs, head)


def _reported(options: StudyOptions, head: str, number: int) -> Reported | None:
    """The paper's value of a head on the embeddings of this number."""
    for reported in options.reproduces:
        of = options.embeddings.index(reported.embeddings) if reported.embeddings else options.on(head)[0]
        if (reported.head, of) == (head, number):
            return reported
    return None


def _compared(learnt: Sequence[_Learnt], options: StudyOptions) -> tuple[Comparison, ...]:
    first = next(item.arm for item in learnt if item.arm.result.head == options.heads[0])
    tests = [
        test
        for item in learnt
        if item.arm is not first and item.runs  # an external cohort is another one
        for test in compare_results(
            first.result, item.arm.result, (first.label, item.arm.label),
            seed=options.seed, resamples=options.resamples,
        )
    ]  # fmt: skip
    return adjusted(tests)


def _few_shot(
    options: StudyOptions, store: Embeddings, prepared: Prepared, heads: Mapping[str, Head], progress: Progress
) -> tuple[FewShot, ...]:
    """Learning curves of each head on the first embeddings; a number of units that cannot be had is left out."""
    points = []
    for name, head in heads.items():
        for count in options.few_shot if 0 in options.on(name) else ():
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
        if item.arm.null or not item.runs or isinstance(item.head, Probe | Cox):
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
                "tiles": int(item.prepared.data.tiles.sizes.sum()),
            }
            for item in {id(item.prepared): item for item in learnt}.values()
        ],
        "heads": {item.arm.label: dict(item.arm.result.options) for item in learnt},
        "warnings": list(prepared.units.warnings),
    }


def _title(options: StudyOptions, cohort: Cohort | None) -> str:
    what = options.target or "survival"
    return f"{what} of {Path(options.labels).name or (cohort.source if cohort else '')}"


def _store_names(stores: Sequence[Embeddings]) -> list[str]:
    """What the report calls each store: its encoder, and its tiling too where encoders repeat."""
    short = [store.encoder for store in stores]
    if len(set(short)) == len(short):
        return short
    tiled = [f"{store.encoder} ({store.folder.parent.name})" for store in stores]
    return tiled if len(set(tiled)) == len(tiled) else [str(store.folder) for store in stores]
