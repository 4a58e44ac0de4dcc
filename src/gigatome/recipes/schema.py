"""A recipe: one complete YAML that says what is trained, on what, how, and what the paper reports for it."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, final

from gigatome import config
from gigatome.core.errors import ConfigError
from gigatome.embeddings.augmented_stream import AugmentedStreamOptions
from gigatome.embeddings.region_stream import RegionStreamOptions
from gigatome.encoders.giga import GigaConfig
from gigatome.encoders.longnet import Checkpointing
from gigatome.encoders.longvit import LongVitConfig
from gigatome.encoders.region_vit import RegionVitConfig
from gigatome.encoders.vit import EncoderConfig
from gigatome.selfsup.dino import DinoOptions
from gigatome.selfsup.dinov2 import Dinov2Options
from gigatome.selfsup.grid_views import GridViewOptions
from gigatome.selfsup.moco import MocoOptions, default_views
from gigatome.selfsup.simclr import SimclrOptions
from gigatome.selfsup.slide_views import SlideViewOptions
from gigatome.selfsup.views import ViewOptions
from gigatome.tiles.stream import StreamOptions
from gigatome.training.loop import FitOptions

MethodOptions = DinoOptions | Dinov2Options | MocoOptions | SimclrOptions
"""Options of a method; each has a section of the method's name in a recipe."""

_METHODS: dict[str, type[MethodOptions]] = {
    "dino": DinoOptions, "dinov2": Dinov2Options, "moco": MocoOptions, "simclr": SimclrOptions,
}  # fmt: skip


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


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What recipes of all levels have: everything that a training depends on, save the data.

    Attributes:
        paper: where the recipe comes from.
        table: table and row it reproduces.
        command: the command that runs it.
        hardware: what the paper, or we, ran it on.
        hours: how long that took; None if the source does not say.
        status: "unverified" until our own measured values stand in ``reproduces``.
        method: the self-supervised method; the recipe has its section, and no other method's.
        level: what it learns from.
        fit: options of the training loop.
        reproduces: the values to reach.
        notes: deviations from the paper, one sentence each.
        name: of a built-in recipe, or of its file.
    """

    paper: str
    table: str
    command: str
    hardware: str
    hours: float | None
    status: Literal["unverified", "verified"]
    method: str
    level: str
    fit: FitOptions
    reproduces: tuple[Reported, ...] = ()
    notes: tuple[str, ...] = ()
    name: str = ""

    def __post_init__(self):
        sections = [key for key in _METHODS if getattr(self, key, None) is not None]
        if sections != [self.method]:
            raise ValueError(
                f"method {self.method} needs a section {self.method} and no other method's; "
                f"there is {' and '.join(sections) or 'none'} (all defaults are written {self.method}: {{}})"
            )
        if self.fit.epoch_images is None and self.level != "slide":
            raise ValueError(f"fit.epoch_images must be a number, as {_SOURCES[self.level]} have no natural epoch")
        if self.fit.batch_size < 2 * self.fit.grad_accumulation:
            raise ValueError(
                f"fit.batch_size {self.fit.batch_size} in {self.fit.grad_accumulation} parts leaves less than 2 "
                f"{_SOURCES[self.level]} to a part; a method needs several to tell them apart: use a larger batch_size"
            )

    @property
    def options(self) -> MethodOptions:
        """Options of the recipe's method."""
        return getattr(self, self.method)

    @property
    def reads_slides(self) -> bool:
        """Whether it learns from slides themselves, and not from embeddings."""
        return _SOURCES[self.level] == "tiles"

    def identity(self) -> str:
        """Hash of what decides the trained weights; a run folder is resumed only by the recipe that began it."""
        return config.digest(self.decisive())

    def decisive(self) -> dict[str, Any]:
        """The values that decide the trained weights, as plain nested mappings."""
        source = _SOURCES[self.level]
        parts = {
            key: config.to_dict(getattr(self, key))
            for key in ("method", "level", "encoder", source, self.method, "fit")
        }
        for key in ("threads", "prefetch", "open_slides", "in_flight", "resident"):
            parts[source].pop(key, None)
        for key in ("save_every", "log_every", "evaluate_every", "keep", "device"):
            parts["fit"].pop(key)
        return parts


@final
@dataclass(frozen=True, kw_only=True)
class TileRecipe(Recipe):
    """A recipe that learns from tiles of slides.

    Attributes:
        encoder: the network.
        tiles: what is read from the slides.
        dino: options of DINO.
        dinov2: options of DINOv2.
        moco: options of MoCo.
        simclr: options of SimCLR.
    """

    method: Literal["dino", "dinov2", "moco", "simclr"]
    level: Literal["tile"]
    encoder: EncoderConfig
    tiles: StreamOptions
    dino: DinoOptions | None = None
    dinov2: Dinov2Options | None = None
    moco: MocoOptions | None = None
    simclr: SimclrOptions | None = None

    def __post_init__(self):
        super().__post_init__()
        _check_view_sizes(self)


@final
@dataclass(frozen=True, kw_only=True)
class PixelRecipe(Recipe):
    """A recipe that learns from regions of pixels, large tiles of which a LongViT sees every patch.

    Attributes:
        encoder: the network.
        tiles: what is read from the slides.
        dino: options of DINO.
        checkpointing: what is kept of a block for the gradient, as of
            :class:`~gigatome.encoders.longnet.LongNetEncoder`; the weights do not depend on it.
    """

    method: Literal["dino"]
    level: Literal["pixels"]
    encoder: LongVitConfig
    tiles: StreamOptions
    dino: DinoOptions
    checkpointing: Checkpointing = "none"

    def __post_init__(self):
        super().__post_init__()
        _check_view_sizes(self)


@final
@dataclass(frozen=True, kw_only=True)
class RegionRecipe(Recipe):
    """A recipe that learns from regions, grids of the embeddings of tiles.

    Attributes:
        encoder: the network.
        dino: options of DINO.
        regions: what is read from the files of grids.
    """

    method: Literal["dino"]
    level: Literal["region"]
    dino: DinoOptions
    encoder: RegionVitConfig
    regions: RegionStreamOptions = field(default_factory=RegionStreamOptions)


@final
@dataclass(frozen=True)
class SlideEncoderConfig(GigaConfig):
    """A slide encoder, and what it starts from.

    Attributes:
        weights: of a ResNet, whose layer 4 it starts as: a file, or a tile encoder such as ``timm:resnet18.tv_in1k``;
            None for random weights.
    """

    weights: str | None = None

    @property
    def network_config(self) -> GigaConfig:
        """What defines the encoder."""
        return GigaConfig(**{key.name: getattr(self, key.name) for key in fields(GigaConfig)})


@final
@dataclass(frozen=True, kw_only=True)
class SlideRecipe(Recipe):
    """A recipe that learns from slides, sets of the embeddings of their augmented tiles.

    Attributes:
        encoder: the network.
        simclr: options of SimCLR.
        slides: what is read from the augmented embeddings.
    """

    method: Literal["simclr"]
    level: Literal["slide"]
    simclr: SimclrOptions
    encoder: SlideEncoderConfig
    slides: AugmentedStreamOptions = field(default_factory=AugmentedStreamOptions)


AnyRecipe = TileRecipe | PixelRecipe | RegionRecipe | SlideRecipe
"""A recipe of any level."""

_LEVELS: dict[str, type[AnyRecipe]] = {
    "tile": TileRecipe, "pixels": PixelRecipe, "region": RegionRecipe, "slide": SlideRecipe,
}  # fmt: skip
_SOURCES = {"tile": "tiles", "pixels": "tiles", "region": "regions", "slide": "slides"}


def load_recipe(source: str | Path, assignments: Sequence[str] = ()) -> AnyRecipe:
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
    level = values.get("level", "tile")
    if level not in [*_LEVELS]:
        raise ConfigError(f"{source}: level must be {' or '.join(_LEVELS)}, not {level!r}")
    for section in set(_SOURCES.values()) & set(values) - {_SOURCES[level]}:
        raise ConfigError(f"{source}: a recipe of level {level} has a section {_SOURCES[level]}, not {section}")
    where = str(source) if level == "tile" else f"{source}, level {level}"
    _complete_views(values, level, where)
    values.setdefault("name", recipe_name(path))
    return config.parse(_LEVELS[level], values, source=where)


def _complete_views(values: dict[str, Any], level: str, source: str) -> None:
    """Makes the views of each section, in place; those that it does not name are its method's own."""
    for name, kind in _METHODS.items():
        section = values.get(name)
        if not isinstance(section, dict):
            continue
        if level == "region" or kind is SimclrOptions:
            section.setdefault("views", {})
        if isinstance(section.get("views"), dict):
            known = {"version": section["version"]} if name == "moco" and section.get("version") in ("v2", "v3") else {}
            own = _own_views(level, kind(**known))
            given = config.to_dict(own) | section["views"]
            section["views"] = config.parse(type(own), given, source=f"{source}: {name}.views")


def _own_views(level: str, options: MethodOptions) -> ViewOptions | GridViewOptions | SlideViewOptions:
    """Views that a method makes at a level unless it is told otherwise."""
    if level in ("region", "slide"):
        return GridViewOptions() if level == "region" else SlideViewOptions()
    return default_views("v2") if isinstance(options, SimclrOptions) else _views(options)


def _views(options: MethodOptions) -> ViewOptions:
    views = options.views
    if isinstance(options, MocoOptions) and options.views is None:
        views = default_views(options.version)
    if not isinstance(views, ViewOptions):
        raise ValueError(f"views of tiles are made as ViewOptions say, not {type(views).__name__}")
    return views


def _check_view_sizes(recipe: TileRecipe | PixelRecipe) -> None:
    """Raises :class:`ValueError` if a view is larger than a tile."""
    for key, size in _view_sizes(recipe.options).items():
        if size > recipe.tiles.tile_size:
            raise ValueError(
                f"{recipe.method}.{key} {size} is larger than the tile of {recipe.tiles.tile_size} px and would only "
                "enlarge it; use smaller views, or a larger tiles.tile_size"
            )


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
    """Names of the built-in recipes that train an encoder, sorted."""
    return [name for name, path in _built_in().items() if not (is_study(path) or is_finetune(path))]


def study_names() -> list[str]:
    """Names of the built-in recipes that evaluate heads (:mod:`gigatome.recipes.studies`), sorted."""
    return [name for name, path in _built_in().items() if is_study(path)]


def finetune_names() -> list[str]:
    """Names of the built-in recipes that fine-tune on slides (:mod:`gigatome.recipes.finetune_schema`), sorted."""
    return [name for name, path in _built_in().items() if is_finetune(path)]


def is_finetune(path: Path) -> bool:
    """Whether a recipe's file is that of a fine-tuning."""
    return "\noutcome:" in path.read_text(encoding="utf-8")


def is_study(path: Path) -> bool:
    """Whether a recipe's file is that of a study."""
    return "\nstudy:" in path.read_text(encoding="utf-8")


def recipe_text(source: str | Path) -> str:
    """The recipe's YAML as it was written, comments included; raises :class:`ConfigError` if there is none."""
    return recipe_path(source).read_text(encoding="utf-8")


def recipe_header(name: str) -> dict[str, Any]:
    """The values of a recipe's YAML, unchecked: quick, for listing."""
    return config.read_yaml(recipe_path(name))


def recipe_path(source: str | Path) -> Path:
    """File of a built-in recipe, or the path of one's own; raises :class:`ConfigError` if there is none."""
    builtin = _folder() / f"{source}.yaml"
    if builtin.is_file():
        return builtin
    if Path(source).is_file():
        return Path(source)
    near = difflib.get_close_matches(str(source), _built_in(), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"built in: {', '.join(_built_in())}"
    raise ConfigError(f"no recipe {source}: neither a built-in one nor a file; {hint}")


def recipe_name(path: Path) -> str:
    """Name of the recipe in a file: of a built-in one, or that of the file."""
    folder = _folder()
    return path.relative_to(folder).with_suffix("").as_posix() if path.is_relative_to(folder) else path.stem


def _built_in() -> dict[str, Path]:
    """Files of the built-in recipes by name, sorted."""
    return dict(sorted((recipe_name(path), path) for path in _folder().glob("*/*.yaml")))


def _folder() -> Path:
    return Path(str(resources.files("gigatome.recipes")))


def _find(source: str | Path) -> Path:
    """File of a recipe that trains."""
    path = recipe_path(source)
    if is_study(path):
        raise ConfigError(
            f"{source} is a study: it trains heads on embeddings that are there. Run "
            f"gigatome evaluate {source} --embeddings JOB --labels CSV -o OUT"
        )
    if is_finetune(path):
        raise ConfigError(
            f"{source} fine-tunes on labelled slides. Run gigatome train {source} --data SLIDES --labels CSV -o RUN"
        )
    return path
