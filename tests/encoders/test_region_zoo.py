"""Region encoders on disk."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from gigatome import config
from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.encoders.on_tiles import tile_encoder_of
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.region_zoo import (
    RegionCard,
    open_region_encoder,
    region_digest,
    region_name,
    save_region_encoder,
)
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, load_encoder, save_encoder

CONFIG = RegionVitConfig(input_dim=8, dim=12, depth=2, heads=2, grid=4, dropout=0.1)
CARD = RegionCard("mine v2", CONFIG, "a test", "own", "tile-0123", "0123456789abcdef", 128, 1.0, 6)


def make(seed=0, of=CONFIG):
    torch.manual_seed(seed)
    return RegionVit(of).eval()


@pytest.fixture
def tile():
    return build_encoder(EncoderConfig(image_size=16, patch_size=8, dim=8, depth=1, heads=2), seed=0, name="tile")


def test_an_encoder_comes_back_as_it_was(tmp_path, tile):
    encoder = make()
    save_region_encoder(encoder, tmp_path / "encoder", CARD, tile=tile)
    grids = torch.randn(2, 8, 5, 5)
    for spec in (tmp_path, tmp_path / "encoder", str(tmp_path)):
        again, card = open_region_encoder(spec)
        assert card == CARD
        assert not again.training
        with torch.no_grad():
            assert torch.equal(again(grids), encoder(grids))
        assert encoder_digest(tile_encoder_of(spec)) == encoder_digest(tile)


def test_names_tell_weights_apart():
    one, other = make(0), make(1)
    assert region_digest(one) == region_digest(make(0)) != region_digest(other)
    assert region_digest(make(of=replace(CONFIG, heads=3))) != region_digest(one)
    name = region_name(one, CARD, "aa")
    assert name.startswith("mine-v2-")
    assert len({name, region_name(one, CARD, "bb"), region_name(other, CARD, "aa")}) == 3


def test_embeddings_must_be_those_it_was_trained_on():
    CARD.check_tiles("tile-0123", "0123456789abcdef", 8, "store")
    CARD.check_tiles("tile", "", 8, "store")
    replace(CARD, tile_weights="").check_tiles("other", "f" * 16, 8, "store")
    with pytest.raises(ConfigError, match=r"store: embeddings of 6 numbers by other; mine v2 takes 8 by tile-0123"):
        CARD.check_tiles("other", "", 6, "store")
    with pytest.raises(ConfigError, match=r"store: .*\(weights f+\); mine v2 was trained on those by tile-0123"):
        CARD.check_tiles("other", "f" * 16, 8, "store")


def unfinished(run, steps=(2, 10), level="region"):
    """A run folder with checkpoints, each of another teacher; returns the last."""
    card = replace(CARD, source="")
    for step in steps:
        encoder = make(step)
        folder = run / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        state = {f"teacher.encoder.{key}": value for key, value in encoder.state_dict().items()}
        save_file(state | {"student.encoder.cls_token": torch.zeros(1, 1, 12)}, folder / "model.safetensors")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"level": level, "encoder": config.to_dict(CONFIG)}))
    (run / "run.yaml").write_text(config.to_yaml({"identity": "x", "cohort": "y", "card": card}))
    return encoder


def test_an_unfinished_run_gives_its_last_teacher(tmp_path):
    last = unfinished(tmp_path)
    encoder, card = open_region_encoder(tmp_path)
    assert card == replace(CARD, source="gigatome, step-00000010 of an unfinished run")
    assert region_digest(encoder) == region_digest(last)
    assert tile_encoder_of(tmp_path) is None


def test_a_region_encoder_is_no_tile_encoder(tmp_path, tile):
    save_region_encoder(RegionVit(CONFIG), tmp_path / "run" / "encoder", RegionCard("regions", CONFIG), tile=tile)
    with pytest.raises(RunError, match=r"is an encoder of regions, not of tiles; that of its tiles is .*tile"):
        load_encoder(tmp_path / "run")


def test_what_is_no_region_encoder_is_refused(tmp_path, tile):
    with pytest.raises(StoreError, match="no such region encoder"):
        open_region_encoder(tmp_path / "nothing")
    with pytest.raises(RunError, match="neither the folder of a region encoder nor a run with a checkpoint"):
        open_region_encoder(tmp_path)
    save_encoder(tile, tmp_path / "tile")
    with pytest.raises(RunError, match="is the encoder of tiles, not of regions"):
        open_region_encoder(tmp_path / "tile")
    unfinished(tmp_path / "run", level="tile")
    with pytest.raises(RunError, match="trains an encoder of tiles, not of regions"):
        open_region_encoder(tmp_path / "run")


def test_a_run_without_its_card_is_refused(tmp_path):
    unfinished(tmp_path)
    (tmp_path / "run.yaml").write_text("identity: x\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: name: "):
        open_region_encoder(tmp_path)


@pytest.mark.parametrize("damage", ["weights", "card", "other weights", "no card"])
def test_a_damaged_folder_is_refused(tmp_path, damage):
    save_region_encoder(make(), tmp_path, CARD)
    weights, card = tmp_path / "encoder.safetensors", tmp_path / "encoder.json"
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "card":
        card.write_text("{")
    elif damage == "other weights":
        save_file(make(1).state_dict(), weights)
    else:
        content = json.loads(card.read_text())
        card.write_text(json.dumps({key: value for key, value in content.items() if key != "card"}))
    with pytest.raises(RunError, match=r"do not belong together|cannot be read as a region encoder"):
        open_region_encoder(tmp_path)
