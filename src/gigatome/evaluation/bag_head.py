"""Models of whole bags as heads: what they learn from, what they predict, and how they are kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from gigatome import config
from gigatome.core.errors import ConfigError, EvaluationError, StoreError
from gigatome.encoders.region_zoo import open_region_encoder
from gigatome.evaluation.heads import Outcome, Prediction
from gigatome.evaluation.outcome_loss import LossOptions, prediction_of, task_of
from gigatome.evaluation.splits import Split
from gigatome.evaluation.unit_data import UnitData
from gigatome.mil.fit import BagFitOptions, fit_bags, predict_bags
from gigatome.mil.mcat import LateFusionOptions
from gigatome.mil.model import BagModel
from gigatome.mil.source import StoreBags, fit_clusters
from gigatome.mil.zoo import bag_model, from_variant, graph_of, model_options, needs_of


@final
@dataclass(frozen=True)
class BagHead(LossOptions):
    """A model of bags, how it is trained, and its loss.

    Attributes:
        model: its name, one of :data:`gigatome.mil.zoo.MODELS`.
        options: of the model, by name, in place of its defaults.
        fit: of the training.
        late_fusion: how omics, where they are given, join a model that does not take them itself.
    """

    model: str = "abmil"
    options: Mapping[str, Any] = field(default_factory=dict)
    fit: BagFitOptions = field(default_factory=BagFitOptions)
    late_fusion: LateFusionOptions = field(default_factory=LateFusionOptions)


def bag_head(model: str, options: Mapping[str, Any]) -> BagHead:
    """A model of bags with some options of :class:`BagHead`, nested as there; raises :class:`ConfigError`.

    ``variant`` in ``fit`` names a published variant of :class:`BagFitOptions`, such as ``"hipt"``, to start from.
    """
    given = {"model": model, **options}
    if isinstance(given.get("fit"), Mapping):
        given["fit"] = from_variant(BagFitOptions, given["fit"], f"head {model}, fit")
    return config.parse(BagHead, given, source=model)


@final
@dataclass(frozen=True, eq=False)
class FittedBagHead:
    """A model of bags that has learnt.

    Attributes:
        head: what it is.
        network: the model.
        dim: size of an embedding.
        outputs: of the model.
        classes: how many classes; 0 for survival.
        edges: float64 [bins + 1] of the time bins; empty without any.
        centroids: float32 [K, D] of the clusters, if the model needs them.
        scales: float64 [2, n_k], mean and deviation of each group of omics in the training part.
    """

    head: BagHead
    network: BagModel
    dim: int
    outputs: int
    classes: int
    edges: NDArray[np.float64]
    centroids: NDArray[np.float32] | None
    scales: tuple[NDArray[np.float64], ...]

    @property
    def needs(self) -> frozenset[str]:
        """See :attr:`FittedHead.needs`."""
        return self.network.needs

    def predict(self, data: UnitData, *, attention: bool = False) -> Prediction:
        """See :meth:`FittedHead.predict`."""
        bags = _bags(self.head, data, self.needs, self.centroids, self.scales)
        found = predict_bags(self.network, bags, np.arange(len(data)), self.head.fit, attention=attention)
        return prediction_of(found.logits, self.classes, self.edges, found.attention)

    def saved(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """See :meth:`FittedHead.saved`."""
        arrays = {f"model.{name}": value.detach().cpu().numpy() for name, value in self.network.state_dict().items()}
        arrays["edges"] = self.edges
        if self.centroids is not None:
            arrays["centroids"] = self.centroids
        arrays |= {f"omics.{k}": scale for k, scale in enumerate(self.scales)}
        shape = {"dim": self.dim, "outputs": self.outputs, "classes": self.classes}
        return {"kind": "bag", "head": config.to_dict(self.head), **shape}, arrays


def fit_bag_head(head: BagHead, data: UnitData, outcome: Outcome, split: Split, *, seed: int) -> FittedBagHead:
    """Trains a model of bags on the training part of a split; see :func:`gigatome.evaluation.heads.fit_head`."""
    data.bags(needs_of(head.model))  # refuses what does not fit before anything is made for it
    head = _with_region_encoder(head, data)
    scales = tuple(_scale(group[split.train]) for group in data.omics)
    task = task_of(outcome, split.train, head)
    network = _network(head, data.reader.dim, task.outputs, scales, seed)
    bags, centroids = _bags(head, data, network.needs, None, scales), None
    if "clusters" in network.needs:
        count = model_options(head.model, head.options).clusters
        centroids = fit_clusters(bags, split.train, count, seed=seed)
        bags = bags.with_clusters(centroids)
    val = split.val if len(split.val) else None
    fit_bags(network, bags, task.targets, task.criterion, head.fit, train=split.train, val=val, seed=seed)
    return FittedBagHead(head, network, data.reader.dim, task.outputs, task.classes, task.edges, centroids, scales)


def restore_bag_head(values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> FittedBagHead:
    """The head that :meth:`FittedBagHead.saved` describes; raises :class:`StoreError` for what is none."""
    try:
        head = config.parse(BagHead, values["head"], source="saved head")
        head = replace(head, fit=replace(head.fit, device="cpu"))
        state = {
            name.removeprefix("model."): torch.from_numpy(np.array(value))
            for name, value in arrays.items()
            if name.startswith("model.")
        }
        edges, classes = np.array(arrays["edges"], np.float64), int(values["classes"])
        scales = tuple(np.array(arrays[f"omics.{k}"]) for k in range(sum(name.startswith("omics.") for name in arrays)))
        dim, outputs = int(values["dim"]), int(values["outputs"])
        # the file that a model's first weights came from need not be there any more
        bare = replace(head, options={**head.options, "weights": None}) if "weights" in head.options else head
        network = _network(bare, dim, outputs, scales, 0)
        network.load_state_dict(state)
    except (KeyError, RuntimeError, ConfigError) as error:
        raise StoreError(f"the saved head cannot be restored ({error}); train it again") from error
    network.eval()
    return FittedBagHead(head, network, dim, outputs, classes, edges, arrays.get("centroids"), scales)


def _network(head: BagHead, dim: int, outputs: int, scales: tuple[NDArray[np.float64], ...], seed: int) -> BagModel:
    sizes = tuple(scale.shape[1] for scale in scales)
    if not sizes:
        return bag_model(head.model, dim, outputs, head.options, seed=seed)
    if hasattr(model_options(head.model, head.options), "omic_sizes"):
        return bag_model(head.model, dim, outputs, {**head.options, "omic_sizes": sizes}, seed=seed)
    fusion = {**config.to_dict(head.late_fusion), "omic_sizes": sizes}
    return bag_model(head.model, dim, outputs, {**head.options, "late_fusion": fusion}, seed=seed)


def _with_region_encoder(head: BagHead, data: UnitData) -> BagHead:
    """The head with the sizes of the region encoder that it starts from, after a check that it is of these tiles."""
    weights = getattr(model_options(head.model, head.options), "weights", None)
    if weights is None or "regions" not in needs_of(head.model):
        return head
    encoder, card = open_region_encoder(weights)
    card.check_tiles(data.reader.encoder, data.reader.weights, data.reader.dim, data.store.folder)
    return replace(head, options={"encoder": config.to_dict(encoder.config), **head.options})


def _bags(
    head: BagHead,
    data: UnitData,
    needs: frozenset[str],
    centroids: NDArray[np.float32] | None,
    scales: tuple[NDArray[np.float64], ...],
) -> StoreBags:
    if len(data.omics) != len(scales):
        raise EvaluationError(f"the head learnt with {len(scales)} groups of omics and is given {len(data.omics)}")
    omics = [(group - scale[0]) / scale[1] for group, scale in zip(data.omics, scales, strict=True)]
    graph = graph_of(model_options(head.model, head.options))
    return StoreBags(data.bags(needs), data.slides, data.names, omics=omics, centroids=centroids, graph=graph)


def _scale(group: NDArray[np.float64]) -> NDArray[np.float64]:
    """[2, n], mean and deviation of each value; a constant one keeps its scale."""
    deviation = group.std(0)
    return np.stack([group.mean(0), np.where(deviation > 1e-12, deviation, 1.0)])
