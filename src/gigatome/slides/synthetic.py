"""Synthetic slides: H&E-like, from a seed, in two classes that differ in architecture and not in colour.

They let ``gigatome demo`` and the tests run the whole chain without any patient's data. A cohort has patients with
one class and a look each (stain, cellularity, fibres), and one or more slides a patient. The slides are pyramidal
JPEG TIFF files with Aperio's metadata; :mod:`gigatome.slides.synthetic_scene` says what is on them.
"""

import csv
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from gigatome.blob.store import atomic_path, write_atomic
from gigatome.config import digest
from gigatome.core.errors import ConfigError
from gigatome.core.geometry import magnification
from gigatome.core.logs import Progress, silent
from gigatome.core.seeding import generator
from gigatome.slides.cohort import Cohort
from gigatome.slides.synthetic_paint import paint
from gigatome.slides.synthetic_scene import KINDS, Look, Scene, SyntheticOptions, lay_out

__all__ = ["KINDS", "Look", "SyntheticOptions", "make_cohort", "make_slide"]

_DESIGN = 1  # raised when the same arguments begin to give other pixels, so that slides made before are made again
_STEP = 4  # from each level of the pyramid to the next
_BAND = 2_000_000  # pixels painted at a time, or one row of chunks if that is more
_BIG = 1 << 30  # pixels above which the classic TIFF limit of 4 GiB comes near


def make_slide(
    path: str | Path,
    kind: str,
    seed: int,
    options: SyntheticOptions | None = None,
    *,
    look: Look | None = None,
) -> Path:
    """Makes one synthetic slide; the same arguments give the same bytes.

    Args:
        path: file to write, ``.svs``.
        kind: one of :data:`~gigatome.slides.synthetic_scene.KINDS`.
        seed: ≥ 0.
        options: size and difficulty.
        look: stain and the like of the patient; drawn from the seed if not given.

    Returns:
        ``path``.

    Raises:
        ConfigError: there is no such kind.
    """
    options = options or SyntheticOptions()
    if kind not in KINDS:
        raise ConfigError(f"there is no synthetic tissue of kind {kind!r}; take one of {', '.join(KINDS)}")
    look = look or Look.draw(generator(seed, "look"))
    with atomic_path(path) as temporary:
        _write(temporary, lay_out(kind, seed, options, look), options, _identity(kind, seed, options, look))
    return Path(path)


def make_cohort(
    folder: str | Path,
    *,
    patients: int = 16,
    slides_per_patient: int | tuple[int, int] = (1, 3),
    options: SyntheticOptions | None = None,
    seed: int = 0,
    threads: int = 2,
    progress: Progress = silent,
) -> Cohort:
    """Makes a cohort of synthetic slides: ``slides/*.svs`` and ``cohort.csv`` (slide, patient, subtype).

    Slides that are already there from the same arguments are kept, so a stopped call goes on where it was.

    Args:
        folder: where to write.
        patients: as many of each class, or one more of the first.
        slides_per_patient: number of slides, or the least and the most, drawn for each patient.
        options: size and difficulty of the slides.
        seed: ≥ 0.
        threads: slides made at a time.
        progress: called after each slide with stage ``"slides"``.

    Returns:
        The cohort, read back from ``cohort.csv``.

    Raises:
        ConfigError: no patient or no slide is asked for.
    """
    low, high = (slides_per_patient,) * 2 if isinstance(slides_per_patient, int) else slides_per_patient
    if patients < 1 or not 1 <= low <= high:
        raise ConfigError(f"{patients} patients with {low} to {high} slides make no cohort; at least one of each")
    folder = Path(folder)
    plan = list(_plan(patients, low, high, options or SyntheticOptions(), seed))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for done, _ in enumerate(pool.map(lambda slide: _ensure(folder / slide.file, slide), plan), start=1):
            progress("slides", done, len(plan))
    table = io.StringIO(newline="")
    rows = [(slide.file, slide.patient, slide.kind) for slide in plan]
    csv.writer(table, lineterminator="\n").writerows([("slide", "patient", "subtype"), *rows])
    write_atomic(folder / "cohort.csv", table.getvalue())
    return Cohort.read(folder / "cohort.csv")


@dataclass(frozen=True)
class _Planned:
    """One slide of a synthetic cohort: its file within the folder, and all that its pixels follow from."""

    file: str
    patient: str
    kind: str
    seed: int
    options: SyntheticOptions
    look: Look


def _plan(patients: int, low: int, high: int, options: SyntheticOptions, seed: int) -> Iterator[_Planned]:
    kinds = [KINDS[index % len(KINDS)] for index in range(patients)]
    for index, turn in enumerate(generator(seed, "classes").permutation(patients).tolist()):
        patient = f"P{index + 1:03d}"
        rng = generator(seed, "patient", index)
        look = Look.draw(rng, pale=bool(rng.random() < options.pale))
        for number in range(int(rng.integers(low, high + 1))):
            own = generator(seed, "slide", index, number)
            file = f"slides/{patient}-{number + 1}.svs"
            yield _Planned(file, patient, kinds[turn], int(own.integers(2**31)), options, look.again(own))


def _ensure(path: Path, slide: _Planned) -> None:
    """Makes the slide unless the very same one is there and whole."""
    if not _is_whole(path, _identity(slide.kind, slide.seed, slide.options, slide.look)):
        make_slide(path, slide.kind, slide.seed, slide.options, look=slide.look)


def _identity(kind: str, seed: int, options: SyntheticOptions, look: Look) -> str:
    return digest({"design": _DESIGN, "kind": kind, "seed": seed, "options": options, "look": look})


def _is_whole(path: Path, identity: str) -> bool:
    if not path.is_file():
        return False
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [page for page in tiff.pages if isinstance(page, tifffile.TiffPage)]
            end = max(sum(chunk) for page in pages for chunk in zip(page.dataoffsets, page.databytecounts, strict=True))
            return f"|ID = {identity}" in pages[0].description and end <= path.stat().st_size
    except Exception:  # whatever is wrong with it, it is made anew
        return False


def _write(path: Path, scene: Scene, options: SyntheticOptions, identity: str) -> None:
    """Level 0, a thumbnail and two smaller levels, in Aperio's order."""
    width, height = scene.width, scene.height
    smaller: list[NDArray[np.uint8]] = []

    def level0() -> Iterator[NDArray[np.uint8]]:
        rows = options.chunk * max(1, _BAND // (options.chunk * width))
        for top in range(0, height, rows):
            band = paint(scene, top, min(rows, height - top))
            smaller.append(_shrink(band))
            yield from _chunks(band, options.chunk)

    def note(image: NDArray[np.uint8] | None) -> str:
        size = f"{width}x{height}" + ("" if image is None else f" -> {image.shape[1]}x{image.shape[0]}")
        return (
            f"Aperio Image Library (gigatome synthetic)\r\n{size} ({options.chunk}x{options.chunk}) "
            f"JPEG/RGB Q={options.quality}|AppMag = {magnification(scene.mpp):g}|MPP = {scene.mpp:.4f}|ID = {identity}"
        )

    common: dict[str, Any] = {
        "photometric": "rgb",
        "compression": "jpeg",
        "compressionargs": {"level": options.quality},
        "metadata": None,
        "software": "gigatome",
        "dtype": np.uint8,
    }
    chunked: dict[str, Any] = common | {"tile": (options.chunk, options.chunk)}
    with tifffile.TiffWriter(path, bigtiff=width * height > _BIG) as tiff:
        tiff.write(level0(), shape=(height, width, 3), description=note(None), **chunked)
        level1 = np.concatenate(smaller)
        level2 = _shrink(level1)
        thumbnail = level1 if max(level1.shape) <= 1024 else level2
        tiff.write(thumbnail, description=note(thumbnail), rowsperstrip=16, **common)
        for image in (level1, level2):
            tiff.write(_chunks(image, options.chunk), shape=image.shape, description=note(image), **chunked)


def _chunks(image: NDArray[np.uint8], side: int) -> Iterator[NDArray[np.uint8]]:
    for top in range(0, image.shape[0], side):
        for left in range(0, image.shape[1], side):
            part = image[top : top + side, left : left + side]
            down, right = side - part.shape[0], side - part.shape[1]
            yield np.pad(part, ((0, down), (0, right), (0, 0)), mode="edge") if down or right else part


def _shrink(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image at a quarter of its width and height, area-averaged; rows and columns over are left out."""
    height, width = image.shape[0] // _STEP, image.shape[1] // _STEP
    if not height or not width:
        return np.empty((height, width, 3), np.uint8)
    cut = image[: height * _STEP, : width * _STEP]
    return np.asarray(cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
