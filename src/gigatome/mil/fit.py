"""The loop that trains any :class:`BagModel` on any :class:`BagSource`, and the one that predicts.

Bags of any length are packed side by side, up to a number of instances, and read by a thread while the last pack is
computed. The gradient of a step does not depend on how its bags are packed: each bag counts alike, unless the criterion
compares bags with one another (:class:`~gigatome.mil.losses.Comparing`), which it can do within a pack only.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigatome.core.errors import ConfigError, EvaluationError, RunError
from gigatome.core.logs import Progress, log, silent
from gigatome.core.seeding import generator, torch_seed
from gigatome.encoders.device import usable_device
from gigatome.mil.dropout import with_fast_dropout
from gigatome.mil.losses import Comparing
from gigatome.mil.model import BagBatch, BagModel, Criterion, Targets
from gigatome.mil.packs import balanced, chunks, packs, read
from gigatome.mil.source import BagSource
from gigatome.training.optim import OptimizerName, clip_gradients, make_optimizer, set_rates, step_if
from gigatome.training.random_state import own_random_state
from gigatome.training.schedules import Clock, cosine

_PATIENCE = 3  # steps in a row that may be without a finite loss and gradient
_LOOK_EVERY = 32  # steps from one look at whether they were finite to the next, as each look waits for the device


@dataclass(frozen=True)
class BagFitOptions:
    """How a model of bags is trained; the defaults are those of HIPT's and MCAT's code.

    Attributes:
        epochs: passes over the training bags.
        lr: learning rate.
        weight_decay: of weights; biases and norms do not decay.
        optimizer: ``"adam"`` (decay joins the gradient), ``"adamw"``, ``"sgd"`` or ``"lars"``.
        batch_bags: bags of a batch.
        accumulate: batches of a step; the gradient is the mean over all their bags.
        sampling: ``"shuffle"``, each bag once an epoch, or ``"balanced"``, as many bags drawn with replacement so that
            each class, or each time bin of events and of censored, is as likely.
        instances: the most instances of a bag in training, drawn anew each time; None for all. Prediction takes all.
        max_instances: at which a batch is cut into packs to spare memory; one larger bag is a pack. Tiles count, where
            an instance is a region of them too.
        schedule: of the learning rate: ``"constant"``, or ``"cosine"`` down to 0.
        warmup: epochs in which it rises from 0.
        patience: epochs without a lower validation loss after which training ends; None for never.
        select: weights of the ``"last"`` epoch or of the ``"best"``, which has the lowest validation loss.
        clip: greatest norm of a step's gradient; None for no clipping.
        precision: of the forward pass; weights are float32 always.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` …
    """

    epochs: int = 20
    lr: float = 2e-4
    weight_decay: float = 1e-5
    optimizer: OptimizerName = "adam"
    batch_bags: int = 1
    accumulate: int = 1
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    instances: int | None = None
    max_instances: int = 65_536
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: float = 0.0
    patience: int | None = None
    select: Literal["last", "best"] = "last"
    clip: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"

    @classmethod
    def hipt(cls) -> Self:
        """As HIPT's code trains on classes: a step of Adam after each bag, classes drawn alike.

        The code divides the loss by 32 and does not accumulate; Adam does not see that.
        """
        return cls(sampling="balanced")

    @classmethod
    def hipt_paper(cls) -> Self:
        """As HIPT's paper says: a rate 50 times that of its code, and 32 bags to a step."""
        return cls(sampling="balanced", lr=0.01, accumulate=32)

    @classmethod
    def hipt_survival(cls) -> Self:
        """As HIPT's tables of survival were made, by MCAT's code: 32 bags to a step."""
        return cls(sampling="balanced", accumulate=32)

    def __post_init__(self):
        for name in ("epochs", "batch_bags", "accumulate", "instances", "max_instances", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not self.lr > 0 or self.weight_decay < 0 or (self.clip is not None and not self.clip > 0):
            raise ValueError("lr and clip must be positive and weight_decay not negative")
        if not 0 <= self.warmup < self.epochs:
            raise ValueError(f"warmup must be less than the {self.epochs} epochs, not {self.warmup:g}")


@final
@dataclass(frozen=True)
class Epoch:
    """What one pass over the training bags gave.

    Attributes:
        epoch: its number, from 1.
        loss: mean training loss; NaN if no step of the epoch was finite.
        val_loss: of the validation bags, by the criterion alone; None without any.
        lr: learning rate of its last step.
        skipped: steps that were left out because they were not finite.
    """

    epoch: int
    loss: float
    val_loss: float | None
    lr: float
    skipped: int


@final
@dataclass(frozen=True)
class BagFit:
    """How a training went.

    Attributes:
        history: of each epoch.
        best_epoch: number, from 1, of the epoch whose weights the model now has.
    """

    history: tuple[Epoch, ...]
    best_epoch: int


@final
@dataclass(frozen=True, eq=False)
class BagPredictions:
    """What a model says of N bags.

    Attributes:
        logits: float64 [N, outputs].
        attention: of each bag float32 [instances, K]; None if the model has none, or it was not asked for.
    """

    logits: NDArray[np.float64]
    attention: tuple[NDArray[np.float32], ...] | None = None


def fit_bags(
    model: BagModel,
    source: BagSource,
    targets: Targets,
    criterion: Criterion,
    options: BagFitOptions | None = None,
    *,
    train: NDArray[np.int64],
    val: NDArray[np.int64] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> BagFit:
    """Trains ``model`` in place; afterwards it is in evaluation mode, on ``options.device``.

    A step whose loss or gradient is not finite leaves weights and optimiser as they are; after the third in a row
    training ends. On a CPU the result is a function of the arguments and the number of threads.

    Args:
        model: what to train, with its initial weights.
        source: of bags.
        targets: of all bags of ``source``, in their order.
        criterion: loss of logits, such as of :mod:`gigatome.mil.losses`.
        options: of the training.
        train: int64, indices of the training bags.
        val: indices of the validation bags, for ``patience`` and ``select="best"``.
        seed: of order, drawn instances and dropout.
        progress: told of every epoch.

    Raises:
        ConfigError: options that need validation bags without any, or a criterion that compares bags and batches of
            one; or the device cannot be used.
        EvaluationError: there is no training bag, targets are not of these bags, or a bag is in both parts.
        StoreError: a bag cannot be read.
        RunError: three steps in a row were not finite; the message names their bags.
    """
    options = options or BagFitOptions()
    _check(source, targets, criterion, options, train, val)
    device = usable_device(options.device)
    with own_random_state(torch_seed(seed, "mil"), device), with_fast_dropout(model):
        model.to(device)
        training = _Training(model, source, targets.to(device), criterion, options, seed)
        history: list[Epoch] = []
        best, lowest, weights = 0, np.inf, {}
        for number in range(1, options.epochs + 1):
            loss, skipped, lr = training.epoch(number, train)
            val_loss = None if val is None or not len(val) else training.val_loss(val)
            history.append(Epoch(number, loss, val_loss, lr, skipped))
            progress("epoch", number, options.epochs)
            if val_loss is not None and (val_loss < lowest):
                best, lowest = number, val_loss
                if options.select == "best":
                    weights = copy.deepcopy(model.state_dict())
            if options.patience is not None and number - best >= options.patience:
                log.info("no lower validation loss for %d epochs: training ends after %d", options.patience, number)
                break
        if options.select == "best" and weights:
            model.load_state_dict(weights)
    model.eval()
    return BagFit(tuple(history), best if options.select == "best" and best else len(history))


@torch.inference_mode()
def predict_bags(
    model: BagModel,
    source: BagSource,
    indices: Sequence[int] | NDArray[np.int64],
    options: BagFitOptions | None = None,
    *,
    attention: bool = False,
) -> BagPredictions:
    """What ``model`` says of some bags, all instances of each; its mode and device are given back as they were.

    Args:
        model: trained.
        source: of bags.
        indices: which bags, in this order.
        options: of which ``max_instances``, ``precision`` and ``device`` count.
        attention: give the attention of each instance too.

    Raises:
        ConfigError: the device cannot be used.
        StoreError: a bag cannot be read.
        RunError: logits of a bag are not finite; the message names it.
    """
    options = options or BagFitOptions()
    device = usable_device(options.device)
    model.to(device)
    mode, logits, weights = model.training, [], []
    model.eval()
    cut = packs(np.asarray(indices, np.int64), source.sizes * source.tiles, len(indices), options.max_instances)
    try:
        for _, batch in read(source, cut, model.needs, device):
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                output = model(batch)
            logits.append(output.logits.double().cpu())
            if attention and output.attention is not None:
                weights += [part.numpy() for part in output.attention.float().cpu().split(batch.sizes.tolist())]
    finally:
        model.train(mode)
    values = torch.cat(logits).numpy() if logits else np.zeros((0, 0))
    wrong = [source.names[int(indices[int(row)])] for row in np.flatnonzero(~np.isfinite(values).all(1))]
    if wrong:
        raise RunError(f"the model's output is not finite for {_listed(wrong)}; train it again with a lower rate")
    return BagPredictions(values, tuple(weights) if weights else None)


@final
class _Training:
    """A model, its optimiser and where they stand."""

    def __init__(
        self,
        model: BagModel,
        source: BagSource,
        targets: Targets,
        criterion: Criterion,
        options: BagFitOptions,
        seed: int,
    ):
        self.model, self.source, self.targets, self.criterion = model, source, targets, criterion
        self.options, self.seed, self.device = options, seed, targets.y.device
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(options.optimizer, model.named_parameters())
        self.streak: list[list[str]] = []  # bags of the last steps in a row that were not finite

    def epoch(self, number: int, train: NDArray[np.int64]) -> tuple[float, int, float]:
        """Mean loss, steps left out, and last learning rate of one pass over the training bags."""
        options, model = self.options, self.model
        model.train()
        random = generator(self.seed, "mil", "order", number)
        order = balanced(train, self.targets, random) if options.sampling == "balanced" else random.permutation(train)
        steps = chunks(order, options.batch_bags * options.accumulate)
        sizes = self.source.sizes if options.instances is None else self.source.sizes.clip(max=options.instances)
        cut = [packs(step, sizes * self.source.tiles, options.batch_bags, options.max_instances) for step in steps]
        if isinstance(self.criterion, Comparing) and number == 1:
            self._warn_of_small_packs(steps, cut)
        draws = partial(generator, self.seed, "mil", "instances", number) if options.instances else None
        flat = [pack for step in cut for pack in step]
        batches = read(self.source, flat, model.needs, self.device, draws, options.instances)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        lr, skipped, counted = 0.0, 0, 0
        pending: list[tuple[NDArray[np.int64], Tensor]] = []
        for place, (step, parts) in enumerate(zip(steps, cut, strict=True)):
            lr = self._rate((number - 1) * len(steps) + place, len(steps))
            loss, finite = self._step(step, [next(batches) for _ in parts], lr)
            total += torch.where(finite, loss, 0.0).double() * len(step)
            pending.append((step, finite))
            if len(pending) == _LOOK_EVERY or place == len(steps) - 1:
                flags = torch.stack([flag for _, flag in pending]).tolist()
                counted += sum(len(bags) for (bags, _), flag in zip(pending, flags, strict=True) if flag)
                skipped += flags.count(False)
                self._look(number, pending, flags, lr)
                pending.clear()
        return (total.item() / counted if counted else float("nan")), skipped, lr

    def _warn_of_small_packs(self, steps: list[NDArray[np.int64]], cut: list[list[NDArray[np.int64]]]) -> None:
        """Bags are compared within a pack; raises :class:`ConfigError` if every pack is a single bag."""
        if all(len(pack) == 1 for parts in cut for pack in parts):
            raise ConfigError(
                "this loss compares bags, and each alone is as large as max_instances; raise max_instances, or set "
                "instances"
            )
        if any(len(parts) > -(-len(step) // self.options.batch_bags) for step, parts in zip(steps, cut, strict=True)):
            log.warning("batches are cut at max_instances, and bags compared within a part only; raise max_instances")

    def val_loss(self, val: NDArray[np.int64]) -> float:
        """The criterion on all validation bags at once."""
        predicted = predict_bags(self.model, self.source, val, self.options)
        rows = torch.from_numpy(np.asarray(val, np.int64)).to(self.device)
        logits = torch.from_numpy(predicted.logits).to(self.device).float()
        return float(self.criterion(logits, self.targets[rows]))

    def _step(
        self, step: NDArray[np.int64], batches: list[tuple[NDArray[np.int64], BagBatch]], lr: float
    ) -> tuple[Tensor, Tensor]:
        """One step; the mean loss of its bags and whether it was finite, both scalars on the device."""
        set_rates(self.optimizer, lr, self.options.weight_decay)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for pack, batch in batches:
            targets = self.targets[torch.from_numpy(pack).to(self.device)]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
                output = self.model(batch)
            loss = self.model.loss(output, targets, self.criterion) * (len(pack) / len(step))
            loss.backward()
            total += loss.detach()
        norm = clip_gradients(self.parameters, self.options.clip, "global")
        finite = torch.isfinite(total) & torch.isfinite(norm)
        step_if(self.optimizer, finite)
        return total, finite

    def _rate(self, step: int, epoch_steps: int) -> float:
        steps, warmup = self.options.epochs * epoch_steps, round(self.options.warmup * epoch_steps)
        if step < warmup:
            return self.options.lr * (step + 1) / warmup
        if self.options.schedule == "constant":
            return self.options.lr
        return cosine(Clock(step, steps, epoch_steps), self.options.lr, 0.0, warmup_steps=warmup)

    def _look(self, number: int, pending: list[tuple[NDArray[np.int64], Tensor]], flags: list[bool], lr: float) -> None:
        for (step, _), finite in zip(pending, flags, strict=True):
            self.streak = [] if finite else [*self.streak, [self.source.names[int(bag)] for bag in step]]
            if len(self.streak) >= _PATIENCE:
                bags = _listed([name for names in self.streak for name in names])
                raise RunError(
                    f"epoch {number}: loss or gradient was not finite in {_PATIENCE} steps in a row, of {bags} "
                    f"(lr {lr:g}, {self.options.precision}); lower lr, set clip, or use fp32"
                )


def _check(
    source: BagSource,
    targets: Targets,
    criterion: Criterion,
    options: BagFitOptions,
    train: NDArray[np.int64],
    val: NDArray[np.int64] | None,
) -> None:
    if len(targets) != len(source):
        raise EvaluationError(f"there are {len(source)} bags and targets of {len(targets)}")
    if not len(train):
        raise EvaluationError("there is no training bag")
    if val is None or not len(val):
        if options.patience is not None or options.select == "best":
            raise ConfigError("patience and select=best need validation bags; give the splits a validation part")
    elif len(both := np.intersect1d(train, val)):
        names = _listed([source.names[int(bag)] for bag in both])
        raise EvaluationError(f"{len(both)} bags are in both the training and the validation part: {names}")
    if isinstance(criterion, Comparing) and options.batch_bags == 1:
        raise ConfigError(
            "this loss compares bags with one another, and a batch of one has nothing to compare; "
            "set batch_bags to 16 or more"
        )


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
