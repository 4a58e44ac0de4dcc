"""A recipe: one complete YAML that says what is trained, on which tiles, how, and what the paper reports for it."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from gigatome import config
from gigatome.core.errors import ConfigError
from gigatome.encoders.vit import EncoderConfig
from gigatome.selfsup.dino import DinoOptions
from gigatome.selfsup.dinov2 import Dinov2Options
from gigatome.selfsup.moco import MocoOptions, default_views
from gigatome.selfsup.views import ViewOptions
from gigatome.tiles.stream import StreamOptions
from gigatome.training.loop import FitOptions

MethodOptions = DinoOptions | Dinov2Options | MocoOptions
"""Options of a method; each has a section of the method's name in a recipe."""

_METHODS: dict[str, type[MethodOptions]] = {"dino": DinoOptions, "dinov2": Dinov2Options, "moco": MocoOptions}


@dataclass(frozen=True)
class Reported:
    """A value that the paper reports for this training.

    Attributes:
        metric: what was measured and on what, such as "BACH balanced accuracy, linear probe (eva)".
        reported: the paper's value.
        measured: ours, once somebody has trained it; None until then.
    """

    metric: str
    reported: float
    measured: float | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that a training depends on, save the data.

    Attributes:
        paper: where the recipe comes from.
        table: table and row it reproduces.
        command: the command that runs it.
        hardware: what the paper, or we, ran it on.
        hours: how long that took; None if the source does not say.
        status: "unverified" until our own measured values stand in ``reproduces``.
        method: the self-supervised method; the recipe has its section, ``dino``, ``dinov2`` or ``moco``, and no other.
        level: what it sees: tiles of slides.
        encoder: the network.
        tiles: what is read from the slides.
        fit: options of the training loop.
        dino: options of DINO.
        dinov2: options of DINOv2.
        moco: options of MoCo.
        reproduces: the values to reach.
        notes: deviations from the paper, one sentence each.
    """

    paper: str
    table: str
    command: str
    hardware: str
    hours: float | None
    status: Literal["unverified", "verified"]
    method: Literal["dino", "dinov2", "moco"]
    level: Literal["tile"]
    encoder: EncoderConfig
    tiles: StreamOptions
    fit: FitOptions
    dino: DinoOptions | None = None
    dinov2: Dinov2Options | None = None
    moco: MocoOptions | None = None
    reproduces: tuple[Reported, ...] = ()
    notes: tuple[str, ...] = ()
    name: str = field(default="", kw_only=True)

    def __post_init__(self):
        sections = [key for key in _METHODS if getattr(self, key) is not None]
        if sections != [self.method]:
            raise ValueError(
                f"method {self.method} needs a section {self.method} and no other method's; "
                f"there is {' and '.join(sections) or 'none'} (all defaults are written {self.method}: {{}})"
            )
        if self.fit.batch_size < 2 * self.fit.grad_accumulation:
            raise ValueError(
                f"fit.batch_size {self.fit.batch_size} in {self.fit.grad_accumulation} parts leaves less than 2 tiles "
                "to a part; a method needs several to tell them apart: use a larger batch_size"
            )
        for key, size in _view_sizes(self.options).items():
            if size > self.tiles.tile_size:
                raise ValueError(
                    f"{self.method}.{key} {size} is larger than the tile of {self.tiles.tile_size} px and would only "
                    "enlarge it; use smaller views, or a larger tiles.tile_size"
                )

    @property
    def options(self) -> MethodOptions:
        """Options of the recipe's method."""
        return getattr(self, self.method)

    def identity(self) -> str:
        """Hash of what decides the trained weights; a run folder is resumed only by the recipe that began it."""
        return config.digest(self.decisive())

    def decisive(self) -> dict[str, Any]:
        """The values that decide the trained weights, as plain nested mappings."""
        parts = {
            key: config.to_dict(getattr(self, key))
            for key in ("method", "level", "encoder", "tiles", self.method, "fit")
        }
        for key in ("threads", "prefetch", "open_slides", "in_flight"):
            parts["tiles"].pop(key)
        for key in ("save_every", "log_every", "evaluate_every", "keep", "device"):
            parts["fit"].pop(key)
        return parts


def load_recipe(source: str | Path, assignments: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        source: name of a built-in recipe such as ``"kaiko/table1_vits16"``, or path of a YAML file.
        assignments: changes such as ``"fit.steps=100"``.

    Raises:
        ConfigError: there is no such recipe; a key is unknown (its path and the nearest right key are named); or a
            value is wrong.
    """
    path = _find(source)
    values = config.read_yaml(path)
    for assignment in assignments:
        config.assign(values, assignment)
    _complete_views(values)
    values.setdefault("name", _name(path))
    return config.parse(Recipe, values, source=str(source))


def _complete_views(values: dict[str, Any]) -> None:
    """Gives the views of a section, in place, their method's own values where they name none."""
    for name, kind in _METHODS.items():
        section = values.get(name)
        if isinstance(section, dict) and isinstance(section.get("views"), dict):
            known = {"version": section["version"]} if name == "moco" and section.get("version") in ("v2", "v3") else {}
            section["views"] = config.to_dict(_views(kind(**known))) | section["views"]


def _views(options: MethodOptions) -> ViewOptions:
    return default_views(options.version) if options.views is None else options.views


def _view_sizes(options: MethodOptions) -> dict[str, int]:
    """Sides of the views that a method makes, by option."""
    views = _views(options)
    sizes = {"views.global_size": views.global_size}
    if views.local_views:
        sizes["views.local_size"] = views.local_size
    if isinstance(options, Dinov2Options) and options.high_resolution_epochs:
        for key in ("high_resolution_global_size", "high_resolution_local_size"):
            sizes[key] = getattr(options, key)
    return sizes


def recipe_names() -> list[str]:
    """Names of the built-in recipes, sorted."""
    return sorted(_name(path) for path in _folder().glob("*/*.yaml"))


def recipe_text(source: str | Path) -> str:
    """The recipe's YAML as it was written, comments included; raises :class:`ConfigError` if there is none."""
    return _find(source).read_text(encoding="utf-8")


def recipe_header(name: str) -> dict[str, Any]:
    """The values of a recipe's YAML, unchecked: quick, for listing."""
    return config.read_yaml(_find(name))


def _folder() -> Path:
    return Path(str(resources.files("gigatome.recipes")))


def _name(path: Path) -> str:
    folder = _folder()
    return path.relative_to(folder).with_suffix("").as_posix() if path.is_relative_to(folder) else path.stem


def _find(source: str | Path) -> Path:
    builtin = _folder() / f"{source}.yaml"
    if builtin.is_file():
        return builtin
    if Path(source).is_file():
        return Path(source)
    near = difflib.get_close_matches(str(source), recipe_names(), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"built in: {', '.join(recipe_names())}"
    raise ConfigError(f"no recipe {source}: neither a built-in one nor a file; {hint}")
