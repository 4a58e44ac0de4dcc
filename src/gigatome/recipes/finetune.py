"""Fine-tunes a LongViT on images of whole slides, fold by fold, and says how well it predicts."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from gigatome import config
from gigatome.blob.store import write_atomic
from gigatome.core.errors import ConfigError
from gigatome.core.logs import Failure, Progress, log, silent, write_failures
from gigatome.distributed import SequenceGroup, rank, sequence_group
from gigatome.encoders.device import usable_device
from gigatome.encoders.dilated_parallel import Share
from gigatome.encoders.folders import weights_digest
from gigatome.encoders.longvit_zoo import BEST
from gigatome.encoders.slide_vit import SlideVit, SlideVitCard, new_slide_vit, open_slide_vit, save_slide_vit
from gigatome.evaluation.crossval import FoldResult, Setting, result_of
from gigatome.evaluation.image_model import save_image_model, unit_logits
from gigatome.evaluation.outcome_loss import Task, prediction_of, task_of
from gigatome.evaluation.splits import Split
from gigatome.evaluation.study import Arm, Study
from gigatome.evaluation.study_report import write_study
from gigatome.evaluation.units import ClassOutcome, SurvivalOutcome
from gigatome.mil.end_to_end import EndToEnd
from gigatome.recipes.finetune_data import FinetuneData, read_finetune_data
from gigatome.recipes.finetune_folder import claim
from gigatome.recipes.finetune_schema import FinetuneRecipe
from gigatome.recipes.longvit_plan import finetune_advice
from gigatome.slides.cohort import Cohort
from gigatome.tiles.slide_image_stream import Order, SlideImageStream
from gigatome.training.interrupts import Interrupts
from gigatome.training.launch import PATIENT, Control, launched, own_device
from gigatome.training.loop import fit
from gigatome.training.memory import explained_memory
from gigatome.training.options import FitOptions

_PREDICTIONS = "predictions.json"


@dataclass(frozen=True)
class Finetuned:
    """How a fine-tuning ended.

    Attributes:
        folder: the run folder: ``recipe.yaml``, ``splits.tsv``, ``fold_0/`` …, and ``report.html`` at the end.
        done: folds that are finished.
        folds: how many there are.
        study: what was found; None until all folds are finished.
        preempted: a signal stopped it; the same call with ``resume=True`` goes on.
        failures: slides that could not be read, or not whole.
    """

    folder: Path
    done: tuple[int, ...]
    folds: int
    study: Study | None
    preempted: bool = False
    failures: tuple[Failure, ...] = ()


def finetune(
    recipe: FinetuneRecipe,
    data: Cohort | str | Path,
    out: str | Path,
    *,
    labels: str | Path | None = None,
    folds: Sequence[int] = (),
    resume: bool = False,
    command: str = "",
    progress: Progress = silent,
) -> Finetuned:
    """Trains, in each fold, a LongViT on the images of the training part, and predicts the test part.

    Images are read from the slides as they are needed. Folds that are finished are not trained again, so that folds may
    be given to several calls, one after another or side by side, and a last one for the report. Where torchrun has
    started several processes, each calls this with the same arguments, and ``out`` is a folder that all see.

    Args:
        recipe: from :func:`~gigatome.recipes.finetune_schema.load_finetune`.
        data: slides, as :meth:`Cohort.read` takes them.
        out: run folder; must be new unless ``resume`` or ``folds``.
        labels: table of slides, patients and outcomes; by default the cohort's own table has them.
        folds: numbers of the folds to train, from 0; all by default.
        resume: go on from what is there.
        command: that makes it again, for the report.
        progress: called as training goes on.

    Raises:
        RunError: the folder holds a run already, or one of another recipe or other slides; memory does not suffice, and
            the message names a plan that fits; or training fails.
        CohortError: there is no such cohort, or no such column.
        EvaluationError: nothing is left to predict, or the labels do not allow these splits.
        ConfigError: the device does not work, or the batch cannot be cut for so many processes.
        StoreError: a slide, or the weights to start from, cannot be had.
    """
    out = Path(out)
    with launched(recipe.fit.device), Interrupts() as interrupts:
        usable_device(str(own_device(recipe.fit.device)))
        group = sequence_group(recipe.processes)
        options = recipe.cut_for(group.sequences)
        control, progress = Control(PATIENT), progress if rank() == 0 else silent
        learnt = read_finetune_data(recipe, data, labels, control, progress)
        count = len(learnt.splits)
        if unknown := [k for k in folds if not 0 <= k < count]:
            raise ConfigError(f"{recipe.name}: there are folds 0 to {count - 1}, not {unknown[0]}")
        run = _Run(recipe, options, learnt, out, group, control, interrupts, progress)
        record = {"identity": recipe.identity(), "cohort": learnt.digest, "weights": run.check()}
        control.on_first(partial(claim, out, recipe, learnt, record, anew=not (resume or folds)))
        try:
            whole = all(run.fold(k) for k in folds or range(count))
        except _StoppedError:  # the others have had the same signal, and may be anywhere
            return Finetuned(out, run.finished(), count, None, preempted=True, failures=learnt.failures)
        done = run.done()
        lost = tuple(dict.fromkeys([*learnt.failures, *chain.from_iterable(map(run.damaged, done)), *run.failures()]))
        control.on_first(partial(write_failures, out / "failures.csv", lost))
        if not whole:
            return Finetuned(out, done, count, None, preempted=True, failures=lost)
        study = None
        if len(done) == count:
            results = run.results()
            study = run.study(results, command)
            control.on_first(partial(run.write, study, results))
    return Finetuned(out, done, count, study, failures=lost)


class _StoppedError(Exception):
    """A signal came while slides were predicted."""


@final
class _Run:
    """What all folds share."""

    def __init__(
        self,
        recipe: FinetuneRecipe,
        options: FitOptions,
        data: FinetuneData,
        out: Path,
        group: SequenceGroup,
        control: Control,
        interrupts: Interrupts,
        progress: Progress,
    ):
        self._interrupts, self._progress = interrupts, progress
        self._recipe, self._options, self._source = recipe, options, data.source
        self._slides, self._units, self._splits = data.slides, data.units, data.splits
        self._out, self._group, self._control = out, group, control
        self._device = own_device(recipe.fit.device)
        self._share, self._rows = None, None
        if group.size > 1:
            patch = recipe.encoder.patch_size
            self._share = Share(group, recipe.images.image_size // patch)
            self._rows = range(self._share.own.start * patch, self._share.own.stop * patch)
        self._failures: list[Failure] = []

    def check(self) -> str:
        """Makes sure that all folds can be trained; returns a hash of the weights to start from, "" for random ones.

        Raises:
            ConfigError: a fold has fewer units to train on than a batch, or is too short for its warm-up.
            EvaluationError: a fold has too few events for its time bins.
            StoreError: the weights cannot be read.
            RunError: they are of another network.
        """
        recipe, batch = self._recipe, self._recipe.fit.batch_size
        for k, split in enumerate(self._splits.parts):
            if len(split.train) < batch:
                raise ConfigError(
                    f"{recipe.name}: fold {k} trains on {len(split.train)} {self._units.level}s, fewer than a batch; "
                    f"--set fit.batch_size={len(split.train)} or less"
                )
            self._options.of_epoch(len(split.train))
            self._task(k)
        model = self._new(self._task(0))
        return "" if recipe.weights is None else weights_digest("", model.state_dict())

    def folder(self, k: int) -> Path:
        """Of a fold."""
        return self._out / f"fold_{k}"

    def done(self) -> tuple[int, ...]:
        """Folds that are finished, as process 0 sees it."""
        return self._control.gather(self.finished())[0]

    def finished(self) -> tuple[int, ...]:
        """Folds that are finished, as this process sees it."""
        return tuple(k for k in range(len(self._splits)) if (self.folder(k) / _PREDICTIONS).is_file())

    def fold(self, k: int) -> bool:
        """Trains a fold and predicts its test part, unless that is done; false if a signal stopped it."""
        if k in self.done():
            return True
        split, task, folder = self._splits.parts[k], self._task(k), self.folder(k)
        model = self._trained(k, split, task)
        if model is None:
            return False
        with self._explained():
            test = self._logits(model, split.test)
            train = self._logits(model, split.train) if isinstance(self._units.outcome, SurvivalOutcome) else None
        found = {
            "test": test.tolist(),
            "train": [] if train is None else train.tolist(),
            "failures": [asdict(failure) for failure in self.failures()],
        }
        self._failures.clear()
        self._control.on_first(partial(write_atomic, folder / _PREDICTIONS, json.dumps(found)))
        return True

    def failures(self) -> list[Failure]:
        """Slides that the fold at work could not read whole, each once."""
        met = chain.from_iterable(self._control.gather(tuple(self._failures)))
        return list({failure.slide: failure for failure in met}.values())

    def damaged(self, k: int) -> list[Failure]:
        """Slides that a finished fold could not read whole."""
        return [Failure(**failure) for failure in self._said(k)["failures"]]

    def study(self, results: Sequence[FoldResult], command: str) -> Study:
        """What the folds together say."""
        recipe, units = self._recipe, self._units
        setting = Setting(
            recipe.outcome.wanted.spelt, "longvit", recipe.decisive(), "end to end",
            recipe.fit.seed, recipe.outcome.resamples,
        )  # fmt: skip
        result = result_of(units, self._splits, results, setting, unlabelled=len(units.excluded.get("no label", ())))
        said = next(iter(recipe.reproduces), None)
        side = recipe.images.image_size
        label = f"LongViT, {side:,} × {side:,} px"
        arm = Arm(label, result) if said is None else Arm(
            label, result, reported=said.value, reported_sd=said.sd, source=said.source
        )  # fmt: skip
        settings = {
            "recipe": config.to_dict(recipe),
            "identity": recipe.identity(),
            "splits": {"name": self._splits.name, "digest": self._splits.digest},
            "warnings": [*units.warnings, *self._splits.warnings],
        }
        title = f"{recipe.outcome.target or 'survival'} of {self._source}"
        return Study(title, (arm,), settings=settings, excluded=units.excluded, command=command)

    def results(self) -> list[FoldResult]:
        """What was predicted in each fold."""
        found = []
        for k, split in enumerate(self._splits.parts):
            said, task = self._said(k), self._task(k)
            test, train = (
                prediction_of(np.array(said[part], np.float64).reshape(-1, task.outputs), task.classes, task.edges)
                for part in ("test", "train")
            )
            found.append(FoldResult(split, test, train.risk))
        return found

    def write(self, study: Study, results: Sequence[FoldResult]) -> None:
        """Writes the report, and the card by which the folds' models predict new slides together."""
        write_study(study, self._out)
        models = [self._model(k).relative_to(self._out).as_posix() for k in range(len(self._splits))]
        save_image_model(
            self._out, models, self._units, results, study.arms[0].result,
            precision=self._recipe.fit.precision, slides=self._recipe.outcome.slides,
        )  # fmt: skip

    def _said(self, k: int) -> dict[str, Any]:
        return json.loads((self.folder(k) / _PREDICTIONS).read_text(encoding="utf-8"))

    def _task(self, k: int) -> Task:
        return task_of(self._units.outcome, self._splits.parts[k].train, self._recipe.outcome.loss)

    def _trained(self, k: int, split: Split, task: Task) -> SlideVit | None:
        """The fold's model; None if a signal stopped the training."""
        recipe, group, seed = self._recipe, self._group, self._recipe.fit.seed
        order = Order(len(split.train), recipe.fit.batch_size, seed, group.sequence, group.sequences)
        options = self._options.of_epoch(len(split.train))
        options = replace(options, save_every=min(options.save_every, options.epoch_steps))
        model = self._new(task)
        method = EndToEnd(
            model, task.targets, task.criterion, lambda step: split.train[order(step)], self._card(task),
            share=self._share,
        )  # fmt: skip
        validation = None
        if len(split.val):
            options = replace(options, evaluate_every=options.epoch_steps)
            save = partial(save_slide_vit, model, card=self._card(task)) if recipe.outcome.select == "best" else None
            logits = partial(self._logits, model, split.val)
            validation = _Validation(self.folder(k), logits, task, split.val, self._control, save)
        stream = SlideImageStream(
            [self._slides[i] for i in split.train], order, recipe.images,
            seed=seed, rows=self._rows, threads=recipe.threads,
        )  # fmt: skip
        log.info("%s: fold %d of %d, %d units to learn from", self._out, k, len(self._splits), len(split.train))
        with self._explained(), stream:
            result = fit(
                method, stream, options, self.folder(k), resume=True,
                identity=f"{recipe.identity()}, {recipe.processes} processes a slide",
                evaluate=validation, progress=self._progress, group=group,
            )  # fmt: skip
        self._failures += stream.failures
        log.info("%s", stream.report().sentence())
        if result.encoder is None:
            return None
        return open_slide_vit(self._model(k))[0]

    def _new(self, task: Task) -> SlideVit:
        recipe = self._recipe
        return new_slide_vit(
            recipe.encoder, task.outputs, recipe.weights, card=self._card(task),
            drop_path=recipe.drop_path, checkpointing=recipe.checkpointing, seed=recipe.fit.seed,
        )  # fmt: skip

    def _explained(self) -> AbstractContextManager[None]:
        return explained_memory(partial(finetune_advice, self._recipe, self._device))

    def _model(self, k: int) -> Path:
        """Folder of a fold's trained model."""
        return self.folder(k) / (BEST if self._recipe.outcome.select == "best" else "encoder")

    def _card(self, task: Task) -> SlideVitCard:
        recipe, outcome = self._recipe, self._units.outcome
        return SlideVitCard(
            recipe.name.replace("/", "-") or "longvit", recipe.encoder, recipe.images,
            target=recipe.outcome.wanted.spelt, level=self._units.level,
            classes=outcome.classes if isinstance(outcome, ClassOutcome) else (), edges=tuple(task.edges.tolist()),
            source="gigatome, fine-tuned",
        )  # fmt: skip

    def _logits(self, model: SlideVit, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64 [len(indices), outputs]; each group of processes predicts its part of the units."""
        group, recipe = self._group, self._recipe
        mine = indices[group.sequence :: group.sequences]
        logits, failures = unit_logits(
            model, [self._slides[i] for i in mine], recipe.images, device=self._device, precision=recipe.fit.precision,
            share=self._share, rows=self._rows, threads=recipe.threads, progress=self._predicting,
        )  # fmt: skip
        self._failures += failures
        parts = dict(chain.from_iterable(zip(own.tolist(), rows, strict=True)
                                         for own, rows in self._control.gather((mine, logits))))  # fmt: skip
        return np.stack([parts[i] for i in indices.tolist()])

    def _predicting(self, stage: str, done: int, total: int) -> None:
        if self._interrupts.seen is not None:
            raise _StoppedError
        self._progress(stage, done, total)


@final
class _Validation:
    """Loss of the validation part after each epoch, and, with ``save``, the weights of that where it was lowest."""

    def __init__(
        self,
        folder: Path,
        logits: Callable[[], NDArray[np.float64]],
        task: Task,
        val: NDArray[np.int64],
        control: Control,
        save: Callable[[Path], None] | None,
    ):
        self._folder, self._logits, self._criterion = folder, logits, task.criterion
        self._targets = task.targets[torch.from_numpy(val)]
        self._control, self._save, self._record = control, save, folder / "best.json"
        self._lowest = control.gather(self._known())[0]

    def __call__(self, step: int) -> Mapping[str, Any]:
        """``val_loss`` after so many steps; called by :func:`fit`."""
        loss = float(self._criterion(torch.from_numpy(self._logits()), self._targets))
        if self._save is not None and loss < self._lowest:
            self._lowest = loss
            self._control.on_first(partial(self._keep, self._save, step))
        return {"val_loss": loss}

    def _known(self) -> float:
        if not self._record.is_file():
            return float("inf")
        return float(json.loads(self._record.read_text(encoding="utf-8"))["val_loss"])

    def _keep(self, save: Callable[[Path], None], step: int) -> None:
        temporary, best = self._folder / f".tmp-{BEST}", self._folder / BEST
        shutil.rmtree(temporary, ignore_errors=True)
        save(temporary)
        shutil.rmtree(best, ignore_errors=True)
        temporary.rename(best)
        write_atomic(self._record, json.dumps({"step": step, "val_loss": self._lowest}))
