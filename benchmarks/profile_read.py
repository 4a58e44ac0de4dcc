"""Where the time of a tile goes: ``python -m benchmarks.profile_read [--write]``; prints JSON. Linux; needs no root.

The C extension is built anew with debugging information, which changes none of its instructions, and reads random tiles
of 256² pixels on tissue under ``perf record``. ``addr2line`` tells the function that each sampled instruction was
written in, inlined ones too; each belongs to one step. Samples are of the process alone: what the system does for it
comes from its processor times.

Needed: GCC, ``perf`` (Debian: linux-perf) with kernel.perf_event_paranoid of at most 2, and addr2line (binutils).
"""

import argparse
import datetime
import importlib.machinery
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.output import add_slides, add_write, row, write_result
from benchmarks.slides import ensure_slides
from gigatome.tiles.bench_result import machine

ROOT = Path(__file__).resolve().parents[1]
MODULE = "gigatome._native"
CASES = ((0.25, 1), (0.5, 2))
"""mpp, and by how much it shrinks level 0 of the benchmark slides."""
TILE, PLACES, HERTZ = 256, 500, 1999

SKIPPED, KEPT, LONG = "parsed only", "decoded", "long codes"
WALK, UNSTUFF = "between blocks", "stuffed zeros removed"
TRANSFORM, UPSAMPLE, COLOUR, LIBRARY, OTHER = "transform", "upsampling", "colour", "C library", "rest of the extension"
PYTHON, SYSTEM = "Python and NumPy", "system"
STEPS = {
    SKIPPED: "entropy codes of blocks that are parsed only",
    KEPT: "entropy codes of blocks that are decoded",
    LONG: "codes that are longer than the tables, of either kind of block",
    WALK: "from block to block, which of them are wanted",
    UNSTUFF: "removing the stuffed zeros of the data",
    TRANSFORM: "inverse transform",
    UPSAMPLE: "upsampling, and putting rows in their place",
    COLOUR: "colour conversion",
    LIBRARY: "memcpy, memset and memchr, called by the steps above",
    OTHER: "the rest of the extension: headers, layout, arguments",
    PYTHON: "Python and NumPy: planning the tile, calling the extension",
    SYSTEM: "the operating system: reading the file, memory for the tile",
}
"""What each step is, in the order of the table."""
ENTROPY = (SKIPPED, KEPT, LONG, WALK, UNSTUFF)
"""The steps that together are entropy decoding."""
# The step of a function of the extension, and of all that is inlined into it.
_FUNCTIONS = {
    "skip_block": SKIPPED, "read_block": KEPT, "long_code": LONG, "decode_units": WALK, "unstuff": UNSTUFF,
    "inverse_transform": TRANSFORM, "flat": TRANSFORM, "to_rgb": COLOUR, "write_pixels": UPSAMPLE,
}  # fmt: skip
_CALLED = re.compile(r"^_*(mem(move|cpy|set|chr|cmp)\w*|.*@plt)$")
_SAMPLE = re.compile(r"^\s*(?P<time>[\d.]+):\s+(?P<address>[0-9a-f]+) (?P<symbol>.*) \((?P<object>.*)\)$")


def build(folder: Path) -> Path:
    """The extension as it is installed, with debugging information; returns its path."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"CFLAGS": "-g"}, check=True, stdout=sys.stderr)
    return next(folder.glob("gigatome/_native*.so"))


def read_tiles(library: Path, slide_path: Path, mpp: float, shrink: int, seconds: float) -> dict[str, Any]:
    """Reads tiles for some seconds with the extension in ``library``; when, and what it took."""
    for name in [name for name in sys.modules if name.startswith(("gigatome", "benchmarks"))]:
        del sys.modules[name]  # to be imported with the other extension
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(library))
    spec = importlib.util.spec_from_loader(MODULE, loader)
    assert spec is not None
    native = sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    loader.exec_module(native)
    from benchmarks.bench_quality import tissue_places
    from gigatome.core.native import NATIVE
    from gigatome.slides.slide import open_slide

    assert NATIVE is native
    with open_slide(slide_path) as slide:
        places = [(shrink * x, shrink * y) for x, y in tissue_places(slide, 0, shrink, PLACES)]
        for x, y in places:  # the system has the file in memory then
            slide.read_tile(x, y, TILE, mpp, exact=False)
        tiles = 0
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.clock_gettime(time.CLOCK_MONOTONIC)
        while time.clock_gettime(time.CLOCK_MONOTONIC) < start + seconds:
            for x, y in places:
                slide.read_tile(x, y, TILE, mpp, exact=False)
            tiles += len(places)
        end, after = time.clock_gettime(time.CLOCK_MONOTONIC), resource.getrusage(resource.RUSAGE_SELF)
    return {
        "start": start,
        "end": end,
        "tiles": tiles,
        "user": after.ru_utime - before.ru_utime,
        "system": after.ru_stime - before.ru_stime,
        "base": _base(library),
    }


def _base(library: Path) -> int:
    """Where the library begins in the memory of this process."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return min(int(line.split("-")[0], 16) for line in maps if line.endswith(str(library)))


def profile(library: Path, slide: Path, mpp: float, shrink: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Shares of the processor time of each of :data:`STEPS`, and the rate."""
    samples = folder / "samples"
    perf = ["perf", "record", "-q", "-F", str(HERTZ), "-k", "CLOCK_MONOTONIC", "-e", "cpu-clock:u", "-o", samples, "--"]
    child = [sys.executable, "-m", "benchmarks.profile_read", "--child", library, slide, mpp, shrink, seconds]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    out = subprocess.run(
        [*perf, *map(str, child)], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE
    ).stdout
    run = json.loads(out)
    script = ["perf", "script", "-i", samples, "--ns", "-F", "time,ip,sym,dso"]
    lines = subprocess.run(script, check=True, capture_output=True, text=True).stdout.splitlines()
    counts = _steps(library, run, lines)
    total, sampled = run["user"] + run["system"], sum(counts.values())
    shares = {step: counts[step] / sampled * run["user"] / total for step in STEPS}
    shares[SYSTEM] = run["system"] / total
    return {
        "slide": slide.stem,
        "mpp": mpp,
        "tiles_per_cpu_second": round(run["tiles"] / total),
        "samples": sampled,
        "shares": {step: round(share, 4) for step, share in shares.items()},
        "entropy_decoding": round(sum(shares[step] for step in ENTROPY), 4),
    }


def _steps(library: Path, run: Mapping[str, Any], lines: Iterable[str]) -> Counter[str]:
    """How many samples taken while tiles were read fell into each step."""
    counts: Counter[str] = Counter()
    inside: Counter[int] = Counter()
    for line in lines:
        found = _SAMPLE.match(line)
        if not found or not run["start"] <= float(found["time"]) <= run["end"]:
            continue
        ours = found["object"].endswith(library.name)
        if _CALLED.match(found["symbol"]) and (ours or "libc" in found["object"]):
            counts[LIBRARY] += 1
        elif ours:
            inside[int(found["address"], 16) - run["base"]] += 1
        else:
            counts[PYTHON] += 1
    for address, functions in _functions(library, list(inside)).items():
        step = next((_FUNCTIONS[name] for name in functions if name in _FUNCTIONS), OTHER)
        counts[step] += inside[address]
    return counts


def _functions(library: Path, addresses: Sequence[int]) -> dict[int, list[str]]:
    """For each address the function that it was written in, then the one that this was inlined into, and so on."""
    command = ["addr2line", "-a", "-f", "-i", "-e", library]
    text = "\n".join(map(hex, addresses))
    lines = subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout.splitlines()
    found: dict[int, list[str]] = {}
    functions: list[str] = []
    for line in lines:
        if line.startswith("0x"):
            functions = found[int(line, 16)] = []
        else:
            functions.append(line.split(".")[0])
    # Each function is followed by its place in the source.
    return {address: names[::2] for address, names in found.items()}


def markdown(results: Sequence[Mapping[str, Any]], command: str) -> str:
    """The table of shares."""
    facts = machine()
    names = [f"{item['slide']}, {item['mpp']:g} mpp" for item in results]
    rows = [[text, *(f"{item['shares'][step]:.1%}" for item in results)] for step, text in STEPS.items()]
    rows.append(["**entropy decoding, the first five**", *(f"**{item['entropy_decoding']:.1%}**" for item in results)])
    rows.append(["tiles a second of processor time", *(str(item["tiles_per_cpu_second"]) for item in results)])
    rows.append(["samples", *(str(item["samples"]) for item in results)])
    lines = [
        "# Where the time of a tile goes",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. Shares of the processor time of reading",
        "random tiles of 256² pixels on tissue, unaligned to chunks, by one thread, the page cache warm; 0.5 mpp is",
        "made from the level of 0.25 mpp, shrunk while it is decoded. `benchmarks/profile_read.py` says how they are",
        "sampled, `benchmarks/slides.py` makes the slides.",
        "",
        row(["step", *names]),
        row(["---", *("---:" for _ in names)]),
        *map(row, rows),
        "",
        f"Machine: {facts['processor']}, {facts['cores']} cores, load {facts['load']}; Python {facts['python']}, NumPy "
        f"{facts['numpy']}; {_version('perf', '--version')}, {_version('cc', '--version')}.",
    ]
    return "\n".join(lines) + "\n"


def _version(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_slides(parser)
    parser.add_argument("--seconds", type=float, default=6, help="that each slide and resolution is read")
    add_write(parser)
    options = parser.parse_args()
    for tool in ("perf", "addr2line", "cc"):
        if shutil.which(tool) is None:
            parser.error(f"{tool} is not installed; see the head of benchmarks/profile_read.py")
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        library = build(Path(scratch))
        for path in ensure_slides(options.slides, options.side).values():
            for mpp, shrink in CASES:
                print(f"reading {path.stem} at {mpp} mpp …", file=sys.stderr)
                results.append(profile(library, path, mpp, shrink, options.seconds, Path(scratch)))
    print(json.dumps(results, indent=2))
    if options.write:
        command = f"python -m benchmarks.profile_read --seconds {options.seconds:g}"
        write_result(options.write, "profile", markdown(results, command), machine())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        library, slide, *numbers = sys.argv[2:]
        mpp, shrink, seconds = float(numbers[0]), int(numbers[1]), float(numbers[2])
        print(json.dumps(read_tiles(Path(library), Path(slide), mpp, shrink, seconds)))
    else:
        main()
