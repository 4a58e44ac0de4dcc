"""Batches hold what the files hold, bag by bag, whatever is drawn, and graphs and clusters stay where they belong."""

import numpy as np
import pytest
import torch

from gigatome.core.errors import ConfigError, EvaluationError, StoreError
from gigatome.embeddings.bags import BagReader
from gigatome.embeddings.packed import pack
from gigatome.embeddings.store import Bag, EmbeddingStore, write_bag
from gigatome.mil.source import ArrayBags, BagSource, Graph, StoreBags, fit_clusters

DIM = 5
SIZES = {"a": 12, "b": 1, "c": 30, "d": 7}
PATIENTS = [("c", "a"), ("b",), ("d",)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job") / "features_enc"
    random = np.random.default_rng(0)
    for name, rows in SIZES.items():
        x = random.normal(size=(rows, DIM)).astype(np.float32)
        write_bag(folder / f"{name}.h5", Bag(name, "enc", random.integers(0, 9000, (rows, 2)), x))
    return EmbeddingStore.open(folder)


@pytest.fixture(scope="module")
def reader(store):
    return BagReader(store, list(SIZES))


@pytest.fixture(scope="module", params=["files", "packed", "packed half"])
def any_reader(request, store, tmp_path_factory):
    if request.param == "files":
        return BagReader(store, list(SIZES))
    path = tmp_path_factory.mktemp("packed") / "p.h5"
    return BagReader(pack(store, path, dtype="float16" if "half" in request.param else "float32"), list(SIZES))


def bag_of(store, slides):
    bags = [store.read(name) for name in slides]
    return np.concatenate([bag.embeddings for bag in bags]), np.concatenate([bag.coords for bag in bags])


def test_batches_hold_the_bags(store, any_reader):
    source = StoreBags(any_reader, PATIENTS, ["p", "q", "r"])
    assert isinstance(source, BagSource)
    assert (len(source), list(source.names), source.sizes.tolist()) == (3, ["p", "q", "r"], [42, 1, 7])
    for indices in ([0], [1], [2, 0], [1, 2, 0, 1]):
        batch = source.batch(np.array(indices), needs=frozenset({"coords"}))
        assert batch.x.dtype == torch.float32
        assert batch.bounds.tolist() == np.cumsum([0, *source.sizes[indices]]).tolist()
        expected = [bag_of(store, PATIENTS[i]) for i in indices]
        np.testing.assert_allclose(batch.x, np.concatenate([x for x, _ in expected]), rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(batch.coords, np.concatenate([coords for _, coords in expected]))
    assert source.batch(np.array([0])).coords is None


def test_drawn_instances(store, reader):
    source = StoreBags(reader, PATIENTS)
    x, coords = bag_of(store, PATIENTS[0])
    place = {tuple(row): i for i, row in enumerate(x.tolist())}
    counts = np.zeros(42)
    for seed in range(300):
        batch = source.batch(np.array([1, 0, 2]), np.random.default_rng(seed), frozenset({"coords"}), 6)
        assert batch.sizes.tolist() == [1, 6, 6]
        rows = [place[tuple(row)] for row in batch.x[1:7].tolist()]
        assert rows == sorted(set(rows))
        np.testing.assert_array_equal(batch.coords[1:7], coords[rows])
        counts[rows] += 1
    # 300 · 6 / 42 = 43 ± 6 each
    assert counts.min() > 18
    assert counts.max() < 70
    same = [source.batch(np.array([0]), np.random.default_rng(3), instances=6).x for _ in range(2)]
    assert torch.equal(*same)
    assert source.batch(np.array([0]), np.random.default_rng(3), instances=42).sizes.tolist() == [42]
    with pytest.raises(ValueError, match="generator"):
        source.batch(np.array([0]), instances=6)


@pytest.mark.parametrize("on", ["coords", "embeddings"])
def test_graphs_do_not_cross_slides_and_are_kept(store, reader, on, monkeypatch):
    from gigatome.mil import source as module

    calls = []
    knn = module.knn_edges
    monkeypatch.setattr(module, "knn_edges", lambda *a, **k: calls.append(1) or knn(*a, **k))
    source = StoreBags(reader, PATIENTS, graph=Graph(on=on, k=3))
    needs = frozenset({"edges"})
    for indices in ([0, 2], [2, 1, 0]):
        batch = source.batch(np.array(indices), needs=needs)
        assert batch.coords is None
        slides = np.concatenate([np.repeat(list(PATIENTS[i]), [SIZES[s] for s in PATIENTS[i]]) for i in indices])
        start, stop = batch.edges.numpy()
        assert (slides[start] == slides[stop]).all()
        assert batch.edges.shape[1] == sum(min(3, SIZES[s] - 1) * SIZES[s] for i in indices for s in PATIENTS[i])
        points = [(x if on == "embeddings" else c) for x, c in (bag_of(store, PATIENTS[i]) for i in indices)]
        points = np.concatenate(points).astype(float)
        for row in range(len(points)):
            far = np.linalg.norm(points - points[row], axis=1)
            far[(slides != slides[row]) | (np.arange(len(points)) == row)] = np.inf
            own = np.sort(far[start[stop == row]])
            np.testing.assert_allclose(own, np.sort(far[np.isfinite(far)])[:3], rtol=1e-4)
    assert len(calls) == 3  # each bag once
    drawn = source.batch(np.array([0]), np.random.default_rng(0), needs, 10)
    assert drawn.edges.max() < 10
    assert len(calls) == 4


def test_old_graphs_make_room(reader, monkeypatch):
    from gigatome.mil import source as module

    monkeypatch.setattr(module, "_GRAPH_BYTES", 2500)
    source = StoreBags(reader, PATIENTS, graph=Graph(k=8))
    for _ in range(2):
        for bag in range(3):
            source.batch(np.array([bag]), needs=frozenset({"edges"}))
            assert source._edge_bytes == sum(edges.nbytes for edges in source._edges.values()) <= 2500


def test_clusters_are_of_the_training_bags(reader):
    random = np.random.default_rng(0)
    centres = 10 * np.eye(DIM)[:3]
    kinds = [random.integers(0, 3, 50) for _ in range(6)]
    bags = [centres[kind] + random.normal(size=(50, DIM)) for kind in kinds]
    source = ArrayBags([*bags, np.full((500, DIM), 1e4)])
    centroids = fit_clusters(source, np.arange(6), 3, seed=1)
    assert centroids.dtype == np.float32
    order = np.argsort(-centroids[:, 0] * 4 - centroids[:, 1] * 2)
    np.testing.assert_allclose(centroids[order], centres, atol=0.5)
    np.testing.assert_array_equal(centroids, fit_clusters(source, np.arange(6), 3, seed=1))
    with pytest.raises(EvaluationError, match="50 instances of 1 training bags do not make 51"):
        fit_clusters(source, np.arange(1), 51)


def test_store_bags_name_the_nearest_cluster(store, reader):
    source = StoreBags(reader, PATIENTS)
    with pytest.raises(ConfigError, match="fit_clusters"):
        source.batch(np.array([0]), needs=frozenset({"clusters"}))
    centroids = fit_clusters(source, np.array([0, 2]), 4, seed=0)
    batch = source.with_clusters(centroids).batch(np.array([2, 0]), needs=frozenset({"clusters"}))
    distances = np.linalg.norm(batch.x.numpy()[:, None] - centroids, axis=2)
    np.testing.assert_array_equal(batch.clusters, distances.argmin(1))
    assert len(np.unique(batch.clusters)) == 4


def test_equal_embeddings_do_not_stop_kmeans():
    centroids = fit_clusters(ArrayBags([np.ones((20, DIM))]), np.array([0]), 3)
    np.testing.assert_array_equal(centroids, np.ones((3, DIM)))


def test_omics_follow_their_bags(reader):
    omics = [np.arange(6.0).reshape(3, 2), np.arange(3.0)[:, None]]
    source = StoreBags(reader, PATIENTS, omics=omics)
    batch = source.batch(np.array([2, 0]), needs=frozenset({"omics"}))
    assert [group.tolist() for group in batch.omics] == [[[4, 5], [0, 1]], [[2], [0]]]
    assert source.batch(np.array([0])).omics == ()
    with pytest.raises(ConfigError, match="omics"):
        StoreBags(reader, PATIENTS).batch(np.array([0]), needs=frozenset({"omics"}))
    with pytest.raises(EvaluationError, match="for 3 bags"):
        StoreBags(reader, PATIENTS, omics=[np.zeros((2, 4))])
    with pytest.raises(EvaluationError, match="not finite"):
        StoreBags(reader, PATIENTS, omics=[np.full((3, 4), np.nan)])


def test_store_bags_refuse(reader):
    with pytest.raises(StoreError, match="slide z"):
        StoreBags(reader, [("a",), ("z",)])
    with pytest.raises(EvaluationError, match="q: has no slide"):
        StoreBags(reader, [("a",), ()], ["p", "q"])
    with pytest.raises(EvaluationError, match="centroids"):
        StoreBags(reader, PATIENTS, centroids=np.zeros((3, DIM + 1)))
    with pytest.raises(ValueError, match="k of at least 1"):
        Graph(k=0)


def test_arrays(reader):
    bags = [np.random.default_rng(i).normal(size=(i + 1, 4, 3)) for i in range(3)]
    clusters = [np.arange(i + 1) for i in range(3)]
    source = ArrayBags(bags, extras={"clusters": clusters}, omics=[np.arange(3.0)[:, None]])
    assert isinstance(source, BagSource)
    batch = source.batch(np.array([2, 1]), needs=frozenset({"clusters", "omics"}))
    np.testing.assert_allclose(batch.x, np.concatenate([bags[2], bags[1]]), rtol=1e-6)
    assert batch.clusters.tolist() == [0, 1, 2, 0, 1]
    assert batch.omics[0].tolist() == [[2], [1]]
    drawn = source.batch(np.array([2]), np.random.default_rng(0), frozenset({"clusters"}), 2)
    np.testing.assert_allclose(drawn.x, bags[2][drawn.clusters], rtol=1e-6)
    with pytest.raises(ConfigError, match="coords and edges"):
        source.batch(np.array([0]), needs=frozenset({"edges", "coords"}))


def test_arrays_refuse():
    good = np.zeros((2, 3))
    for bags, message in [
        ([good, np.zeros((0, 3))], "y: a bag without instances"),
        ([good, np.zeros((2, 4))], r"y: embeddings of shape \(4,\), and of \(3,\) in x"),
        ([good, np.full((2, 3), np.nan)], "y: has embeddings that are not finite"),
    ]:
        with pytest.raises(EvaluationError, match=message):
            ArrayBags(bags, ["x", "y"])
