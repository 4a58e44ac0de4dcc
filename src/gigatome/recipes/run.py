"""Trains what a recipe says on the slides of a cohort, or on a store of grids or of augmented embeddings."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from gigatome import config
from gigatome.blob.store import write_atomic
from gigatome.core.errors import ConfigError, RunError
from gigatome.core.logs import Failure, Progress, log, silent, write_failures
from gigatome.distributed import rank, world_size
from gigatome.embeddings.augmented_stream import AugmentedStream
from gigatome.embeddings.region_stream import RegionStream
from gigatome.encoders.device import usable_device
from gigatome.encoders.giga import GigaEncoder
from gigatome.encoders.longvit import LongVit
from gigatome.encoders.longvit_zoo import open_longvit
from gigatome.encoders.region_vit import RegionVit
from gigatome.encoders.region_zoo import open_region_encoder
from gigatome.encoders.slide_zoo import open_slide_encoder
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.zoo import load_encoder
from gigatome.recipes.data import Data, open_data
from gigatome.recipes.differences import differences
from gigatome.recipes.longvit_plan import step_advice
from gigatome.recipes.schema import AnyRecipe, PixelRecipe, Recipe, RegionRecipe, SlideRecipe
from gigatome.recipes.watch import Watch, WatchOptions
from gigatome.selfsup.dino import Dino
from gigatome.selfsup.dinov2 import Dinov2
from gigatome.selfsup.moco import Moco, MocoOptions
from gigatome.selfsup.simclr import Simclr, SimclrOptions
from gigatome.tiles.stream import TileStream
from gigatome.training.launch import Control, first_process_first, launched, own_device
from gigatome.training.loop import fit
from gigatome.training.memory import explained_memory

_DATA = {"tile": "slides", "pixels": "slides", "region": "slides or embeddings", "slide": "slides or embeddings"}


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
    recipe: AnyRecipe
    step: int
    finished: bool
    failures: tuple[Failure, ...] = ()

    @property
    def encoder(self) -> TileEncoder | LongVit | RegionVit | GigaEncoder:
        """The trained encoder (the teacher, if there is one), of the recipe's level."""
        if isinstance(self.recipe, SlideRecipe):
            return open_slide_encoder(self.folder)[0]
        if isinstance(self.recipe, PixelRecipe):
            return open_longvit(self.folder)[0]
        if isinstance(self.recipe, RegionRecipe):
            return open_region_encoder(self.folder)[0]
        return load_encoder(self.folder)


def train(
    recipe: AnyRecipe,
    data: Data,
    out: str | Path,
    *,
    resume: bool = False,
    job: str | Path | None = None,
    watch: WatchOptions | None = None,
    progress: Progress = silent,
) -> Run:
    """Trains ``recipe`` on ``data``.

    Tiles are read from the slides as they are needed; nothing but tissue polygons is prepared. Regions are read from
    the grids of tile embeddings that embedding with level region has written, slides from embeddings of augmented
    tiles. Where torchrun has started several processes, each calls this with the same arguments, and ``out`` is a
    folder that all see.

    Args:
        recipe: from :func:`~gigatome.recipes.schema.load_recipe`.
        data: a cohort, or what :meth:`Cohort.read` takes; for a recipe of level region a store of grids, or what
            :meth:`EmbeddingStore.open` takes; for one of level slide a store of augmented embeddings, or what
            :class:`gigatome.embeddings.augmented_files.AugmentedFiles` takes.
        out: run folder; must be new unless ``resume``.
        resume: go on from the newest checkpoint; the same weights result as without the interruption.
        job: job directory with tissue polygons to reuse or to write; ``out`` by default. Regions need none.
        watch: figures of the encoder every ``fit.evaluate_every`` steps and at the end, and an alarm at a collapse.
        progress: called as training goes on.

    Raises:
        RunError: the folder holds a run already, or one of another recipe or other data.
        CohortError: no slide of the cohort can be used.
        StoreError: the store holds nothing that can be used.
        ConfigError: the device does not work, the batch cannot be cut for so many processes, or the data are not of
            the recipe's level or encoder.
    """
    out = Path(out)
    if job is not None and not recipe.reads_slides:
        raise ConfigError(f"a recipe of level {recipe.level} needs no tissue; leave the job directory out")
    if watch is not None and isinstance(recipe, SlideRecipe):
        raise ConfigError("a run of level slide is not watched; its metrics.jsonl tells of accuracy and spread anyway")
    with launched(recipe.fit.device):
        usable_device(str(own_device(recipe.fit.device)))
        recipe.fit.share(world_size())
        progress = progress if rank() == 0 else silent
        source = open_data(recipe, data)
        recipe, method = source.recipe, source.method()
        with first_process_first():  # it finds the tissue for all
            _claim(out, recipe, source.record(), resume)
            stream = source.stream(Path(job) if job else out, progress)
        control = Control()
        _check_slides(out, stream, control)
        run = partial(
            fit, method, stream, recipe.fit, out, resume=resume, identity=recipe.identity(), progress=progress
        )
        with _explained(recipe):
            if watch is None:
                result = run()
            else:
                with _watching(recipe, method, stream, watch, out) as hook:
                    result = run(evaluate=hook, sinks=hook.sinks)
        stream.close()
        log.info("%s", stream.report().sentence())
        failures = tuple(dict.fromkeys(chain.from_iterable(control.gather(tuple(stream.failures)))))
        control.on_first(partial(write_failures, out / "failures.csv", failures))
    return Run(out, recipe, result.step, not result.preempted, failures)


def _explained(recipe: AnyRecipe) -> AbstractContextManager[None]:
    """Says what would fit when a recipe that can be planned runs out of memory in the block."""
    if not isinstance(recipe, PixelRecipe):
        return nullcontext()
    return explained_memory(partial(step_advice, recipe, world_size(), own_device(recipe.fit.device)))


def _watching(
    recipe: Recipe,
    method: Dino | Dinov2 | Moco | Simclr,
    stream: TileStream | RegionStream | AugmentedStream,
    watch: WatchOptions,
    out: Path,
) -> Watch:
    return Watch(
        method.teacher.encoder,
        stream,
        watch,
        out,
        steps=recipe.fit.total_steps,
        seed=recipe.fit.seed,
        precision=recipe.fit.precision,
        prototypes=None if isinstance(recipe.options, MocoOptions | SimclrOptions) else recipe.options.out_dim,
        name=recipe.name,
        config=recipe.decisive(),
    )


def plan(recipe: AnyRecipe, data: Data) -> dict[str, object]:
    """What :func:`train` would do, without doing it: checks the data, builds the networks, counts.

    Returns:
        Slides, patients or regions, steps, images seen, parameters of the student, and the recipe's identity.
    """
    source = open_data(recipe, data)
    recipe = source.recipe
    return {
        **source.facts(),
        "steps": recipe.fit.total_steps,
        "images": recipe.fit.total_steps * recipe.fit.batch_size,
        "student parameters": sum(p.numel() for p in source.method().parameters() if p.requires_grad),
        "identity": recipe.identity(),
    }


def _claim(out: Path, recipe: Recipe, data: Mapping[str, Any], resume: bool) -> None:
    """Takes a folder for this run, or makes sure that it is this run's already."""
    record = out / "run.yaml"
    mine = {"identity": recipe.identity(), **data}
    if record.is_file():
        theirs = yaml.safe_load(record.read_text(encoding="utf-8"))
        if theirs["identity"] != mine["identity"]:
            raise RunError(f"{out} holds a run of another recipe ({differences(out, recipe.decisive())}); "
                           "choose another folder, or the recipe in its recipe.yaml")  # fmt: skip
        if theirs["cohort"] != mine["cohort"]:
            raise RunError(f"{out} holds a run on other {_DATA[recipe.level]}; choose another folder, or its own data")
        if not resume and ((out / "checkpoints").exists() or (out / "metrics.jsonl").exists()):
            raise RunError(f"{out} holds this run already; pass --resume to go on with it, or choose another folder")
        return
    if out.is_dir() and (out / "checkpoints").exists():
        raise RunError(f"{out} holds checkpoints of something else; choose another folder")
    write_atomic(out / "recipe.yaml", config.to_yaml(recipe))
    write_atomic(record, config.to_yaml(mine))


def _check_slides(out: Path, stream: TileStream | RegionStream | AugmentedStream, control: Control) -> None:
    """Makes sure that all processes draw from the same slides, so that their parts make up the batches of the seed."""
    lost = control.gather(sorted({failure.slide for failure in stream.failures}))
    for number, theirs in enumerate(lost):
        if theirs != lost[0]:
            slide = sorted(set(theirs) ^ set(lost[0]))[0]
            raise RunError(
                f"{out}: processes 0 and {number} cannot use the same slides: one has failed with {slide}; see to it "
                "that all can read the data and the job directory"
            )
