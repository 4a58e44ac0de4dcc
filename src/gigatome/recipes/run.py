"""Trains what a recipe says on the slides of a cohort."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from gigatome import config
from gigatome.blob.store import write_atomic
from gigatome.core.errors import RunError
from gigatome.core.job import Job
from gigatome.core.logs import Failure, Progress, log, silent, write_failures
from gigatome.encoders.device import usable_device
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.zoo import load_encoder
from gigatome.recipes.schema import Recipe
from gigatome.selfsup.dino import Dino
from gigatome.slides.cohort import Cohort
from gigatome.tiles.stream import TileStream
from gigatome.training.loop import fit


@dataclass(frozen=True)
class Run:
    """A finished, or stopped, training.

    Attributes:
        folder: the run folder: ``recipe.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``encoder/``.
        recipe: what was trained.
        step: steps done.
        finished: False if a signal ended the run early; the same call with ``resume=True`` goes on.
        failures: slides that could not be used.
    """

    folder: Path
    recipe: Recipe
    step: int
    finished: bool
    failures: tuple[Failure, ...] = ()

    @property
    def encoder(self) -> TileEncoder:
        """The trained encoder (the teacher)."""
        return load_encoder(self.folder)


def train(
    recipe: Recipe,
    data: Cohort | str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    job: str | Path | None = None,
    progress: Progress = silent,
) -> Run:
    """Trains ``recipe`` on the slides of ``data``.

    Tiles are read from the slides as they are needed; nothing but tissue polygons is prepared.

    Args:
        recipe: from :func:`~gigatome.recipes.schema.load_recipe`.
        data: a cohort, or what :meth:`Cohort.read` takes.
        out: run folder; must be new unless ``resume``.
        resume: go on from the newest checkpoint; the same weights result as without the interruption.
        job: job directory with tissue polygons to reuse or to write; ``out`` by default.
        progress: called as training goes on.

    Raises:
        RunError: the folder holds a run already, or one of another recipe or other slides.
        CohortError: no slide of the cohort can be used.
    """
    cohort, out = Cohort.read(data), Path(out)
    usable_device(recipe.fit.device)
    method = build_method(recipe)
    _claim(out, recipe, cohort, resume)
    stream = TileStream(
        cohort,
        recipe.tiles,
        batch_size=recipe.fit.batch_size,
        seed=recipe.fit.seed,
        job=Job(Path(job) if job else out),
        progress=progress,
    )
    result = fit(method, stream, recipe.fit, out, resume=resume, identity=recipe.identity(), progress=progress)
    stream.close()
    log.info("%s", stream.report().sentence())
    write_failures(out / "failures.csv", stream.failures)
    return Run(out, recipe, result.step, not result.preempted, tuple(stream.failures))


def plan(recipe: Recipe, data: Cohort | str | Path) -> dict[str, object]:
    """What :func:`train` would do, without doing it: checks the cohort, builds the networks, counts.

    Returns:
        Slides, patients, steps, images seen, parameters of the student, and the recipe's identity.
    """
    cohort = Cohort.read(data)
    method = build_method(recipe)
    return {
        "slides": len(cohort),
        "patients": len({slide.patient for slide in cohort}),
        "steps": recipe.fit.total_steps,
        "images": recipe.fit.total_steps * recipe.fit.batch_size,
        "student parameters": sum(p.numel() for p in method.parameters() if p.requires_grad),
        "identity": recipe.identity(),
    }


def build_method(recipe: Recipe) -> Dino:
    """The method that a recipe trains, with its initial weights."""
    name = recipe.name.replace("/", "-") or None
    return Dino(recipe.encoder, recipe.dino, seed=recipe.fit.seed, name=name, mpp=recipe.tiles.mpp)


def _claim(out: Path, recipe: Recipe, cohort: Cohort, resume: bool) -> None:
    """Takes a folder for this run, or makes sure that it is this run's already."""
    record = out / "run.yaml"
    mine = {"identity": recipe.identity(), "cohort": config.digest([(s.name, s.mpp) for s in cohort])}
    if record.is_file():
        theirs = yaml.safe_load(record.read_text(encoding="utf-8"))
        if theirs["identity"] != mine["identity"]:
            raise RunError(f"{out} holds a run of another recipe ({', '.join(_differences(out, recipe))}); "
                           "choose another folder, or the recipe in its recipe.yaml")  # fmt: skip
        if theirs["cohort"] != mine["cohort"]:
            raise RunError(f"{out} holds a run on other slides; choose another folder, or its cohort")
        if not resume and ((out / "checkpoints").exists() or (out / "metrics.jsonl").exists()):
            raise RunError(f"{out} holds this run already; pass --resume to go on with it, or choose another folder")
        return
    if out.is_dir() and (out / "checkpoints").exists():
        raise RunError(f"{out} holds checkpoints of something else; choose another folder")
    write_atomic(out / "recipe.yaml", config.to_yaml(recipe))
    write_atomic(record, config.to_yaml(mine))


def _differences(out: Path, recipe: Recipe) -> list[str]:
    theirs = _flat(config.read_yaml(out / "recipe.yaml"))
    mine = _flat(recipe.decisive())
    keys = [key for key in mine if mine[key] != theirs.get(key)]
    return [f"{key} is {theirs.get(key)} there and {mine.get(key)} here" for key in keys[:3]]


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
