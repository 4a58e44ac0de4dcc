"""Bags are read as HDF5 reads them, whether they are mapped or not, and what cannot be used is refused by name."""

import os

import h5py
import numpy as np
import pytest

from gigatome.core.errors import StoreError
from gigatome.core.job import Job
from gigatome.embeddings import bags as bags_module
from gigatome.embeddings.bags import BagReader, check_bags
from gigatome.embeddings.packed import open_packed, pack
from gigatome.embeddings.store import WEIGHTS, Bag, EmbeddingStore, write_bag

DIM = 8


def values_of(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)


def store_in(folder):
    (folder / "features_enc").mkdir(exist_ok=True)
    return EmbeddingStore.open(folder / "features_enc")


def write(folder, name, values, weights="0123", dtype="float32"):
    coords = np.arange(2 * len(values)).reshape(-1, 2)
    write_bag(
        folder / "features_enc" / f"{name}.h5", Bag(name, "enc", coords, values, {}, {WEIGHTS: weights}), dtype=dtype
    )


def write_raw(folder, name, values, **layout):
    """A file by another program."""
    with h5py.File(
        folder / "features_enc" / f"{name}.h5", "w", userblock_size=layout.pop("userblock_size", None)
    ) as file:
        file.create_dataset("coords", data=np.zeros((len(values), 2), np.int64))
        interleaved = layout.pop("interleaved", False)
        features = file.create_dataset("features", values.shape, values.dtype, **layout)
        if interleaved:  # chunks out of order, with something else between them
            step = features.chunks[0]
            for number, start in enumerate(reversed(range(0, len(values), step))):
                features[start : start + step] = values[start : start + step]
                file.create_dataset(f"other{number}", data=np.full(100 + number, 7, np.uint8))
                file.flush()
        else:
            features[:] = values


LAYOUTS = {
    "one piece": {},
    "trident": {"chunks": (1, DIM), "maxshape": (None, DIM)},
    "ours": {"chunks": (512, DIM)},
    "out of order": {"chunks": (100, DIM), "interleaved": True},
    "gzip": {"chunks": (512, DIM), "compression": "gzip"},
    "cut columns": {"chunks": (512, DIM // 2)},
    "user block": {"chunks": (512, DIM), "userblock_size": 512},
}
MAPPED = ("one piece", "trident", "ours", "out of order")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "features_enc").mkdir()
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", ">f4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_as_hdf5_does(folder, layout, dtype, monkeypatch):
    values = values_of(1300).astype(dtype)
    write_raw(folder, "a", values, **LAYOUTS[layout])
    reader = BagReader(store_in(folder), ["a"])
    assert reader.sizes.tolist() == [1300]
    assert (reader.dim, reader.encoder, len(reader)) == (DIM, "enc", 1)
    mappable = dtype in ("float32", "float16")
    mapped = mappable and layout in MAPPED
    if mapped:  # then HDF5 is not asked again
        monkeypatch.setattr(bags_module.h5py, "File", None)
    read = reader.read(0)
    np.testing.assert_array_equal(read, values.astype(np.float32) if not mappable else values)
    assert read.dtype == (np.float32 if not mappable else values.dtype)
    rows = np.array([0, 5, 99, 100, 511, 512, 600, 1299])
    np.testing.assert_array_equal(reader.read(0, rows), read[rows])
    assert bool(len(reader._layouts[0].offsets)) == mapped


def test_our_own_files_are_views_of_the_file(folder):
    write(folder, "a", values_of(1300))
    read = BagReader(store_in(folder), ["a"]).read(0)
    base = read
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    read[0, 0] = 5  # which changes no file
    assert BagReader(store_in(folder), ["a"]).read(0)[0, 0] != 5


def test_coords(folder):
    write(folder, "a", values_of(3))
    write(folder, "b", values_of(2))
    store = store_in(folder)
    for source in (store, pack(store, folder / "packed.h5")):
        reader = BagReader(source, ["b", "a"])
        assert reader.coords(1).tolist() == [[0, 1], [2, 3], [4, 5]]
        assert reader.coords(0).dtype == np.int64
        assert reader.weights == "0123"


def test_bags_that_cannot_be_used_are_listed(folder):
    write(folder, "good", values_of(5))
    write(folder, "empty", values_of(0))
    write(folder, "nan", np.where(np.arange(40).reshape(5, DIM) == 11, np.nan, values_of(5)).astype(np.float32))
    write(folder, "half", np.where(np.arange(40).reshape(5, DIM) == 11, np.inf, values_of(5)), dtype="float16")
    store = store_in(folder)
    assert check_bags(store) == {"no tiles": ("empty",), "embeddings that are not finite": ("half", "nan")}
    assert check_bags(store, values=False) == {"no tiles": ("empty",)}
    assert check_bags(store, ["good", "gone"]) == {"no embeddings": ("gone",)}
    with pytest.raises(StoreError, match="empty: has no tiles"):
        BagReader(store, ["good", "empty"])
    with pytest.raises(StoreError, match="no embeddings of slide gone"):
        BagReader(store, ["gone"])
    for name in ("nan", "half"):
        with pytest.raises(StoreError, match=f"{name}: 1 of 5 embeddings are not finite"):
            BagReader(store, [name]).read(0)
        reader = BagReader(store, [name])
        with pytest.raises(StoreError, match="1 of 2 embeddings"):
            reader.read(0, np.array([0, 1]))
        assert len(reader.read(0, np.array([0, 2]))) == 2


def test_large_values_are_finite(folder):
    write_raw(folder, "wide", np.full((2000, DIM), 3e38, np.float32))
    write_raw(folder, "half", np.full((2000, DIM), 6e4, np.float16))
    assert check_bags(store_in(folder)) == {}


def test_other_sizes_and_other_encoders_are_refused(folder):
    write(folder, "a", values_of(5))
    write(folder, "b", values_of(5)[:, :4])
    write(folder, "c", values_of(5), weights="4567")
    store = store_in(folder)
    with pytest.raises(StoreError, match=r"differ in size \(b has 4, a has 8\)"):
        BagReader(store, ["a", "b"])
    with pytest.raises(StoreError, match="a by 0123, c by 4567"):
        BagReader(store, ["a", "c"])
    with pytest.raises(StoreError, match=r"differ in size"):
        pack(store, folder / "packed.h5", names=["a", "b"])
    with pytest.raises(StoreError, match="differ in the encoder's weights"):
        pack(store, folder / "packed.h5", names=["a", "c"])
    assert not (folder / "packed.h5").exists()


def test_damaged_and_changed_files(folder):
    path = folder / "features_enc" / "a.h5"
    write(folder, "a", values_of(2000))
    reader = BagReader(store_in(folder), ["a"])
    reader.read(0)
    with path.open("r+b") as handle:
        os.truncate(handle.fileno(), 5000)
    with pytest.raises(StoreError, match="has changed since"):
        reader.read(0)
    with pytest.raises(StoreError, match="damaged"):
        BagReader(store_in(folder), ["a"])
    path.unlink()
    with pytest.raises(StoreError, match="cannot be read any more"):
        reader.read(0)
    with pytest.raises(StoreError, match="cannot be read any more"):
        reader.coords(0)
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((3, DIM), np.float32)
    with pytest.raises(StoreError, match="coords do not fit"):
        BagReader(store_in(folder), ["a"])


def test_truncated_within_the_embeddings_is_refused_and_not_mapped(folder):
    """Reading beyond the end of a mapped file would kill the process."""
    write_raw(folder, "a", values_of(4000))
    path = folder / "features_enc" / "a.h5"
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(StoreError):
        BagReader(store_in(folder), ["a"]).read(0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pack(folder, dtype):
    values = {name: values_of(rows, seed) for seed, (name, rows) in enumerate([("a", 7), ("b", 0), ("c", 600)])}
    for name, bag in values.items():
        write(folder, name, bag)
    calls = []
    packed = pack(store_in(folder), folder / "p.h5", dtype=dtype, progress=lambda *call: calls.append(call))
    assert (packed.names, packed.bounds.tolist(), packed.dim) == (("a", "c"), [0, 7, 607], DIM)
    assert calls == [("pack", 1, 2), ("pack", 2, 2)]
    reader = BagReader(packed, ["c", "a"])
    assert reader.sizes.tolist() == [600, 7]
    for place, name in enumerate(("c", "a")):
        assert reader.read(place).dtype == dtype
        np.testing.assert_array_equal(reader.read(place), values[name].astype(dtype))
    np.testing.assert_array_equal(reader.read(0, np.array([3, 500])), values["c"].astype(dtype)[[3, 500]])
    with pytest.raises(StoreError, match="no embeddings of b"):
        BagReader(packed, ["a", "b"])
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["p.h5"]


def test_packed_files_say_whose_they_are(folder):
    write(folder, "a", values_of(7))
    store = store_in(folder)
    first = pack(store, folder / "p.h5")
    assert open_packed(folder / "p.h5", encoder="enc", weights="0123").digest == first.digest
    for wrong in ({"encoder": "other"}, {"weights": "4567"}):
        with pytest.raises(StoreError, match=r"not of (other|4567)"):
            open_packed(folder / "p.h5", **wrong)
    assert pack(store, folder / "q.h5").digest == first.digest
    write(folder, "a", values_of(7, seed=1))
    assert pack(store, folder / "p.h5").digest != first.digest
    assert len(first.digest) == 16


def test_what_is_no_packed_file(folder):
    write(folder, "a", values_of(7))
    store = store_in(folder)
    with pytest.raises(StoreError, match="is no file of packed"):
        open_packed(store.path("a"))
    with pytest.raises(StoreError, match="cannot be read as packed"):
        open_packed(folder / "none.h5")
    path = pack(store, folder / "p.h5").path
    with h5py.File(path, "r+") as file:
        file["bounds"][-1] = 99
    with pytest.raises(StoreError, match="do not fit together"):
        open_packed(path)


def test_pack_refuses(folder):
    write(folder, "a", np.full((3, DIM), 1e5, np.float32))
    write(folder, "b", np.full((3, DIM), np.nan, np.float32))
    write(folder, "c", values_of(0))
    store = store_in(folder)
    with pytest.raises(StoreError, match=r"a: has embeddings up to 1e\+05, too large for float16"):
        pack(store, folder / "p.h5", names=["a"])
    with pytest.raises(StoreError, match="b: has embeddings that are not finite"):
        pack(store, folder / "p.h5", names=["b"])
    with pytest.raises(StoreError, match="c: no tiles"):
        pack(store, folder / "p.h5", names=["a", "c"])
    with pytest.raises(StoreError, match="no embeddings of slide d"):
        pack(store, folder / "p.h5", names=["d"])
    with pytest.raises(StoreError, match="no slide with tiles"):
        pack(EmbeddingStore(folder, Job(folder).tiles(256, 0.5), "none"), folder / "p.h5")
    assert not (folder / "p.h5").exists()
    assert pack(store, folder / "p.h5", names=["a"], dtype="float32").embeddings.max() == 1e5
