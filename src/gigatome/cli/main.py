"""The ``gigatome`` command: wires one file a command group, and turns errors into exit codes.

Exit codes: 0 done, 1 error, 2 wrong usage, 3 finished with some slides skipped (listed in ``failures.csv``), 130
interrupted.
"""

import logging
import sys

import typer
from rich.console import Console
from rich.logging import RichHandler

from gigatome.cli import (
    bench,
    check,
    demo,
    doctor,
    embed,
    evaluate,
    export,
    heatmap,
    info,
    predict,
    recipes,
    tile,
    tissue,
    train,
)
from gigatome.core.errors import GigatomeError

app = typer.Typer(
    name="gigatome",
    help="Learn from gigapixel whole-slide images where they lie.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    demo.demo,
    info.info,
    check.check,
    tissue.tissue,
    tile.tile,
    train.train,
    embed.embed,
    evaluate.evaluate,
    predict.predict,
    heatmap.heatmap,
    export.export,
    doctor.doctor,
):
    app.command()(command)
app.add_typer(bench.app, name="bench")
app.add_typer(recipes.app, name="recipes")


@app.callback()
def _options(verbose: bool = typer.Option(False, "--verbose", "-v", help="Show what the library logs.")) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logger = logging.getLogger("gigatome")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)


def main() -> None:
    """Entry point of the ``gigatome`` script."""
    try:
        app()
    except GigatomeError as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print(
            "Interrupted; run the same command again to go on (train: with --resume).", highlight=False
        )
        sys.exit(130)


def _plain(error: GigatomeError) -> str:
    return str(error).replace("[", r"\[")
