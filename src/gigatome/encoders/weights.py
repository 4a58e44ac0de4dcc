"""Reading weights that others trained: safetensors, or PyTorch checkpoints without running any code in them."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gigatome.core.errors import RunError, StoreError

_PARTS = ("teacher", "student", "state_dict", "model")
_PREFIXES = ("module.", "backbone.", "encoder.", "vit.")
_HEADS = ("head.", "dino_head.", "mask_token")


def read_weights(path: str | Path, *, part: Literal["teacher", "student"] = "teacher") -> dict[str, Tensor]:
    """Encoder weights in a file.

    Args:
        path: ``.safetensors``, or a checkpoint of PyTorch, which is read with ``weights_only=True``.
        part: which network of a DINO training checkpoint.

    Returns:
        State dict as of :func:`encoder_weights`.

    Raises:
        StoreError: the file cannot be read, or holds more than weights.
        RunError: it holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"{path}: there is no such file of weights")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # DINO stores its command line in the checkpoint; a Namespace of plain values is harmless
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes that are no weights, the unpickler stumbles in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StoreError(f"{path}: cannot be read as weights: {reason}") from error
    if not isinstance(content, Mapping):
        raise RunError(f"{path}: holds no weights but a {type(content).__name__}")
    return encoder_weights(content, source=str(path), part=part)


def encoder_weights(
    content: Mapping[str, Any], *, source: str, part: Literal["teacher", "student"] = "teacher"
) -> dict[str, Tensor]:
    """Encoder weights in the content of a checkpoint.

    A network inside (``part``, ``state_dict`` and the like) is picked, the prefixes ``module.``, ``backbone.``,
    ``encoder.`` and ``vit.`` are stripped, and heads are dropped.

    Raises:
        RunError: no tensors are left.
    """
    order = [part, *(other for other in _PARTS if other != part)]
    while (key := next((key for key in order if isinstance(content.get(key), Mapping)), None)) is not None:
        content = content[key]
    weights = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if any(key.startswith(f"{part}.") for key in weights):
        weights = {key.removeprefix(f"{part}."): weights[key] for key in weights if key.startswith(f"{part}.")}
    for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    weights = {key: value for key, value in weights.items() if not key.startswith(_HEADS)}
    if not weights:
        raise RunError(f"{source}: holds no weights of an encoder")
    return weights


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Puts weights into a model, which they must fit exactly; the model may be on the device ``meta``.

    They are copied in the model's precision, so that float16 files give float32 models.

    Raises:
        RunError: keys are missing or unexpected, or shapes differ; the message names them.
    """
    own = model.state_dict()
    problems = [
        _list("missing", own.keys() - weights.keys()),
        _list("unexpected", weights.keys() - own.keys()),
        _list(
            "of another shape",
            {
                f"{key} ({list(weights[key].shape)} in the file, {list(value.shape)} in the model)"
                for key, value in own.items()
                if key in weights and weights[key].shape != value.shape
            },
        ),
    ]
    if any(problems):
        raise RunError(f"{source}: the weights do not fit the model; {'; '.join(filter(None, problems))}")
    model.load_state_dict({key: weights[key].to(own[key].dtype, copy=True) for key in own}, assign=True)


def _list(kind: str, names: set[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:4])
    return f"{len(names)} {kind}: {shown}{' …' if len(names) > 4 else ''}"
