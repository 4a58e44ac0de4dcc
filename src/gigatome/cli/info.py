"""``gigatome info SLIDE``: what a slide is."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gigatome.core.geometry import magnification
from gigatome.slides.slide import Slide, open_slide


def info(
    slide: Annotated[str, typer.Argument(help="Path or URI of a slide.")],
    slide_mpp: Annotated[
        float | None, typer.Option(help="µm per level-0 pixel, if the file states none or a wrong one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Levels, size, exact mpp, vendor, reader, chunk size and compression of a slide."""
    with open_slide(slide, mpp=slide_mpp) as opened:
        facts = describe(opened)
    console = Console(markup=False)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _show(console, facts)


def describe(slide: Slide) -> dict[str, Any]:
    """What ``gigatome info`` tells, as JSON can hold it."""
    return {
        "slide": slide.name,
        "vendor": slide.vendor,
        "reader": slide.reader,
        "width": slide.width,
        "height": slide.height,
        "mpp": slide.mpp if slide.has_mpp else None,
        "magnification": magnification(slide.mpp) if slide.has_mpp else None,
        "bounds": [slide.bounds.x, slide.bounds.y, slide.bounds.width, slide.bounds.height],
        "levels": [
            {
                "width": level.width,
                "height": level.height,
                "downsample": level.downsample,
                "mpp": slide.mpp * level.downsample if slide.has_mpp else None,
                "chunk_width": level.chunk_width,
                "chunk_height": level.chunk_height,
                "compression": level.compression,
            }
            for level in slide.levels
        ],
        "properties": dict(sorted(slide.properties.items())),
    }


def _show(console: Console, facts: dict[str, Any]) -> None:
    summary = Table.grid(padding=(0, 2))
    summary.add_row("slide", facts["slide"])
    summary.add_row("vendor", f"{facts['vendor']}, read by {facts['reader']}")
    summary.add_row("size", f"{facts['width']} × {facts['height']} px")
    if facts["mpp"] is None:
        summary.add_row("mpp", "not stated; give it with --slide-mpp or in a column mpp of the cohort's table")
    else:
        summary.add_row("mpp", f"{facts['mpp']!r} µm per pixel (about {facts['magnification']:.3g}×)")
        width, height = (facts[side] * facts["mpp"] / 1000 for side in ("width", "height"))
        summary.add_row("area", f"{width:.2f} × {height:.2f} mm")
    levels = Table(
        "level", "width", "height", "downsample", "mpp", "chunk", "compression", title="Levels", title_justify="left"
    )
    for number, level in enumerate(facts["levels"]):
        chunk = f"{level['chunk_width']} × {level['chunk_height']}" if level["chunk_width"] else "–"
        mpp = "–" if level["mpp"] is None else f"{level['mpp']:.6g}"
        row = (level["width"], level["height"], f"{level['downsample']:.6g}", mpp, chunk, level["compression"] or "–")
        levels.add_row(str(number), *(str(value) for value in row))
    console.print(summary, levels)
    if facts["properties"]:
        table = Table("property", "value", title="Properties", title_justify="left")
        for key, value in facts["properties"].items():
            table.add_row(key, " ".join(value.split()))
        console.print(table)
