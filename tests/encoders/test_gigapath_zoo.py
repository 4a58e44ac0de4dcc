"""Prov-GigaPath's slide encoders are read as they were written, from the authors' file too, and changed as asked."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.encoders import gigapath_zoo
from gigatome.encoders.giga import GigaConfig, GigaEncoder, build_giga
from gigatome.encoders.gigapath import GigapathConfig, GigapathEncoder, build_gigapath
from gigatome.encoders.gigapath_zoo import GigapathCard, gigapath_digest, is_gigapath, open_gigapath, save_gigapath
from gigatome.encoders.on_tiles import tile_encoder_of
from gigatome.encoders.slide_zoo import SlideCard, open_any_slide_encoder, open_slide_encoder, save_slide_encoder
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, load_encoder, save_encoder

CONFIG = GigapathConfig(input_dim=4, dim=16, depth=2, ffn_dim=20, grid=9, pooling="mean")
CARD = GigapathCard("tiny path", CONFIG, "here", "own", "tiny", "abc", 1.0)
TILE = EncoderConfig(image_size=32, patch_size=8, dim=4, depth=1, heads=1)


@pytest.fixture
def encoder():
    return build_gigapath(CONFIG, seed=1).eval()


@pytest.fixture
def authors(encoder, tmp_path):
    torch.save({"model": encoder.state_dict()}, tmp_path / "slide_encoder.pth")
    return tmp_path / "slide_encoder.pth"


def embedding(encoder):
    return encoder(torch.arange(20.0).reshape(1, 5, 4).sin(), torch.arange(10).reshape(1, 5, 2) % 9)


def test_what_is_written_is_read(encoder, tmp_path):
    tile = build_encoder(TILE, seed=0)
    save_gigapath(encoder, tmp_path / "run" / "encoder", CARD, tile=tile)
    for spec in (tmp_path / "run", f"{tmp_path}/run/encoder", f"{tmp_path}/run?model=gigapath"):
        assert is_gigapath(spec)
        found, card = open_gigapath(spec)
        assert card == CARD
        assert (card.tile_size, card.mpp) == (256, 1.0)
        assert not found.training
        assert torch.equal(embedding(found), embedding(encoder))
        assert gigapath_digest(found) == gigapath_digest(encoder)
    assert encoder_digest(tile_encoder_of(tmp_path / "run")) == encoder_digest(tile)


def test_the_authors_file(encoder, authors, tmp_path):
    for spec in (authors, f"{authors}?model=gigapath", f"{tmp_path}?model=gigapath"):
        found, card = open_gigapath(spec)
        assert found.config == replace(CONFIG, pooling="cls", grid=1000)
        assert (card.name, card.tile_encoder, card.tile_weights) == ("gigapath", "gigapath", "")
        assert (card.tile_size, card.mpp, card.source) == (256, 0.5, "slide_encoder.pth")
    assert not is_gigapath(authors)
    assert torch.equal(found.cls_token, encoder.cls_token)


def test_what_is_asked_to_be_different(encoder, authors, tmp_path):
    save_gigapath(encoder, tmp_path / "folder", CARD)
    plain = open_gigapath(authors)[0]
    for spec in (f"{authors}?model=gigapath&grid=9", f"{tmp_path}/folder?grid=9"):
        found, card = open_gigapath(f"{spec}&pooling=mean&final=encoder_states&layer=1")
        assert card.config == found.config
        assert (found.config.final, found.config.layer, found.config.pooling) == ("encoder_states", 1, "mean")
        x, places = torch.ones(1, 5, 4), torch.arange(10).reshape(1, 5, 2) % 9
        expected = replace(CONFIG, final="encoder_states", layer=1)
        assert found.config == expected
        assert torch.equal(found(x, places), encoder.all_layers(x, places)[1])
        assert gigapath_digest(found) not in (gigapath_digest(encoder), gigapath_digest(plain))
    smaller = open_gigapath(f"{authors}?slide_size=250000")[0]
    assert smaller.config.encoder().attention.segments == (1024, 4870, 23170, 110217, 524288)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("pools=mean", "unknown key pools; did you mean pooling"),
        ("pooling=max", r"pooling: .*'cls' or 'mean'"),
        ("layer=1", 'needs final "encoder_states"'),
        ("model=longvit", "is to be opened as gigapath; write .*slide_encoder.pth.model=gigapath"),
    ],
)
def test_what_cannot_be_different(authors, query, message):
    with pytest.raises(ConfigError, match=message):
        open_gigapath(f"{authors}?{query}")


def test_the_hub(authors, monkeypatch):
    asked = []
    monkeypatch.setattr(gigapath_zoo, "fetch", lambda *given: asked.append(given) or authors)
    found, _ = open_any_slide_encoder("hf-hub:prov-gigapath/prov-gigapath?model=gigapath")
    assert isinstance(found, GigapathEncoder)
    assert asked == [("prov-gigapath/prov-gigapath", ("slide_encoder.pth",))]


def test_digests_tell_embeddings_apart(encoder):
    digest = gigapath_digest(encoder)
    assert gigapath_digest(build_gigapath(CONFIG, 1)) == digest
    assert gigapath_digest(build_gigapath(CONFIG, 2)) != digest
    for same in ({"merge": "gradient"}, {"segments": CONFIG.encoder().attention.segments}):
        assert gigapath_digest(build_gigapath(replace(CONFIG, **same), 1)) == digest
    for other in ({"pooling": "cls"}, {"padding": "masked"}, {"slide_size": 250_000}, {"final": "encoder_states"}):
        assert gigapath_digest(build_gigapath(replace(CONFIG, **other), 1)) != digest


def test_one_function_opens_every_slide_encoder(encoder, authors, tmp_path):
    save_gigapath(encoder, tmp_path / "path", CARD)
    config = GigaConfig(pooling="mlp", input_dim=4, dim=8)
    save_slide_encoder(build_giga(config, 0), tmp_path / "giga", SlideCard("giga", config))
    assert isinstance(open_any_slide_encoder(tmp_path / "path")[0], GigapathEncoder)
    assert isinstance(open_any_slide_encoder(f"{authors}?model=gigapath")[1], GigapathCard)
    assert isinstance(open_any_slide_encoder(tmp_path / "giga")[0], GigaEncoder)
    assert not is_gigapath(tmp_path / "giga")
    with pytest.raises(RunError, match="is a slide encoder of Prov-GigaPath's"):
        open_slide_encoder(tmp_path / "path")
    with pytest.raises(RunError, match=r"slide_encoder\.pth: .*for weights of Prov-GigaPath write .*\?model=gigapath"):
        open_any_slide_encoder(authors)
    with pytest.raises(RunError, match="is an encoder of slides, not of tiles"):
        load_encoder(tmp_path / "path")


def test_what_is_no_such_encoder(encoder, tmp_path):
    save_encoder(build_encoder(TILE, seed=0), tmp_path / "tile")
    with pytest.raises(RunError, match="is the encoder of tiles, not one of slides by Prov-GigaPath"):
        open_gigapath(tmp_path / "tile")
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "nothing"):
        with pytest.raises(StoreError, match=r"no such slide encoder; give the folder of one, or the authors'"):
            open_gigapath(f"{tmp_path / nothing}?model=gigapath")
    save_gigapath(encoder, tmp_path / "path", CARD)
    weights = tmp_path / "path" / "encoder.safetensors"
    save_file({key: value + 1 for key, value in load_file(weights).items()}, weights)
    with pytest.raises(RunError, match="do not belong together"):
        open_gigapath(tmp_path / "path")
    (tmp_path / "path" / "encoder.json").write_text("{")
    assert not is_gigapath(tmp_path / "path")
    with pytest.raises(RunError, match="cannot be read as a slide encoder"):
        open_any_slide_encoder(tmp_path / "path")


def test_tiles_by_another_encoder():
    CARD.check_tiles("tiny", "abc", 4, "store")
    with pytest.raises(ConfigError, match="store: embeddings of 5 numbers by vit; tiny path takes 4 by tiny"):
        CARD.check_tiles("vit", "abc", 5, "store")
    with pytest.raises(ConfigError, match=r"trained on those by tiny \(weights abc\)"):
        CARD.check_tiles("tiny", "def", 4, "store")


def test_a_card_is_plain_json(encoder, tmp_path):
    save_gigapath(encoder, tmp_path, CARD)
    content = json.loads((tmp_path / "encoder.json").read_text())
    assert (content["level"], content["model"]) == ("slide", "gigapath")
    assert content["card"]["config"]["ratios"] == [1, 2, 4, 8, 16]
