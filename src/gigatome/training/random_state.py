"""The global random generators, which networks draw from in dropout and stochastic depth.

The loop seeds them anew at each step from the run's seed, the step and the process, so a checkpoint need not hold them.
"""

import base64
import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seeds the global generators of PyTorch (all devices), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is meant
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """States of the global generators of PyTorch (CPU), NumPy and Python, as JSON can hold them."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the global generator is meant
    python_version, words, python_gauss = random.getstate()
    return {
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "numpy": [kind, [int(key) for key in keys], place, has_gauss, gauss],
        "python": [python_version, list(words), python_gauss],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what :func:`random_state` gave."""
    torch.set_rng_state(torch.from_numpy(np.frombuffer(base64.b64decode(state["torch"]), np.uint8).copy()))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))  # noqa: NPY002 - the global generator is meant
    python_version, words, gauss = state["python"]
    random.setstate((python_version, tuple(words), gauss))


@contextlib.contextmanager
def own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the global generators for the block, and gives them back to the caller as they were."""
    before = random_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            seed_all(seed)
            yield
    finally:
        set_random_state(before)
