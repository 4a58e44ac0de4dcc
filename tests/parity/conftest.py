"""The parity harness: reference outputs of the authors' code, and the seeded weights and inputs that give them.

``pytest tests/parity --parity-dir DIR --parity-seed N`` compares against another folder, made with case seed N.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from seeded import Seeded


@pytest.fixture(scope="session")
def seeded(request) -> Seeded:
    """Weights and inputs of the case seed that was asked for."""
    return Seeded(request.config.getoption("--parity-seed"))


@pytest.fixture(scope="session")
def reference(request):
    """Maps a file stem such as ``"losses"`` to its reference outputs, {key: array}."""
    return lambda stem: _arrays(_file(request, f"{stem}.npz"))


@pytest.fixture(scope="session")
def reference_shapes(request):
    """Maps a file stem such as ``"hipt"`` to the authors' state-dict keys and shapes, {model: {key: shape}}."""
    return lambda stem: json.loads(_file(request, f"{stem}.shapes.json").read_text(encoding="utf-8"))


def _file(request, name: str) -> Path:
    path = request.config.getoption("--parity-dir") / name
    if not path.parent.is_dir():
        raise pytest.UsageError(f"--parity-dir {path.parent}: no such folder")
    if not path.is_file():
        pytest.skip(f"no {name} in {path.parent}")
    return path


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}
