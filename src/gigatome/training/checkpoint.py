"""Checkpoints: one folder a checkpoint, ``step-000100/``, that is there whole or not at all.

A folder holds one ``.safetensors`` file for each group of tensors and ``state.json``: step, run identity, versions,
states of the random generators, and size and SHA-256 of every file. It is written under a temporary name, flushed to
the disk and renamed; a run killed at any moment finds its last whole checkpoint. Nothing is pickled.
"""

import base64
import contextlib
import hashlib
import json
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gigatome.blob.store import sync as _sync
from gigatome.core.errors import RunError
from gigatome.core.logs import log
from gigatome.core.version import __version__

_STATE = "state.json"
_PREFIX = "step-"
_UNFINISHED = ".tmp-"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        path: its folder.
        step: steps finished when it was written.
        identity: of the run that wrote it.
        torch: version of PyTorch that wrote it.
        files: size in bytes and SHA-256 of each file of tensors.
        random: states of the generators, as of :func:`random_state`.
        stream: state of the stream of tiles.
    """

    path: Path
    step: int
    identity: str
    torch: str
    files: Mapping[str, tuple[int, str]]
    random: Mapping[str, Any]
    stream: Mapping[str, list[int]]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Tensors of one group, on the CPU; raises :class:`RunError` if the file is not as it was written."""
        file = self.path / f"{group}.safetensors"
        expected = self.files.get(file.name)
        try:
            if expected != _fingerprint(file):
                raise RunError(f"{file}: has changed since it was written; {_way_out(self.path)}")
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{file}: cannot be read ({error}); {_way_out(self.path)}") from error


def save_checkpoint(
    folder: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    *,
    identity: str,
    keep: int,
    stream: Mapping[str, list[int]] | None = None,
) -> Path:
    """Writes a checkpoint, then removes all but the last ``keep``.

    Args:
        folder: of all checkpoints of the run; made if needed.
        step: steps finished.
        groups: tensors of each file, such as ``{"model": …, "optimizer": …}``.
        identity: of the run.
        keep: how many to keep, at least 1.
        stream: state of the stream of tiles.

    Returns:
        The checkpoint's folder.

    Raises:
        RunError: it cannot be written; the checkpoints before it are as they were.
    """
    final = folder / f"{_PREFIX}{step:06d}"
    temporary = folder / f"{_UNFINISHED}{final.name}"
    try:
        temporary.mkdir(parents=True)
        for group, tensors in groups.items():
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(plain, temporary / f"{group}.safetensors")
        state = {
            "step": step,
            "identity": identity,
            "torch": torch.__version__,
            "gigatome": __version__,
            "files": {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())},
            "random": random_state(),
            "stream": dict(stream or {}),
        }
        (temporary / _STATE).write_text(json.dumps(state), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        temporary.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        before = latest_checkpoint(folder)
        stands = f"{before.path.name} stands, and --resume goes on from it" if before else "there is none before it"
        raise RunError(f"{final}: the checkpoint cannot be written ({error}); {stands}") from error
    for old in _folders(folder)[:-keep]:
        _remove(old)
    return final


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The last whole checkpoint in ``folder``, or None; raises :class:`RunError` if its ``state.json`` is damaged."""
    folders = _folders(folder)
    return read_checkpoint(folders[-1]) if folders else None


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's description; raises :class:`RunError` if ``path`` is none, or is damaged."""
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        files = {name: (int(size), str(digest)) for name, (size, digest) in state["files"].items()}
        return Checkpoint(
            path, int(state["step"]), state["identity"], state["torch"], files, state["random"], state.get("stream", {})
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path / _STATE}: cannot be read ({error}); {_way_out(path)}") from error


def sweep(folder: Path) -> None:
    """Removes what killed runs have left unfinished."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        log.info("removing the unfinished checkpoint %s", path)
        shutil.rmtree(path, ignore_errors=True)


def check_fits(checkpoint: Checkpoint, identity: str) -> None:
    """Refuses the checkpoint of another run, and warns of another PyTorch.

    Raises:
        RunError: ``identity`` is not the checkpoint's.
    """
    if checkpoint.identity != identity:
        raise RunError(
            f"{checkpoint.path}: was written by another recipe or with other options ({checkpoint.identity}, not "
            f"{identity}); resume with the recipe it was started with, or give another folder"
        )
    if checkpoint.torch != torch.__version__:
        log.warning(
            "%s was written by PyTorch %s, this is %s: the run goes on, but will not be bit for bit the same",
            checkpoint.path,
            checkpoint.torch,
            torch.__version__,
        )


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
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is meant
            random.seed(seed)
            yield
    finally:
        set_random_state(before)


def _folders(folder: Path) -> list[Path]:
    named = (path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit())
    return sorted(named, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _remove(path: Path) -> None:
    """Removes a checkpoint without ever leaving half of one under its name."""
    doomed = path.with_name(f"{_UNFINISHED}{path.name}")
    try:
        path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        log.warning("%s: the old checkpoint cannot be removed (%s)", path, error)


def _fingerprint(path: Path) -> tuple[int, str]:
    with path.open("rb") as handle:
        return path.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest()


def _way_out(path: Path) -> str:
    return f"remove {path.name} to resume from the checkpoint before it"
