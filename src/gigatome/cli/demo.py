"""``gigatome demo``."""

import sys
from pathlib import Path

import typer
from rich.console import Console

from gigatome.cli.options import SlideMpp, cohort_of
from gigatome.cli.progress import progress_bar


def demo(
    out: Path = typer.Option(Path("gigatome-demo"), "--out", "-o", help="Folder for everything the demo makes."),
    slides: str | None = typer.Option(None, help="Your own slides: CSV, folder, glob or bucket prefix."),
    labels: str | None = typer.Option(None, help="Table of labels for them, if --slides is not a table with labels."),
    target: str | None = typer.Option(None, help="Label column to predict; may be left out if there is only one."),
    recipe: str = typer.Option("demo/dino_vit_mini", help="What to train."),
    assignments: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Change a value of the recipe."),
    slide_mpp: SlideMpp = None,
    folds: int = typer.Option(5, min=2, help="Patient-grouped folds of the evaluation."),
) -> None:
    """Do the main job: a cohort, training, embeddings, scores, heat-maps and one HTML report.

    Without --slides it makes a synthetic cohort. Run it again to go on where it stopped.
    """
    from gigatome.recipes.main_job import run_main_job
    from gigatome.recipes.main_report import write_main_report
    from gigatome.recipes.schema import load_recipe

    loaded = load_recipe(recipe, assignments)
    cohort = cohort_of(slides, slide_mpp, labels) if slides is not None else None
    with progress_bar() as progress:
        result = run_main_job(loaded, out, cohort=cohort, target=target, folds=folds, progress=progress)
        command = "gigatome " + " ".join(sys.argv[1:]) if sys.argv[0].endswith("gigatome") else "run_main_job"
        report = write_main_report(result, out / "report.html", command=command)
    console = Console(highlight=False)
    for (encoder, head), found in result.results.items():
        low, high = found.auroc_ci
        console.print(f"AUROC {found.auroc:.3f} ({low:.3f} to {high:.3f})  {encoder}, {head}")
    console.print(f"Report: {report}", soft_wrap=True)
    if result.failures:
        console.print(f"{len(result.failures)} slides were left out: {out / 'failures.csv'}", soft_wrap=True)
        raise typer.Exit(3)
