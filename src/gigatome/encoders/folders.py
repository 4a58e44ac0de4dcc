"""Folders of encoders: a file of weights and a card beside it, whatever the encoder is of."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gigatome import config as configuration
from gigatome.blob.store import atomic_path, write_atomic
from gigatome.core.errors import ConfigError, RunError

WEIGHTS_FILE, CARD_FILE = "encoder.safetensors", "encoder.json"

C = TypeVar("C")


def weights_digest(about: str, state: Mapping[str, Tensor]) -> str:
    """Hash of weights and of what else decides an embedding, ``about``: 16 hexadecimal digits."""
    digest = hashlib.sha256(about.encode())
    for key, value in sorted(state.items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def unique_name(name: str, digest: str) -> str:
    """``name`` fit for files and folders, with the beginning of a hash, such as ``kaiko-vits16-5f0c9a1e``."""
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}-{digest[:8]}"


def write_folder(folder: Path, network: nn.Module, content: Mapping[str, Any]) -> None:
    """Writes the weights of ``network``, and then ``content``, which holds the card and the digest."""
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    write_atomic(folder / CARD_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def find_folder(path: Path) -> Path | None:
    """``path``, or ``encoder/`` in it, whichever has a card; None if neither has."""
    return next((folder for folder in (path, path / "encoder") if (folder / CARD_FILE).is_file()), None)


def stated(folder: Path, key: str) -> Any:
    """What the card of a folder says under ``key``; None if it says nothing, or cannot be read."""
    try:
        return json.loads((folder / CARD_FILE).read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None  # whoever opens it says what is wrong


def read_folder(
    folder: Path, card: type[C], *, what: str, refusal: Callable[[str], str]
) -> tuple[C, dict[str, Tensor], str]:
    """Card, weights and digest in a folder.

    Args:
        folder: that has a card.
        card: its type.
        what: the encoder is, for messages.
        refusal: why an encoder of a level is not wanted; "" if it is.

    Raises:
        RunError: it is of another level, or cannot be read.
    """
    try:
        content = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        if reason := refusal(content.get("level", "tile")):
            raise RunError(f"{folder}: {reason}")
        found = configuration.parse(card, content["card"], source=str(folder / CARD_FILE))
        return found, load_file(folder / WEIGHTS_FILE), content["digest"]
    except (OSError, KeyError, TypeError, ValueError, SafetensorError, ConfigError) as error:
        raise RunError(f"{folder}: cannot be read as {what}: {error}") from error


def check_digest(folder: Path, found: str, stated: str) -> None:
    """Raises :class:`RunError` if the weights are not those that the card was written for."""
    if found != stated:
        raise RunError(f"{folder}: {WEIGHTS_FILE} and {CARD_FILE} do not belong together; write the encoder again")


def last_checkpoint(run: Path, what: str) -> Path:
    """Weights in the last checkpoint of a run that has a recipe; raises :class:`RunError` if there are none."""
    steps = sorted(run.glob("checkpoints/step-*/model.safetensors"), key=lambda path: (len(path.parent.name), path))
    if not steps or not (run / "recipe.yaml").is_file():
        raise RunError(f"{run}: is neither the folder of {what} nor a run with a checkpoint")
    return steps[-1]
