"""``gigatome predict``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from gigatome.cli.options import SlideMpp, cohort_of
from gigatome.cli.progress import progress_bar

if TYPE_CHECKING:
    from gigatome.evaluation.saved import NewPrediction

_SHOWN = 20


def predict(
    run: Path = typer.Argument(
        help="Folder of a study, as gigatome evaluate … -o FOLDER writes it, of its heads, or of a fine-tuning."
    ),
    slides: str = typer.Argument(help="Slides (folder, glob, bucket prefix, CSV), or a job directory with embeddings."),
    out: Path = typer.Option(..., "--out", "-o", help="Table to write, .csv."),
    arm: str | None = typer.Option(None, help="Which heads, where the study has several."),
    encoder: str | None = typer.Option(None, help="To embed slides with: what gigatome embed takes."),
    job: Path | None = typer.Option(None, help="Job directory for the embeddings; beside the table by default."),
    by_patient: bool = typer.Option(False, "--by-patient", help="Predict patients, from all their slides together."),
    patients: str | None = typer.Option(None, help="Table of slides and their patients, where names do not tell."),
    slide_mpp: SlideMpp = None,
    device: str = typer.Option("cpu", help="Where the encoder runs, such as cuda."),
) -> None:
    """Predict new slides with the heads of a study; embeddings by another encoder are refused."""
    from gigatome.blob.store import write_atomic
    from gigatome.evaluation.image_model import is_image_model, load_image_model
    from gigatome.evaluation.predict import predict_slides
    from gigatome.evaluation.saved import predictions_csv
    from gigatome.evaluation.tables import read_labels

    with progress_bar() as progress:
        if is_image_model(run):
            _refuse(arm=arm, encoder=encoder, job=job)
            images, cohort = load_image_model(run), cohort_of(slides, slide_mpp)
            if patients is not None:
                cohort = read_labels(patients, cohort)
            card, classes, by = images.card, images.classes, "LongViT"
            rows, failures = images.predict(cohort, by_patient=by_patient or None, device=device, progress=progress)
            level = "patient" if by_patient else card["level"]
        else:
            model, rows, failures = predict_slides(
                run, slides if slide_mpp is None else cohort_of(slides, slide_mpp),
                arm=arm, encoder=encoder, job=job or out.with_name(f"{out.stem}_job"), by_patient=by_patient,
                patients=patients, device=device, progress=progress,
            )  # fmt: skip
            card, classes, level = model.card, model.classes, model.level
            by = f"{card['head']} on {model.origin.encoder}"
    write_atomic(out, predictions_csv(level, classes, rows))
    console = Console(highlight=False)
    console.print(_table(f"{card['target']} by {by}", classes, rows))
    more = f" ({len(rows) - _SHOWN} more in the table)" if len(rows) > _SHOWN else ""
    console.print(f"{out}{more}", soft_wrap=True)
    for failure in failures:
        console.print(f"{failure.slide}: {failure.stage}: {failure.message}", soft_wrap=True, markup=False)
    if failures:
        raise typer.Exit(3 if rows else 1)


def _refuse(**given: object) -> None:
    """Refuses options that a model of whole slides would not read."""
    for name, value in given.items():
        if value is not None:
            raise typer.BadParameter("this run predicts from whole slides, without embeddings", param_hint=f"--{name}")


def _table(title: str, classes: Sequence[str], rows: "Sequence[NewPrediction]") -> Table:
    table = Table(title=title)
    for column in ("", "predicted", "probability" if classes else "risk", "±", ""):
        table.add_column(column)
    for row in rows[:_SHOWN]:
        value = row.probabilities[classes.index(row.label)] if row.probabilities else row.risk
        odd = "unlike the training slides" if row.unusual else ""
        table.add_row(row.name, row.label, f"{value:.3f}", f"{row.spread:.3f}", odd)
    return table
