"""Heads on regions: HIPT's on grids, all others on the tiles in them, and what becomes of what does not fit."""

import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from made_region_cohorts import CONFIG, DIM, LEVEL0, SIDE, make, write_splits

from gigatome import config
from gigatome.core.errors import ConfigError, EvaluationError, StoreError
from gigatome.core.job import Job
from gigatome.embeddings.bags import BagReader, check_bags
from gigatome.embeddings.joined import join_means, open_embeddings
from gigatome.embeddings.region_tiles import RegionTiles
from gigatome.embeddings.regions import RegionBag, read_regions, region_attributes, write_regions
from gigatome.embeddings.store import Bag, EmbeddingStore, write_bag
from gigatome.encoders.region_vit import RegionVit
from gigatome.encoders.region_zoo import RegionCard, save_region_encoder
from gigatome.evaluation.bag_head import BagHead, fit_bag_head
from gigatome.evaluation.heads import find_head, restore_head
from gigatome.evaluation.predict import predict_slides
from gigatome.evaluation.probes import Knn
from gigatome.evaluation.protocol import evaluate, prepare
from gigatome.evaluation.study_options import StudyOptions
from gigatome.evaluation.study_run import run_study
from gigatome.evaluation.unit_data import tiling_of
from gigatome.evaluation.units import SurvivalTarget
from gigatome.mil.fit import BagFitOptions
from gigatome.mil.model import BagBatch
from gigatome.mil.zoo import bag_model
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.slides.synthetic import SyntheticOptions, make_slide
from gigatome.slides.synthetic_scene import KINDS
from gigatome.tiles.grid import TileGrid
from gigatome.tiles.regions import RegionOptions, make_regions

SMALL = config.to_dict(CONFIG)
FAST = {"epochs": 8, "lr": 5e-3}
HEADS = {
    "hipt_lgp_fc": {"options": {"encoder": SMALL}},
    "hipt_none_fc": {"options": {"hidden": 8}},
    "abmil": {"options": {"hidden": 8, "attention": 4}},
    "max": {},
    "deep_attn_misl": {"options": {"clusters": 2, "hidden": 8}},
    "deep_graph_conv": {"options": {"hidden": 8}},
    "patch_gcn": {"options": {"hidden": 8}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


def run(store, made, head, **options):
    given = {"fit": FAST, **options}
    return evaluate(store, made.labels, target="oncotree_code", head=head, options=given, folds=2, resamples=9)


def test_the_tiles_of_regions_are_a_reader_of_tiles(made):
    regions = BagReader(made.grids, made.names)
    tiles = RegionTiles(regions)
    bag = read_regions(made.grids.path(made.names[0]))
    assert (tiles.names, tiles.dim, tiles.shape, tiles.side) == (made.names, DIM, (DIM,), SIDE)
    assert (tiles.encoder, tiles.weights) == ("enc", "w1")
    assert tiles.sizes[0] == bag.mask.sum() < bag.mask.size
    np.testing.assert_array_equal(tiles.read(0), bag.grids[bag.mask])
    rows = np.array([0, 3, tiles.sizes[0] - 1])
    np.testing.assert_array_equal(tiles.read(0, rows), bag.grids[bag.mask][rows])
    place = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), -1).reshape(-1, 2)  # x first, row by row
    expected = (bag.coords[:, None] + place * LEVEL0)[bag.mask]
    np.testing.assert_array_equal(tiles.coords(0), expected)
    with pytest.raises(StoreError, match="tiles, not of regions"):
        RegionTiles(BagReader(made.vectors, made.names))


@pytest.mark.parametrize("head", HEADS)
def test_one_file_of_regions_serves_every_head(made, head):
    result = run(made.grids, made, head, **HEADS[head])
    assert result.n_slides == len(made.names)
    assert np.isfinite(result.predictions.probabilities).all()
    if head in ("hipt_none_fc", "abmil"):
        assert result.auroc > 0.85


def test_heads_of_tiles_see_present_tiles_and_heads_of_regions_see_regions(made):
    prepared = prepare(made.grids, made.labels, "oncotree_code", 2)
    split = prepared.splits.parts[0]
    masks = [read_regions(made.grids.path(name)).mask for name in prepared.units.names]
    for model, sizes in (("abmil", [m.sum() for m in masks]), ("hipt_none_fc", [len(m) for m in masks])):
        head = BagHead(model, HEADS[model]["options"], BagFitOptions(epochs=1))
        found = fit_bag_head(head, prepared.data, prepared.units.outcome, split, seed=0)
        weights = found.predict(prepared.data, attention=True).attention
        assert [len(of) for of in weights] == sizes
        values, arrays = found.saved()
        again = restore_head(values, arrays).predict(prepared.data)
        np.testing.assert_allclose(again.probabilities, found.predict(prepared.data).probabilities, atol=1e-6)


def test_means_weigh_slides_by_the_tiles_that_are_there(tmp_path):
    made = make(tmp_path, patients=6, slides=2)
    data = prepare(made.grids, made.labels, "oncotree_code", 2, level="patient").data
    bags = [read_regions(made.grids.path(name)) for name in data.slides[0]]
    every = np.concatenate([bag.grids[bag.mask] for bag in bags])
    np.testing.assert_allclose(data.vectors[0], every.mean(0), atol=1e-5)


def test_frozen_hipt_on_grids_is_hipt_on_region_embeddings(made):
    torch.manual_seed(0)
    whole = bag_model("hipt_lgp_fc", DIM, 2, {"weights": str(made.encoder), "freeze": True}).eval()
    upper = bag_model("hipt_gp_fc", CONFIG.dim, 2).eval()
    state = {key: value for key, value in whole.state_dict().items() if not key.startswith("local_vit.")}
    upper.load_state_dict(state)
    name = made.names[0]
    x = torch.from_numpy(read_regions(made.grids.path(name)).grids)
    bounds = torch.tensor([0, len(x)])
    vectors = torch.from_numpy(made.vectors.read(name).embeddings)
    expected = upper(BagBatch(vectors, bounds)).logits
    torch.testing.assert_close(whole(BagBatch(x, bounds)).logits, expected, atol=1e-5, rtol=1e-5)
    everywhere = bag_model("hipt_lgp_fc", DIM, 2, {"weights": str(made.encoder), "variant": "hipt"}).eval()
    everywhere.load_state_dict(whole.state_dict())
    assert not torch.allclose(everywhere(BagBatch(x, bounds)).logits, expected, atol=1e-4)


def test_a_head_starts_from_a_region_encoder_and_is_restored_without_it(made, tmp_path):
    encoder = RegionVit(CONFIG)
    card = RegionCard("own", CONFIG, tile_encoder="enc", tile_weights="w1", tiles=SIDE)
    save_region_encoder(encoder, tmp_path / "own", card)
    prepared = prepare(made.grids, made.labels, "oncotree_code", 2)
    split, outcome = prepared.splits.parts[0], prepared.units.outcome
    options = {"weights": str(tmp_path / "own"), "freeze": True}
    head = BagHead("hipt_lgp_fc", options, BagFitOptions(epochs=1))
    found = fit_bag_head(head, prepared.data, outcome, split, seed=0)
    torch.testing.assert_close(found.network.local_vit.state_dict(), encoder.state_dict())
    values, arrays = found.saved()
    save_region_encoder(encoder, tmp_path / "other", replace(card, tile_weights="w2"))
    (tmp_path / "own" / "encoder.json").unlink()
    again = restore_head(values, arrays)
    np.testing.assert_allclose(
        again.predict(prepared.data).probabilities, found.predict(prepared.data).probabilities, atol=1e-6
    )
    other = replace(head, options={"weights": str(tmp_path / "other")})
    with pytest.raises(ConfigError, match=r"features_enc: embeddings by enc \(weights w1\); own was trained on .* w2"):
        fit_bag_head(other, prepared.data, outcome, split, seed=0)


@pytest.mark.parametrize(
    ("store", "head", "message"),
    [
        ("vectors", "hipt_lgp_fc", "takes regions as grids of tile embeddings; write them with gigatome embed"),
        ("vectors", "hipt_none_fc", "takes regions as grids of tile embeddings"),
        ("grids", "hipt_gp_fc", "takes one embedding of each region; write them with .* a region encoder"),
        ("grids", "region_transformer", "takes one embedding of each region"),
    ],
)
def test_heads_on_the_wrong_embeddings_say_how_to_make_the_right_ones(made, store, head, message):
    with pytest.raises(ConfigError, match=message):
        run(getattr(made, store), made, head)


def test_slides_without_any_tile_or_with_nan_are_left_out(tmp_path):
    made = make(tmp_path, patients=4)
    empty, broken = (read_regions(made.grids.path(name)) for name in made.names[:2])
    write_regions(made.grids.path(made.names[0]), replace(empty, grids=0 * empty.grids, mask=empty.mask & False))
    broken.grids[0, 3, 2] = np.nan
    write_regions(made.grids.path(made.names[1]), broken)
    found = check_bags(made.grids)
    assert found == {"no tiles": (made.names[0],), "embeddings that are not finite": (made.names[1],)}
    with pytest.raises(StoreError, match=f"1 of {len(broken)} embeddings are not finite"):
        BagReader(made.grids, made.names[1:2]).read(0)
    with pytest.raises(StoreError, match="no region has a tile"):
        RegionTiles(BagReader(made.grids, made.names[:1]))


def test_packs_count_tiles(made, monkeypatch):
    from gigatome.mil import fit

    seen = []
    monkeypatch.setattr(
        fit, "packs", lambda order, sizes, *rest, packs=fit.packs: seen.append(sizes) or packs(order, sizes, *rest)
    )
    run(made.grids, made, "hipt_none_fc", **HEADS["hipt_none_fc"])
    bags = BagReader(made.grids, made.names)
    assert {int(size) for sizes in seen for size in sizes} <= {int(size) * SIDE**2 for size in bags.sizes}


def test_published_trainings_by_name():
    code, paper, survival = (
        find_head("abmil", {"fit": {"variant": name}})[1].fit for name in ("hipt", "hipt_paper", "hipt_survival")
    )
    assert (code.lr, code.weight_decay, code.optimizer, code.epochs) == (2e-4, 1e-5, "adam", 20)
    assert (code.batch_bags, code.accumulate, code.sampling, code.select) == (1, 1, "balanced", "last")
    assert paper == replace(code, lr=0.01, accumulate=32)
    assert survival == replace(code, accumulate=32)
    assert find_head("abmil", {"fit": {"variant": "hipt", "epochs": 3}})[1].fit == replace(code, epochs=3)
    with pytest.raises(ConfigError, match="head abmil, fit: there is no variant none; there are hipt, hipt_paper"):
        find_head("abmil", {"fit": {"variant": "none"}})


def test_probes_take_options_and_other_names():
    assert find_head("near", {"model": "knn", "k": 3}) == ("near", Knn(k=3))
    assert find_head("hipt") == ("hipt", Knn(k=5, metric="euclidean"))
    with pytest.raises(ConfigError, match="knn: unknown key neighbours"):
        find_head("knn", {"neighbours": 3})


def test_means_of_two_levels_side_by_side(made, tmp_path):
    joined = join_means([made.grids, made.vectors], tmp_path / "joined")
    names, vectors = joined.slide_vectors()
    assert names == sorted(made.names)
    parts = [store.slide_vectors()[1] for store in (made.grids, made.vectors)]
    np.testing.assert_array_equal(vectors, np.concatenate(parts, 1))
    assert joined.encoder == "enc+made"
    assert BagReader(joined, names).weights == "w1+w1-r"
    text = f"{made.grids.folder} + {made.vectors.folder}"
    assert open_embeddings(text, tmp_path / "again").slide_vectors()[1].shape == (16, DIM + CONFIG.dim)
    assert open_embeddings(made.grids.folder, tmp_path).folder == made.grids.folder
    with pytest.raises(StoreError, match="no slide in common"):
        join_means([made.grids, EmbeddingStore(tmp_path, made.grids.tiles, "none")], tmp_path)


def test_means_side_by_side_are_of_the_slides_that_are_there(made, tmp_path):
    job = shutil.copytree(made.grids.job, tmp_path / "job")
    stores = [EmbeddingStore.open(job / store.folder.relative_to(store.job)) for store in (made.grids, made.vectors)]
    gone, *others = join_means(stores, tmp_path / "joined").names()
    stores[0].path(gone).unlink()
    assert join_means(stores, tmp_path / "joined").names() == others


def test_the_size_of_regions_is_kept_as_it_is(made, tmp_path):
    name = made.grids.names()[0]
    path = shutil.copy(made.grids.path(name), tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["coords"].attrs.update({"patch_size": 1024, "target_mpp": 0.50201})
    folder = tmp_path / "job" / "tiles" / "features_enc"
    folder.mkdir(parents=True)
    tiling = tiling_of(EmbeddingStore.open(Path(shutil.move(path, folder / "a.h5")).parent), "a")
    assert (tiling["patch_size"], tiling["target_mpp"]) == (1024, 0.502)


def test_background_is_of_one_kind_and_that_of_training(made, tmp_path):
    origin = prepare(made.grids, made.labels, "oncotree_code", 2).data.origin
    assert origin.background == "mask"
    with pytest.raises(EvaluationError, match="embedded with --background encode, the head learnt from those with"):
        origin.refuse_other(replace(origin, background="encode"), "there")
    origin.refuse_other(replace(origin, background=""), "files that do not say")
    store = EmbeddingStore.open(shutil.copytree(made.grids.folder, tmp_path / "tiles" / "features_enc"))
    with h5py.File(store.path(store.names()[-1]), "r+") as file:
        file["coords"].attrs["region_background"] = "encode"
    with pytest.raises(EvaluationError, match=r"cut into different tiles: .* mask\) and .* encode\)"):
        _ = prepare(store, made.labels, "oncotree_code", 2).data.origin


def test_knn_at_each_level_is_scikit_learns(made):
    neighbours = pytest.importorskip("sklearn.neighbors")
    for store in (made.grids, made.vectors):
        prepared = prepare(store, made.labels, "oncotree_code", 2)
        split, x, y = prepared.splits.parts[0], prepared.data.vectors, prepared.units.outcome.y
        expected = neighbours.KNeighborsClassifier().fit(x[split.train], y[split.train]).predict_proba(x[split.test])
        result = evaluate(store, made.labels, target="oncotree_code", head="hipt", folds=2, resamples=9)
        np.testing.assert_allclose(result.predictions.probabilities[: len(split.test)], expected)


def test_survival_of_patients(tmp_path):
    made = make(tmp_path, patients=20, slides=2)
    fit = {"variant": "hipt_survival", "epochs": 1}
    result = evaluate(
        made.grids, made.labels, target=SurvivalTarget("survival_months", censorship="censorship"), folds=2,
        head="hipt_none_fc", options={"fit": fit, "options": {"hidden": 8}}, resamples=9,
    )  # fmt: skip
    assert (result.level, result.n_patients, result.n_slides) == ("patient", 20, 40)
    assert result.predictions.survival.shape == (20, 4)


def test_the_authors_tables_end_to_end(tmp_path, caplog):
    made = make(tmp_path, patients=10, slides=2)
    splits = write_splits(tmp_path / "splits", made.names)
    with pytest.raises(EvaluationError, match="in both train and test, such as TCGA-"):
        evaluate(made.grids, made.labels, target="oncotree_code", folds=str(splits))
    given = {
        "embeddings": [str(made.grids.folder)], "labels": str(made.labels), "target": "oncotree_code",
        "heads": ["hipt_none_fc", "knn"], "options": {"hipt_none_fc": HEADS["hipt_none_fc"], "knn": {"k": 1}},
        "fit": {"epochs": 1}, "split_file": str(splits), "leaks": "warn", "resamples": 9, "tiles": 0, "shuffled": False,
    }  # fmt: skip
    study = run_study(config.parse(StudyOptions, given), tmp_path / "study")
    both = next(record.message for record in caplog.records if "splits_0.csv" in record.message)
    listed = both.rsplit(": ", 1)[1].split(", ")
    assert f"{len(listed)} patients in both train and test: TCGA-" in both
    assert both in study.settings["splits"]["warnings"]
    assert study.arms[0].result.folds[0].n_train == 10
    quarter = config.parse(
        StudyOptions, given | {"splits": {"train_fraction": 0.5}, "heads": ["knn"], "options": {"knn": {"k": 1}}}
    )
    fewer = run_study(quarter, tmp_path / "fewer")
    assert [fold.n_train for fold in fewer.arms[0].result.folds] == [5, 5]
    assert fewer.arms[0].result.split.endswith("50 % of the training part")


def test_saved_heads_find_their_embeddings_in_a_job_of_several(made, tmp_path):
    tiles = Job(made.job).tiles(256, 0.5).features("enc")  # of the same encoder, cut otherwise
    bag = Bag(made.names[0], "enc", np.zeros((1, 2), np.int64), np.zeros((1, DIM), np.float32), {"patch_size": 256})
    write_bag(tiles / f"{made.names[0]}.h5", bag)
    given = {
        "embeddings": [str(made.grids.folder)], "labels": str(made.labels), "target": "oncotree_code",
        "heads": ["hipt_none_fc"], "options": {"hipt_none_fc": HEADS["hipt_none_fc"]}, "fit": {"epochs": 1},
        "splits": {"folds": 2}, "resamples": 9, "tiles": 0, "shuffled": False,
    }  # fmt: skip
    run_study(config.parse(StudyOptions, given), tmp_path / "study")
    _, rows, _ = predict_slides(tmp_path / "study", made.job)
    assert [row.name for row in rows] == sorted(made.names)
    with pytest.raises(EvaluationError, match=r"embeddings of 12 numbers by made .* learnt from 16 by enc"):
        predict_slides(tmp_path / "study", made.vectors)
    with pytest.raises(ConfigError, match="heads learnt from regions; embed the slides with gigatome embed"):
        predict_slides(tmp_path / "study", Cohort((), "none"), encoder="e", job=tmp_path)
    shutil.rmtree(tiles.parent)


@pytest.mark.parametrize(("head", "side"), [("hipt_none_fc", 256), ("abmil", 128)])
def test_attended_regions_and_tiles_are_shown(tmp_path, head, side):
    folder, slides = Job(tmp_path / "job").tiles(256, 1.0).features("enc"), []
    for number in range(4):
        name, path = f"s{number}", tmp_path / f"s{number}.svs"
        make_slide(path, KINDS[number % 2], number, SyntheticOptions(width=1024, height=1024))
        slides.append(CohortSlide(str(path), name, f"p{number}", None, {"kind": KINDS[number % 2]}))
        with slides[-1].open() as slide:
            step, mpp, size = round(128 / slide.mpp), slide.mpp, (slide.width, slide.height)
        x, y = np.meshgrid(np.arange(size[0] // step), np.arange(size[1] // step))
        coords = np.stack([x.ravel(), y.ravel()], 1).astype(np.int64)[1:] * step  # without the first tile
        ones = np.ones(len(coords), np.float32)
        grid = TileGrid(coords, ones, 128, 1.0, 0, mpp, *size)
        regions = make_regions(grid, RegionOptions(tiles=2, min_tiles=1))
        x = np.random.default_rng(number).normal(size=(*regions.mask.shape, 4)).astype(np.float32)
        x[~regions.mask] = 0
        attrs = region_attributes(regions, name, "")
        bag = RegionBag(name, "enc", regions.coords, x, regions.mask, attrs)
        write_regions(folder / f"{name}.h5", bag)
    given = {
        "embeddings": [str(folder)], "labels": "none.csv", "target": "kind", "heads": [head], "splits": {"folds": 2},
        "options": {head: HEADS[head]}, "fit": {"epochs": 1}, "tiles": 4, "resamples": 9, "shuffled": False,
    }  # fmt: skip
    study = run_study(config.parse(StudyOptions, given), tmp_path / "study", cohort=Cohort(tuple(slides), "made"))
    assert study.tiles
    by_name = {slide.name: slide for slide in slides}
    for tile in study.tiles:
        with by_name[tile.slide].open() as slide:
            assert (tile.x % round(side / slide.mpp), tile.y % round(side / slide.mpp)) == (0, 0)
            expected = slide.read_tile(tile.x, tile.y, 192, side / 192)
        np.testing.assert_array_equal(tile.image, expected)
    if head == "abmil":
        assert (0, 0) not in {(tile.x, tile.y) for tile in study.tiles}
