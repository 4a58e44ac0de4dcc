"""Where bags come from: a cohort's embeddings on disk, or arrays in memory; each batch is made when it is needed."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol, final, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigatome.core.errors import ConfigError, EvaluationError, StoreError
from gigatome.core.seeding import generator
from gigatome.embeddings.bags import BagReader
from gigatome.embeddings.region_tiles import RegionTiles
from gigatome.mil.model import BagBatch
from gigatome.mil.neighbours import knn_edges

_NOTHING: frozenset[str] = frozenset()
_INSTANCES = frozenset(("regions", "region embeddings"))  # needs that the model checks itself
_GRAPH_BYTES = 1 << 30  # of edges that are kept for the next epoch
_LLOYD_STEPS = 50


@runtime_checkable
class BagSource(Protocol):
    """Bags by number, such as of the slides of a cohort, or of its patients."""

    @property
    def names(self) -> Sequence[str]:
        """What each bag is called in messages."""
        ...

    @property
    def sizes(self) -> NDArray[np.int64]:
        """int64 [N], instances of each bag, each at least 1."""
        ...

    @property
    def tiles(self) -> int:
        """Tiles of an instance, by which it takes memory: 1, or those of a region."""
        ...

    def __len__(self) -> int:
        """How many bags there are."""
        ...

    def batch(
        self,
        indices: NDArray[np.int64],
        rng: np.random.Generator | None = None,
        needs: frozenset[str] = _NOTHING,
        instances: int | None = None,
    ) -> BagBatch:
        """Some bags side by side, on the CPU; called by a thread, one call at a time.

        Args:
            indices: which bags.
            rng: draws instances.
            needs: what the batch must hold beside ``x``, as of :attr:`BagModel.needs`.
            instances: the most of each bag, drawn without replacement; None for all.

        Raises:
            ConfigError: it cannot give what ``needs`` names.
            StoreError: a bag cannot be read.
        """
        ...


@final
@dataclass(frozen=True)
class Graph:
    """The graph of a bag: each instance and its nearest neighbours within its slide.

    Attributes:
        on: ``"coords"``, neighbours in space, as Patch-GCN has them; or ``"embeddings"``, in Euclidean distance.
        k: how many neighbours, without itself.
        towards: which way edges lead, as of :func:`~gigatome.mil.neighbours.knn_edges`.
    """

    on: Literal["coords", "embeddings"] = "coords"
    k: int = 8
    towards: Literal["self", "neighbour"] = "self"

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"a graph needs k of at least 1, not {self.k}")


@final
class ArrayBags:
    """Bags in memory.

    Args:
        bags: float [n_i, …] of each, n_i ≥ 1, all of one shape but for n_i.
        names: of each; their numbers by default.
        extras: of "coords" int64 [n_i, 2] and "clusters" int64 [n_i] of each bag.
        omics: groups of values, float [N, n_k] each.

    Raises:
        EvaluationError: a bag is empty, has other sizes than the others, or holds NaN.
    """

    def __init__(
        self,
        bags: Sequence[NDArray[np.floating]],
        names: Sequence[str] | None = None,
        *,
        extras: Mapping[str, Sequence[NDArray[np.int64]]] = MappingProxyType({}),
        omics: Sequence[NDArray[np.floating]] = (),
    ):
        self.names = tuple(f"bag {number}" for number in range(len(bags))) if names is None else tuple(names)
        for name, bag in zip(self.names, bags, strict=True):
            if not len(bag):
                raise EvaluationError(f"{name}: a bag without instances cannot be used; leave it out")
            if bag.shape[1:] != bags[0].shape[1:]:
                raise EvaluationError(
                    f"{name}: embeddings of shape {bag.shape[1:]}, and of {bags[0].shape[1:]} in {self.names[0]}"
                )
            if not np.isfinite(bag).all():
                raise EvaluationError(f"{name}: has embeddings that are not finite; embed it again")
        self._bags = [torch.from_numpy(np.ascontiguousarray(bag, np.float32)) for bag in bags]
        self._extras = {
            key: [torch.from_numpy(np.asarray(v, np.int64)) for v in values] for key, values in extras.items()
        }
        self._omics = _groups(omics, len(bags))
        self.sizes = np.array([len(bag) for bag in bags], np.int64)
        self.tiles = bags[0].shape[1] if bags and bags[0].ndim == 3 else 1

    def __len__(self) -> int:
        return len(self._bags)

    def batch(
        self,
        indices: NDArray[np.int64],
        rng: np.random.Generator | None = None,
        needs: frozenset[str] = _NOTHING,
        instances: int | None = None,
    ) -> BagBatch:
        """As of :meth:`BagSource.batch`."""
        given = {*self._extras, *(["omics"] if self._omics else []), *_INSTANCES}
        if needs - given:
            raise ConfigError(f"the model needs {_words(needs - given)} of each bag, and these bags have none")
        rows = [_drawn(int(self.sizes[bag]), instances, rng) for bag in indices]
        parts = {
            key: torch.cat([_pick(values[bag], row) for bag, row in zip(indices, rows, strict=True)])
            for key, values in {"x": self._bags, **self._extras}.items()
            if key == "x" or key in needs
        }
        sizes = [int(self.sizes[bag]) if row is None else len(row) for bag, row in zip(indices, rows, strict=True)]
        omics = tuple(group[torch.from_numpy(indices)] for group in self._omics) if "omics" in needs else ()
        return BagBatch(bounds=_bounds(sizes), omics=omics, **parts)


@final
class StoreBags:
    """Bags of the slides, or patients, of a cohort, from embeddings on disk.

    Args:
        reader: of all slides; :class:`~gigatome.embeddings.region_tiles.RegionTiles` gives the tiles of regions.
        slides: names of the slides of each bag, whose embeddings follow one another in it.
        names: of the bags; that of its first slide by default.
        omics: groups of values, float [N, n_k] each.
        centroids: float [K, D] of :func:`fit_clusters`, for models that need clusters.
        graph: for models that need edges, which never join two slides.

    Raises:
        StoreError: the reader has not all slides.
        EvaluationError: a bag has no slide, or the omics do not fit.
    """

    def __init__(
        self,
        reader: BagReader | RegionTiles,
        slides: Sequence[Sequence[str]],
        names: Sequence[str] | None = None,
        *,
        omics: Sequence[NDArray[np.floating]] = (),
        centroids: NDArray[np.floating] | None = None,
        graph: Graph | None = None,
    ):
        places = {name: place for place, name in enumerate(reader.names)}
        for number, listed in enumerate(slides):
            if not len(listed):
                raise EvaluationError(f"{names[number] if names else f'bag {number}'}: has no slide; leave it out")
            if missing := [name for name in listed if name not in places]:
                raise StoreError(f"there are no embeddings of slide {missing[0]}; embed it first")
        if centroids is not None and centroids.shape[1:] != (reader.dim,):
            raise EvaluationError(f"centroids {centroids.shape} are not of embeddings of size {reader.dim}")
        self._reader, self._graph = reader, graph or Graph()
        self._slides = [np.array([places[name] for name in listed], np.int64) for listed in slides]
        self.names = tuple(listed[0] for listed in slides) if names is None else tuple(names)
        self.sizes = np.array([reader.sizes[listed].sum() for listed in self._slides], np.int64)
        self.tiles = math.prod(reader.shape[:-1])
        self._omics = _groups(omics, len(slides))
        self._centroids = None if centroids is None else torch.from_numpy(np.asarray(centroids, np.float32))
        self._edges: OrderedDict[int, Tensor] = OrderedDict()
        self._edge_bytes = 0

    def __len__(self) -> int:
        return len(self._slides)

    def with_clusters(self, centroids: NDArray[np.floating]) -> "StoreBags":
        """The same bags with the clusters of other centroids, such as of another fold's training part."""
        slides = [[self._reader.names[place] for place in listed] for listed in self._slides]
        omics = [group.numpy() for group in self._omics]
        return StoreBags(self._reader, slides, self.names, omics=omics, centroids=centroids, graph=self._graph)

    def batch(
        self,
        indices: NDArray[np.int64],
        rng: np.random.Generator | None = None,
        needs: frozenset[str] = _NOTHING,
        instances: int | None = None,
    ) -> BagBatch:
        """As of :meth:`BagSource.batch`; a single slide's float32 embeddings are a view of the file."""
        self._check(needs)
        rows = [_drawn(int(self.sizes[bag]), instances, rng) for bag in indices]
        pieces = [piece for bag, drawn in zip(indices, rows, strict=True) for piece in self._pieces(bag, drawn)]
        parts = [torch.from_numpy(self._reader.read(slide, picked)) for slide, picked in pieces]
        x = _joined(parts)
        sizes = [
            int(self.sizes[bag]) if drawn is None else len(drawn) for bag, drawn in zip(indices, rows, strict=True)
        ]
        bounds = _bounds(sizes)
        coords = clusters = edges = None
        if "coords" in needs or ("edges" in needs and self._graph.on == "coords"):
            found = [self._reader.coords(slide) for slide, _ in pieces]
            picked = [c if r is None else c[r] for c, (_, r) in zip(found, pieces, strict=True)]
            coords = torch.from_numpy(np.concatenate(picked))
        if "clusters" in needs:
            clusters = _nearest(x, _given(self._centroids))
        if "edges" in needs:
            points = x if self._graph.on == "embeddings" else _given(coords)
            edges = self._graph_of(indices, rows, points, bounds, [len(part) for part in parts])
        omics = tuple(group[torch.from_numpy(indices)] for group in self._omics) if "omics" in needs else ()
        return BagBatch(x, bounds, coords if "coords" in needs else None, clusters, edges, omics)

    def _check(self, needs: frozenset[str]) -> None:
        if "clusters" in needs and self._centroids is None:
            raise ConfigError("the model needs clusters; fit them on the training bags with fit_clusters")
        if "omics" in needs and not self._omics:
            raise ConfigError("the model needs omics of each bag, and none are given")

    def _pieces(self, bag: int, rows: NDArray[np.int64] | None) -> list[tuple[int, NDArray[np.int64] | None]]:
        """Each slide of a bag with its share of the drawn rows."""
        slides = self._slides[bag]
        if rows is None:
            return [(int(slide), None) for slide in slides]
        starts = np.cumsum([0, *self._reader.sizes[slides]])
        cuts = np.searchsorted(rows, starts)
        shares = [rows[a:b] - start for a, b, start in zip(cuts, cuts[1:], starts, strict=False)]
        return [(int(slide), share) for slide, share in zip(slides, shares, strict=True) if len(share)]

    def _graph_of(
        self,
        indices: NDArray[np.int64],
        rows: Sequence[NDArray[np.int64] | None],
        points: Tensor,
        bounds: Tensor,
        lengths: Sequence[int],
    ) -> Tensor:
        """Edges of the batch; those of whole bags are kept for the next epoch, as far as there is room."""
        starts = [0, *np.cumsum(lengths).tolist()]
        found = []
        for bag, drawn, start, stop in zip(indices.tolist(), rows, bounds.tolist(), bounds[1:].tolist(), strict=False):
            edges = self._edges.get(bag) if drawn is None else None
            if edges is None:
                slides = torch.tensor([edge - start for edge in starts if start <= edge <= stop])
                edges = knn_edges(points[start:stop], self._graph.k, slides, towards=self._graph.towards).int()
                if drawn is None:
                    self._keep(bag, edges)
            found.append(edges.long() + start)
        return torch.cat(found, 1)

    def _keep(self, bag: int, edges: Tensor) -> None:
        self._edges[bag] = edges
        self._edge_bytes += edges.nbytes
        while self._edge_bytes > _GRAPH_BYTES:
            self._edge_bytes -= self._edges.popitem(last=False)[1].nbytes


def fit_clusters(
    source: BagSource, train: NDArray[np.int64], clusters: int = 10, *, seed: int = 0, sample: int = 50_000
) -> NDArray[np.float32]:
    """Centroids of k-means on the embeddings of training bags, for models of clusters.

    Bags count alike: as many instances are drawn of each, save of small ones.

    Source: Lloyd, 1982, from the start of Arthur and Vassilvitskii (k-means++), 2007.

    Args:
        source: of bags.
        train: int64, the training bags; no others are looked at.
        clusters: how many.
        seed: of draws.
        sample: instances to draw of all bags together, about.

    Returns:
        float32 [clusters, D].

    Raises:
        EvaluationError: the training bags have fewer instances than clusters are asked for.
        StoreError: a bag cannot be read.
    """
    random = generator(seed, "mil", "clusters")
    most = max(1, sample // max(1, len(train)))
    drawn = [source.batch(train[place : place + 1], random, _NOTHING, most).x for place in range(len(train))]
    x = torch.cat(drawn).float() if drawn else torch.zeros(0, 0)
    if len(x) < clusters:
        raise EvaluationError(f"{len(x)} instances of {len(train)} training bags do not make {clusters} clusters")
    centroids = x[random.integers(len(x))][None]
    nearest = torch.full((len(x),), torch.inf)
    for _ in range(clusters - 1):
        nearest = torch.minimum(nearest, (x - centroids[-1]).square().sum(1))
        weights = nearest.double().numpy()
        total = weights.sum()
        place = random.choice(len(x), p=weights / total if total > 0 else None)
        centroids = torch.cat([centroids, x[place][None]])
    for _ in range(_LLOYD_STEPS):
        own = _nearest(x, centroids)
        counts = torch.bincount(own, minlength=clusters)[:, None]
        sums = torch.zeros_like(centroids).index_add_(0, own, x)
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids.numpy()


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """int64 [T], the nearest centroid of each row."""
    return (centroids.square().sum(1) - 2 * (x @ centroids.T)).argmin(1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Embeddings one after another in float32; one float32 part as it is."""
    if len(parts) == 1:
        return parts[0].float()
    x = torch.empty(sum(map(len, parts)), *parts[0].shape[1:])
    start = 0
    for part in parts:
        x[start : start + len(part)] = part
        start += len(part)
    return x


def _given(values: Tensor | None) -> Tensor:
    assert values is not None  # noqa: S101 - for the type checker
    return values


def _drawn(size: int, instances: int | None, rng: np.random.Generator | None) -> NDArray[np.int64] | None:
    """Ascending rows of the drawn instances; None for all of them."""
    if instances is None or size <= instances:
        return None
    if rng is None:
        raise ValueError("a generator is needed to draw instances")
    return np.sort(rng.choice(size, instances, replace=False, shuffle=False))


def _pick(values: Tensor, rows: NDArray[np.int64] | None) -> Tensor:
    return values if rows is None else values[torch.from_numpy(rows)]


def _bounds(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int64)


def _groups(omics: Sequence[NDArray[np.floating]], bags: int) -> tuple[Tensor, ...]:
    for number, group in enumerate(omics):
        if group.ndim != 2 or len(group) != bags:
            raise EvaluationError(f"group {number} of omics is {group.shape}, for {bags} bags")
        if not np.isfinite(group).all():
            raise EvaluationError(f"group {number} of omics holds values that are not finite")
    return tuple(torch.from_numpy(np.ascontiguousarray(group, np.float32)) for group in omics)


def _words(needs: frozenset[str]) -> str:
    return " and ".join(sorted(needs))
