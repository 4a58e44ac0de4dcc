"""``gigatome train``."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from gigatome.cli.options import SlideMpp, cohort_of
from gigatome.cli.progress import progress_bar
from gigatome.cli.scores import show_study

if TYPE_CHECKING:
    from gigatome.recipes.run import Run


def train(
    recipe: str = typer.Argument(help="Name of a built-in recipe (gigatome recipes list), or path of a YAML file."),
    data: str | None = typer.Option(
        None,
        "--data",
        help="Cohort: CSV, folder, glob, or bucket prefix; for level region the folder of grids. Needed unless --plan.",
    ),
    labels: str | None = typer.Option(
        None, help="To fine-tune: table of slides, patients and outcomes; the cohort's own by default."
    ),
    folds: list[int] = typer.Option([], "--fold", help="To fine-tune: train this fold only, from 0; several times."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Run folder; needed unless --dry-run or --plan."),
    assignments: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Change a value of the recipe."),
    steps: int | None = typer.Option(None, help="Length of the run in steps, in place of the recipe's."),
    device: str | None = typer.Option(None, help="Short for --set fit.device=NAME, such as cuda."),
    resume: bool = typer.Option(False, "--resume", help="Go on with the run in the folder."),
    job: Path | None = typer.Option(
        None, help="Job directory to take tissue from and to keep it in; the run folder by default."
    ),
    watch: int | None = typer.Option(
        None, metavar="STEPS", help="Every so many steps: rank and spread of embeddings, and an alarm at a collapse."
    ),
    labelled: str | None = typer.Option(
        None, help="Folder or CSV of labelled tiles, for kNN and linear accuracy with --watch."
    ),
    tensorboard: bool = typer.Option(False, "--tensorboard", help="With --watch: also write files for TensorBoard."),
    wandb: str | None = typer.Option(None, metavar="PROJECT", help="With --watch: also report to Weights & Biases."),
    slide_mpp: SlideMpp = None,
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Check recipe, table and network; print what would be done. Opens no slide."
    ),
    planned: bool = typer.Option(
        False, "--plan", help="Of a LongViT: print what a step takes (tokens, operations, memory, time), and end."
    ),
    max_memory: str | None = typer.Option(
        None, metavar="SIZE", help="As --plan, for devices of so much memory, such as 40GB; says what makes it fit."
    ),
) -> None:
    """Train an encoder on tiles read from the slides as they are needed, or on regions of embedded tiles.

    A recipe that fine-tunes learns from whole slides and their labels, fold by fold, and writes a report.

    On several GPUs: torchrun --nproc-per-node 8 -m gigatome train … --device cuda. Exit code 75: a signal has stopped
    the run after saving; queue it again with --resume.
    """
    from gigatome import config
    from gigatome.recipes.longvit_plan import plan_text
    from gigatome.recipes.run import plan
    from gigatome.recipes.run import train as run_training
    from gigatome.recipes.schema import is_finetune, load_recipe, recipe_path
    from gigatome.recipes.watch import WatchOptions
    from gigatome.training.launch import launch_rank, launch_size

    if watch is None and (labelled or tensorboard or wandb):
        raise typer.BadParameter("say how often, as --watch 500", param_hint="--watch")
    watching = WatchOptions(labelled=labelled, tensorboard=tensorboard, wandb=wandb) if watch is not None else None
    changes = [*assignments, *_changes(steps, device, watch)]
    console = Console(highlight=False, quiet=launch_rank() > 0)
    if is_finetune(recipe_path(recipe)):
        _only(watch=watch, job=job, dry_run=dry_run or None)
        _finetune(recipe, changes, data, labels, folds, out, console, slide_mpp, resume=resume, planned=planned,
                  max_memory=max_memory)  # fmt: skip
        return
    if labels or folds:
        raise typer.BadParameter("it is for recipes that fine-tune", param_hint="--labels" if labels else "--fold")
    loaded = load_recipe(recipe, changes)
    if planned or max_memory is not None:
        console.print(plan_text(loaded, launch_size(), max_memory), soft_wrap=True, markup=False)
        return
    if data is None:
        raise typer.BadParameter("say what to learn from", param_hint="--data")
    if not loaded.reads_slides and slide_mpp is not None:
        raise typer.BadParameter(f"a recipe of level {loaded.level} reads no slides", param_hint="--slide-mpp")
    source = cohort_of(data, slide_mpp) if loaded.reads_slides else data
    if dry_run:
        console.print(config.to_yaml(loaded), soft_wrap=True, markup=False)
        for key, value in plan(loaded, source).items():
            console.print(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")
        return
    if out is None:
        raise typer.BadParameter("give a run folder with -o, or pass --dry-run", param_hint="--out")
    with progress_bar() as progress:
        run = run_training(loaded, source, out, resume=resume, job=job, watch=watching, progress=progress)
    _report(run, console)


def _only(**given: object) -> None:
    """Refuses options that a fine-tuning would not read."""
    for name, value in given.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter("it is for recipes that train an encoder", param_hint=option)


def _finetune(
    recipe: str, changes: list[str], data: str | None, labels: str | None, folds: list[int], out: Path | None,
    console: Console, slide_mpp: float | None, *, resume: bool, planned: bool, max_memory: str | None,
) -> None:  # fmt: skip
    from gigatome.recipes.finetune import finetune
    from gigatome.recipes.finetune_schema import load_finetune
    from gigatome.recipes.longvit_plan import finetune_text
    from gigatome.training.launch import PREEMPTED, launch_size

    if planned or max_memory is not None:
        loaded = load_finetune(recipe, [*changes, "weights=null"])
        console.print(finetune_text(loaded, launch_size(), max_memory), soft_wrap=True, markup=False)
        return
    loaded = load_finetune(recipe, changes)
    if data is None or out is None:
        missing = "data" if data is None else "out"
        raise typer.BadParameter(f"give {'the slides' if data is None else 'a run folder'}", param_hint=f"--{missing}")
    with progress_bar() as progress:
        run = finetune(
            loaded, cohort_of(data, slide_mpp), out, labels=labels, folds=folds, resume=resume,
            command=shlex.join(["gigatome", *sys.argv[1:]]), progress=progress,
        )  # fmt: skip
    if run.preempted:
        console.print("Stopped by a signal after saving; go on with --resume.")
        raise typer.Exit(PREEMPTED)
    console.print(f"{run.folder}: {len(run.done)} of {run.folds} folds done", soft_wrap=True)
    if run.study is not None:
        show_study(run.study, console)
        console.print(run.folder / "report.html", soft_wrap=True)
    if run.failures:
        console.print(
            f"{len(run.failures)} slides were not read, or not whole: {run.folder / 'failures.csv'}", soft_wrap=True
        )
        raise typer.Exit(3 if launch_size() == 1 else 0)  # torchrun takes any status but 0 for a failure


def _changes(steps: int | None, device: str | None, watch: int | None) -> list[str]:
    """Assignments that options are short for."""
    length = [f"fit.steps={steps}", "fit.epochs=null"] if steps is not None else []
    given = {"fit.device": device, "fit.evaluate_every": watch}
    return [*length, *(f"{key}={value}" for key, value in given.items() if value is not None)]


def _report(run: "Run", console: Console) -> None:
    """Says how a run ended, by words and exit status."""
    from gigatome.training.launch import PREEMPTED, launch_size

    console.print(f"{run.folder}: step {run.step} of {run.recipe.fit.total_steps}", soft_wrap=True)
    if not run.finished:
        console.print("Stopped by a signal after saving; go on with --resume.")
        raise typer.Exit(PREEMPTED)
    if run.failures:
        console.print(f"{len(run.failures)} slides were left out: {run.folder / 'failures.csv'}", soft_wrap=True)
        raise typer.Exit(3 if launch_size() == 1 else 0)  # torchrun takes any status but 0 for a failure
