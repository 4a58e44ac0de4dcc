"""How the recipe in a run folder differs from another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gigatome import config

_SHOWN = 3


def differences(folder: Path, mine: Mapping[str, Any]) -> str:
    """The first values of a recipe that are other ones in the ``recipe.yaml`` of a folder, in words."""
    theirs, own = _flat(config.read_yaml(folder / "recipe.yaml")), _flat(mine)
    keys = [key for key in own if own[key] != theirs.get(key)]
    return ", ".join(f"{key} is {theirs.get(key)} there and {own[key]} here" for key in keys[:_SHOWN])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
