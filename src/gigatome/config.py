"""Strict configuration: YAML in, frozen dataclasses out.

A component's options are a frozen dataclass that stands beside the component. This module turns a mapping into such a
dataclass, with nested ones, and refuses a key that does not exist, naming its path and the nearest right key.
"""

import dataclasses
import difflib
import hashlib
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from gigatome.core.errors import ConfigError

T = TypeVar("T")


def parse(kind: type[T], values: Mapping[str, Any], *, source: str = "configuration") -> T:
    """Builds dataclass ``kind`` from nested mappings.

    Args:
        kind: a dataclass; its fields may be dataclasses again.
        values: the values; lists become tuples where the field says so.
        source: where the values come from, for messages.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    _refuse_unknown(kind, values, "", source)
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"]) or "(top level)"
        got = "" if isinstance(first["input"], Mapping) else f" (got {first['input']!r})"
        raise ConfigError(f"{source}: {path}: {_sentence(first['msg'])}{got}") from error


def load(kind: type[T], path: str | Path, assignments: Sequence[str] = ()) -> T:
    """Reads a YAML file, applies ``key=value`` assignments and builds ``kind``; raises :class:`ConfigError`."""
    values = read_yaml(path)
    for assignment in assignments:
        assign(values, assignment)
    return parse(kind, values, source=str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Mapping in a YAML file; raises :class:`ConfigError` if it is missing, no YAML or no mapping."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of options")
    return values


def assign(values: dict[str, Any], assignment: str) -> None:
    """Applies one ``--set`` assignment such as ``fit.steps=100`` in place; the value is read as YAML."""
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {assignment}: write it as key=value, such as fit.steps=100")
    *parents, last = key.strip().split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {assignment}: {parent} is a value, not a group of options")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment}: the value is not valid YAML") from error


def to_dict(config: Any) -> Any:
    """Plain mappings, lists and scalars of a configuration, as YAML and JSON can hold them."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config


def to_yaml(config: Any) -> str:
    """YAML text of a configuration, keys in the order of its fields."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def digest(config: Any) -> str:
    """Hash of a configuration: 16 hexadecimal digits, the same for equal values whatever their order."""
    text = json.dumps(to_dict(config), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _refuse_unknown(kind: Any, values: Any, path: str, source: str) -> None:
    kind = _dataclass_in(kind)
    if kind is None or not isinstance(values, Mapping):
        return
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            raise ConfigError(f"{source}: unknown key {where}; {hint}")
        _refuse_unknown(hints[key], value, where, source)


def _dataclass_in(kind: Any) -> Any:
    """The dataclass in ``kind``, which may be one or an optional one; None if it holds none."""
    for option in typing.get_args(kind) or (kind,):
        if dataclasses.is_dataclass(option):
            return option
    return None


def _sentence(message: str) -> str:
    return message.removeprefix("Value error, ").rstrip(".")
