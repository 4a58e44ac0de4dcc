"""LongViTs on disk."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from gigatome import config
from gigatome.core.errors import RunError, StoreError
from gigatome.encoders.longvit import LongVit, LongVitConfig
from gigatome.encoders.longvit_zoo import (
    LongVitCard,
    finishing,
    is_finetuning,
    longvit_digest,
    open_longvit,
    open_pixel_encoder,
    save_longvit,
)
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.region_zoo import RegionCard, save_region_encoder
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, load_encoder, save_encoder

CONFIG = LongVitConfig(
    segments=(4, 8), ratios=(1, 2), patch_size=4, dim=12, depth=2, heads=3, ffn_dim=20, grid=4, pos_embed="dino"
)
CARD = LongVitCard("mine", CONFIG, "a test", "own", (0.5, 1.0))
PIXELS = torch.randint(0, 256, (2, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make(seed=0, of=CONFIG):
    torch.manual_seed(seed)
    return LongVit(of).eval()


def same(one, other):
    with torch.no_grad():
        return torch.equal(one(PIXELS), other(PIXELS))


@pytest.mark.parametrize("norm", ["pretrain", "finetune"])
def test_an_encoder_comes_back_as_it_was(tmp_path, norm):
    card = replace(CARD, config=replace(CONFIG, norm=norm))
    encoder = make(of=card.config)
    save_longvit(encoder, tmp_path / "encoder", card)
    for spec in (tmp_path, tmp_path / "encoder", str(tmp_path)):
        again, found = open_longvit(spec)
        assert found == card
        assert not again.training
        assert same(again, encoder)
        assert same(open_pixel_encoder(spec), encoder)


def test_pixels_and_normalised_images_are_one():
    encoder = make()
    normalised = (PIXELS.permute(0, 3, 1, 2) - encoder.mean) / encoder.std
    with torch.no_grad():
        torch.testing.assert_close(encoder(normalised), encoder(encoder.normalise(PIXELS)))


def test_the_digest_is_of_what_decides_an_embedding():
    digest = longvit_digest(make())
    assert digest == longvit_digest(make()) == longvit_digest(make(of=replace(CONFIG, image_size=4096)))
    changes = [{"std": (0.5, 0.5, 0.5)}, {"segments": (4, 16)}, {"pos_embed": "size"}, {"merge": "detached"}]
    others = [make(1), *(make(of=replace(CONFIG, **change)) for change in changes)]
    assert len({digest, *map(longvit_digest, others)}) == 6


def unfinished(run, level="pixels", steps=(2, 10)):
    """A run folder with checkpoints, each of another teacher."""
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        teacher = {f"teacher.encoder.{key}": value for key, value in make(step).state_dict().items()}
        student = {f"student.encoder.{key}": value for key, value in make(99).state_dict().items()}
        save_file(teacher | student | {"teacher.head.mlp.weight": torch.zeros(1)}, folder / "model.safetensors")
    recipe = {"level": level, "name": "longvit/mine", "encoder": config.to_dict(CONFIG), "tiles": {"mpp": [0.5]}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_an_unfinished_run_gives_its_last_teacher(tmp_path):
    unfinished(tmp_path)
    encoder, card = open_longvit(tmp_path)
    assert same(encoder, make(10))
    assert card == LongVitCard("longvit-mine", CONFIG, "gigatome, step-00000010 of an unfinished run", mpp=(0.5,))
    assert same(open_pixel_encoder(tmp_path), encoder)
    with pytest.raises(RunError, match="is a LongViT; gigatome embed takes it at level tile"):
        load_encoder(tmp_path)


def test_of_a_fold_the_selected_one_is_taken(tmp_path):
    last, best = make(1), make(2)
    save_longvit(last, tmp_path / "fold_0/encoder", CARD)
    assert same(open_longvit(tmp_path / "fold_0")[0], last)
    save_longvit(best, tmp_path / "fold_0/best", CARD)
    for opens in (lambda spec: open_longvit(spec)[0], open_pixel_encoder):
        assert same(opens(tmp_path / "fold_0"), best)
        assert same(opens(tmp_path / "fold_0/encoder"), last)
        assert same(opens(str(tmp_path / "fold_0/best")), best)


def test_a_fine_tuning_is_told_from_its_folds(tmp_path, monkeypatch):
    run = tmp_path / "run"
    save_longvit(make(), run / "fold_0/encoder", CARD)
    save_longvit(make(), run / "fold_1/best", CARD)  # of an epoch, but the fold goes on
    assert not is_finetuning(run)
    (run / "recipe.yaml").write_text("name: mine\noutcome: {target: subtype}\n")
    assert is_finetuning(run)
    for opens in (open_longvit, open_pixel_encoder):
        with pytest.raises(RunError, match=r"run: is a fine-tuning, .* give one of them, .*run/fold_0$"):
            opens(run)
        with pytest.raises(RunError, match="fold_1: this fold is not finished") as error:
            opens(run / "fold_1")
        assert finishing(run) in str(error.value)
        opens(run / "fold_0")
    monkeypatch.chdir(run / "fold_1")
    with pytest.raises(RunError, match="this fold is not finished"):
        open_pixel_encoder(".")
    unfinished(run / "fold_2")  # with a recipe of its own
    assert same(open_pixel_encoder(run / "fold_2"), make(10))


def test_the_authors_file(tmp_path):
    path = tmp_path / "longvit.pth"
    large = LongVit(LongVitConfig(depth=1)).state_dict()
    names = {
        f"encoder.layers.{depth}.{key[17:]}"
        for key in large
        if key.startswith("encoder.layers.0.")
        for depth in range(12)
    }
    state = {key: value for key, value in large.items() if not key.startswith("encoder.")}
    state |= {name: large[f"encoder.layers.0.{name.split('.', 3)[3]}"] for name in names}
    torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items()}}, path)
    for opened in (open_longvit(path)[0], open_pixel_encoder(f"{path}?model=longvit")):
        assert torch.equal(opened.pos_embed, large["pos_embed"])
        assert len(opened.encoder.layers) == 12


def test_tile_encoders_are_opened_too(tmp_path):
    tile = build_encoder(EncoderConfig(image_size=16, patch_size=8, dim=8, depth=1, heads=2), seed=0)
    save_encoder(tile, tmp_path)
    assert encoder_digest(open_pixel_encoder(tmp_path)) == encoder_digest(tile)
    with pytest.raises(RunError, match=r"is an encoder of tiles, no LongViT; .* level pixels"):
        open_longvit(tmp_path)


def test_what_is_none_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no such LongViT; give a run folder"):
        open_longvit(tmp_path / "nothing")
    with pytest.raises(RunError, match="neither the folder of a LongViT nor a run with a checkpoint"):
        open_longvit(tmp_path)
    with pytest.raises(RunError, match="neither the folder of an encoder nor a run"):
        open_pixel_encoder(tmp_path)
    with pytest.raises(StoreError, match="no such encoder"):
        open_pixel_encoder("nowhere")
    unfinished(tmp_path / "run", level="region")
    with pytest.raises(RunError, match="trains an encoder of regions, no LongViT"):
        open_longvit(tmp_path / "run")
    region = RegionVitConfig(input_dim=8, dim=12, depth=1, heads=2, grid=4)
    save_region_encoder(RegionVit(region), tmp_path / "region", RegionCard("r", region))
    with pytest.raises(RunError, match="is an encoder of regions, no LongViT"):
        open_longvit(tmp_path / "region")


def test_weights_and_card_belong_together(tmp_path):
    save_longvit(make(), tmp_path, CARD)
    with pytest.raises(RunError, match="is a LongViT; gigatome embed takes it at level tile"):
        load_encoder(tmp_path)
    save_file(make(1).state_dict(), tmp_path / "encoder.safetensors")
    with pytest.raises(RunError, match="do not belong together"):
        open_longvit(tmp_path)
    content = json.loads((tmp_path / "encoder.json").read_text())
    content["card"]["config"]["dpth"] = 3
    (tmp_path / "encoder.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"cannot be read as a LongViT: .*did you mean depth"):
        open_longvit(tmp_path)
    (tmp_path / "encoder.json").write_text("no JSON")
    with pytest.raises(RunError, match="cannot be read as"):
        open_pixel_encoder(tmp_path)
