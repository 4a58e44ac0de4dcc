"""Studies as recipes: the heads and splits of a paper's table, to be run on embeddings that are there."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from gigatome import config
from gigatome.core.errors import ConfigError
from gigatome.core.logs import log
from gigatome.embeddings.bags import BagReader
from gigatome.embeddings.regions import TILES
from gigatome.embeddings.slide_store import holds_embeddings, slide_folders
from gigatome.embeddings.store import EmbeddingStore
from gigatome.evaluation.study_options import Reported, StudyOptions
from gigatome.recipes.schema import is_study, recipe_name, recipe_path

Kind = Literal["grids", "regions", "grids + regions", "tiles", "slides"]
"""Grids of tile embeddings; embeddings of regions; the means of both side by side; of tiles; of slides."""

REGION_ENCODER = "REGION_ENCODER"
"""Stands in a recipe for the path of a region encoder, which only its user knows."""

_GIVEN = ("embeddings", "labels", "reproduces", "paper", "notes")


@final
@dataclass(frozen=True, kw_only=True)
class StudyRecipe:
    """The study of a table, save its data.

    Attributes:
        paper: where the recipe comes from.
        table: table and column it reproduces.
        command: the command that runs it.
        hardware: what the paper, or we, ran it on.
        hours: how long that took; None if the source does not say.
        status: "unverified" until somebody has run it on the paper's data.
        reproduces: the values to reach.
        notes: deviations from the paper, one sentence each.
        embeddings: the kinds that its heads run on, whose numbers ``study.only`` names.
        study: options of :class:`StudyOptions`, save embeddings, labels, reproduces, paper and notes.
        name: of a built-in recipe, or of its file.
    """

    paper: str
    table: str
    command: str
    hardware: str
    hours: float | None
    status: Literal["unverified", "verified"]
    reproduces: tuple[Reported, ...]
    notes: tuple[str, ...]
    embeddings: tuple[Kind, ...]
    study: Mapping[str, Any]
    name: str

    def __post_init__(self):
        if stated := [key for key in _GIVEN if key in self.study]:
            raise ValueError(f"study.{stated[0]} is not the study's to state; it stands above, or in the command")


def read_study(source: str | Path) -> StudyRecipe:
    """Reads the recipe of a study.

    Args:
        source: name of a built-in one such as ``"hipt/table1_brca_100"``, or path of a YAML file.

    Raises:
        ConfigError: there is no such recipe, it is none of a study, or a key or value is wrong.
    """
    path = recipe_path(source)
    if not is_study(path):
        raise ConfigError(f"{source} trains an encoder; run gigatome train {source}")
    values = config.read_yaml(path)
    return config.parse(StudyRecipe, {"name": recipe_name(path), **values}, source=str(source))


def load_study(
    source: str | Path,
    *,
    embeddings: Sequence[str | Path],
    labels: str | Path,
    assignments: Sequence[str] = (),
) -> StudyOptions:
    """A study of a paper's table, ready for :func:`~gigatome.evaluation.study_run.run_study`.

    Heads that need more than is given, embeddings of another kind or a region encoder, are left out, with a warning.

    Args:
        source: as of :func:`read_study`.
        embeddings: job directories, folders or tables of embeddings. Their kinds are read off the files, so that one
            job with all that the recipe needs will do.
        labels: table of slides, patients and outcomes.
        assignments: changes of the study, such as ``"options.hipt.fit.epochs=5"`` or ``"split_file=splits"``.

    Raises:
        ConfigError: as of :func:`read_study`; an option of the study is wrong; two of ``embeddings`` are of one kind;
            or nothing is left to run.
        StoreError: embeddings cannot be read.
    """
    recipe = read_study(source)
    study: dict[str, Any] = config.to_dict(recipe.study)
    for assignment in assignments:
        config.assign(study, assignment)
    folders = _by_kind(embeddings, recipe.embeddings)
    here = {k: _joined(kind, folders) for k, kind in enumerate(recipe.embeddings)}
    numbers = {k: place for place, k in enumerate(k for k, path in here.items() if path)}
    only = {head: study.get("only", {}).get(head, list(here)) for head in study["heads"]}
    lacks = {head: _lacks(recipe, study, head, only[head], numbers) for head in study["heads"]}
    heads = [head for head, lack in lacks.items() if not lack]
    if not heads:
        raise ConfigError(
            f"{source}: no head can run on {', '.join(map(str, embeddings))}; it needs {', '.join(recipe.embeddings)}: "
            f"embed the slides with level {'slide' if 'slides' in recipe.embeddings else 'region'}"
        )
    for lack in sorted(set(lacks.values()) - {""}):
        listed = ", ".join(head for head, of in lacks.items() if of == lack)
        log.warning("%s: left out for want of %s: %s", recipe.name, lack, listed)
    left_out = {*recipe.study["heads"], *study["heads"]} - set(heads)
    values = study | {
        "embeddings": [path for path in here.values() if path],
        "labels": str(labels),
        "heads": heads,
        "options": {head: of for head, of in study.get("options", {}).items() if head not in left_out},
        "only": {head: [numbers[k] for k in only[head] if k in numbers] for head in heads},
        "reproduces": [config.to_dict(value) for value in recipe.reproduces if value.head in heads],
        "paper": f"{recipe.paper}, {recipe.table}",
        "notes": list(recipe.notes),
    }
    return config.parse(StudyOptions, values, source=str(source))


def _by_kind(paths: Sequence[str | Path], kinds: Collection[Kind]) -> dict[str, str]:
    """The folder, or table, of each kind of embeddings that a recipe takes."""
    wanted = {part for kind in kinds for part in kind.split(" + ")}
    found: dict[str, str] = {}
    for folder, kind in {folder: kind for path in paths for folder, kind in _sets(Path(path).absolute())}.items():
        if kind in found and kind in wanted:
            raise ConfigError(
                f"{found[kind]} and {folder} are both {kind}; give --embeddings the folder of one of them"
            )
        found[kind] = str(folder)
    return found


def _sets(path: Path) -> Iterator[tuple[Path, str]]:
    """Each set of embeddings at ``path``, and its kind."""
    stores, slides = EmbeddingStore.find(path), slide_folders(path)
    if not stores and not slides and holds_embeddings(path):
        slides = [path]
    yield from ((folder, "slides") for folder in slides)
    for store in stores:
        names = store.names()
        if names and TILES not in store.attributes(names[0]):
            yield store.folder, "tiles"
        elif names:
            yield store.folder, "regions" if len(BagReader(store, names[:1]).shape) == 1 else "grids"


def _joined(kind: Kind, folders: Mapping[str, str]) -> str:
    """The entry of a study for embeddings of a kind; "" if they are not there."""
    parts = [folders.get(part, "") for part in kind.split(" + ")]
    return " + ".join(parts) if all(parts) else ""


def _lacks(
    recipe: StudyRecipe, study: Mapping[str, Any], head: str, wanted: Sequence[int], given: Collection[int]
) -> str:
    """What a head needs and has not, in words; "" if it can run."""
    if not set(wanted) & set(given):
        return " or ".join(recipe.embeddings[k] for k in wanted if 0 <= k < len(recipe.embeddings)) or "embeddings"
    if study.get("options", {}).get(head, {}).get("options", {}).get("weights") == REGION_ENCODER:
        return f"a region encoder, to which options.{head}.options.weights must be set"
    return ""
