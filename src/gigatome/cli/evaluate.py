"""``gigatome evaluate``."""

import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from gigatome.cli.progress import progress_bar
from gigatome.cli.scores import interval, show_study

if TYPE_CHECKING:
    from gigatome.evaluation.result import EvaluationResult, Scores
    from gigatome.evaluation.study_options import StudyOptions
    from gigatome.evaluation.survival_result import SurvivalResult


def evaluate(
    context: typer.Context,
    stores: list[Path] = typer.Argument(
        help="Embeddings: job directories, folders, tables (.parquet); or a study.yaml, or a recipe of a study."
    ),
    embeddings: list[Path] = typer.Option([], help="For a recipe: job directories or folders; several times."),
    labels: str | None = typer.Option(None, help="Table of slides, patients and outcomes."),
    target: str | None = typer.Option(None, help="Column of classes to predict."),
    time: str | None = typer.Option(None, help="For survival: column of times."),
    event: str | None = typer.Option(None, help="For survival: column that is 1 where the event was seen; or"),
    censorship: str | None = typer.Option(None, help="for survival: column that is 1 where it was not."),
    time_unit: str = typer.Option("months", help="Unit of the times, for words and axes."),
    heads: list[str] = typer.Option(["linear"], "--head", help="Probe or model of bags; may be given several times."),
    folds: str = typer.Option("10", help="How many; 'patient' leaves one patient out at a time; or published splits."),
    leaks: str = typer.Option("error", help="Published splits with a patient on both sides: error, or warn."),
    sites: bool = typer.Option(False, "--by-site", help="Keep sites, not only patients, on one side."),
    seed: int = typer.Option(0, min=0, help="Seed of splits, training and resampling."),
    level: str | None = typer.Option(None, help="slide, patient, or tile: tiles, and slides by their tiles."),
    tiles_per_slide: int | None = typer.Option(None, help="With --level tile: the most tiles of a slide."),
    encoder: str | None = typer.Option(None, help="Which encoder's embeddings, where the store holds several."),
    compare: bool = typer.Option(False, "--compare", help="Test every arm against the first."),
    shuffled: bool = typer.Option(False, "--shuffled", help="Add a row that learnt from shuffled outcomes."),
    few_shot: list[int] = typer.Option([], help="Training units of a point of a learning curve; several times."),
    assignments: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Option of a study, such as options.abmil.fit.epochs=50."
    ),
    out: Path | None = typer.Option(
        None, "--out", "-o", help="FILE.json for scores, with predictions in FILE.csv; or a folder: report, heads, all."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON in place of a table."),
) -> None:
    """Say how well heads on the embeddings predict an outcome; patients never on both sides of a split."""
    console = Console(highlight=False)
    alone = len(stores) == 1 and len(heads) == 1 and not (compare or shuffled or few_shot or assignments)
    whole = out is not None and out.suffix != ".json"
    if _is_recipe(stores[0]):
        _only(context, "a recipe", "stores", "embeddings", "labels", "folds", "leaks", "seed", "assignments", "out")
        changes = [f"{name}={context.params[name]}" for name in ("leaks", "seed") if _stated(context, name)]
        if _stated(context, "folds"):
            changes.append(f"splits.folds={folds}" if folds.isdecimal() else f"split_file={folds}")
        _run(_from_recipe(stores, embeddings, labels, changes + assignments), out, console, as_json)
    elif embeddings:
        raise typer.BadParameter("it is for recipes; name folders as arguments", param_hint="--embeddings")
    elif stores[0].suffix in (".yaml", ".yml"):
        _only(context, "a study's file", "stores", "assignments", "out")
        _run(_from_file(stores, assignments), out, console, as_json)
    elif alone and not whole and not sites:
        _one(
            stores[0], labels, _outcome(target, time, event, censorship, time_unit), heads[0], folds, out, console,
            as_json=as_json, encoder=encoder, seed=seed, level=level, tiles_per_slide=tiles_per_slide, leaks=leaks,
        )  # fmt: skip
    else:
        if level == "tile":
            raise typer.BadParameter(
                "tiles are classified by one probe at a time, without -o FOLDER", param_hint="--level"
            )
        survival = {"time": time, "event": event, "censorship": censorship, "unit": time_unit} if time else None
        split = {"folds": int(folds)} if folds.isdecimal() else {"kind": "leave_one_out"} if folds == "patient" else {}
        values = {
            "embeddings": [str(_folder(store, encoder)) for store in stores],
            "labels": _needed(labels),
            "target": target,
            "survival": survival,
            "heads": heads,
            "level": level,
            "splits": {**split, "group": "site" if sites else "patient"},
            "split_file": None if split else folds,
            "leaks": leaks,
            "shuffled": shuffled,
            "compare": compare or len(stores) * len(heads) > 1,
            "few_shot": few_shot,
            "seed": seed,
        }
        _run(_parsed(values, assignments), out, console, as_json)


def _only(context: typer.Context, what: str, *own: str) -> None:
    """Refuses options that would not be read."""
    given = [name for name in context.params if name not in (*own, "as_json") and _stated(context, name)]
    if given:
        raise typer.BadParameter(f"{what} states {given[0]} itself; change it with --set", param_hint="STORES")


def _stated(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _one(
    store: Path, labels: str | None, target: Any, head: str, folds: str, out: Path | None, console: Console, *,
    as_json: bool, encoder: str | None, **options: Any,
) -> None:  # fmt: skip
    from gigatome.embeddings.slide_store import open_store
    from gigatome.evaluation.protocol import evaluate as run_evaluate

    with progress_bar() as progress:
        result = run_evaluate(
            open_store(store, encoder=encoder),
            _needed(labels),
            target=target,
            head=head,
            folds=int(folds) if folds.isdecimal() else folds,
            progress=progress,
            **options,
        )
    if out is not None:
        result.save(out)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        _show(result, console)


def _run(options: "StudyOptions", out: Path | None, console: Console, as_json: bool) -> None:
    from gigatome.evaluation.study_files import study_json
    from gigatome.evaluation.study_run import run_study

    if out is None or out.suffix == ".json":
        raise typer.BadParameter("give a folder for the report and the heads with -o", param_hint="--out")
    with progress_bar() as progress:
        study = run_study(options, out, command=shlex.join(["gigatome", *sys.argv[1:]]), progress=progress)
    if as_json:
        typer.echo(json.dumps(study_json(study, ()), ensure_ascii=False))
        return
    show_study(study, console)
    console.print(out / "report.html", soft_wrap=True)


def _from_file(stores: Sequence[Path], assignments: list[str]) -> "StudyOptions":
    from gigatome import config
    from gigatome.evaluation.study_options import StudyOptions

    if len(stores) > 1:
        raise typer.BadParameter("a study's file names all embeddings itself", param_hint="STORES")
    return config.load(StudyOptions, stores[0], assignments)


def _is_recipe(source: Path) -> bool:
    """Whether this is a recipe, and not a study's file or embeddings."""
    if source.is_dir() or (source.suffix not in ("", ".yaml", ".yml")):
        return False
    from gigatome.recipes.schema import is_study, recipe_names, study_names

    return is_study(source) if source.is_file() else str(source) in (*recipe_names(), *study_names())


def _from_recipe(
    stores: Sequence[Path], embeddings: Sequence[Path], labels: str | None, changes: list[str]
) -> "StudyOptions":
    from gigatome.recipes.studies import load_study

    if len(stores) > 1 or not embeddings:
        raise typer.BadParameter("give a recipe alone, and its embeddings with --embeddings", param_hint="STORES")
    return load_study(stores[0], embeddings=embeddings, labels=_needed(labels), assignments=changes)


def _parsed(values: dict[str, Any], assignments: list[str]) -> "StudyOptions":
    from gigatome import config
    from gigatome.evaluation.study_options import StudyOptions

    for assignment in assignments:
        config.assign(values, assignment)
    return config.parse(StudyOptions, values, source="evaluate")


def _outcome(target: str | None, time: str | None, event: str | None, censorship: str | None, unit: str) -> Any:
    from gigatome.evaluation.units import SurvivalTarget

    if (target is None) == (time is None):
        raise typer.BadParameter("give --target, or --time with --event or --censorship", param_hint="--target")
    return target if time is None else SurvivalTarget(time, event, censorship, unit)


def _needed(labels: str | None) -> str:
    if labels is None:
        raise typer.BadParameter("give the table of slides, patients and outcomes", param_hint="--labels")
    return labels


def _folder(store: Path, encoder: str | None) -> Path:
    from gigatome.embeddings.slide_store import open_store

    return open_store(store, encoder=encoder).folder


def _show(result: "EvaluationResult | SurvivalResult", console: Console) -> None:
    from gigatome.evaluation.result import EvaluationResult

    about = f"{result.n_slides} slides of {result.n_patients} patients, {result.split}"
    table = Table(title=f"{result.target} from {result.encoder}, {result.head}: {about}", title_justify="left")
    if not isinstance(result, EvaluationResult):
        _show_survival(result, table, console)
        return
    for column in ("", "n", "AUROC", "95 % interval", "balanced accuracy", "95 % interval", "accuracy"):
        table.add_column(column, justify="left" if column == "" else "right")
    table.add_row(f"{result.level}s", *_cells(result.scores))
    for how, scores in result.by_slide.items():
        table.add_row(f"slides, {how}", *_cells(scores))
    console.print(table)
    mean, deviation = result.fold_auroc
    if math.isfinite(mean):
        console.print(f"AUROC of the folds: {mean:.3f} ± {deviation:.3f}")
    if result.unlabelled:
        console.print(f"{result.unlabelled} slides have no {result.target} and are left out")
    if result.without_embeddings:
        names = ", ".join(result.without_embeddings[:5]) + (" …" if len(result.without_embeddings) > 5 else "")
        console.print(f"{len(result.without_embeddings)} labelled slides have no embeddings: {names}", soft_wrap=True)


def _show_survival(result: "SurvivalResult", table: Table, console: Console) -> None:
    scores = result.scores
    for column in ("", "n", "events", "c-index", "95 % interval", "hazard ratio", "95 % interval", "log-rank p"):
        table.add_column(column, justify="left" if column == "" else "right")
    table.add_row(
        f"{result.level}s", str(scores.n), str(scores.events), f"{scores.c_index:.3f}", interval(scores.c_index_ci),
        f"{scores.hazard_ratio:.2f}", interval(scores.hazard_ratio_ci), f"{scores.logrank_p:.3g}",
    )  # fmt: skip
    console.print(table)
    mean, deviation = result.fold_c_index
    console.print(f"c-index of the folds: {mean:.3f} ± {deviation:.3f}")
    for reason, count in result.excluded.items():
        console.print(f"{count} left out: {reason}")


def _cells(scores: "Scores") -> list[str]:
    return [
        str(scores.n),
        f"{scores.auroc:.3f}",
        interval(scores.auroc_ci),
        f"{scores.balanced_accuracy:.3f}",
        interval(scores.balanced_accuracy_ci),
        f"{scores.accuracy:.3f}",
    ]
