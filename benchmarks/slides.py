"""The slides on which reading is measured: ``python -m benchmarks.slides OUT [--side 30720] [--tissue DIR]``.

A real H&E slide, mosaicked from random crops and flips with a scanner's mild noise, in the three codings that
Aperio's scanners write: JPEG of quality 70, tables apart from the chunks, levels 1/4/16, a thumbnail. The mpp they
state is 0.25 whatever the tissue's own. Where there is no real slide, a synthetic one supplies the tissue.

A band of the mosaic and the second level are held at a time: about 1 GB for 30,720² pixels.
"""

import argparse
import os
import struct
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import tifffile

from gigatome.blob.store import atomic_path
from gigatome.core.seeding import generator
from gigatome.slides.slide import open_slide
from gigatome.slides.synthetic import SyntheticOptions, make_slide

SIDE, MPP, QUALITY, SEED = 30_720, 0.25, 70, 0
TISSUE = Path(os.environ.get("GIGATOME_TISSUE", Path(__file__).resolve().parents[2] / "shared" / "data"))
"""Where real tissue is looked for."""
_REAL = "CMU-1-Small-Region.svs"  # OpenSlide's test data, CC0
_BLOCK = 960  # side of a crop
_BAND = 3840  # rows painted at a time: whole rows of chunks of 240 and of 256, and of crops
_STEP = 4  # from each level to the next
_NOISE = 1.5  # grey levels, standard deviation
_THREADS = 2
_TABLES = (0xC4, 0xDB)  # JPEG's Huffman and quantisation tables
_PHOTOMETRIC, _RGB = 262, 2


@dataclass(frozen=True)
class Coding:
    """How the chunks of a benchmark slide are compressed; ``subsampling`` as JPEG names it, None for RGB."""

    chunk: int
    subsampling: str | None


CODINGS = {
    "ycc422_256": Coding(256, "422"),
    "ycc420_240": Coding(240, "420"),
    "rgb_240": Coding(240, None),
}
"""The benchmark slides by name."""


def ensure_slides(folder: Path, side: int = SIDE, tissue: Path = TISSUE) -> dict[str, Path]:
    """Makes the slides of :data:`CODINGS` that ``folder`` does not hold yet; returns their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    found = next(tissue.rglob(_REAL), None)
    name = found.stem if found else "synthetic"
    source, paths = None, {}
    for key, coding in CODINGS.items():
        path = paths[key] = folder / f"{key}.svs"
        if not _is_made(path, _description(coding, side, name)):
            source = _source(found) if source is None else source
            with atomic_path(path) as temporary:
                _write(temporary, coding, side, source, name)
    return paths


def _source(found: Path | None) -> np.ndarray:
    """Pixels to crop from, of the slide found or of a synthetic one."""
    with tempfile.TemporaryDirectory() as scratch:
        path = found or make_slide(Path(scratch) / "tissue.svs", "glandular", SEED, SyntheticOptions(2200, 2200))
        with open_slide(path) as slide:
            return slide.read_level(0, 0, 0, slide.width, slide.height)


def _description(coding: Coding, side: int, tissue: str, level: int | None = None) -> str:
    kind = "RGB" if coding.subsampling is None else "YCC"
    shrunk = "" if level is None else f" -> {level}x{level}"
    return (
        f"Aperio Image Library v12.0.15 \r\n{side}x{side} [0,0 {side}x{side}] ({coding.chunk}x{coding.chunk})"
        f"{shrunk} JPEG/{kind} Q={QUALITY}|AppMag = 40|MPP = {MPP:.4f}|Tissue = {tissue}|Seed = {SEED}"
    )


def _is_made(path: Path, description: str) -> bool:
    if not path.is_file():
        return False
    with tifffile.TiffFile(path) as tiff:
        return tiff.pages.first.description == description


def _band(source: np.ndarray, side: int, top: int) -> np.ndarray:
    """Rows ``top`` to ``top + _BAND`` of the mosaic, fewer at its foot: uint8 [rows, side, 3]."""
    rng = generator(SEED, "mosaic", top)
    noise = rng.normal(0, _NOISE, (2 * _BLOCK, 2 * _BLOCK, 3)).astype(np.float32)
    output = np.empty((min(_BAND, side - top), side, 3), np.uint8)
    for y in range(0, output.shape[0], _BLOCK):
        for x in range(0, side, _BLOCK):
            block = _crop(source, rng)
            if rng.random() < 0.5:
                block = block.transpose(1, 0, 2)
            block = block[:: rng.choice((1, -1)), :: rng.choice((1, -1))]
            noisy = cv2.add(np.ascontiguousarray(block), _crop(noise, rng), dtype=cv2.CV_8U)
            part = output[y : y + _BLOCK, x : x + _BLOCK]
            part[:] = noisy[: part.shape[0], : part.shape[1]]
    return output


def _crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = (rng.integers(length - _BLOCK + 1) for length in image.shape[:2])
    return image[y : y + _BLOCK, x : x + _BLOCK]


def _shrunk(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[0] // _STEP, image.shape[1] // _STEP
    cut = image[: height * _STEP, : width * _STEP]
    return np.asarray(cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _write(path: Path, coding: Coding, side: int, source: np.ndarray, tissue: str) -> None:
    """Level 0, a thumbnail, levels 1 and 2, in Aperio's order."""
    smaller: list[np.ndarray] = []

    def level0() -> Iterator[np.ndarray]:
        for top in range(0, side, _BAND):
            band = _band(source, side, top)
            smaller.append(_shrunk(band))
            yield band

    describe = partial(_description, coding, side, tissue)
    with ThreadPoolExecutor(_THREADS) as pool, tifffile.TiffWriter(path) as tiff:
        _write_level(tiff, pool, coding, side, level0(), describe())
        level1 = np.concatenate(smaller)
        level2 = _shrunk(level1)
        thumbnail = cv2.resize(level2, (min(768, len(level2)),) * 2, interpolation=cv2.INTER_AREA)
        strips = {"photometric": "rgb", "compression": "jpeg", "rowsperstrip": 16, "metadata": None, "software": None}
        tiff.write(thumbnail, description=describe(len(thumbnail)), **strips)
        for image in (level1, level2):
            _write_level(tiff, pool, coding, len(image), iter([image]), describe(len(image)))
    if coding.subsampling is None:  # tifffile states YCbCr for every JPEG
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            for page in tiff.pages:
                if page.is_tiled:
                    page.tags[_PHOTOMETRIC].overwrite(_RGB)


def _write_level(
    tiff: tifffile.TiffWriter,
    pool: ThreadPoolExecutor,
    coding: Coding,
    side: int,
    bands: Iterator[np.ndarray],
    description: str,
) -> None:
    rgb = coding.subsampling is None
    encode = partial(_encode, coding)
    tables, _ = encode(np.zeros((coding.chunk, coding.chunk, 3), np.uint8))
    chunks = (data for band in bands for _, data in pool.map(encode, _chunks(band, coding.chunk)))
    tiff.write(
        chunks,
        shape=(side, side, 3),
        dtype=np.uint8,
        tile=(coding.chunk, coding.chunk),
        photometric="rgb" if rgb else "ycbcr",
        compression="jpeg",
        jpegtables=tables,
        subsampling={"422": (2, 1), "420": (2, 2), None: None}[coding.subsampling],
        description=description,
        metadata=None,
        software=None,
    )


def _chunks(image: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    for y in range(0, image.shape[0], chunk):
        for x in range(0, image.shape[1], chunk):
            part = image[y : y + chunk, x : x + chunk]
            down, right = chunk - part.shape[0], chunk - part.shape[1]
            yield np.pad(part, ((0, down), (0, right), (0, 0)), mode="edge") if down or right else part


def _encode(coding: Coding, pixels: np.ndarray) -> tuple[bytes, bytes]:
    """The tables and the chunk, each a JPEG stream; the tables are the same for all chunks."""
    rgb = coding.subsampling is None
    whole = imagecodecs.jpeg8_encode(
        np.ascontiguousarray(pixels),
        level=QUALITY,
        colorspace="rgb",
        outcolorspace="rgb" if rgb else "ycbcr",
        subsampling=coding.subsampling or "444",
        optimize=False,
    )
    tables, chunk = [b"\xff\xd8"], [b"\xff\xd8"]
    for marker, segment in _segments(whole):
        if marker in _TABLES:
            tables.append(segment)
        elif marker == 0xC0:
            chunk.append(_renumbered(segment, 10, 3) if rgb else segment)
        elif marker == 0xDA:
            chunk.append(_renumbered(segment, 5, 2) if rgb else segment)
    return b"".join([*tables, b"\xff\xd9"]), b"".join(chunk)


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers with their segments, the last with all that follows it."""
    position, marker = 2, 0
    while marker != 0xDA:
        marker, length = jpeg[position + 1], struct.unpack_from(">H", jpeg, position + 2)[0]
        end = len(jpeg) if marker == 0xDA else position + 2 + length
        yield marker, jpeg[position:end]
        position = end


def _renumbered(segment: bytes, first: int, step: int) -> bytes:
    """With Aperio's component ids 0, 1, 2 of RGB, which no Adobe marker explains."""
    changed = bytearray(segment)
    changed[first : first + 3 * step : step] = bytes(range(3))
    return bytes(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the slides")
    parser.add_argument("--side", type=int, default=SIDE, help="level-0 pixels along each side")
    parser.add_argument(
        "--tissue",
        type=Path,
        default=TISSUE,
        help=f"folder that holds {_REAL}; else the tissue is synthetic (default: $GIGATOME_TISSUE, here %(default)s)",
    )
    options = parser.parse_args()
    for path in ensure_slides(options.out, options.side, options.tissue).values():
        print(path)


if __name__ == "__main__":
    main()
