"""``gigatome evaluate``."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from gigatome.cli.progress import progress_bar

if TYPE_CHECKING:
    from gigatome.evaluation.result import EvaluationResult, Scores


def evaluate(
    store: Path = typer.Argument(help="Embeddings: a job directory, or a folder features_<encoder> in it."),
    labels: str = typer.Option(..., help="Table of slides, patients and labels."),
    target: str = typer.Option(..., help="Label column to predict."),
    head: str = typer.Option("linear", help="linear, knn, giga (Giga-SSL's regression) or hipt (HIPT's kNN)."),
    folds: str = typer.Option("5", help="How many; 'patient' leaves one patient out at a time; or a table of folds."),
    seed: int = typer.Option(0, help="Seed of folds and resampling."),
    level: str = typer.Option("slide", help="slide: mean embeddings; tile: tiles, and slides by their tiles."),
    tiles_per_slide: int | None = typer.Option(None, help="With --level tile: the most tiles of a slide."),
    encoder: str | None = typer.Option(None, help="Which encoder's embeddings, where the store holds several."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Write FILE.json, and predictions to FILE.csv."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON in place of a table."),
) -> None:
    """Say how well a simple head on the embeddings predicts a label; patients never on both sides of a split."""
    from gigatome.embeddings.store import EmbeddingStore
    from gigatome.evaluation.protocol import evaluate as run_evaluate

    with progress_bar() as progress:
        result = run_evaluate(
            EmbeddingStore.open(store, encoder=encoder),
            labels,
            target=target,
            head=head,
            folds=int(folds) if folds.isdecimal() else folds,
            seed=seed,
            level=level,  # pyright: ignore[reportArgumentType] - checked there, with a message
            tiles_per_slide=tiles_per_slide,
            progress=progress,
        )
    if out is not None:
        result.save(out)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        _show(result)


def _show(result: "EvaluationResult") -> None:
    console = Console(highlight=False)
    about = f"{result.n_slides} slides of {result.n_patients} patients, {result.split}"
    table = Table(title=f"{result.target} from {result.encoder}, {result.head}: {about}", title_justify="left")
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


def _cells(scores: "Scores") -> list[str]:
    return [
        str(scores.n),
        f"{scores.auroc:.3f}",
        _interval(scores.auroc_ci),
        f"{scores.balanced_accuracy:.3f}",
        _interval(scores.balanced_accuracy_ci),
        f"{scores.accuracy:.3f}",
    ]


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.3f} – {bounds[1]:.3f}" if all(map(math.isfinite, bounds)) else "too few patients"
