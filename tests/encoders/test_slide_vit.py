"""LongViTs with a head: new ones from weights of every kind, and on disk."""

import argparse
import json
import logging
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from safetensors.torch import load_file, save_file

from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.encoders.longvit import LongVit, LongVitConfig
from gigatome.encoders.longvit_zoo import (
    LongVitCard,
    longvit_digest,
    open_longvit,
    open_pixel_encoder,
    save_longvit,
)
from gigatome.encoders.slide_vit import SlideVit, SlideVitCard, new_slide_vit, open_slide_vit, save_slide_vit
from gigatome.tiles.slide_images import SlideImageOptions

FINE = LongVitConfig(
    segments=(4, 8), ratios=(1, 2), patch_size=4, dim=12, depth=2, heads=3, ffn_dim=20, grid=4, norm="finetune"
)
PRETRAINED = replace(FINE, norm="pretrain", pos_embed="dino")
CARD = SlideVitCard(
    "mine", FINE, SlideImageOptions(20, "stretch", (0.5, 1.0), flip=True), "subtype", "slide", ("IDC", "ILC", "other"),
    source="a test",
)  # fmt: skip
PIXELS = torch.randint(0, 256, (2, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def disturbed(made, seed=0):
    """With parameters that are far from their initial values."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)
    return made.eval()


def fine_tuned(outputs=3, seed=0, config=FINE):
    return disturbed(new_slide_vit(config, outputs, None, seed=seed), seed)


def pretrained(seed=0, config=PRETRAINED):
    torch.manual_seed(seed)
    return disturbed(LongVit(config), seed)


def published(made, path, prefix="backbone.", key="teacher"):
    """As the authors write a pretrained network."""
    state = {f"{prefix}{name}": value for name, value in made.state_dict().items()}
    torch.save({key: state | {"head.mlp.0.weight": torch.zeros(5, 12)}, "epoch": 100}, path)
    return path


def authors_fine_tuned(made, path):
    """As the authors' fine-tuning writes a network: its LongViT is ``model``, and the command line goes with it."""
    backbone = made.backbone.state_dict()
    inner = {f"model.{name}": value for name, value in backbone.items() if not name.startswith("fc_norm.")}
    outer = {name: value for name, value in backbone.items() if name.startswith("fc_norm.")}
    head = {f"head.{name}": value for name, value in made.head.state_dict().items()}
    torch.save({"model": inner | outer | head, "epoch": 9, "args": argparse.Namespace(task="tcga")}, path)
    return path


def logits(made):
    with torch.no_grad():
        return made(PIXELS)


def same(one, other):
    return torch.equal(logits(one), logits(other))


def expected_of_pretrained(made, encoder):
    """Logits of a new network on a pretrained one: its tokens' mean through a new norm, and the network's own head."""
    tokens = encoder.encoder(encoder._embed(PIXELS))
    return made.head(F.layer_norm(tokens.mean(1), (12,), eps=1e-5))


def test_logits_are_linear_in_the_embedding():
    made = fine_tuned()
    torch.testing.assert_close(logits(made), made.backbone(PIXELS) @ made.head.weight.T + made.head.bias)


def test_the_initial_head_is_that_of_the_authors():
    made = new_slide_vit(replace(FINE, dim=384), 64, None)
    weight = made.head.weight
    assert weight.abs().max() <= 0.02
    assert weight.std().item() == pytest.approx(0.02 * 0.5396, rel=0.02)  # of a normal distribution cut at one
    assert not made.head.bias.any()
    assert made.training


def test_random_weights_go_by_the_seed_alone():
    before = torch.get_rng_state()
    one, other, third = (new_slide_vit(FINE, 3, None, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, other)
    assert not same(one, third)


def test_configurations_that_are_none():
    with pytest.raises(ConfigError, match=r"norm finetune, not pretrain; set encoder\.norm=finetune"):
        SlideVit(PRETRAINED, 2)
    with pytest.raises(ConfigError, match="at least 1 output"):
        SlideVit(FINE, 0)


@pytest.mark.parametrize(("prefix", "key"), [("backbone.", "teacher"), ("module.backbone.", "teacher"), ("", "model")])
def test_from_the_authors_pretrained_file(tmp_path, prefix, key):
    encoder = pretrained()
    path = published(encoder, tmp_path / "longvit.pth", prefix, key)
    for spec in (path, f"{path}?model=longvit"):
        made = new_slide_vit(FINE, 3, spec, drop_path=0.5, checkpointing="block", seed=4)
        assert made.training
        assert torch.equal(made.head.weight, new_slide_vit(FINE, 3, None, seed=4).head.weight)
        torch.testing.assert_close(logits(made.eval()), expected_of_pretrained(made, replace_positions(encoder)))
    rates = [float(getattr(layer.drop_path, "drop_prob", 0)) for layer in made.backbone.encoder.layers]
    assert rates == [0, 0.5]
    assert all(layer.checkpointing == "block" for layer in made.backbone.encoder.layers)


def replace_positions(encoder):
    """The same network, whose positions are interpolated as in fine-tuning."""
    made = LongVit(replace(PRETRAINED, pos_embed="size")).eval()
    made.load_state_dict(encoder.state_dict())
    return made


def test_from_a_folder_of_a_pretrained_one(tmp_path):
    encoder = pretrained()
    save_longvit(encoder, tmp_path / "encoder", LongVitCard("mine", PRETRAINED))
    for spec in (tmp_path, str(tmp_path / "encoder")):
        made = new_slide_vit(FINE, 3, spec).eval()
        torch.testing.assert_close(logits(made), expected_of_pretrained(made, replace_positions(encoder)))


def test_positions_are_taken_to_the_grid(tmp_path):
    encoder = pretrained()
    finer = replace(FINE, grid=7)
    save_longvit(encoder, tmp_path / "folder", LongVitCard("mine", PRETRAINED))
    grid = encoder.pos_embed.detach().unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=7, mode="bicubic").flatten(2).mT
    for spec in (tmp_path / "folder", published(encoder, tmp_path / "longvit.pth")):
        torch.testing.assert_close(new_slide_vit(finer, 2, spec).backbone.pos_embed.detach(), expected)


def test_from_one_that_was_fine_tuned(tmp_path, caplog):
    made = fine_tuned()
    save_slide_vit(made, tmp_path / "encoder", CARD)
    flat = {name.removeprefix("backbone."): value for name, value in made.state_dict().items()}
    save_file(flat, tmp_path / "flat.safetensors")
    torch.save(flat, tmp_path / "flat.pth")
    authors = authors_fine_tuned(made, tmp_path / "fine.pth")
    for spec in (tmp_path, tmp_path / "flat.safetensors", tmp_path / "flat.pth", authors):
        assert same(new_slide_vit(FINE, 3, spec, seed=7).eval(), made)
        with caplog.at_level(logging.INFO, "gigatome"):
            other = new_slide_vit(FINE, 2, spec, seed=7).eval()
        assert f"{spec}: has a head of other outputs" in caplog.text
        assert torch.equal(other.head.weight, new_slide_vit(FINE, 2, None, seed=7).head.weight)
        assert torch.equal(other.backbone(PIXELS), made.backbone(PIXELS))
        caplog.clear()


@pytest.mark.parametrize(
    ("theirs", "changes", "words"),
    [
        ({}, {}, ""),
        ({}, {"name": "yours", "level": "patient", "source": "elsewhere"}, ""),
        ({}, {"classes": ("glandular", "solid", "other")}, r"classes \('IDC', 'ILC', 'other'\), not \('glandular'"),
        ({}, {"classes": ("ILC", "IDC", "other")}, "classes"),
        ({}, {"target": "grade"}, "target subtype, not grade"),
        ({"classes": (), "edges": (0.0, 1.0, 2.0, 3.0)}, {}, ""),
        ({"classes": (), "edges": (0.0, 1.0, 2.0, 3.0)}, {"edges": (0.0, 1.0, 2.0, 4.0)}, "edges"),
    ],
)
def test_a_head_is_kept_if_it_predicts_the_same(tmp_path, caplog, theirs, changes, words):
    made, card = fine_tuned(), replace(CARD, **theirs)
    save_slide_vit(made, tmp_path, card)
    with caplog.at_level(logging.INFO, "gigatome"):
        again = new_slide_vit(FINE, 3, tmp_path, card=replace(card, **changes), seed=7).eval()
    (said,) = [record.getMessage() for record in caplog.records if "head" in record.getMessage()]
    assert torch.equal(again.backbone(PIXELS), made.backbone(PIXELS))
    if words:
        assert re.search(f"its head has {words}", said)
        assert said.endswith("so the head is a new one")
        assert torch.equal(again.head.weight, new_slide_vit(FINE, 3, None, seed=7).head.weight)
    else:
        assert "its head is kept, as it predicts the same" in said
        assert same(again, made)


def test_a_head_that_says_nothing_of_itself_is_kept_with_a_warning(tmp_path, caplog):
    made = fine_tuned()
    path = authors_fine_tuned(made, tmp_path / "fine.pth")
    assert same(new_slide_vit(FINE, 3, path, card=CARD).eval(), made)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "its head is kept, as it has 3 outputs; nothing says of what" in caplog.text
    with caplog.at_level(logging.INFO, "gigatome"):
        new_slide_vit(FINE, 3, published(pretrained(), tmp_path / "longvit.pth"), card=CARD)
    assert "longvit.pth: has no head, so the head is a new one" in caplog.text


def test_of_a_fold_the_selected_one_is_taken(tmp_path):
    last, best = fine_tuned(seed=1), fine_tuned(seed=2)
    save_slide_vit(last, tmp_path / "fold_0/encoder", CARD)
    save_slide_vit(best, tmp_path / "fold_0/best", CARD)
    (tmp_path / "recipe.yaml").write_text("outcome: {target: subtype}\n")
    (tmp_path / "fold_1").mkdir()
    assert same(open_slide_vit(tmp_path / "fold_0")[0], best)
    assert same(open_slide_vit(tmp_path / "fold_0/encoder")[0], last)
    assert same(new_slide_vit(FINE, 3, tmp_path / "fold_0", card=CARD).eval(), best)
    assert torch.equal(open_pixel_encoder(tmp_path / "fold_0")(PIXELS), best.backbone(PIXELS))
    for opens in (open_slide_vit, lambda spec: new_slide_vit(FINE, 3, spec)):
        with pytest.raises(RunError, match=r"is a fine-tuning, .* give one of them, .*fold_0"):
            opens(tmp_path)
        with pytest.raises(RunError, match="fold_1: this fold is not finished"):
            opens(tmp_path / "fold_1")


def test_half_precision_becomes_single(tmp_path):
    made = fine_tuned().half()
    again = new_slide_vit(FINE, 3, authors_fine_tuned(made, tmp_path / "half.pth"))
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    assert torch.equal(again.head.weight, made.head.weight.float())


def test_weights_of_another_network_are_refused(tmp_path):
    path = published(pretrained(), tmp_path / "longvit.pth")
    with pytest.raises(RunError, match=r"longvit\.pth: .*of another shape: .*patch_embed"):
        new_slide_vit(replace(FINE, patch_size=5), 2, path)
    with pytest.raises(RunError, match="missing: encoder"):
        new_slide_vit(replace(FINE, depth=3), 2, path)
    save_longvit(pretrained(), tmp_path / "folder", LongVitCard("mine", PRETRAINED))
    with pytest.raises(ConfigError, match=r"folder: has heads 3, but the encoder is to have 2"):
        new_slide_vit(replace(FINE, heads=2), 2, tmp_path / "folder")
    with pytest.raises(ConfigError, match=r"has std \(0\.229, 0\.224, 0\.225\), but the encoder"):
        new_slide_vit(replace(FINE, std=(1.0, 1.0, 1.0)), 2, tmp_path / "folder")
    with pytest.raises(StoreError, match="no such LongViT"):
        new_slide_vit(FINE, 2, tmp_path / "nothing")


def test_it_comes_back_as_it_was(tmp_path):
    survival = replace(CARD, target="time,event", level="patient", classes=(), edges=(-1e-6, 1.5, 4.0, 9.25))
    for number, card in enumerate((CARD, survival)):
        made = fine_tuned(seed=number)
        save_slide_vit(made, tmp_path / str(number) / "encoder", card)
        before = torch.get_rng_state()
        for spec in (tmp_path / str(number), str(tmp_path / str(number) / "encoder")):
            again, found = open_slide_vit(spec)
            assert found == card
            assert not again.training
            assert same(again, made)
        assert torch.equal(torch.get_rng_state(), before)


def test_keys_are_those_of_the_authors(tmp_path):
    save_slide_vit(fine_tuned(), tmp_path, CARD)
    attention = [f"self_attn.{part}" for part in ("k_proj", "v_proj", "q_proj", "out_proj", "inner_attn_ln")]
    inner = ["self_attn_layer_norm", "ffn.fc1", "ffn.fc2", "ffn.ffn_layernorm", "final_layer_norm"]
    parts = [f"encoder.layers.{i}.{part}" for i in range(2) for part in attention + inner]
    parts += ["patch_embed.proj", "fc_norm", "head"]
    wanted = {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")} | {"pos_embed"}
    assert set(load_file(tmp_path / "encoder.safetensors")) == wanted
    assert json.loads((tmp_path / "encoder.json").read_text())["level"] == "slide pixels"


def test_its_backbone_is_a_longvit(tmp_path):
    made = fine_tuned()
    save_slide_vit(made, tmp_path / "encoder", CARD)
    backbone, card = open_longvit(tmp_path)
    assert card == LongVitCard("mine", FINE, "a test")
    assert longvit_digest(backbone) == longvit_digest(made.backbone)
    assert torch.equal(open_pixel_encoder(str(tmp_path))(PIXELS), made.backbone(PIXELS))


def test_what_is_none_is_refused(tmp_path):
    with pytest.raises(StoreError, match="holds no LongViT with a head"):
        open_slide_vit(tmp_path)
    save_longvit(pretrained(), tmp_path / "pretrained", LongVitCard("mine", PRETRAINED))
    with pytest.raises(RunError, match="is not a LongViT with a head; give what a fine-tuning"):
        open_slide_vit(tmp_path / "pretrained")
    save_slide_vit(fine_tuned(), tmp_path / "fine", CARD)
    state = load_file(tmp_path / "fine" / "encoder.safetensors")
    save_file(state | {"head.bias": state["head.bias"] + 1}, tmp_path / "fine" / "encoder.safetensors")
    for opens in (open_slide_vit, open_longvit):
        with pytest.raises(RunError, match="do not belong together"):
            opens(tmp_path / "fine")
    content = json.loads((tmp_path / "fine" / "encoder.json").read_text())
    content["card"]["images"]["aspekt"] = "keep"
    (tmp_path / "fine" / "encoder.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"cannot be read as a LongViT with a head: .*aspect"):
        open_slide_vit(tmp_path / "fine")
