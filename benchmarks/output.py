"""What the scripts that measure have in common: where results go, and how their tables and options look."""

import argparse
import datetime
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.slides import SIDE
from gigatome.blob.store import write_atomic

RESULTS = Path(__file__).parent / "results"


def add_slides(parser: argparse.ArgumentParser) -> None:
    """Options that say which benchmark slides to read."""
    parser.add_argument(
        "--slides",
        type=Path,
        default=Path(tempfile.gettempdir()) / "gigatome-bench",
        help="folder of the benchmark slides, made there where missing (default: %(default)s)",
    )
    parser.add_argument("--side", type=int, default=SIDE, help="level-0 pixels along each side of the slides")


def add_write(parser: argparse.ArgumentParser) -> None:
    """The option that has the tables written."""
    parser.add_argument(
        "--write",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        const=RESULTS,
        help="also write the tables, to benchmarks/results unless a folder is named",
    )


def row(cells: Iterable[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def listed(conditions: Mapping[str, Any]) -> str:
    """Conditions of a measurement in one line."""
    return ", ".join(f"{key} {value}" for key, value in conditions.items())


def write_result(folder: Path, theme: str, text: str, machine: Mapping[str, Any] | None = None) -> None:
    """Writes ``<theme>_<hardware>_<yyyymm>.md``; without ``machine`` the results do not depend on the hardware."""
    parts = [theme]
    if machine is not None:
        accelerator = str(machine.get("device", "cpu")).lower()
        processor = re.sub(r"\((R|TM|C)\)|CPU|Processor|@.*", " ", machine["processor"], flags=re.IGNORECASE).lower()
        words = f"{processor} {machine['cores']} cores" if accelerator == "cpu" else accelerator
        parts.append("-".join(re.findall(r"[a-z0-9]+", words)))
    parts.append(f"{datetime.date.today():%Y%m}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{'_'.join(parts)}.md", text)
