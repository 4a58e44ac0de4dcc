"""Looks at every slide of a cohort before work is wasted on it: damage, missing resolution, duplicates."""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import final

from gigatome.blob.store import open_blob, redact
from gigatome.core.errors import GigatomeError
from gigatome.core.geometry import magnification
from gigatome.core.logs import Progress, log, silent
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.slides.slide import Slide

_SAMPLE_BYTES = 1 << 16  # of each end of a file, hashed to find copies
_BLOCK = 2048  # px, side of what is read at once when all is read
_PROBE = 8  # px read at each probed place; the whole chunk around it is decoded
# Objectives of slide scanners run from 2.5× to 100×; a level 0 outside 0.1 … 4 µm is no scan, or no µm.
_USUAL_MPP = (0.1, 4.0)
_LARGE_PIXELS = 1 << 26  # the smallest level above this (192 MiB as RGB) makes every overview slow


@final
@dataclass(frozen=True)
class SlideReport:
    """What was found out about one slide.

    Attributes:
        name: its name in the cohort.
        uri: where it lies.
        patient: whose it is.
        width: level-0 pixels; 0 if it could not be opened, as for ``height`` and ``levels``.
        height: level-0 pixels.
        mpp: µm per pixel of level 0; None if nobody states it.
        vendor: the format; empty if it could not be opened.
        levels: number of pyramid levels.
        problems: one sentence each; empty if all is well.
        usable: whether the slide can be read at a stated resolution.
    """

    name: str
    uri: str
    patient: str
    width: int = 0
    height: int = 0
    mpp: float | None = None
    vendor: str = ""
    levels: int = 0
    problems: tuple[str, ...] = ()
    usable: bool = False


def check_cohort(
    cohort: Cohort, *, thorough: bool = False, threads: int = 8, progress: Progress = silent
) -> list[SlideReport]:
    """Opens every slide, reads the corners and the middle of each of its levels, and compares it with the others.

    It never stops at a bad slide.

    Args:
        cohort: may hold the same name twice (``Cohort.read(…, allow_duplicates=True)``).
        thorough: read every pixel of every level, which takes long; otherwise damage within a file that is whole is
            found only where it was probed.
        threads: slides looked at at a time.
        progress: called after each slide with stage ``"check"``.

    Returns:
        One report a slide, in the cohort's order.
    """
    reports, prints = [], []
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for done, (report, print_) in enumerate(pool.map(partial(_look, thorough=thorough), cohort.slides), start=1):
            reports.append(report)
            prints.append(print_)
            progress("check", done, len(cohort))
    copies = _repeats(reports, prints, lambda report: f"has the same contents as {redact(report.uri)}")
    rows = _repeats(reports, [report.uri for report in reports], lambda _: "stands in the cohort twice")
    names = _repeats(
        reports, [report.name for report in reports], lambda report: f"has the name of {redact(report.uri)}"
    )
    return [
        replace(report, problems=(*report.problems, *([row] if row else filter(None, (name, copy)))))
        for report, copy, row, name in zip(reports, copies, rows, names, strict=True)
    ]


def _look(entry: CohortSlide, thorough: bool) -> tuple[SlideReport, str | None]:
    """Report of one slide by itself, and the fingerprint of its file."""
    report = SlideReport(entry.name, entry.uri, entry.patient)
    try:
        with entry.open() as slide:
            problems = [*_mpp_problems(slide, entry), *_size_problems(slide)]
            report = replace(
                report,
                width=slide.width,
                height=slide.height,
                mpp=slide.mpp if slide.has_mpp else None,
                vendor=slide.vendor,
                levels=len(slide.levels),
                problems=tuple(problems),
            )
            _probe(slide)
            if thorough:
                _read_all(slide)
        return replace(report, usable=report.mpp is not None), _fingerprint(entry.uri)
    except Exception as error:  # the point is to look at them all, whatever a decoder raises
        if not isinstance(error, GigatomeError):
            log.warning("%s: unexpected error while it was checked", redact(entry.uri), exc_info=error)
        return replace(report, problems=(_sentence(error, entry), *report.problems)), None


def _probe(slide: Slide) -> None:
    """Decodes the chunks at the corners and in the middle of every level; the last corner is the end of many files."""
    for index, level in enumerate(slide.levels):
        right, bottom = max(0, level.width - _PROBE), max(0, level.height - _PROBE)
        for x, y in ((0, 0), (right, 0), (right // 2, bottom // 2), (0, bottom), (right, bottom)):
            slide.read_level(index, x, y, min(_PROBE, level.width), min(_PROBE, level.height))


def _read_all(slide: Slide) -> None:
    for index, level in enumerate(slide.levels):
        for y in range(0, level.height, _BLOCK):
            for x in range(0, level.width, _BLOCK):
                slide.read_level(index, x, y, min(_BLOCK, level.width - x), min(_BLOCK, level.height - y))


def _mpp_problems(slide: Slide, entry: CohortSlide) -> Iterable[str]:
    if not slide.has_mpp:
        yield "states no mpp; give it in a column mpp of the cohort's table"
        return
    low, high = _USUAL_MPP
    if not low <= slide.mpp <= high:
        yield f"has {slide.mpp:g} mpp, and scanners make {low:g} to {high:g}"
    across, down = (float(slide.properties.get(f"mpp-{axis}", "nan")) for axis in "xy")
    if abs(across - down) > 0.01 * across:
        yield f"has {across:g} mpp in x and {down:g} in y"
    if entry.mpp is not None and abs(across - entry.mpp) > 0.1 * across:
        yield f"states {across:g} mpp itself, and the table says {entry.mpp:g}"
    stated = slide.properties.get("aperio.AppMag") or slide.properties.get("openslide.objective-power") or "nan"
    try:
        power = float(stated)
    except ValueError:
        return
    if power > 0 and not 0.6 <= magnification(slide.mpp) / power <= 1.7:
        yield f"has {slide.mpp:g} mpp, which is {magnification(slide.mpp):.3g}×, and calls itself {power:g}×"


def _size_problems(slide: Slide) -> Iterable[str]:
    smallest = slide.levels[-1]
    if smallest.width * smallest.height > _LARGE_PIXELS:
        what = "is no pyramid" if len(slide.levels) == 1 else "lacks small pyramid levels"
        yield f"{what}: its smallest level has {smallest.width} × {smallest.height} px, so overviews are slow"


def _fingerprint(uri: str) -> str:
    """Hash of the size and both ends of a file."""
    blob = open_blob(uri)
    try:
        length = min(_SAMPLE_BYTES, blob.size)
        ends = blob.read_ranges([(0, length), (blob.size - length, length)])
    finally:
        blob.close()
    return hashlib.sha256(b"".join([str(blob.size).encode(), b":", *ends])).hexdigest()


def _repeats(
    reports: list[SlideReport], keys: Iterable[str | None], say: Callable[[SlideReport], str]
) -> list[str | None]:
    """For each report what to say if an earlier one has the same key, else None."""
    first: dict[str, SlideReport] = {}
    return [
        say(first[key]) if key in first else None if key is None else first.setdefault(key, report) and None
        for report, key in zip(reports, keys, strict=True)
    ]


def _sentence(error: Exception, entry: CohortSlide) -> str:
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    text = text.removeprefix(f"{redact(entry.uri)}: ")
    return text if isinstance(error, GigatomeError) else f"cannot be read ({type(error).__name__}: {text})"
