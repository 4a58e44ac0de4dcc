from dataclasses import dataclass, field

import pytest

from gigatome import config
from gigatome.core.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    sides: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    name: str
    steps: int = 10
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None


def test_nested_values_become_frozen_dataclasses():
    value = config.parse(Outer, {"name": "a", "inner": {"rate": 1, "sides": [3]}, "maybe": {"rate": 2}})
    assert value == Outer("a", 10, Inner(1.0, (3,)), Inner(2.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "inner": {"rates": 1}}, r"r\.yaml: unknown key inner\.rates; did you mean rate\?"),
        ({"name": "a", "maybe": {"side": 1}}, r"unknown key maybe\.side; did you mean sides\?"),
        ({"name": "a", "zzz": 1}, "unknown key zzz; known here: name, steps, inner, maybe"),
        ({"name": "a", "steps": "many"}, r"steps: .*valid integer.*'many'"),
        ({"steps": 3}, "name: Field required"),
    ],
)
def test_wrong_keys_and_values_name_their_path(values, message):
    with pytest.raises(ConfigError, match=message):
        config.parse(Outer, values, source="r.yaml")


def test_load_applies_assignments(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: a\nsteps: 3\n")
    value = config.load(Outer, path, ["inner.rate=0.5", "inner.sides=[4, 5]", "steps=7"])
    assert value == Outer("a", 7, Inner(0.5, (4, 5)))


@pytest.mark.parametrize(
    ("text", "assignment", "message"),
    [
        ("name: a", "steps", "write it as key=value"),
        ("name: a", "name.x=1", "name is a value"),
        ("name: a", "steps=[", "not valid YAML"),
        ("- a", "steps=1", "must hold a mapping"),
        ("name: [", "steps=1", "not valid YAML"),
    ],
)
def test_bad_files_and_assignments(tmp_path, text, assignment, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(Outer, path, [assignment])


def test_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        config.read_yaml(tmp_path / "none.yaml")


def test_digest_sees_values_not_order():
    assert config.digest({"a": 1, "b": (1, 2)}) == config.digest({"b": [1, 2], "a": 1})
    assert config.digest(Outer("a")) != config.digest(Outer("b"))
    assert len(config.digest({})) == 16


def test_yaml_round_trip():
    value = Outer("a", maybe=Inner(2.0))
    import yaml

    assert config.parse(Outer, yaml.safe_load(config.to_yaml(value))) == value
