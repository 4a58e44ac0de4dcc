"""Heads of whole slides, as the uppermost level of a hierarchy: how they attend to the regions of a slide."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gigatome.core.errors import ConfigError
from gigatome.evaluation.bag_head import FittedBagHead
from gigatome.evaluation.predict import heads_folder
from gigatome.evaluation.saved import SavedModel, load_model
from gigatome.mil.fit import predict_bags
from gigatome.mil.regions import HiptLgpFc, HiptNoneFc
from gigatome.mil.source import ArrayBags


def open_slide_model(folder: str | Path) -> SavedModel:
    """The heads in the folder of a study with one arm, or of an arm; raises as :func:`heads_folder`."""
    return load_model(heads_folder(folder))


def takes_grids(model: SavedModel) -> bool:
    """Whether its regions are grids of tile embeddings, not embeddings; raises :class:`ConfigError` for a probe."""
    return isinstance(_bag_heads(model)[0].network, HiptLgpFc | HiptNoneFc)


def attend(
    model: SavedModel, x: NDArray[np.floating], coords: NDArray[np.int64], *, label: str | None, device: str
) -> NDArray[np.float32]:
    """See :meth:`gigatome.heatmaps.chain.Chain.attend`."""
    bags = ArrayBags([x], ["slide"], extras={"coords": [coords]})
    weights, scores = [], []
    for head in _bag_heads(model):
        options = replace(head.head.fit, device=device)
        found = predict_bags(head.network, bags, [0], options, attention=True)
        if found.attention is None:
            raise ConfigError(f"the slide model {head.head.model} has no attention; use one such as abmil or clam_sb")
        weights.append(found.attention[0])
        scores.append(torch.from_numpy(found.logits).softmax(1)[0].numpy())
    attention, classes = np.stack(weights).mean(0, dtype=np.float64), model.classes
    if label is not None and label not in classes:
        raise ConfigError(f"the slide model knows no class {label}; it knows {', '.join(classes) or 'survival'}")
    if attention.shape[1] > 1 and attention.shape[1] == len(classes):
        chosen = _predicted(model, np.stack(scores).mean(0)) if label is None else classes.index(label)
        return attention[:, chosen].astype(np.float32)
    return attention.mean(1).astype(np.float32)


def _bag_heads(model: SavedModel) -> list[FittedBagHead]:
    heads = [head for head in model.heads if isinstance(head, FittedBagHead)]
    if len(heads) < len(model.heads) or not heads:
        raise ConfigError(
            "the slide model is a probe of mean embeddings, which has no attention; evaluate with a model of bags such "
            "as abmil or hipt_gp_fc"
        )
    return heads


def _predicted(model: SavedModel, probabilities: NDArray[np.float64]) -> int:
    threshold = model.card["threshold"]
    return int(probabilities.argmax() if threshold is None else probabilities[1] >= threshold)
