"""Writes the seeds of fuzz/decode.c into a folder: one small JPEG of every kind, with and without its own tables."""

import struct
import sys
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import simplejpeg

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

from tiff_files import picture, split_tables

SAMPLINGS = ("444", "422", "420", "grey")
COMPARE_WITH_WHOLE, RGB = 16, 4


def encode(image: np.ndarray, sampling: str, quality: int, *, optimize: bool = False, rgb: bool = False) -> bytes:
    """RGB pixels uint8 [H, W, 3] to a baseline JPEG; grey takes the first component."""
    if sampling == "grey":
        grey = np.ascontiguousarray(image[..., :1])
        return simplejpeg.encode_jpeg(grey, quality, colorspace="GRAY", colorsubsampling="Gray")
    colours = "rgb" if rgb else "ycbcr"
    return bytes(
        imagecodecs.jpeg8_encode(
            image, level=quality, colorspace="rgb", outcolorspace=colours, subsampling=sampling, optimize=optimize
        )
    )


def restarted(image: np.ndarray, sampling: str, quality: int, interval: int) -> bytes:
    """A JPEG with a restart marker every ``interval`` units."""
    kind = {"444": 0x111111, "422": 0x211111, "420": 0x221111}[sampling]
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    return cv2.imencode(".jpg", image[..., ::-1], [*options, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, kind])[1].tobytes()


def wrapped(
    chunk: bytes, tables: bytes = b"", rectangle: tuple[int, int, int, int] = (0, 0, 999, 999), flags: int = 0
) -> bytes:
    """An input: parameters (flags and shrink, x, y, width, height, length of the tables), tables, chunk."""
    return struct.pack("<BBHHHHHHH", flags, 0, 0, *rectangle, len(tables), 0) + tables + chunk


def seeds() -> dict[str, bytes]:
    """Inputs by name."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
    smooth = np.ascontiguousarray(picture(64, 48))
    found = {}
    for sampling in SAMPLINGS:
        for name, image in (("noise", noise), ("smooth", smooth), ("odd", np.ascontiguousarray(smooth[:27, :35]))):
            for optimize in (False, True):
                chunk = encode(image, sampling, 75, optimize=optimize)
                tables, rest = split_tables(chunk)
                for shrink in range(4):
                    anywhere = tuple(int(value) for value in rng.integers(1, 30, 4))
                    blocks = tuple(8 * int(value) for value in rng.integers(1, 3, 4))
                    flags = shrink | RGB * int(rng.integers(2))
                    stem = f"{sampling}-{name}-{'best' if optimize else 'plain'}-{shrink}"
                    found[f"{stem}-own"] = wrapped(chunk, b"", anywhere, flags)
                    found[f"{stem}-common"] = wrapped(rest, tables, blocks, flags | COMPARE_WITH_WHOLE)
        if sampling != "grey":
            for interval in (1, 2, 5):
                chunk = restarted(smooth, sampling, 60, interval)
                found[f"{sampling}-restart-{interval}"] = wrapped(chunk, b"", (3, 5, 40, 30), COMPARE_WITH_WHOLE)
    wide = encode(np.ascontiguousarray(np.resize(smooth, (16, 512, 3))), "422", 30)
    found["wide"] = wrapped(wide, b"", (100, 0, 300, 16), COMPARE_WITH_WHOLE)
    progressive = cv2.imencode(".jpg", smooth, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    found["progressive"] = wrapped(progressive)
    return found


def main() -> None:
    """``seeds.py FOLDER``."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (folder / name).write_bytes(data)
    sys.stdout.write(f"{len(seeds())} seeds\n")


if __name__ == "__main__":
    main()
