"""Weights and inputs that anyone can make again, so that a parity case stores outputs only.

An array is drawn from NumPy's Philox generator, keyed by the CRC-32 of its name and by the case seed.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Seeded:
    """The weights and inputs of one case seed."""

    seed: int

    def input(self, name: str, shape: Sequence[int], scale: float = 1.0) -> np.ndarray:
        """Standard normal float32 input of a case, times ``scale``."""
        return self._draw(f"input:{name}", shape, scale)

    def state(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
        """State dict of the given keys and shapes."""
        return {key: self._parameter(key, tuple(shape)) for key, shape in shapes.items()}

    def _parameter(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        kind = key.rsplit(".", 1)[-1]
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 0
        array = self._draw(key, shape, 1.5 / fan_in**0.5 if kind == "weight" and fan_in else 0.05)
        if kind == "weight" and len(shape) == 1:  # the gain of a norm layer
            return 1.0 + 2.0 * array
        return np.abs(array) + 0.5 if kind == "running_var" else array

    def _draw(self, key: str, shape: Sequence[int], scale: float) -> np.ndarray:
        random = np.random.Generator(np.random.Philox(key=[zlib.crc32(key.encode()), self.seed]))
        return (random.standard_normal(shape) * scale).astype(np.float32)
