"""Calls the C extension with arguments that make no sense; see README.md beside this file.

Each call must raise one of a few errors or return what it promises, hold no reference and no buffer afterwards, and
leave the interpreter alive; what it does to memory is for AddressSanitizer to see.
"""

import argparse
import importlib.machinery
import importlib.util
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1] / "tests")]

from seeds import encode, picture, split_tables

ALLOWED = (ValueError, TypeError, BufferError, OSError, EOFError, OverflowError, MemoryError, IndexError, RuntimeError)
SIDE, ROWS, COLUMNS = 32, 3, 4
NUMBERS = (-(1 << 63), -(1 << 31), -1, 0, 1, 2, 3, 31, 33, 65535, 65536, (1 << 32) + 1, 1 << 62, (1 << 63) - 1)


def load(path: str | None):
    """The extension at ``path``, or the one that is installed."""
    if path is None:
        from gigatome.core.native import NATIVE

        return NATIVE
    loader = importlib.machinery.ExtensionFileLoader("gigatome._native", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


class Sequence:
    """A list of chunks that does something to the other arguments while it is read."""

    def __init__(self, chunks, rng, arrays):
        self.chunks, self.rng, self.arrays = chunks, rng, arrays
        self.kind, self.at = rng.choice(("change", "length", "raise", "lie", "type", "huge", "calm")), rng.randrange(4)

    def change(self):
        """Writes to some of the arrays."""
        for array in self.arrays:
            if array.flags.writeable and self.rng.random() < 0.5:
                array[...] = self.rng.choice((0, 1, 40, 200))

    def __len__(self):
        if self.kind == "length":
            self.change()
        return 1 << 62 if self.kind == "huge" else len(self.chunks) + (self.kind == "lie")

    def __getitem__(self, number):
        if number == self.at and self.kind == "change":
            self.change()
        if number == self.at and self.kind == "raise":
            raise RuntimeError
        if number == self.at and self.kind == "type":
            return self.rng.choice((None, 3, "text", [], np.zeros((2, 2)), np.zeros(8)[::2]))
        return self.chunks[number]


class Caller:
    """Makes a call that is right, then spoils some of its arguments."""

    def __init__(self, native, folder: Path, seed: int):
        self.native, self.rng = native, random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        image = np.ascontiguousarray(picture(SIDE, SIDE))
        whole = [encode(np.roll(image, 3 * k, axis=1), "422", 80) for k in range(ROWS * COLUMNS)]
        self.tables, chunks = split_tables(whole[0])[0], [split_tables(chunk)[1] for chunk in whole]
        self.chunks = [chunk if k % 5 else whole[k] for k, chunk in enumerate(chunks)]
        self.counts = np.array([len(chunk) for chunk in self.chunks], np.uint32)
        self.counts[-1] = 0
        self.offsets = np.concatenate([[0], np.cumsum(self.counts)[:-1]]).astype(np.uint32)
        path = folder / "chunks"
        path.write_bytes(b"".join(self.chunks))
        self.file = os.open(path, os.O_RDONLY)
        self.closed = os.dup(self.file)
        os.close(self.closed)

    def spoiled(self, value):
        """Another array, or another number, in the place of ``value``."""
        rng = self.rng
        if not isinstance(value, np.ndarray):
            return rng.choice((*NUMBERS, None, "x", b"", 1.5, (), [1]))
        kind = rng.randrange(9)
        if kind == 0:
            with np.errstate(invalid="ignore"):
                return value.astype(rng.choice(("u1", "<i2", ">u4", "f4", "f8", "u8", "?", "c16", "O")))
        if kind == 1:
            return np.asfortranarray(value) if rng.random() < 0.5 else value[..., ::-1]
        if kind == 2:
            return value.reshape(-1) if rng.random() < 0.5 else value[None]
        if kind == 3:
            return np.zeros([rng.choice((0, 1, min(size, 99) + 1)) for size in value.shape], value.dtype)
        if kind == 4:
            return np.zeros((0, rng.choice((1 << 57, 1 << 40, 3)), *([3] * (value.ndim == 3))), value.dtype)
        if kind == 5:
            fixed = value.copy()
            fixed.setflags(write=False)
            return fixed
        if kind == 6 and not value.dtype.hasobject:
            moved = np.empty(value.nbytes + 1, np.uint8)[1:].view(value.dtype).reshape(value.shape)
            moved[...] = value
            return moved
        changed = value.copy()
        if changed.size and changed.dtype.kind in "iu":
            most = np.iinfo(changed.dtype).max
            least = np.iinfo(changed.dtype).min
            for _ in range(rng.randint(1, 3)):
                changed.flat[rng.randrange(changed.size)] = min(max(rng.choice(NUMBERS), least), most)
        return changed

    def damaged(self, chunk: bytes) -> bytes:
        """A chunk with some bytes changed, or cut."""
        data = bytearray(chunk)
        for _ in range(self.rng.randint(0, 4)):
            data[self.rng.randrange(len(data))] = self.rng.randrange(256)
        return bytes(data[: self.rng.choice((len(data), len(data), self.rng.randrange(len(data))))])

    def spoil(self, arguments: list) -> list:
        """Spoils up to two of the arguments."""
        for place in self.rng.sample(range(len(arguments)), self.rng.choice((0, 0, 1, 1, 1, 2))):
            arguments[place] = self.spoiled(arguments[place])
        return arguments

    def read_tiles(self) -> None:
        """One call, of up to three windows, alone or among others."""
        results, chunks = self.read(self.rng.randint(0, 3))
        for status, _ in results:
            assert set(status) <= {0, 1, 2}
        for chunk in chunks:
            if isinstance(chunk, bytearray):
                chunk.append(0)  # a buffer that is held would refuse

    def read(self, others: int) -> tuple[list[tuple[bytes, float]], list[bytes | bytearray]]:
        """Results of ``read_tiles``, or of ``read_many`` if there are others, and the chunks that were given."""
        calls, chunks = zip(*(self.read_arguments() for _ in range(others + 1)), strict=True)
        given = [chunk for some in chunks for chunk in some]
        if not others:
            result = self.call(self.native.read_tiles, calls[0])
            return ([] if result is None else [result]), given
        results = self.call(self.native.read_many, [[tuple(call) for call in calls]])
        return [result for result in results or [] if isinstance(result, tuple)], given

    def read_arguments(self) -> tuple[list, list[bytes | bytearray]]:
        """Arguments of ``read_tiles``, and the chunks among them."""
        rng, shrink = self.rng, self.rng.randrange(4)
        side = SIDE >> shrink
        number, height, width = rng.randint(0, 3), rng.randint(1, 2 * side), rng.randint(1, 2 * side)
        corners = np.array(
            [(rng.randint(0, COLUMNS * side - width), rng.randint(0, ROWS * side - height)) for _ in range(number)],
            np.int64,
        ).reshape(number, 2)
        counts = self.counts.reshape(ROWS, COLUMNS).copy()
        offsets = self.offsets.reshape(ROWS, COLUMNS).astype(rng.choice((np.uint32, np.uint64)))
        out = np.empty((number, height, width, 3), np.uint8)
        kind = [SIDE, SIDE, 3, False]
        if rng.random() < 0.1:
            kind[rng.randrange(4)] = rng.choice(NUMBERS)
        tables = rng.choice((self.native.Tables(self.tables), self.native.Tables(b"\xff\xd8")))
        if rng.random() < 0.05:
            tables = self.spoiled(0)
        touched = [
            row * COLUMNS + column
            for x, y in corners
            for row in range(y // side, (y + height - 1) // side + 1)
            for column in range(x // side, (x + width - 1) // side + 1)
        ]
        chunks = [self.damaged(self.chunks[place]) for place in touched if counts.flat[place]]
        if rng.random() < 0.2:
            chunks = [bytearray(chunk) for chunk in chunks]
        source = rng.choice((self.file, self.file, chunks, Sequence(chunks, rng, (offsets, counts, corners, out))))
        if rng.random() < 0.05:
            source = rng.choice((self.closed, -1, 1 << 40, None, chunks[1:], {}, "text", True))
        arguments = [source, *self.spoil([offsets, counts]), tuple(kind), *self.spoil([corners, out, shrink])]
        return [tables, *arguments], chunks

    def digests(self) -> None:
        """One call."""
        self.call(self.native.digests, [self.rng.choice((self.chunks, [*self.chunks, self.spoiled(0)], self.counts))])

    def resample(self) -> None:
        """One call, with weights of any size."""
        rng = self.rng
        height, width = rng.randint(1, 40), rng.randint(1, 40)
        axes = []
        for size in (width, height):
            count, taps = rng.randint(0, 30), rng.randint(1, 5)
            index = np.array([rng.randrange(size) for _ in range(count * taps)], np.int32).reshape(count, taps)
            weight = np.array([rng.choice((0.5, -3.0, 1e38, np.nan)) for _ in range(count * taps)], np.float32)
            axes += [index, weight.reshape(count, taps), np.array([rng.random()] * count, np.float32)]
        out = np.empty((len(axes[3]), len(axes[0]), 3), np.uint8)
        self.call(self.native.resample, self.spoil([np.zeros((height, width, 3), np.uint8), *axes, out]))

    def make_tables(self) -> None:
        """One call, with damaged tables."""
        self.call(self.native.Tables, [self.damaged(self.rng.choice((self.tables, self.chunks[0])))])

    def call(self, function, arguments: list):
        """Calls; counts what came of it, and sees that no argument is still held."""
        calls = [call for argument in arguments if isinstance(argument, list) for call in argument]
        given = [*arguments, *(argument for call in calls if isinstance(call, tuple) for argument in call)]
        owned = [argument for argument in given if isinstance(argument, np.ndarray | Sequence | self.native.Tables)]
        before = [sys.getrefcount(argument) for argument in owned]
        try:
            result, outcome = function(*arguments), "done"
        except ALLOWED as error:
            result, outcome = None, type(error).__name__
        assert [sys.getrefcount(argument) for argument in owned] == before, "a reference is held"
        self.outcomes[f"{function.__name__}: {outcome}"] += 1
        return result


def main() -> None:
    """Calls for ``--seconds``; ``--extension`` is a shared object to take instead of the installed one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extension")
    options = parser.parse_args()
    native = load(options.extension)
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        caller = Caller(native, Path(folder), options.seed)
        while time.monotonic() < end:
            for call in (caller.read_tiles, caller.read_tiles, caller.resample, caller.make_tables, caller.digests):
                call()
    print(*(f"{count:9} {outcome}" for outcome, count in sorted(caller.outcomes.items())), sep="\n")


if __name__ == "__main__":
    main()
