"""Compares the C extension with libjpeg-turbo on random and on damaged JPEG chunks; see README.md beside this file.

Undamaged chunks must be decoded, to the same pixels. For damaged ones it is counted what becomes of them; cases of
other pixels are kept as files.
"""

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1] / "tests")]

from seeds import SAMPLINGS, encode, picture, restarted, split_tables

from gigatome.core.native import NATIVE
from gigatome.slides.decode import ChunkError, decode_jpeg, jpeg_prefix

EMPTY = b"\xff\xd8\xff\xd9"
KEPT_CASES = 40


@dataclass
class Case:
    """A chunk, the tables common to it and others, and what is read of it."""

    chunk: bytes
    tables: bytes
    shape: tuple[int, int, int]
    rgb: bool
    shrink: int
    rectangle: tuple[int, int, int, int]

    def native(self) -> np.ndarray | None:
        """The pixels, None if the chunk is declined."""
        x, y, width, height = self.rectangle
        counts = np.array([[len(self.chunk)]], np.uint32)
        out = np.full((1, height, width, 3), 77, np.uint8)
        result = NATIVE.read_tiles(
            NATIVE.Tables(jpeg_prefix(self.tables, rgb=self.rgb)),
            [self.chunk],
            np.zeros_like(counts),
            counts,
            (self.shape[1], self.shape[0], self.shape[2], self.rgb),
            np.array([[x, y]], np.int64),
            out,
            self.shrink.bit_length() - 1,
        )
        return None if result[0] != b"\0" else out[0]

    def library(self) -> np.ndarray | None:
        """The same by the decoder that serves where there is no extension."""
        x, y, width, height = self.rectangle
        prefix = jpeg_prefix(self.tables, rgb=self.rgb)
        try:
            whole = decode_jpeg(self.chunk, prefix, self.shape, self.shrink, (y + height) * self.shrink)
            return whole[y : y + height, x : x + width]
        except ChunkError:
            return None


def random_image(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: a picture, noise, extremes, or one colour."""
    kind = rng.integers(5)
    if kind == 0:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == 1:
        return rng.choice(np.array([0, 255], np.uint8), (height, width, 3))
    if kind == 2:
        return np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    image = picture(width, height)
    return image if kind == 3 else 255 - image


def random_case(rng: np.random.Generator) -> Case:
    """An undamaged chunk and a rectangle of it."""
    sides = rng.choice([16, 40, 64, 128, 240, 256, 512], 2) if rng.random() < 0.6 else rng.integers(16, 513, 2)
    width, height = (int(side) for side in (sides if rng.random() < 0.3 else np.minimum(sides, 160)))
    image = np.ascontiguousarray(random_image(rng, width, height))
    sampling, quality, rgb = str(rng.choice(SAMPLINGS)), int(rng.integers(1, 101)), False
    if sampling != "grey" and rng.random() < 0.2:
        data = restarted(image, sampling, quality, int(rng.integers(1, 40)))
    else:
        rgb = sampling != "grey" and bool(rng.random() < 0.3)
        data = encode(image, sampling, quality, optimize=bool(rng.integers(2)), rgb=rgb)
    tables, chunk = split_tables(data) if rng.random() < 0.5 else (EMPTY, data)
    shrink = int(rng.choice([shrink for shrink in (1, 2, 4, 8) if width % shrink == height % shrink == 0]))
    width, height = width // shrink, height // shrink
    size = [width, height] if rng.random() < 0.2 else [int(rng.integers(1, side + 1)) for side in (width, height)]
    corner = int(rng.integers(width - size[0] + 1)), int(rng.integers(height - size[1] + 1))
    shape = (image.shape[0], image.shape[1], 1 if sampling == "grey" else 3)
    return Case(chunk, tables, shape, rgb, shrink, (*corner, *size))


def damaged(chunk: bytes, rng: random.Random) -> bytes:
    """A few changes in the entropy-coded data."""
    start = chunk.index(b"\xff\xda") + 2
    start += int.from_bytes(chunk[start : start + 2], "big")
    data = bytearray(chunk[start:-2])
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, kind = rng.randrange(len(data) or 1), rng.randrange(6)
        if kind <= 1 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2 and data:
            data[at] = rng.randrange(256)
        elif kind == 3:
            del data[at : at + rng.randint(1, 4)]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randint(1, 4))
        else:
            data[at : at + rng.choice((0, 2))] = bytes((0xFF, rng.choice((0xD0, 0xD3, 0xD7, 0xD9, 0x00, 0xE0))))
    return chunk[:start] + bytes(data) + chunk[-2:]


def verdict(native: np.ndarray | None, library: np.ndarray | None) -> str:
    """What became of a damaged chunk."""
    if native is None:
        return "refused by both" if library is None else "refused by the extension only"
    if library is None:
        return "refused by the library only"
    return "accepted, same pixels" if np.array_equal(native, library) else "accepted, other pixels"


def main() -> None:
    """Compares for ``--seconds``; cases of other pixels go to ``--keep``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("differences"))
    options = parser.parse_args()
    rng, breaker = np.random.default_rng(options.seed), random.Random(options.seed)
    end, counts = time.monotonic() + options.seconds, Counter[str]()
    while time.monotonic() < end:
        case = random_case(rng)
        found = verdict(case.native(), case.library())
        if found != "accepted, same pixels":
            raise SystemExit(f"undamaged, but {found}: {case}")
        counts["undamaged, same pixels"] += 1
        for _ in range(6):
            broken = replace(case, chunk=damaged(case.chunk, breaker))
            found = verdict(broken.native(), broken.library())
            counts[found] += 1
            if found == "accepted, other pixels" and counts[found] <= KEPT_CASES:
                options.keep.mkdir(exist_ok=True)
                (options.keep / f"{options.seed}-{counts[found]}").write_text(repr(broken))
    print(*(f"{count:9} {name}" for name, count in sorted(counts.items())), sep="\n")


if __name__ == "__main__":
    main()
