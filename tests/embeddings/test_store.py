"""The files of embeddings: their layout, and what reading them refuses."""

import logging

import h5py
import numpy as np
import pytest

from gigatome.core.errors import StoreError
from gigatome.core.job import Job
from gigatome.embeddings.store import WEIGHTS, Bag, EmbeddingStore, read_bag, read_header, write_bag

NINE = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40.0,
    "target_magnification": 20.0,
    "overlap": 0,
    "level0_width": 9000,
    "level0_height": 7000,
}


def make_bag(name="a", rows=5, dim=8, seed=0, **encoding):
    rng = np.random.default_rng(seed)
    coords = rng.integers(0, 9000, (rows, 2))
    return Bag(name, "enc", coords, rng.normal(size=(rows, dim)).astype(np.float32), NINE, encoding)


def make_store(job, bags, encoder="enc", mpp=0.5):
    tiles = Job(job).tiles(256, mpp)
    for bag in bags:
        write_bag(tiles.features(encoder) / f"{bag.name}.h5", bag)
    return EmbeddingStore(job, tiles, encoder)


def test_layout_is_that_of_trident(tmp_path):
    path = tmp_path / "features_enc" / "TCGA-3C-AALI.F6E9.h5"
    bag = make_bag("TCGA-3C-AALI.F6E9", rows=1300)
    write_bag(path, bag)
    with h5py.File(path) as file:
        assert set(file) == {"features", "coords"}
        assert all(isinstance(item, h5py.Dataset) and item.ndim == 2 for item in file.values())
        assert not file.attrs
        features, coords = file["features"], file["coords"]
        assert (features.dtype, features.shape, features.chunks) == (np.float32, (1300, 8), (512, 8))
        assert dict(features.attrs) == {"encoder": "enc", "name": bag.name, "savetodir": str(path.parent)}
        assert coords.dtype == np.int64
        assert set(coords.attrs) == {*NINE, "name", "savetodir"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_round_trip(tmp_path):
    bag = make_bag(**{WEIGHTS: "0123"})
    write_bag(tmp_path / "a.h5", bag)
    again = read_bag(tmp_path / "a.h5")
    assert (again.name, again.encoder, again.encoding[WEIGHTS]) == ("a", "enc", "0123")
    np.testing.assert_array_equal(again.coords, bag.coords)
    np.testing.assert_array_equal(again.embeddings, bag.embeddings)
    assert again.attrs["patch_size_level0"] == 512
    header = read_header(tmp_path / "a.h5")
    assert (header.encoder, header.weights, header.dim, len(header.coords)) == ("enc", "0123", 8, 5)


def test_small_and_empty_slides(tmp_path):
    write_bag(tmp_path / "small.h5", make_bag(rows=3))
    write_bag(tmp_path / "empty.h5", make_bag(rows=0))
    with h5py.File(tmp_path / "small.h5") as file:
        assert file["features"].chunks == (3, 8)
    with h5py.File(tmp_path / "empty.h5") as file:
        assert file["features"].shape == (0, 8)
        assert file["coords"].shape == (0, 2)
    assert len(read_bag(tmp_path / "empty.h5")) == 0


def test_float16_is_opt_in_and_read_as_float32(tmp_path):
    bag = make_bag()
    write_bag(tmp_path / "a.h5", bag, dtype="float16")
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["features"].dtype == np.float16
    again = read_bag(tmp_path / "a.h5").embeddings
    assert again.dtype == np.float32
    np.testing.assert_allclose(again, bag.embeddings, rtol=1e-3, atol=1e-4)


def test_reads_what_trident_wrote(tmp_path):
    """Row chunks, no hash of weights, and float16 from an encoder under autocast."""
    folder = tmp_path / "20x_256px_0px_overlap" / "features_uni_v1"
    folder.mkdir(parents=True)
    with h5py.File(folder / "slide.1.h5", "w") as file:
        features = file.create_dataset("features", data=np.ones((7, 4), np.float16), chunks=(1, 4), maxshape=(None, 4))
        features.attrs.update({"encoder": "uni_v1", "name": "slide.1", "savetodir": "elsewhere"})
        file.create_dataset("coords", data=np.zeros((7, 2), np.int64), chunks=(1, 2)).attrs.update(NINE)
    store = EmbeddingStore.open(tmp_path)
    assert (store.encoder, store.names()) == ("uni_v1", ["slide.1"])
    names, vectors = store.slide_vectors()
    assert names == ["slide.1"]
    np.testing.assert_array_equal(vectors, np.ones((1, 4), np.float32))
    assert read_header(folder / "slide.1.h5").weights == ""


def test_slide_vectors_are_means(tmp_path):
    bags = [make_bag("b", 3, seed=1), make_bag("a", 9000, seed=2), make_bag("c", 4, seed=3)]
    store = make_store(tmp_path, bags)
    names, vectors = store.slide_vectors()
    assert names == ["a", "b", "c"]
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[1], bags[0].embeddings.mean(0), rtol=1e-6)
    np.testing.assert_allclose(vectors[0], bags[1].embeddings.mean(0, dtype=np.float64), rtol=1e-6)
    assert store.slide_vectors(["c"])[0] == ["c"]


def test_slides_without_a_mean_are_left_out_and_logged(tmp_path, caplog):
    bad = make_bag("bad")
    bad.embeddings[2, 1] = np.nan
    store = make_store(tmp_path, [make_bag("good"), make_bag("empty", rows=0), bad])
    with caplog.at_level(logging.WARNING, "gigatome"):
        names, vectors = store.slide_vectors()
    assert names == ["good"]
    assert vectors.shape == (1, 8)
    assert "empty: has no tiles" in caplog.text
    assert "bad: has embeddings that are not finite" in caplog.text


def test_a_store_without_slides_has_no_vectors(tmp_path):
    assert make_store(tmp_path, [make_bag("empty", rows=0)]).slide_vectors()[0] == []


def test_embeddings_of_different_sizes_are_refused(tmp_path):
    store = make_store(tmp_path, [make_bag("a", dim=8), make_bag("b", dim=6)])
    with pytest.raises(StoreError, match=r"differ in size \(a has 8, b has 6\)"):
        store.slide_vectors()


def test_open_finds_the_same_store_from_each_folder(tmp_path):
    store = make_store(tmp_path, [make_bag()])
    (tmp_path / "thumbnails").mkdir()
    for path in (tmp_path, store.tiles.path, store.folder, str(store.folder)):
        found = EmbeddingStore.open(path)
        assert (found.folder, found.encoder, found.job) == (store.folder, "enc", tmp_path)


def test_open_works_from_within(tmp_path, monkeypatch):
    store = make_store(tmp_path, [make_bag()])
    monkeypatch.chdir(store.folder)
    assert EmbeddingStore.open(".").names() == ["a"]


def test_open_lists_what_there_is_to_choose_from(tmp_path):
    make_store(tmp_path, [make_bag()], "one")
    make_store(tmp_path, [make_bag()], "two")
    make_store(tmp_path, [make_bag()], "two", mpp=1.0)
    with pytest.raises(StoreError, match="holds 3 sets of embeddings") as error:
        EmbeddingStore.open(tmp_path)
    for part in ("20x_256px_0px_overlap/features_one", "10x_256px_0px_overlap/features_two"):
        assert part in str(error.value)
    assert EmbeddingStore.open(tmp_path, encoder="one").encoder == "one"
    with pytest.raises(StoreError, match="holds 2 sets"):
        EmbeddingStore.open(tmp_path, encoder="two")
    with pytest.raises(StoreError, match="no embeddings of encoder three; there are"):
        EmbeddingStore.open(tmp_path, encoder="three")


def test_open_passes_over_slide_features_and_empty_folders(tmp_path):
    store = make_store(tmp_path, [make_bag()])
    (store.tiles.path / "slide_features_titan").mkdir()
    (store.tiles.path / "features_begun").mkdir()
    assert EmbeddingStore.open(tmp_path).encoder == "enc"


@pytest.mark.parametrize("name", ["missing", "."])
def test_open_refuses_a_folder_without_embeddings(tmp_path, name):
    with pytest.raises(StoreError, match="holds no tile embeddings"):
        EmbeddingStore.open(tmp_path / name)


def test_read_of_a_slide_that_is_not_there(tmp_path):
    with pytest.raises(StoreError, match="holds no embeddings of slide b"):
        make_store(tmp_path, [make_bag("a")]).read("b")


def test_a_truncated_file_is_damaged(tmp_path):
    path = tmp_path / "a.h5"
    write_bag(path, make_bag(rows=2000))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(StoreError, match=r"a\.h5: is damaged"):
        read_bag(path)


def test_no_hdf5_at_all(tmp_path):
    (tmp_path / "a.h5").write_text("slide,label\n")
    with pytest.raises(StoreError, match="is damaged"):
        read_bag(tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"feats": (5, 8), "coords": (5, 2)}, "has coords, feats, not features and coords"),
        ({"features": (8,), "coords": (5, 2)}, "slide embeddings lie in"),
        ({"features": (1, 5, 8), "coords": (5, 2)}, "are no tile embeddings"),
        ({"features": (5, 8), "coords": (4, 2)}, "are no tile embeddings"),
    ],
)
def test_other_layouts_are_refused(tmp_path, arrays, message):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, shape in arrays.items():
            file.create_dataset(name, data=np.zeros(shape))
    with pytest.raises(StoreError, match=message):
        read_bag(tmp_path / "a.h5")


def test_writing_where_one_cannot(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file"):
        write_bag(tmp_path / "file" / "a.h5", make_bag())


def test_a_bag_must_fit_together():
    with pytest.raises(ValueError, match="a bag needs"):
        Bag("a", "enc", np.zeros((3, 2), np.int64), np.zeros((4, 8), np.float32))
