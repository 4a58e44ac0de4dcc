"""``gigatome train``."""

from pathlib import Path

import typer
from rich.console import Console

from gigatome.cli.options import SlideMpp, cohort_of
from gigatome.cli.progress import progress_bar


def train(
    recipe: str = typer.Argument(help="Name of a built-in recipe (gigatome recipes list), or path of a YAML file."),
    data: str = typer.Option(..., "--data", help="Cohort: CSV, folder, glob, or bucket prefix."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Run folder; needed unless --dry-run."),
    assignments: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Change a value of the recipe."),
    steps: int | None = typer.Option(None, help="Length of the run in steps, in place of the recipe's."),
    device: str | None = typer.Option(None, help="Short for --set fit.device=NAME, such as cuda."),
    resume: bool = typer.Option(False, "--resume", help="Go on with the run in the folder."),
    job: Path | None = typer.Option(
        None, help="Job directory to take tissue from and to keep it in; the run folder by default."
    ),
    slide_mpp: SlideMpp = None,
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Check recipe, table and network; print what would be done. Opens no slide."
    ),
) -> None:
    """Train an encoder on tiles read from the slides as they are needed."""
    from gigatome import config
    from gigatome.recipes.run import plan
    from gigatome.recipes.run import train as run_training
    from gigatome.recipes.schema import load_recipe

    changes = list(assignments)
    changes += [f"fit.steps={steps}", "fit.epochs=null"] if steps is not None else []
    changes += [f"fit.device={device}"] if device is not None else []
    loaded = load_recipe(recipe, changes)
    console = Console(highlight=False)
    cohort = cohort_of(data, slide_mpp)
    if dry_run:
        console.print(config.to_yaml(loaded), soft_wrap=True, markup=False)
        for key, value in plan(loaded, cohort).items():
            console.print(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")
        return
    if out is None:
        raise typer.BadParameter("give a run folder with -o, or pass --dry-run", param_hint="--out")
    with progress_bar() as progress:
        run = run_training(loaded, cohort, out, resume=resume, job=job, progress=progress)
    console.print(f"{run.folder}: step {run.step} of {loaded.fit.total_steps}", soft_wrap=True)
    if not run.finished:
        console.print("Stopped by a signal after saving; go on with --resume.")
        raise typer.Exit(1)
    if run.failures:
        console.print(f"{len(run.failures)} slides were left out: {run.folder / 'failures.csv'}", soft_wrap=True)
        raise typer.Exit(3)
