"""One random generator for each purpose, all from one seed.

A generator is a pure function of the run's seed and a path of keys such as ``("tiles", step, rank)``: no draw depends
on how many were made before it, on threads or on workers, and a resumed run needs to remember nothing but its step.
"""

import zlib

import numpy as np


def generator(seed: int, *keys: int | str) -> np.random.Generator:
    """NumPy generator (Philox) for one purpose.

    Args:
        seed: the run's seed, ≥ 0.
        *keys: the path that names the purpose; strings are hashed with CRC-32.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=tuple(map(_word, keys)))))


def torch_seed(seed: int, *keys: int | str) -> int:
    """Seed in [0, 2**63) for a ``torch.Generator`` of the same purpose."""
    return int(generator(seed, *keys).integers(0, 2**63 - 1))


def _word(key: int | str) -> int:
    return zlib.crc32(key.encode()) if isinstance(key, str) else int(key)
