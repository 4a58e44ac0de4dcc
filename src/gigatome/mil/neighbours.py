"""Nearest neighbours of instances within their bag: the edges of the graph models."""

import itertools
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.spatial import KDTree
from torch import Tensor

from gigatome.core.errors import EvaluationError

_TREE_DIMS = 8  # beyond these a KD-tree looks at nearly all points
_BLOCK = 1 << 24  # distances held at once
_SPARE = 8


def knn_edges(
    points: Tensor | ArrayLike,
    k: int = 8,
    bounds: Tensor | ArrayLike | None = None,
    *,
    towards: Literal["self", "neighbour"] = "self",
) -> Tensor:
    """Edges between instances and their nearest neighbours of the same bag, by Euclidean distance, exactly.

    Distances of few dimensions (coordinates) go through a KD-tree, those of many (embeddings) through products of
    blocks of rows: 100,000 × 1024 embeddings take no more memory than a few hundred MB, but 10^10 products.
    Of equal distances, of which a grid is full, the lower row goes first; among a dozen equal embeddings any may.

    Args:
        points: real [T, d], such as coordinates in level-0 pixels or embeddings. Embeddings on a GPU stay there.
        k: most neighbours of an instance, itself not counted; a bag of n instances has n − 1 at most.
        bounds: int64 [B + 1], rows of each bag; one bag of all rows by default. No edge joins two bags.
        towards: ``"self"``, edges lead from an instance's neighbours to the instance, so that each gathers from its
            own k nearest; ``"neighbour"``, from the instance to its neighbours, as the authors of Patch-GCN build their
            graphs: an instance gathers from those that count it among their nearest, which may be none.

    Returns:
        int64 [2, E], from row and to row, on the device of ``points``; ordered by the instance, then by distance.

    Raises:
        EvaluationError: a point is not finite, or the bounds are not those of the points.

    Source: Patch-GCN (Chen et al., MICCAI 2021), 8 neighbours by coordinates; differs: exact, where they use HNSW.
    """
    points = torch.as_tensor(points)
    if points.ndim != 2 or k < 1:
        raise ValueError(f"need points [T, d] and k ≥ 1, got {list(points.shape)} and k = {k}")
    starts = [0, len(points)] if bounds is None else torch.as_tensor(bounds).tolist()
    if starts[0] != 0 or starts[-1] != len(points) or any(a > b for a, b in itertools.pairwise(starts)):
        raise EvaluationError(f"bounds {starts[:3]} … {starts[-1]} are not those of {len(points)} instances")
    finite = points.isfinite().all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise EvaluationError(f"instance {row} has a value that is not finite; neighbours cannot be found")
    nearest = _by_tree if points.shape[1] <= _TREE_DIMS else _by_products
    parts = []
    for start, stop in itertools.pairwise(starts):
        few = min(k, stop - start - 1)
        if few > 0:
            rows = torch.arange(start, stop, device=points.device).repeat_interleave(few)
            parts.append(torch.stack([nearest(points[start:stop], few).flatten() + start, rows]))
    edges = torch.cat(parts, 1) if parts else torch.empty(2, 0, dtype=torch.int64, device=points.device)
    return edges if towards == "self" else edges.flip(0)


def _by_tree(points: Tensor, k: int) -> Tensor:
    """int64 [n, k] of few dimensions; k < n."""
    array = points.double().cpu().numpy()
    n = len(array)
    tree = KDTree(array)
    more = min(n, k + 1 + 2 * array.shape[1])  # room for those as far away as the last
    while True:
        distance, index = tree.query(array, more)
        # ties at the last place may go on beyond what was asked for
        cut = (distance[:, k] == distance[:, -1]) if more < n else np.zeros(n, bool)
        if not cut.any():
            break
        more = min(n, 2 * more)
        if more * n > _BLOCK:  # as many duplicates as that: any of the equally near will do
            break
    own = index == np.arange(n)[:, None]
    distance = np.where(own, -1.0, distance)  # the instance itself first, duplicates of it behind
    missing = ~own.any(1)  # more duplicates than were asked for
    distance[missing, -1] = -1.0
    order = np.lexsort((index, distance), axis=1)[:, 1 : k + 1]
    return torch.from_numpy(np.take_along_axis(index, order, 1).astype(np.int64)).to(points.device)


def _by_products(points: Tensor, k: int) -> Tensor:
    """int64 [n, k] of many dimensions; k < n."""
    points = points.detach().float()
    points = points - points.mean(0)  # smaller numbers lose less in the difference of squares
    n = len(points)
    squares = points.square().sum(1)
    found = []
    for start in range(0, n, block := max(1, _BLOCK // n)):
        rows = points[start : start + block]
        distance = torch.addmm(squares.expand(len(rows), n), rows, points.T, alpha=-2)
        own = torch.arange(len(rows), device=points.device)
        distance[own, own + start] = torch.inf
        # one more than needed, exactly compared: the difference of squares rounds
        near = distance.topk(min(n - 1, k + _SPARE), largest=False).indices.sort(1).values
        exact = (points[near] - rows[:, None]).square().sum(2)
        found.append(near.gather(1, exact.sort(dim=1, stable=True).indices[:, :k]))
    return torch.cat(found)
