"""Encoders and heads that stand upon one another, and those that do not."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_chains import make_chain, make_heads
from safetensors.numpy import save_file

from gigatome.core.errors import ConfigError, EvaluationError, RunError, StoreError
from gigatome.encoders.hipt import VIT4096
from gigatome.encoders.region_vit import RegionVit
from gigatome.encoders.region_zoo import region_name, region_weights, save_region_encoder
from gigatome.encoders.zoo import encoder_digest, encoder_name, save_encoder
from gigatome.evaluation.saved import SavedModel
from gigatome.heatmaps import slide_model
from gigatome.heatmaps.chain import open_chain
from gigatome.mil.model import BagBatch


@pytest.fixture(scope="module")
def made():
    return make_chain()


@pytest.fixture
def kept(tmp_path, made):
    """A region encoder with its tile encoder, and one without."""
    save_region_encoder(made.region, tmp_path / "run" / "encoder", made.card, tile=made.tile)
    save_region_encoder(made.region, tmp_path / "alone", made.card)
    save_encoder(made.tile, tmp_path / "tile", name="tiny")
    return tmp_path


def origin(made, kind):
    weights = encoder_digest(made.tile)
    if kind == "grids":
        return {"encoder": encoder_name(made.tile), "weights": weights, "dim": made.tile.dim, "tiling": {}}
    name, both = region_name(made.region, made.card, weights), region_weights(made.region, weights)
    return {"encoder": name, "weights": both, "dim": made.region.dim, "tiling": {}}


def saved(monkeypatch, made, kind="vectors", **changes):
    """Has ``load_model`` give heads that learnt from what ``made`` makes."""
    model, dim, options = ("abmil", 12, {}) if kind == "vectors" else ("hipt_none_fc", 16, {"hidden": 8})
    heads = make_heads(model, dim, {**origin(made, kind), **changes}, options=options)
    monkeypatch.setattr(slide_model, "open_slide_model", lambda folder: heads)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(("model", "tile"), [("run", None), ("run/encoder", None), ("alone", "tile"), ("run", "tile")])
def test_region_encoder_and_its_tile_encoder(kept, made, model, tile):
    chain = open_chain(kept / model, tile_encoder=tile and kept / tile)
    assert same(chain.region, made.region)
    assert same(chain.tile.vit, made.tile.vit)
    assert chain.card == made.card
    chain.check(["cell", "tile"])


def test_bare_weights_of_the_authors(tmp_path):
    torch.save({"teacher": RegionVit(VIT4096).state_dict()}, tmp_path / "vit4k_xs_dino.pth")
    with pytest.raises(ConfigError, match=r"no tile encoder is kept with this region encoder; name .*--tile-encoder"):
        open_chain(tmp_path / "vit4k_xs_dino.pth")
    with pytest.raises(ConfigError, match=r"embeddings of 16 numbers by tiny-.*takes 384"):
        open_chain(tmp_path / "vit4k_xs_dino.pth", tile_encoder=make_chain().tile)


def test_a_tile_encoder_has_cells_alone(kept, made):
    chain = open_chain(kept / "tile")
    assert chain.region is None
    chain.check(["cell"])
    with pytest.raises(ConfigError, match="the level tile needs a region encoder"):
        chain.check(["cell", "tile"])
    with pytest.raises(ConfigError, match="is a tile encoder itself"):
        open_chain(kept / "tile", tile_encoder=kept / "tile")
    assert open_chain(made.tile).tile is made.tile


def test_another_tile_encoder_is_refused(kept):
    with pytest.raises(ConfigError, match=r"tiny4k was trained on those by tiny-.*Embed the tiles with that encoder"):
        open_chain(kept / "alone", tile_encoder=make_chain(seed=1).tile)
    with pytest.raises(ConfigError, match=r"no tile encoder is kept .*--tile-encoder\): tiny-"):
        open_chain(kept / "alone")


def test_what_is_no_model(tmp_path, kept):
    with pytest.raises(StoreError, match="no such encoder"):
        open_chain(tmp_path / "nowhere")
    (kept / "run" / "encoder" / "encoder.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        open_chain(kept / "run")
    with pytest.raises(StoreError, match="holds no heads; gigatome evaluate"):
        open_chain(kept / "tile", slide_model=kept)


@pytest.mark.parametrize("kind", ["vectors", "grids"])
def test_heads_of_these_encoders(kept, made, monkeypatch, kind):
    saved(monkeypatch, made, kind)
    chain = open_chain(kept / "run", slide_model="heads")
    assert chain.on_grids == (kind == "grids")
    chain.check(["cell", "tile", "region"])


def test_heads_are_found_in_the_folder_of_a_study(kept, made):
    heads = make_heads("abmil", 12, origin(made, "vectors"))
    arm = kept / "study" / "models" / "abmil"
    arm.mkdir(parents=True)
    members = [head.saved() for head in heads.heads]
    for fold, (_, arrays) in enumerate(members):
        save_file(arrays, arm / f"fold_{fold}.safetensors")
    save_file({"mean": heads.mean, "deviation": heads.deviation}, arm / "cohort.safetensors")
    card = {**heads.card, "target": "x", "head": "abmil", "level": "slide", "cohort": {"greatest_distance": 1.0}}
    (arm / "model.json").write_text(json.dumps({**card, "members": [values for values, _ in members]}))
    x, coords = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32), np.zeros((4, 2), np.int64)
    expected = replace(made, slide=heads).attend(x, coords)
    assert np.ptp(expected) > 1e-3
    for folder in (kept / "study", arm):
        np.testing.assert_array_equal(open_chain(kept / "run", slide_model=folder).attend(x, coords), expected)


def test_heads_of_grids_need_no_region_encoder(kept, made, monkeypatch):
    saved(monkeypatch, made, "grids")
    open_chain(kept / "tile", slide_model="heads").check(["cell", "region"])
    saved(monkeypatch, made)
    with pytest.raises(ConfigError, match=r"heads learnt from embeddings of regions by tiny4k-.*give that region"):
        open_chain(kept / "tile", slide_model="heads")


@pytest.mark.parametrize("kind", ["vectors", "grids"])
def test_heads_of_other_encoders_are_refused(kept, made, monkeypatch, kind):
    saved(monkeypatch, made, kind, weights="0123456789abcdef", encoder="other")
    with pytest.raises(EvaluationError, match=r"slide model: .*the head learnt from .* by other"):
        open_chain(kept / "run", slide_model="heads")


def test_heads_without_attention(made):
    x, coords = np.ones((3, 12), np.float32), np.zeros((3, 2), np.int64)
    mean = replace(made, slide=make_heads("mean", 12, origin(made, "vectors")))
    with pytest.raises(ConfigError, match="slide model mean has no attention"):
        mean.attend(x, coords)
    probe = SavedModel({"classes": ["a", "b"]}, (object(),), np.zeros(12), np.ones(12), "slide")
    with pytest.raises(ConfigError, match="probe of mean embeddings, which has no attention"):
        replace(made, slide=probe).check_slide()
    with pytest.raises(ConfigError, match="the level region needs a slide model"):
        made.attend(x, coords)


def test_attention_of_the_predicted_class(made):
    chain = replace(made, slide=make_heads("clam_mb", 12, origin(made, "vectors"), classes=("a", "b", "c")))
    x = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    coords = np.zeros((5, 2), np.int64)
    each = {label: chain.attend(x, coords, label=label) for label in "abc"}
    assert all(weights.sum() == pytest.approx(1, abs=1e-5) for weights in each.values())
    with torch.inference_mode():
        outputs = [head.network(BagBatch(torch.from_numpy(x), torch.tensor([0, 5]))) for head in chain.slide.heads]
    chosen = int(torch.stack([output.logits.softmax(1) for output in outputs]).mean(0).argmax())
    expected = torch.stack([output.attention for output in outputs]).mean(0)[:, chosen]
    np.testing.assert_allclose(chain.attend(x, coords), expected, rtol=1e-5)
    np.testing.assert_array_equal(chain.attend(x, coords), each["abc"[chosen]])
    assert not np.allclose(each["a"], each["b"])
    with pytest.raises(ConfigError, match="knows no class d; it knows a, b, c"):
        chain.attend(x, coords, label="d")
