"""Reading weights that others trained: safetensors, or PyTorch checkpoints without running any code in them."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from safetensors.torch import load_file
from torch import Tensor, nn

from gigatome.core.errors import RunError, StoreError
from gigatome.core.logs import log
from gigatome.encoders.hub import HUB, fetch
from gigatome.encoders.layouts import to_timm

_PARTS = ("teacher", "student", "state_dict", "model")
_PREFIXES = ("module.", "model.", "backbone.", "encoder.", "vit.")
_QUERIES = ("encoder_q.", "base_encoder.")  # the trained network of MoCo v2 and v3; the other one is its average
_HEADS = ("head.", "dino_head.", "ibot_head.", "fc.", "mask_token")


def read_weights(path: str | Path, *, part: Literal["teacher", "student"] = "teacher") -> dict[str, Tensor]:
    """Encoder weights in a file.

    Args:
        path: ``.safetensors``, or a checkpoint of PyTorch, which is read with ``weights_only=True``; or
            ``hf-hub:OWNER/NAME``, a repository on the Hugging Face hub, whose weights are fetched and cached.
        part: which network of a DINO training checkpoint.

    Returns:
        State dict as of :func:`encoder_weights`.

    Raises:
        StoreError: the file cannot be fetched or read, or holds more than weights.
        RunError: it holds no weights.
    """
    return encoder_weights(read_content(path), source=str(path), part=part)


def read_content(path: str | Path) -> Mapping[str, Any]:
    """All that a file of weights holds; arguments and errors are those of :func:`read_weights`."""
    if str(path).startswith(HUB):
        path = fetch(str(path).removeprefix(HUB))
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
    return content


def encoder_weights(
    content: Mapping[str, Any], *, source: str, part: Literal["teacher", "student"] = "teacher"
) -> dict[str, Tensor]:
    """Encoder weights in the content of a checkpoint.

    A network inside (``part``, ``state_dict`` and the like, MoCo's query encoder) is picked, the prefixes ``module.``,
    ``model.``, ``backbone.``, ``encoder.`` and ``vit.`` are stripped, heads are dropped, and keys become those of timm
    (:func:`gigatome.encoders.layouts.to_timm`).

    Raises:
        RunError: no tensors are left.
    """
    order = [part, *(other for other in _PARTS if other != part)]
    while (key := next((key for key in order if isinstance(content.get(key), Mapping)), None)) is not None:
        content = content[key]
    weights = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    weights = _only(weights, f"{part}.")
    weights = to_timm(weights)  # before "encoder." is stripped, which is a part of other names
    for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
        for query in _QUERIES:
            weights = _only(weights, query)
    weights = {key: value for key, value in to_timm(weights).items() if not key.startswith(_HEADS)}
    if not weights:
        raise RunError(f"{source}: holds no weights of an encoder")
    return weights


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], *, source: str, pos_embed: Literal["timm", "dino"] = "timm"
) -> None:
    """Puts weights into a model, which they must fit exactly but for the grid of the position embedding.

    They are copied in the model's precision, so that float16 files give float32 models.

    Args:
        model: may be on the device ``meta``.
        weights: with timm's keys.
        source: where they come from, for messages.
        pos_embed: how a position embedding of another grid is interpolated (:func:`resize_grid`). Where the file
            gives class and register tokens positions and the model does not, those are added to the tokens.

    Raises:
        RunError: keys are missing or unexpected, or shapes differ; the message names them.
    """
    own = model.state_dict()
    weights = _fit_positions(own, weights, source, pos_embed)
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


def resize_grid(grid: Tensor, rows: int, columns: int, *, how: Literal["timm", "dino"]) -> Tensor:
    """Position embeddings [1, R, C, dim] of a grid of patches, interpolated to [1, rows, columns, dim].

    ``"timm"`` is bicubic to the exact size with antialiasing, as the authors of DINOv2 do it for models with
    registers. ``"dino"`` is bicubic without antialiasing, as DINO, HIPT and DINOv2 without registers do it: they pass
    (rows + 0.1) / R and no size, and so sample with a step of R / (rows + 0.1).
    """
    channels_first = grid.float().permute(0, 3, 1, 2)
    if how == "dino":
        factors = ((rows + 0.1) / grid.shape[1], (columns + 0.1) / grid.shape[2])
        resized = F.interpolate(channels_first, scale_factor=factors, mode="bicubic")
    else:
        resized = F.interpolate(channels_first, size=(rows, columns), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).to(grid.dtype)


def _fit_positions(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str, how: Literal["timm", "dino"]
) -> Mapping[str, Tensor]:
    """The weights with a position embedding for the model's grid and prefix, if it can be had from theirs."""
    ours, theirs = own.get("pos_embed"), weights.get("pos_embed")
    if ours is None or theirs is None or ours.ndim != 3 or theirs.ndim != 3 or ours.shape == theirs.shape:
        return weights
    our_side, our_prefix = _sides(ours)
    side, prefix = _sides(theirs)
    fitted = dict(weights)
    if prefix != our_prefix:
        tokens = [name for name in ("cls_token", "reg_token") if name in weights][: 1 if prefix == 1 else 2]
        counts = [weights[name].shape[1] for name in tokens]
        if our_prefix or sum(counts) != prefix:
            return weights
        places = theirs[:, :prefix].split(counts, 1)
        fitted |= {name: weights[name] + place for name, place in zip(tokens, places, strict=True)}
    grid = theirs[:, prefix:]
    if side != our_side:
        log.info("%s: position embedding interpolated from %d² to %d² patches", source, side, our_side)
        grid = resize_grid(grid.unflatten(1, (side, side)), our_side, our_side, how=how).flatten(1, 2)
    fitted["pos_embed"] = torch.cat([theirs[:, :our_prefix], grid], 1)
    return fitted


def _sides(positions: Tensor) -> tuple[int, int]:
    """Side of the grid and number of prefix tokens, which never are so many that they complete another square."""
    side = math.isqrt(positions.shape[1])
    return side, positions.shape[1] - side**2


def _only(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights under a prefix, without it; all of them if none has it."""
    found = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    return found or weights


def _list(kind: str, names: set[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:4])
    return f"{len(names)} {kind}: {shown}{' …' if len(names) > 4 else ''}"
