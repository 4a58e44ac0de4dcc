"""Checkpoints: one folder a checkpoint, ``step-000100/``, that is there whole or not at all.

A folder holds one ``.safetensors`` file for each group of tensors and ``state.json``: step, run identity, versions,
states of the streams, and size and SHA-256 of every file. It is written under a temporary name, flushed to
the disk and renamed; a run killed at any moment finds its last whole checkpoint. Nothing is pickled.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        streams: state of each process's stream of tiles.
        flops: operations of a step in a process, by the shapes of its views.
        line: of ``metrics.jsonl`` for its step, without what an evaluation finds.
    """

    path: Path
    step: int
    identity: str
    torch: str
    files: Mapping[str, tuple[int, str]]
    streams: Sequence[Mapping[str, list[int]]]
    flops: Mapping[str, int]
    line: Mapping[str, Any]

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

    def misfit(self, error: Exception) -> RunError:
        """The error for a checkpoint that was written for another model."""
        return RunError(f"{self.path}: does not fit the model that the recipe describes: {error}")


def save_checkpoint(
    folder: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    *,
    identity: str,
    keep: int,
    streams: Sequence[Mapping[str, list[int]]] = ({},),
    flops: Mapping[str, int] = {},
    line: Mapping[str, Any] = {},
) -> Path:
    """Writes a checkpoint, then removes all but the last ``keep``.

    Args:
        folder: of all checkpoints of the run; made if needed.
        step: steps finished.
        groups: tensors of each file, such as ``{"model": …, "optimizer": …}``.
        identity: of the run.
        keep: how many to keep, at least 1.
        streams: state of each process's stream of tiles.
        flops: operations of a step in a process, by the shapes of its views.
        line: of ``metrics.jsonl`` for this step, as far as it is known.

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
            "streams": [dict(stream) for stream in streams],
            "flops": dict(flops),
            "line": dict(line),
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
        step, streams, flops = int(state["step"]), list(state["streams"]), dict(state["flops"])
        line = dict(state.get("line", {}))  # without it, metrics.jsonl got the line before
        return Checkpoint(path, step, state["identity"], state["torch"], files, streams, flops, line)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path / _STATE}: cannot be read ({error}); {_way_out(path)}") from error


def sweep(folder: Path) -> None:
    """Removes what killed runs have left unfinished."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        log.info("removing the unfinished checkpoint %s", path)
        shutil.rmtree(path, ignore_errors=True)


def check_fits(checkpoint: Checkpoint, identity: str, processes: int) -> None:
    """Refuses the checkpoint of another run, and warns of another PyTorch.

    Raises:
        RunError: ``identity``, or the number of processes, is not the checkpoint's.
    """
    if checkpoint.identity != identity:
        raise RunError(
            f"{checkpoint.path}: was written by another recipe or with other options ({checkpoint.identity}, not "
            f"{identity}); resume with the recipe it was started with, or give another folder"
        )
    if len(checkpoint.streams) != processes:
        raise RunError(
            f"{checkpoint.path}: was written by {len(checkpoint.streams)} processes, this run has {processes}, so it "
            "would not go on as it began; start torchrun with as many as before"
        )
    if checkpoint.torch != torch.__version__:
        log.warning(
            "%s was written by PyTorch %s, this is %s: the run goes on, but will not be bit for bit the same",
            checkpoint.path,
            checkpoint.torch,
            torch.__version__,
        )


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
