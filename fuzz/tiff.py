"""Fuzzes the TIFF parser, the recognition of dialects and the index cache; see README.md beside this file.

Every input must give an index that points inside the file and survives the cache, or a SlideError, within a second.
"""

import argparse
import contextlib
import random
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1] / "tests")]

try:
    import atheris

    watched = atheris.instrument_imports(include=["gigatome.slides", "xml.etree"], enable_loader_override=False)
except ImportError:
    atheris, watched = None, contextlib.nullcontext()

with watched:
    from gigatome.core.errors import SlideError
    from gigatome.slides import index_cache, vendors
    from gigatome.slides.tiff import TiffFile

KEY = bytes(16)
# Of the processor: other work on the machine shall not look like a finding.
SECONDS = 1.0


class Memory:
    """A blob of bytes in memory; ``remote`` makes the parser read as it does from a bucket."""

    def __init__(self, data: bytes, remote: bool):
        self.uri, self.size, self._data = "https://host/a" if remote else "a", len(data), data

    def read(self, offset, length):
        return self.read_ranges([(offset, length)])[0]

    def read_ranges(self, ranges):
        assert all(offset >= 0 and length >= 0 and offset + length <= self.size for offset, length in ranges)
        return [self._data[offset : offset + length] for offset, length in ranges]


def one_input(data: bytes) -> None:
    """Keeps an input that fails."""
    try:
        check(data)
    except BaseException:
        Path(f"finding-{zlib.crc32(data):08x}").write_bytes(data)
        raise


def check(data: bytes) -> None:
    """Parses one input twice, as a local and as a remote file."""
    results = []
    for remote in (False, True):
        start = time.process_time()
        try:
            tiff = TiffFile(Memory(data, remote), "fuzz")
            index = vendors.recognise(tiff)
            vendors.is_foreign(tiff)
        except SlideError as error:
            index = type(error)
        assert time.process_time() - start < SECONDS, "too slow"
        results.append(index)
    local, remote = results
    if isinstance(local, type) or local is None:
        assert remote is local
        return
    check_index(local, len(data))
    packed = index_cache._packed(local, KEY)
    assert index_cache._packed(index_cache._unpacked(packed, KEY), KEY) == packed
    assert index_cache._packed(remote, KEY) == packed


def check_index(index, size: int) -> None:
    """Everything that readers rely on."""
    assert index.levels
    for level in index.levels:
        rows, columns = -(-level.height // level.chunk_height), -(-level.width // level.chunk_width)
        assert level.width > 0
        assert level.height > 0
        assert level.offsets.shape == level.counts.shape == (rows, columns)
        assert level.counts.dtype == level.offsets.dtype == np.uint32
        held = level.counts > 0
        assert (level.offsets.astype(np.int64) + level.counts <= size)[held].all()
        assert 0 < level.scale_x < 1 << 21
        assert 0 < level.scale_y < 1 << 21
    assert index.mpp is None or min(index.mpp) > 0


def write_seeds(folder: Path) -> None:
    """One small file of each dialect."""
    import tifffile

    import tiff_files as make

    image = make.picture(150, 100)
    padded = make.padded(image, 64)
    rows, columns = padded.shape[0] // 64, padded.shape[1] // 64
    make.write_tiff(folder / "aperio", make.aperio_pages(image))
    make.write_tiff(folder / "big", make.aperio_pages(image, kind="rgb"), order=">", big=True)
    make.write_tiff(folder / "lzw", [make.raw_page(image, 64, 5, 2), make.raw_page(make.halved(image, 2), 64, 8)])
    make.write_tiff(folder / "philips", make.philips_pages(padded, missing=(1,)))
    make.write_tiff(folder / "ventana", make.ventana_pages(image))
    make.write_tiff(folder / "bif", make.ventana_pages(padded, info=make.encode_info(columns, rows)))
    make.write_ndpi(folder / "ndpi", make.ndpi_pages(make.picture(128, 64)))
    with tifffile.TiffWriter(folder / "ome", ome=True) as writer:
        options = {"tile": (64, 64), "photometric": "rgb", "compression": "zlib"}
        physical = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        writer.write(image, subifds=1, metadata=physical, **options)
        writer.write(make.halved(image, 2), subfiletype=1, **options)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Changes a few bytes, words or lengths; for use without atheris."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = (
            rng.randrange(len(changed))
            if rng.random() < 0.3
            else len(changed) - 1 - rng.randrange(min(2000, len(changed)))
        )
        kind = rng.random()
        if kind < 0.4:
            changed[at] = rng.randrange(256)
        elif kind < 0.8:
            width = rng.choice((2, 4, 8))
            value = rng.choice((0, 1, 2, 0xFFFF, 1 << 31, (1 << 32) - 1, len(changed), at, rng.getrandbits(32)))
            changed[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, rng.choice(("little", "big")))
        elif kind < 0.9:
            del changed[at : at + rng.randint(1, 40)]
        else:
            changed[at:at] = changed[at : at + rng.randint(1, 40)]
        if not changed:
            return b""
    return bytes(changed)


def loop(seeds: list[Path], seconds: float, seed: int) -> None:
    """Random mutations for a while."""
    rng = random.Random(seed)
    corpus = [path.read_bytes() for path in seeds]
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        one_input(mutate(rng.choice(corpus), rng))
        count += 1
    print(f"{count} inputs, no finding")


def main() -> None:
    """Without atheris: ``--seconds`` and ``--seed``; with it all arguments but ``--random`` go to libFuzzer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", action="store_true", help="random mutations although atheris is installed")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        write_seeds(Path(folder))
        if atheris and not options.random:
            atheris.Setup([sys.argv[0], *others, folder], one_input)
            atheris.Fuzz()
        else:
            loop(sorted(Path(folder).iterdir()), options.seconds, options.seed)


if __name__ == "__main__":
    main()
