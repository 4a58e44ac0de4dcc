"""``gigatome bench``: how fast this machine does what gigatome does."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gigatome import config
from gigatome.cli.options import SlideMpp, cohort_of
from gigatome.cli.progress import progress_bar
from gigatome.core.native import NATIVE
from gigatome.tiles.bench import bench_read
from gigatome.tiles.bench_result import HEADINGS, Reading, machine, remarks, rows
from gigatome.tiles.bench_stream import bench_stream
from gigatome.tiles.stream import StreamOptions, TileStream
from gigatome.tiles.stream_report import StreamReport

app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def read(
    slide: Annotated[str, typer.Argument(help="Local path of a slide.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which every reader has its turn.")] = 9,
    tiles: Annotated[int, typer.Option(min=1, help="Tiles that each reader reads in a round.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the positions.")] = 0,
    slide_mpp: Annotated[
        float | None, typer.Option(help="µm per level-0 pixel, if the file states none or a wrong one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read random tiles of a slide with gigatome, OpenSlide and whatever other reader is installed."""
    stderr = Console(stderr=True)
    reading = bench_read(
        slide,
        mpp=slide_mpp,
        rounds=rounds,
        tiles=tiles,
        seed=seed,
        # A bar that draws itself would be measured with the readers.
        progress=lambda stage, done, total: stderr.print(f"{stage}: {done} of {total} resolutions", highlight=False),
    )
    if as_json:
        typer.echo(json.dumps(reading.as_json(), indent=2, ensure_ascii=False))
    else:
        _show(Console(markup=False), reading)


@app.command()
def stream(
    slides: Annotated[
        str, typer.Argument(metavar="COHORT", help="A slide, a folder, a glob, a bucket prefix or a CSV.")
    ],
    mpp: Annotated[str, typer.Option(help="Resolutions to draw from, µm per pixel, with commas.")] = "0.25,0.5,1,2",
    tile_size: Annotated[int, typer.Option(min=1, help="Side of a tile in pixels.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Tiles a batch.")] = 64,
    min_tissue: Annotated[float, typer.Option(min=0, max=1, help="Least share of a tile that is tissue.")] = 0.4,
    threads: Annotated[int, typer.Option(min=1, help="That decode.")] = StreamOptions.threads,
    prefetch: Annotated[int, typer.Option(min=1, help="Batches read ahead.")] = StreamOptions.prefetch,
    seconds: Annotated[float, typer.Option(min=0, help="To measure for, after warming up.")] = 20.0,
    step_ms: Annotated[
        float, typer.Option(min=0, help="Time that training takes for a batch; with 0 the stream is the limit.")
    ] = 0.0,
    job: Annotated[Path | None, typer.Option(help="Job directory to take tissue from and to keep it in.")] = None,
    slide_mpp: SlideMpp = None,
    as_json: AsJson = False,
) -> None:
    """Stream random tiles of a cohort as training does, and say where the time goes and what is the limit.

    Exit code: 0 all is well, 1 no slide could be used, 3 some were left out.
    """
    values = {
        "tile_size": tile_size,
        "mpp": mpp.split(","),
        "min_tissue": min_tissue,
        "threads": threads,
        "prefetch": prefetch,
    }
    options = config.parse(StreamOptions, values, source="gigatome bench stream")
    with progress_bar() as progress:
        tiles = TileStream(cohort_of(slides, slide_mpp), options, batch_size=batch_size, job=job, progress=progress)
    report = bench_stream(tiles, seconds=seconds, step=step_ms / 1000)
    left_out = [f"{failure.slide}: {failure.message}" for failure in tiles.failures]
    if as_json:
        found = asdict(report) | {"tiles_per_second": report.tiles_per_second, "limit": report.limit}
        found |= {"sentence": report.sentence(), "options": config.to_dict(options), "left_out": left_out}
        found |= {"slides": len(tiles.cohort), "step_ms": step_ms, "native": NATIVE is not None, "machine": machine()}
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _show_stream(Console(markup=False, highlight=False), report, left_out)
    if left_out:
        raise typer.Exit(3)


def _show(console: Console, reading: Reading) -> None:
    table = Table(box=None, pad_edge=False)
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, no_wrap=place < 2, justify="left" if place < 2 else "right")
    for row in rows(reading):
        table.add_row(*row)
    console.print(table)
    for remark in remarks(reading):
        console.print(remark, highlight=False, soft_wrap=True)


def _show_stream(console: Console, report: StreamReport, left_out: list[str]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("part", "seconds", "share", "of", ""):
        table.add_column(heading, justify="right" if heading in ("seconds", "share") else "left")
    clock, threads = (1, "the time"), (report.threads, f"{report.threads} threads' time")
    for name, spent, (count, whole), remark in (
        ("waiting", report.waited, clock, "for the next batch"),
        ("planning", report.planning, threads, "drawing tiles"),
        ("opening", report.opening, threads, f"{report.opened:,} slides"),
        ("network", report.network, clock, f"{report.fetched / 1e6:,.1f} MB in {report.requests:,} requests"),
        ("disk", report.disk, threads, ""),
        ("decoding", report.decoding, threads, f"{report.tiles:,} tiles in {report.batches:,} batches"),
    ):
        share = spent / (count * report.seconds)
        table.add_row(name, f"{spent:.2f}", f"{share:.1%}", whole, remark)
    console.print(table)
    for line in left_out:
        console.print(f"Left out: {line}", soft_wrap=True)
    console.print(report.sentence(), soft_wrap=True)
