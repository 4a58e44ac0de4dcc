"""``gigatome check``: opens every slide of a cohort and says what is wrong, without stopping."""

import contextlib
import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gigatome.blob.store import redact, write_atomic
from gigatome.cli.progress import progress_bar
from gigatome.core.errors import GigatomeError
from gigatome.slides.check import SlideReport, check_cohort
from gigatome.slides.cohort import Cohort


def check(
    cohort: Annotated[str, typer.Argument(help="A table (CSV), a folder, a glob, a bucket prefix or one slide.")],
    labels: Annotated[str | None, typer.Option(help="A table to join by slide or patient.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for check.csv and cohort.html.")] = None,
    thorough: Annotated[bool, typer.Option(help="Read every pixel, to find damage anywhere; takes long.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
) -> None:
    """Open every slide and report missing mpp, damage, duplicates and odd pyramids, without stopping.

    Exit code: 0 all is well, 1 no slide can be used, 3 some slides have problems.
    """
    slides = Cohort.read(cohort, labels=labels, allow_duplicates=True)
    with progress_bar() as progress:
        reports = check_cohort(slides, thorough=thorough, progress=progress)
    if out is not None:
        from gigatome.evaluation.report import cohort_page

        write_atomic(out / "check.csv", _csv(reports))
        cohort_page(out / "cohort.html", Path(slides.source).name, reports, _thumbnails(slides, reports))
    if as_json:
        plain = [dataclasses.asdict(report) | {"uri": redact(report.uri)} for report in reports]
        typer.echo(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        _show(reports)
    if not any(report.usable for report in reports):
        raise typer.Exit(1)
    if any(report.problems for report in reports):
        raise typer.Exit(3)


def _show(reports: list[SlideReport]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(box=None, pad_edge=False)
    table.add_column("slide", overflow="fold")
    table.add_column("patient", overflow="fold")
    for heading in ("width", "height", "mpp", "levels"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("vendor", no_wrap=True)
    table.add_column("problems", overflow="fold", ratio=1)
    for report in reports:
        size = (str(report.width), str(report.height)) if report.width else ("–", "–")
        mpp = "–" if report.mpp is None else f"{report.mpp:.4g}"
        colour = "yellow" if report.usable else "red"
        problems = "\n".join(f"[{colour}]{escape(problem)}[/]" for problem in report.problems) or "[green]ok[/]"
        levels = str(report.levels or "–")
        table.add_row(escape(report.name), escape(report.patient), *size, mpp, levels, report.vendor or "–", problems)
    console.print(table)
    usable, bad = sum(report.usable for report in reports), sum(bool(report.problems) for report in reports)
    patients = len({report.patient for report in reports})
    console.print(
        f"\nslides: {len(reports)} · patients: {patients} · can be used: {usable} · with problems: {bad}",
        highlight=False,
    )


def _thumbnails(cohort: Cohort, reports: list[SlideReport]) -> dict[str, np.ndarray]:
    """Pictures of the slides that can be used; one that cannot be drawn after all is left out."""
    usable = {report.uri for report in reports if report.usable}
    pictures = {}
    for entry in cohort:
        if entry.uri in usable:
            with contextlib.suppress(GigatomeError), entry.open() as slide:
                pictures[entry.name] = slide.thumbnail(480)
    return pictures


def _csv(reports: list[SlideReport]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(SlideReport)])
    for report in reports:
        row = dataclasses.asdict(report) | {"uri": redact(report.uri), "problems": "; ".join(report.problems)}
        writer.writerow(["" if value is None else value for value in row.values()])
    return text.getvalue()
