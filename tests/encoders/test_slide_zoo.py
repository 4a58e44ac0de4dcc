"""Slide encoders are read as they were written, and what is none is said to be none."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.encoders.giga import GigaConfig, build_giga
from gigatome.encoders.on_tiles import tile_encoder_of
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.region_zoo import RegionCard, save_region_encoder
from gigatome.encoders.slide_zoo import (
    SlideCard,
    new_slide_encoder,
    open_slide_encoder,
    save_slide_encoder,
    slide_digest,
    slide_name,
)
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, save_encoder

CONFIG = GigaConfig(pooling="mlp", input_dim=4, dim=8)
CARD = SlideCard(
    "gigassl / tiny", CONFIG, "here", "own", "resnet18.layer3", "abc", 224, 0.5, 7, frame="authors_training"
)
TILE = EncoderConfig(image_size=32, patch_size=8, dim=4, depth=1, heads=1)


@pytest.fixture
def encoder():
    encoder = build_giga(CONFIG, seed=1)
    encoder(torch.randn(6, 4), torch.randint(5, (6, 2)), torch.tensor([0, 2, 6]))  # moves the running statistics
    return encoder.eval()


def embedding(encoder):
    x = torch.arange(12.0).reshape(3, 4)
    return encoder(x, torch.tensor([[0, 0], [0, 1], [3, 1]]), torch.tensor([0, 3]))


def test_what_is_written_is_read(encoder, tmp_path):
    tile = build_encoder(TILE, seed=0)
    save_slide_encoder(encoder, tmp_path / "run" / "encoder", CARD, tile=tile)
    for spec in (tmp_path / "run", tmp_path / "run" / "encoder"):
        found, card = open_slide_encoder(spec)
        assert card == CARD
        assert not found.training
        assert torch.equal(embedding(found), embedding(encoder))
        assert slide_digest(found) == slide_digest(encoder)
        assert encoder_digest(tile_encoder_of(spec)) == encoder_digest(tile)
    save_slide_encoder(encoder, tmp_path / "alone", CARD)
    assert tile_encoder_of(tmp_path / "alone") is None


def test_names_tell_weights_apart(encoder):
    name = slide_name(encoder, CARD, "abc")
    assert name.startswith("gigassl-tiny-")
    assert name != slide_name(encoder, CARD, "def")
    assert name != slide_name(build_giga(CONFIG, seed=2), CARD, "abc")
    assert slide_digest(build_giga(CONFIG, 1)) != slide_digest(build_giga(replace(CONFIG, dropout=0.1), 1))


def test_a_card_without_its_weights(encoder, tmp_path):
    save_slide_encoder(encoder, tmp_path, CARD)
    state = load_file(tmp_path / "encoder.safetensors")
    save_file({key: value + 1 for key, value in state.items()}, tmp_path / "encoder.safetensors")
    with pytest.raises(RunError, match="do not belong together"):
        open_slide_encoder(tmp_path)
    (tmp_path / "encoder.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match="cannot be read as a slide encoder"):
        open_slide_encoder(tmp_path)


def test_encoders_of_something_else(tmp_path):
    save_encoder(build_encoder(TILE, seed=0), tmp_path / "tile")
    with pytest.raises(RunError, match="is the encoder of tiles, not of slides"):
        open_slide_encoder(tmp_path / "tile")
    config = RegionVitConfig(input_dim=4, dim=8, depth=1, heads=1)
    save_region_encoder(RegionVit(config), tmp_path / "region", RegionCard("r", config))
    with pytest.raises(RunError, match="is the encoder of regions, not of slides"):
        open_slide_encoder(tmp_path / "region")
    with pytest.raises(StoreError, match="no such slide encoder"):
        open_slide_encoder(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="is neither the folder of a slide encoder nor a run with a checkpoint"):
        open_slide_encoder(tmp_path / "empty")


def test_the_authors_weights_are_used_as_at_their_inference(tmp_path):
    resnet = timm.create_model("resnet18").state_dict()
    names = {"bn1": "norm1", "bn2": "norm2", "downsample.0": "convd", "downsample.1": "normd"}
    state = {}
    for key, value in resnet.items():
        if not key.startswith("layer4.") or key.endswith("num_batches_tracked"):
            continue
        key = key.removeprefix("layer4.")
        for ours, theirs in names.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        kernel = value.permute(3, 2, 1, 0).reshape(-1, 1, *value.shape[1::-1]) if value.ndim == 4 else value
        state[f"backbone.net.mil_model.sparse_pooling.0.{key}"] = kernel
    torch.save({"epoch": 1000, "state_dict": state}, tmp_path / "gigassl.pth")
    encoder, card = open_slide_encoder(tmp_path / "gigassl.pth")
    assert torch.equal(encoder.network.state_dict()["0.conv1.weight"], resnet["layer4.0.conv1.weight"])
    assert (card.name, card.tile_size, card.frame, card.tiles) == ("gigassl", 224, "authors_inference", 5)


def test_tiles_by_another_encoder(encoder):
    CARD.check_tiles("resnet18.layer3", "abc", 4, "store")
    CARD.check_tiles("unknown", "", 4, "store")
    with pytest.raises(ConfigError, match=r"store: embeddings of 5 numbers by vit; gigassl / tiny takes 4 by resnet18"):
        CARD.check_tiles("vit", "abc", 5, "store")
    with pytest.raises(ConfigError, match=r"trained on those by resnet18\.layer3 \(weights abc\)"):
        CARD.check_tiles("resnet18.layer3", "def", 4, "store")


def test_new_encoders(tmp_path):
    assert slide_digest(new_slide_encoder(CONFIG, None, 3)) == slide_digest(build_giga(CONFIG, 3))
    with pytest.raises(StoreError, match="nothing"):
        new_slide_encoder(GigaConfig(), str(tmp_path / "nothing"), 0)
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(RunError, match="fit the pooling sparse_conv, not mlp"):
        new_slide_encoder(CONFIG, str(tmp_path / "resnet18.pth"), 0)


def test_a_card_is_plain_json(encoder, tmp_path):
    save_slide_encoder(encoder, tmp_path, CARD)
    content = json.loads((tmp_path / "encoder.json").read_text())
    assert content["level"] == "slide"
    assert content["card"]["config"]["pooling"] == "mlp"
