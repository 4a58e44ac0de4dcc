"""Watches an encoder while it learns: figures of its embeddings every so many steps, and an alarm at a collapse."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gigatome.core.errors import ConfigError, EvaluationError
from gigatome.core.logs import log
from gigatome.distributed import gather, rank, world_size
from gigatome.encoders.longvit import LongVit
from gigatome.encoders.region_vit import RegionVit
from gigatome.encoders.vit import TileEncoder
from gigatome.evaluation.collapse import CollapseLimits, find_collapse
from gigatome.evaluation.labelled import LabelledTiles, read_labelled
from gigatome.evaluation.unsupervised import embedding_std, odcorr, rankme
from gigatome.selfsup.grid_views import embed_grids
from gigatome.training.method import Stream
from gigatome.training.record import Sink
from gigatome.training.sinks import TensorBoard, WeightsAndBiases


@dataclass(frozen=True)
class WatchOptions:
    """What is watched; how often is ``fit.evaluate_every``. Nothing of it changes the weights.

    Attributes:
        tiles: probe tiles, or regions, drawn once from the stream beyond the run's last batch; 0 for none.
        labelled: folder or CSV of labelled tiles, as :func:`gigatome.evaluation.labelled.read_labelled` takes; None for
            none.
        labelled_limit: greatest number of labelled tiles, about.
        neighbours: of kNN on them.
        batch_size: tiles that the encoder embeds at once.
        tensorboard: write files for TensorBoard into the run's folder.
        wandb: project at Weights & Biases to report to.
        limits: when to raise the alarm.
    """

    tiles: int = 1024
    labelled: str | None = None
    labelled_limit: int = 2000
    neighbours: int = 20
    batch_size: int = 64
    tensorboard: bool = False
    wandb: str | None = None
    limits: CollapseLimits = field(default_factory=CollapseLimits)

    def __post_init__(self):
        if self.tiles < 0 or self.tiles == 1:
            raise ValueError(f"tiles must be 0 or at least 2, not {self.tiles}")
        if min(self.labelled_limit, self.neighbours, self.batch_size) < 1:
            raise ValueError("labelled_limit, neighbours and batch_size must be at least 1")


@final
class Watch:
    """The evaluation hook of :func:`gigatome.training.loop.fit`; a context that ends its sinks.

    Every process of a run makes one and calls it at the same steps: each embeds its share of the tiles.

    Args:
        encoder: what is watched; for a method with a teacher, the teacher's encoder.
        stream: of the run; probe tiles are its batches from ``steps`` on, for which no step of training asks.
        options: what is watched.
        out: the run's folder; its ``metrics.jsonl`` tells of the run so far.
        steps: length of the run.
        seed: of the split of labelled tiles.
        precision: ``"bf16"`` for autocast, or ``"fp32"``.
        prototypes: K, outputs of the teacher's softmax, to judge its entropy; None if it has none.
        name: of the run at Weights & Biases.
        config: options of the run, to be shown there.

    Attributes:
        sinks: for ``fit``; empty on all ranks but the first.

    Raises:
        EvaluationError: there are no usable labelled tiles.
        ConfigError: labelled tiles for an encoder of regions.
        MissingExtraError: a sink's package is not installed.
    """

    def __init__(
        self,
        encoder: TileEncoder | LongVit | RegionVit,
        stream: Stream,
        options: WatchOptions,
        out: str | Path,
        *,
        steps: int,
        seed: int = 0,
        precision: str = "fp32",
        prototypes: int | None = None,
        name: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self._encoder, self._options, self._out = encoder, options, Path(out)
        self._precision, self._prototypes, self._steps = precision, prototypes, steps
        self._labelled: LabelledTiles | None = None
        self._pictures = self._probe = np.empty((0, 0, 0, 3), np.uint8)
        if options.labelled:
            if isinstance(encoder, RegionVit):
                raise ConfigError("labelled tiles tell nothing of an encoder of regions; watch it without them")
            self._labelled = read_labelled(options.labelled, limit=options.labelled_limit, seed=seed)
            self._pictures = _share(self._labelled, encoder.config.image_size)
        if options.tiles:
            self._probe = _draw(stream, math.ceil(options.tiles / world_size()), steps, encoder)
        self.sinks: list[Sink] = []
        if options.tensorboard and rank() == 0:
            self.sinks.append(TensorBoard(self._out / "tensorboard"))
        if options.wandb and rank() == 0:
            self.sinks.append(WeightsAndBiases(options.wandb, self._out, name=name, config=config))

    def __call__(self, step: int) -> dict[str, Any]:
        """Figures of the encoder as it is: ``rankme``, ``odcorr``, ``std``, ``unit_std``, ``knn``, ``linear``.

        A figure that embeddings do not have is None. If the run looks collapsed, ``alarm`` says so, and so does the
        log.
        """
        found: dict[str, Any] = {}
        with _evaluating(self._encoder):
            if len(self._probe):
                found |= _describe(self._embed(self._probe))
            if self._labelled is not None:
                found |= _accuracy(self._labelled, self._embed(self._pictures), self._options.neighbours)
        if rank() == 0:
            lines = [*_lines(self._out / "metrics.jsonl"), {"step": step, **found}]
            alarm = find_collapse(lines, steps=self._steps, prototypes=self._prototypes, limits=self._options.limits)
            if alarm:
                log.warning("%s, step %d: %s", self._out, step, alarm)
                found["alarm"] = alarm
        return found

    def close(self) -> None:
        """Ends the sinks."""
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _embed(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Embeddings [N, D] of the tiles or regions of all processes."""
        device, size = next(self._encoder.parameters()).device, self._options.batch_size
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self._precision == "bf16")
        parts = [torch.from_numpy(images[start : start + size]) for start in range(0, len(images), size)]
        with torch.no_grad(), autocast:  # inference tensors would be left in an encoder that is spread over processes
            embeddings = torch.cat([_encode(self._encoder, part.to(device)).float() for part in parts])
        return gather(embeddings).cpu().numpy()


@contextmanager
def _evaluating(encoder: nn.Module) -> Iterator[None]:
    """The encoder in evaluation mode; every part in the mode it had before, afterwards."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _encode(encoder: TileEncoder | LongVit | RegionVit, images: Tensor) -> Tensor:
    """Embeddings [B, D] of tiles uint8 [B, H, W, 3] or regions [B, rows, columns, D']."""
    if isinstance(encoder, RegionVit):
        return embed_grids(encoder, images.movedim(-1, 1))
    return encoder(encoder.normalise(images))


def _draw(stream: Stream, count: int, step: int, encoder: TileEncoder | LongVit | RegionVit) -> NDArray[Any]:
    """``count`` images of the stream's batches from ``step`` on: whole regions, or the middle of tiles."""
    images: list[NDArray[Any]] = []
    for batch in stream.batches(step):
        images.extend(_middle(np.asarray(batch.images[: count - len(images)]), encoder).copy())
        if len(images) == count:
            break
    return np.stack(images)


def _middle(images: NDArray[Any], encoder: TileEncoder | LongVit | RegionVit) -> NDArray[Any]:
    """What the encoder is fed of a batch of tiles; regions whole."""
    if isinstance(encoder, RegionVit):
        return images
    height, width = images.shape[1:3]
    side = min(encoder.config.image_size, height, width) // encoder.patch_size * encoder.patch_size
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, top : top + side, left : left + side]


def _share(labelled: LabelledTiles, size: int) -> NDArray[np.uint8]:
    """This process's pictures, filled up with black ones to the same number everywhere."""
    count = math.ceil(len(labelled.paths) / world_size())
    images = labelled.images(size, rank() * count, (rank() + 1) * count)
    return np.concatenate([images, np.zeros((count - len(images), size, size, 3), np.uint8)])


def _describe(embeddings: NDArray[np.float32]) -> dict[str, float | None]:
    figures = {
        "rankme": rankme,
        "odcorr": odcorr,
        "std": embedding_std,
        "unit_std": lambda z: embedding_std(z, unit=True),
    }
    return {name: _or_none(figure, embeddings) for name, figure in figures.items()}


def _accuracy(labelled: LabelledTiles, embeddings: NDArray[np.float32], neighbours: int) -> dict[str, float | None]:
    if not np.isfinite(embeddings).all():
        return {"knn": None, "linear": None}
    return {**labelled.accuracy(embeddings[: len(labelled.paths)], neighbours=neighbours)}


def _or_none(figure: Callable[[NDArray[np.float32]], float], embeddings: NDArray[np.float32]) -> float | None:
    try:
        return figure(embeddings)
    except EvaluationError:  # as of embeddings that are all zero: the alarm says more
        return None


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
