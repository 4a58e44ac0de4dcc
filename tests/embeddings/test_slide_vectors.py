"""Slides are the normalised mean over views, whatever the order, the batch and the process that made them."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from made_augmented import made_bag, made_store
from made_slides import ATTRS, made_encoder, made_tiles

from gigatome.core.errors import ConfigError, StoreError
from gigatome.embeddings import slide_vectors
from gigatome.embeddings.slide_store import TABLE, SlideStore
from gigatome.embeddings.slide_vectors import SlideVectorOptions, embed_slide_vectors
from gigatome.embeddings.slide_ways import draw_views
from gigatome.embeddings.store import write_bag
from gigatome.slides.cohort import Cohort, CohortSlide

PARTITION = SlideVectorOptions(views=7, tiles=5)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def one_by_one(encoder, bag, options, side=1024.0, truncate=False):
    """A slide's vector by its definition: each view alone."""
    found = []
    for rows in draw_views(options, bag.name, len(bag)):
        places = bag.coords[rows] / side
        places = places - places.min(0)
        cells = torch.from_numpy(np.trunc(places) if truncate else np.rint(places)).long()
        x = torch.from_numpy(bag.embeddings[rows])
        with torch.inference_mode():
            found.append(encoder(x, cells, torch.tensor([0, len(rows)]))[0].double())
    mean = torch.stack(found).mean(0)
    return (mean / mean.norm()).float().numpy()


@pytest.mark.parametrize("pooling", ["sparse_conv", "mlp", "transformer"])
@pytest.mark.parametrize("drawing", ["partition", "replacement", "all"])
def test_a_vector_is_the_normalised_mean_over_views(tmp_path, pooling, drawing):
    store, made = made_tiles(tmp_path, [30, 3, 1, 12]), made_encoder(pooling=pooling)
    options = replace(PARTITION, drawing=drawing)
    found = embed_slide_vectors(store, slide_encoder=made, options=options)
    assert found.names() == store.names()
    for name, vector in zip(*found.slide_vectors(), strict=True):
        assert vector == pytest.approx(one_by_one(made[0], store.read(name), options), abs=2e-6)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_views_are_dealt_without_replacement_until_tiles_run_out():
    views = draw_views(SlideVectorOptions(views=9, tiles=5), "a", 23)
    for part in (views[:4], views[4:8]):  # four hands of five
        assert len(set(part.ravel().tolist())) == 20
    assert len(views) == 9
    assert len(set(views[8].tolist())) == 5
    with_them = draw_views(SlideVectorOptions(views=200, tiles=5, drawing="replacement"), "a", 6)
    assert any(len(set(view.tolist())) < 5 for view in with_them)
    assert np.bincount(with_them.ravel()) == pytest.approx(1000 / 6, rel=0.25)
    assert draw_views(PARTITION, "a", 5).tolist() == [[0, 1, 2, 3, 4]]
    assert draw_views(replace(PARTITION, drawing="all"), "a", 9).tolist() == [list(range(9))]
    assert draw_views(replace(PARTITION, drawing="replacement"), "a", 1).tolist() == [[0] * 5] * 7


@pytest.mark.parametrize("drawing", ["partition", "replacement"])
def test_a_view_depends_on_seed_name_and_number_alone(drawing):
    few, many = (draw_views(SlideVectorOptions(views=v, tiles=4, drawing=drawing), "a", 30) for v in (6, 60))
    assert np.array_equal(few, many[:6])
    for name, seed in (("b", 0), ("a", 1)):
        other = draw_views(SlideVectorOptions(views=6, tiles=4, drawing=drawing, seed=seed), name, 30)
        assert not np.array_equal(few, other)


def test_neither_order_nor_company_matters(tmp_path, monkeypatch):
    store, made = made_tiles(tmp_path / "job", [30, 12, 40]), made_encoder(edges="batch")
    found = embed_slide_vectors(store, slide_encoder=made, options=PARTITION)
    monkeypatch.setattr(slide_vectors, "_TILES_AT_ONCE", 1)
    cohort = Cohort(tuple(CohortSlide(n, n, f"p{n}") for n in ("s02", "s00")), "two")
    two = embed_slide_vectors(store, slide_encoder=made, options=PARTITION, cohort=cohort, out=tmp_path / "two")
    assert two.names() == ["s00", "s02"]
    assert two.embeddings == pytest.approx(found.embeddings[[0, 2]], abs=1e-6)
    assert two.patients == {"s00": "ps00", "s02": "ps02"}
    parts = [
        embed_slide_vectors(store, slide_encoder=made, options=PARTITION, out=tmp_path / "shards", shard=(i, 2))
        for i in range(2)
    ]
    assert [len(part) for part in parts] == [2, 3]
    assert parts[1].embeddings == pytest.approx(found.embeddings, abs=1e-6)


def test_files_go_on_where_they_stopped_and_tell_what_they_are(tmp_path):
    store, made = made_tiles(tmp_path, [30, 12]), made_encoder()
    found = embed_slide_vectors(store, slide_encoder=made, options=PARTITION)
    first, second = (found.folder / f"{name}.h5" for name in found.names())
    assert found.folder.parent == store.tiles.path
    with h5py.File(first) as file:
        assert list(file) == ["features"]
        features = file["features"]
        assert (features.shape, features.dtype) == ((512,), np.float32)
        assert features.attrs["encoder"] == found.encoder
        assert features.attrs["encoder_weights"] == found.weights
        assert features.attrs["target_mpp"] == 1.0
        assert features.attrs["view_tiles"] == 5
        said = json.loads(features.attrs["slide_options"])
    assert said == {"views": 7, "tiles": 5, "drawing": "partition", "frame": "tile", "seed": 0}
    stamp = second.stat().st_mtime_ns
    first.unlink()
    again = embed_slide_vectors(store, slide_encoder=made, options=PARTITION)
    assert second.stat().st_mtime_ns == stamp
    assert again.embeddings == pytest.approx(found.embeddings, abs=1e-6)
    first.write_bytes(b"no file")
    again = embed_slide_vectors(store, slide_encoder=made, options=PARTITION)
    assert again.embeddings == pytest.approx(found.embeddings, abs=1e-6)
    with pytest.raises(StoreError, match=r"made otherwise \(slide s00: .*give these another name, or pass overwrite"):
        embed_slide_vectors(store, slide_encoder=made, options=replace(PARTITION, seed=1))
    other = embed_slide_vectors(store, slide_encoder=made, options=replace(PARTITION, seed=1), overwrite=True)
    assert not np.allclose(other.embeddings, found.embeddings, atol=1e-4)
    bag = store.read("s00")  # on another grid now
    write_bag(store.path("s00"), replace(bag, coords=bag.coords[::-1].copy()))
    moved = embed_slide_vectors(store, slide_encoder=made, options=replace(PARTITION, seed=1))
    same = [np.allclose(*pair, atol=1e-6) for pair in zip(moved.embeddings, other.embeddings, strict=True)]
    assert same == [False, True]


def test_without_pyarrow_there_is_no_table_and_a_word(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    store, made = made_tiles(tmp_path, [8]), made_encoder()
    with caplog.at_level(logging.WARNING, "gigatome"):
        found = embed_slide_vectors(store, slide_encoder=made, options=PARTITION)
    assert not (found.folder / TABLE).exists()
    assert f"{TABLE} is left out; pyarrow is needed" in caplog.text
    assert "gigatome[tables]" in caplog.text


def test_slides_that_cannot_be_embedded_are_named(tmp_path):
    store, made = made_tiles(tmp_path, [30, 0, 12, 9, 9]), made_encoder()
    bag = store.read("s02")
    bag.embeddings[3, 1] = np.nan
    write_bag(store.path("s02"), bag)
    bag = store.read("s03")
    bag.coords[0] += 2**40
    write_bag(store.path("s03"), bag)
    store.path("s04").write_bytes(b"no file")
    cohort = Cohort(tuple(CohortSlide(n, n, n) for n in [*store.names(), "s09"]), "made")
    options = replace(PARTITION, drawing="all")
    found = embed_slide_vectors(store, slide_encoder=made, cohort=cohort, options=options)
    assert found.names() == ["s00"]
    told = {failure.slide: failure.message for failure in found.failures}
    assert sorted(told) == ["s01", "s02", "s03", "s04", "s09"]
    words = ["has no tiles", "not finite", "cells", "damaged", "has no embeddings of tiles in"]
    assert all(word in message for word, (_, message) in zip(words, sorted(told.items()), strict=True)), told
    assert (tmp_path / "failures.csv").read_text().count("\n") == 6


def test_tiles_by_another_encoder_are_refused(tmp_path):
    store = made_tiles(tmp_path / "a", [8, 9], weights="other")
    with pytest.raises(ConfigError, match=r"weights other\); tiny giga was trained on those by tiny \(weights abc\)"):
        embed_slide_vectors(store, slide_encoder=made_encoder())
    with pytest.raises(ConfigError, match="tiny giga takes 4"):
        embed_slide_vectors(made_tiles(tmp_path / "b", [8], dim=5), slide_encoder=made_encoder())
    mixed = made_tiles(tmp_path / "c", [8, 9])
    bag = mixed.read("s01")
    write_bag(mixed.path("s01"), replace(bag, encoding={"encoder_weights": "xyz"}))
    with pytest.raises(StoreError, match=r"by different encoders: slide s01 by tiny \(weights xyz\), others .*abc"):
        embed_slide_vectors(mixed, slide_encoder=made_encoder())
    with pytest.raises(StoreError, match="holds no tile embeddings"):
        embed_slide_vectors(made_tiles(tmp_path / "d", []), slide_encoder=made_encoder())


@pytest.mark.parametrize(
    "options", [{"views": 0}, {"tiles": 0}, {"seed": -1}, {"drawing": "some"}], ids=["views", "tiles", "seed", "draw"]
)
def test_options_are_checked(options):
    with pytest.raises(ConfigError):
        SlideVectorOptions(**options)


def test_the_cards_tiles_and_frame_are_the_default(tmp_path):
    store, made = made_tiles(tmp_path, [30]), made_encoder(tiles=3, frame="authors_training")
    found = embed_slide_vectors(store, slide_encoder=made)
    wanted = one_by_one(made[0], store.read("s00"), SlideVectorOptions(tiles=3), side=224.0, truncate=True)
    assert found.embeddings[0] == pytest.approx(wanted, abs=2e-6)


def test_tridents_attributes_say_where_tiles_lie(tmp_path):
    attrs = {"patch_size": 256, "overlap": 0, "level0_magnification": 40.0, "target_magnification": 10.0}
    made = made_encoder(weights="")
    found = [
        embed_slide_vectors(made_tiles(tmp_path / name, [30], weights="", attrs=of), slide_encoder=made)
        for name, of in (("a", attrs), ("b", ATTRS))
    ]
    assert np.array_equal(found[0].embeddings, found[1].embeddings)
    nowhere = made_tiles(tmp_path / "c", [30], weights="", attrs={})
    assert "does not state 'patch_size'" in embed_slide_vectors(nowhere, slide_encoder=made).failures[0].message


def test_augmented_tiles_as_the_authors_use_them(tmp_path):
    store = made_store(tmp_path, [made_bag(n) for n in range(3)])
    made = made_encoder()
    found = embed_slide_vectors(store, slide_encoder=made, options=SlideVectorOptions(views=6, tiles=2))
    bag = store.read("s01")
    rows = draw_views(SlideVectorOptions(views=6, tiles=2), "s01", 6, groups=3)
    assert (rows // 6 == np.array([0, 1, 2, 0, 1, 2])[:, None]).all()  # a view sees one augmentation
    assert all(len(set(rows[g::3].ravel().tolist())) == 4 for g in range(3))
    views = [(bag.embeddings.reshape(18, -1)[view], bag.cells.reshape(18, 2)[view]) for view in rows]
    bounds = torch.tensor([0, 2])
    with torch.inference_mode():
        each = [made[0](torch.from_numpy(x).float(), torch.from_numpy(c - c.min(0)), bounds)[0] for x, c in views]
    mean = torch.stack(each).mean(0)
    assert found.embeddings[1] == pytest.approx((mean / mean.norm()).numpy(), abs=2e-6)


def test_tiles_unlike_those_of_training_are_worth_a_word(tmp_path, caplog):
    encoder, card = made_encoder(pooling="mlp")
    for size, words in (
        (256, ""),
        (224, "trained on embeddings of tiles of 224 px at 1 mpp; these are of 256 px at 1"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "gigatome"):
            made = encoder, replace(card, tile_size=size)
            embed_slide_vectors(made_tiles(tmp_path / str(size), [8]), slide_encoder=made, options=PARTITION)
        told = [record.getMessage() for record in caplog.records if "trained on" in record.getMessage()]
        assert [words in line for line in told] == [True] * bool(words)


def test_the_mean_of_tiles(tmp_path):
    store = made_tiles(tmp_path, [30, 2])
    found = embed_slide_vectors(store, slide_encoder=None)
    assert found.encoder == "mean-tiny"
    assert found.weights not in ("", "abc")
    assert found.embeddings == pytest.approx(store.slide_vectors()[1], abs=1e-7)
    assert isinstance(SlideStore.open(Path(tmp_path)), SlideStore)
