"""Slide embeddings of ours and of other tools are read alike, and what is none is refused."""

import sys

import h5py
import numpy as np
import pytest
from made_slides import made_tiles
from typer.testing import CliRunner

from gigatome.cli.main import app
from gigatome.core.errors import MissingExtraError, StoreError
from gigatome.embeddings.slide_store import SlideStore, holds_embeddings, open_store, write_slide_vector
from gigatome.embeddings.slide_vectors import embed_slide_vectors
from gigatome.embeddings.store import EmbeddingStore

VECTORS = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
NAMES = ["TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF", "b.c", "a"]


def files(folder, key="features", shape=(6,), names=NAMES, **attrs):
    folder.mkdir(parents=True)
    for name, vector in zip(names, VECTORS, strict=True):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file[key] = vector.reshape(shape)
            file.attrs.update(attrs)
    return folder


def check(store, encoder):
    assert store.names() == sorted(NAMES)
    assert store.encoder == encoder
    assert np.array_equal(store.slide_vectors(NAMES)[1], VECTORS)
    assert store.slide_vectors(["a"])[0] == ["a"]


def test_files_of_other_tools(tmp_path):
    trident = files(tmp_path / "job" / "20x_256px_0px_overlap" / "slide_features_titan")
    for path in (trident, trident.parent, tmp_path / "job"):
        check(open_store(path), "titan")
    check(open_store(files(tmp_path / "pooled", shape=(1, 6))), "pooled")  # Patho-Bench
    for number, shape in enumerate([(6,), (1, 6)]):
        stamp = files(tmp_path / f"stamp{number}", "feats", shape, extractor="chief", feat_type="slide")
        check(open_store(stamp), "chief")
    published = tmp_path / "TCGA_encoded_t5e1000"
    published.mkdir()
    np.save(published / "ids.npy", np.array(NAMES, "<U61"))
    np.save(published / "embeddings.npy", VECTORS.astype(np.float64))
    check(open_store(published), "TCGA_encoded_t5e1000")
    assert all(map(holds_embeddings, (trident, tmp_path / "job", published, tmp_path / "pooled")))
    assert not holds_embeddings(tmp_path)


def test_a_table_holds_all_that_the_files_do(tmp_path):
    pytest.importorskip("pyarrow", reason="the extra tables is not installed")
    folder = tmp_path / "10x_256px_0px_overlap" / "slide_features_giga"
    stated = {"target_mpp": 1.0, "patch_size": np.int64(256), "view_tiles": 5}
    for number, (name, vector) in enumerate(zip(NAMES, VECTORS, strict=True)):
        write_slide_vector(
            folder / f"{name}.h5", vector, encoder="giga", weights="abc", patient=f"p{number}",
            stated={**stated, "mpp_level0": 0.25 + number},
        )  # fmt: skip
    store = open_store(folder)
    check(store, "giga")
    store.write_table(tmp_path / "all.parquet")
    table = open_store(tmp_path / "all.parquet")
    check(table, "giga")
    assert (table.weights, table.patients, table.patients["a"]) == ("abc", store.patients, "p2")
    assert table.attributes("a") == stated  # what all have alike
    assert len(table.packed().embeddings) == 3

    import pyarrow
    from pyarrow import parquet

    schema = parquet.read_schema(tmp_path / "all.parquet")
    assert schema.names == ["slide_id", "case_id", *(f"f{k}" for k in range(6))]
    assert set(schema.types[2:]) == {pyarrow.float32()}
    foreign = pyarrow.table({"slide_id": NAMES, "f0": VECTORS[:, 0].astype(np.float64), "label": [0, 1, 0]})
    parquet.write_table(foreign, tmp_path / "plain.parquet")
    plain = open_store(tmp_path / "plain.parquet")
    assert (plain.encoder, plain.weights, plain.embeddings.shape) == ("plain", "", (3, 1))
    parquet.write_table(foreign.drop_columns(["slide_id"]), tmp_path / "nameless.parquet")
    with pytest.raises(StoreError, match=r"nameless\.parquet: .*columns slide_id, f0, f1 … are needed"):
        open_store(tmp_path / "nameless.parquet")
    parquet.write_table(pyarrow.concat_tables([foreign, foreign]), tmp_path / "twice.parquet")
    with pytest.raises(StoreError, match=r"slide TCGA-3C-AALI-01Z-00-DX1\.F6E9A5DF is there twice"):
        open_store(tmp_path / "twice.parquet")


def test_as_patho_bench_reads_them(tmp_path):
    trident = files(tmp_path / "slide_features_titan")
    said = CliRunner().invoke(app, ["export", str(trident), "--to", "patho-bench", "-o", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    assert said.output == f"{tmp_path / 'out' / 'pooled'}: 3 slides by titan\n"
    with h5py.File(tmp_path / "out" / "pooled" / "a.h5") as file:
        assert (list(file), file["features"].shape, file["features"].dtype) == (["features"], (1, 6), np.float32)
    check(open_store(tmp_path / "out" / "pooled"), "titan")


def test_a_table_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pyarrow is needed to read x\.parquet: pip .*gigatome\[tables"):
        open_store(tmp_path / "x.parquet")


def test_tiles_come_first_and_a_name_decides(tmp_path):
    tiles = made_tiles(tmp_path, [8])
    slides = embed_slide_vectors(tiles, slide_encoder=None, name="mean")
    assert isinstance(open_store(tmp_path), EmbeddingStore)
    assert isinstance(open_store(tmp_path, encoder="tiny"), EmbeddingStore)
    assert open_store(tmp_path, encoder="mean").folder == slides.folder
    embed_slide_vectors(tiles, slide_encoder=None, name="other")
    with pytest.raises(StoreError, match=r"name one set of slide embeddings; there are .*mean, .*other"):
        SlideStore.open(tmp_path)


def test_what_is_no_slide_embedding(tmp_path):
    with pytest.raises(StoreError, match=r"holds no slide embedding \(D,\) or \(1, D\), but \(2, 3\)"):
        open_store(files(tmp_path / "slide_features_a", shape=(2, 3)))
    with pytest.raises(StoreError, match=r"but \['other'\]"):
        open_store(files(tmp_path / "slide_features_b", "other"))
    mixed = files(tmp_path / "slide_features_c")
    write_slide_vector(mixed / "d.h5", VECTORS[0], encoder="x", weights="", patient="p", stated={})
    with pytest.raises(StoreError, match="are by different encoders"):
        open_store(mixed)
    sizes = files(tmp_path / "slide_features_e")
    write_slide_vector(sizes / "z.h5", VECTORS[0, :4], encoder="e", weights="", patient="p", stated={})
    with pytest.raises(StoreError, match=r"differ in size \(a has 6, z has 4\)|differ in size"):
        open_store(sizes)
    (sizes / "z.h5").write_bytes(b"no file")
    with pytest.raises(StoreError, match=r"z\.h5: is damaged"):
        open_store(sizes)
    (tmp_path / "ids.npy").write_bytes(b"no array")
    np.save(tmp_path / "embeddings.npy", VECTORS)
    with pytest.raises(StoreError, match=r"ids\.npy and embeddings.npy cannot be read"):
        SlideStore.open(tmp_path)
    with pytest.raises(StoreError, match="there are nothing"):
        SlideStore.open(tmp_path / "none")
