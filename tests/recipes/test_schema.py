from dataclasses import replace

import pytest
import timm
import yaml

from gigatome import config
from gigatome.core.errors import ConfigError
from gigatome.recipes.schema import load_recipe, recipe_header, recipe_names, recipe_text
from gigatome.selfsup.views import ViewOptions
from gigatome.tiles.pixel_filter import HsvFilter

KAIKO = {
    "table1": ["vitb16", "vitb8", "vitl14", "vits16", "vits8"],
    "table2": ["10x", "20x", "20x_40x", "40x", "5x", "5x_10x_20x", "5x_10x_20x_40x"],
    "table3": ["100percent", "10percent", "1percent", "30percent"],
    "table4": ["1e3", "1e4", "1e5", "1e6"],
    "table7": ["dino", "dinov2"],
}


def test_the_builtin_recipes():
    kaiko = [f"kaiko/{table}_{row}" for table, rows in KAIKO.items() for row in rows]
    hipt = ["hipt/stage1_vit256", "hipt/stage2_vit4096"]
    ablations = ["imagenet_tiles", "no_slide_augmentation", "not_shared"]
    giga = [f"gigassl/{name}" for name in ("moco_resnet18", "pretrain_resnet18", *(f"table3_{it}" for it in ablations))]
    others = ["demo/dino_vit_mini", "longvit/pretrain_1024", "midnight/midnight12k"]
    assert recipe_names() == sorted([*kaiko, *hipt, *giga, *others])


@pytest.mark.parametrize("name", recipe_names())
def test_a_builtin_recipe_loads_and_opens_with_its_source(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert list(recipe_header(name))[:6] == ["paper", "table", "command", "hardware", "hours", "status"]
    assert f"gigatome train {name} --data " in recipe.command or recipe.command == "gigatome demo"
    assert recipe.status == "unverified"
    assert all(row.measured is None for row in recipe.reproduces)
    assert len(recipe_text(name).splitlines()) <= 60
    if recipe.level == "tile" and recipe.encoder.pretrained:
        assert timm.models.is_model_pretrained(recipe.encoder.model)


@pytest.mark.parametrize(
    ("name", "model", "gpus", "each"),
    [
        ("vits16", "vit_small_patch16_224.dino", 4, 256), ("vits8", "vit_small_patch8_224.dino", 4, 64),
        ("vitb16", "vit_base_patch16_224.dino", 4, 128), ("vitb8", "vit_base_patch8_224.dino", 8, 32),
        ("vitl14", "vit_large_patch14_reg4_dinov2.lvd142m", 16, 32),
    ],
)  # fmt: skip
def test_kaikos_models_are_trained_as_the_paper_says(name, model, gpus, each):
    recipe = load_recipe(f"kaiko/table1_{name}")
    fit, tiles = recipe.fit, recipe.tiles
    assert (recipe.encoder.model, recipe.encoder.pretrained) == (model, True)
    assert fit.batch_size == gpus * each
    assert fit.total_steps * fit.batch_size == 100 * 1_280_000
    assert fit.lr == pytest.approx((2e-4 if name == "vitl14" else 5e-4) / 10)
    assert fit.warmup_steps == (16 if name == "vitl14" else 10) * fit.epoch_steps
    assert (tiles.tile_size, tiles.min_tissue, tiles.mpp) == (256, 0.4, (0.25, 0.5, 1.0, 2.0))
    assert recipe.encoder.mean == recipe.encoder.std == (0.5, 0.5, 0.5)


def test_kaikos_ablations_differ_in_what_they_ablate_only():
    whole = load_recipe("kaiko/table3_100percent")
    assert (whole.tiles.slide_fraction, whole.tiles.limit_tiles, whole.fit.total_steps) == (1.0, None, 500_000)
    for share in (1, 10, 30):
        fewer = load_recipe(f"kaiko/table3_{share}percent")
        assert fewer.tiles == replace(whole.tiles, slide_fraction=share / 100)
        assert (fewer.encoder, fewer.dino, fewer.fit) == (whole.encoder, whole.dino, whole.fit)
    for power in (3, 4, 5, 6):
        limited = load_recipe(f"kaiko/table4_1e{power}")
        assert limited.tiles == replace(whole.tiles, limit_tiles=10**power)
        assert (limited.encoder, limited.dino, limited.fit) == (whole.encoder, whole.dino, whole.fit)
    for name in KAIKO["table2"]:
        mpp = {f"{round(10 / mpp)}x" for mpp in load_recipe(f"kaiko/table2_{name}").tiles.mpp}
        assert mpp == set(name.split("_"))


def test_the_other_papers_numbers():
    hipt = load_recipe("hipt/stage1_vit256")
    assert (hipt.fit.total_steps, hipt.fit.batch_size, hipt.fit.lr, hipt.tiles.mpp) == (400_000, 256, 5e-4, (0.5,))
    assert hipt.fit.warmup_steps == 10 * hipt.fit.epoch_steps
    giga = load_recipe("gigassl/moco_resnet18")
    assert giga.fit.total_steps == 200 * (6_000_000 // giga.fit.batch_size)
    assert (giga.tiles.limit_tiles, round(giga.tiles.slide_fraction * 11_754, -2)) == (6_000_000, 3000)
    assert (giga.encoder.model, giga.moco.export_layer, giga.tiles.mpp) == ("resnet18", 3, (1.0,))
    midnight = load_recipe("midnight/midnight12k")
    assert (midnight.fit.total_steps, midnight.fit.batch_size, midnight.tiles.hsv) == (1_000_000, 768, HsvFilter())
    assert (midnight.dinov2.koleo_weight, midnight.dinov2.kde_weight) == (0.0, 0.05)
    assert (midnight.dinov2.views.global_size, midnight.dinov2.views.local_size) == (224, 98)


def test_views_that_are_not_named_are_the_methods_own():
    def views(name, *assignments):
        return load_recipe(name, assignments).options.views

    giga, flip = "gigassl/moco_resnet18", "moco.views.vertical_flip=0.5"
    assert views("kaiko/table1_vitl14") == replace(ViewOptions.dinov2(), local_size=98)
    assert views("kaiko/table1_vits16", "dino.views.hed=0.2") == replace(ViewOptions.dino(), hed=0.2)
    assert views(giga) is None
    assert views(giga, flip) == replace(ViewOptions.moco_v2(), vertical_flip=0.5)
    assert views(giga, flip, "moco.version=v3") == replace(ViewOptions.moco_v3(), vertical_flip=0.5)


@pytest.mark.parametrize(
    ("source", "assignments", "message"),
    [
        ("kaiko/table1_vits61", [], "did you mean kaiko/table1_vits16"),
        ("kaiko/table1_vits16", ["tiles.tilesize=3"], r"unknown key tiles\.tilesize; did you mean tile_size\?"),
        ("kaiko/table1_vits16", ["dino.views.local_vews=3"], "did you mean local_views"),
        ("kaiko/table1_vits16", ["fit.batch_size=x"], "fit.batch_size"),
        ("kaiko/table1_vits16", ["fit.steps=10"], "either steps or epochs"),
        ("kaiko/table1_vits16", ["method=jepa"], "method"),
        ("kaiko/table1_vits16", ["method=dinov2"], "method dinov2 needs a section dinov2 .* there is dino "),
        ("kaiko/table1_vits16", ["dino=null"], "method dino needs a section dino .* there is none"),
        ("kaiko/table1_vits16", ["moco={}"], "no other method's; there is dino and moco"),
        ("demo/dino_vit_mini", ["fit.batch_size=1"], "fit.batch_size 1 in 1 parts leaves less than 2 tiles"),
        ("demo/dino_vit_mini", ["fit.grad_accumulation=32"], "fit.batch_size 32 in 32 parts leaves less than 2"),
        ("demo/dino_vit_mini", ["tiles.tile_size=56"], "dino.views.global_size 64 is larger than the tile of 56 px"),
        ("demo/dino_vit_mini", ["dino.views.local_size=104"], "dino.views.local_size 104 is larger than the tile"),
        ("gigassl/moco_resnet18", ["tiles.tile_size=128"], "moco.views.global_size 224 is larger than the tile"),
        ("kaiko/table1_vitl14", ["dinov2.high_resolution_epochs=1"], "high_resolution_global_size 392 is larger"),
        ("kaiko/table1_vitl14", ["dinov2.views.local_vews=3"], "did you mean local_views"),
        ("kaiko/table4_1e3", ["tiles.limit_tiles=0"], "limit_tiles must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(source, assignments, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(source, assignments)


def test_identity_is_of_what_decides_the_weights():
    recipe = load_recipe("demo/dino_vit_mini")
    same = replace(recipe, hardware="a laptop", fit=replace(recipe.fit, save_every=7, device="cuda"))
    assert same.identity() == recipe.identity()
    assert load_recipe("demo/dino_vit_mini", ["tiles.threads=9"]).identity() == recipe.identity()
    for change in ("fit.lr=0.1", "tiles.min_tissue=0.5", "dino.out_dim=8", "encoder.depth=2", "fit.seed=3"):
        assert load_recipe("demo/dino_vit_mini", [change]).identity() != recipe.identity()


def test_a_resolved_recipe_loads_again(tmp_path):
    recipe = load_recipe("demo/dino_vit_mini", ["fit.steps=50"])
    path = tmp_path / "recipe.yaml"
    path.write_text(config.to_yaml(recipe))
    assert load_recipe(path) == recipe
    assert yaml.safe_load(path.read_text())["fit"]["steps"] == 50
