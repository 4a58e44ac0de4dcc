from dataclasses import replace

import pytest
import yaml

from gigatome import config
from gigatome.core.errors import ConfigError
from gigatome.recipes.schema import load_recipe, recipe_header, recipe_names, recipe_text


def test_builtin_recipes_load_and_open_with_their_source():
    assert recipe_names() == ["demo/dino_vit_mini", "kaiko/table1_vits16"]
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        header = recipe_header(name)
        assert recipe.command.startswith("gigatome ")
        assert list(header)[:6] == ["paper", "table", "command", "hardware", "hours", "status"]
        assert len(recipe_text(name).splitlines()) <= 60


def test_kaikos_recipe_is_the_papers():
    recipe = load_recipe("kaiko/table1_vits16")
    assert recipe.tiles.mpp == (0.25, 0.5, 1.0, 2.0)
    assert (recipe.tiles.tile_size, recipe.tiles.min_tissue) == (256, 0.4)
    assert recipe.encoder.mean == recipe.encoder.std == (0.5, 0.5, 0.5)
    assert recipe.fit.total_steps == 100 * 1250
    assert recipe.fit.lr == pytest.approx(5e-4 / 10)
    assert all(row.measured is None for row in recipe.reproduces)
    assert recipe.status == "unverified"


@pytest.mark.parametrize(
    ("source", "assignments", "message"),
    [
        ("kaiko/table1_vits61", [], "did you mean kaiko/table1_vits16"),
        ("kaiko/table1_vits16", ["tiles.tilesize=3"], r"unknown key tiles\.tilesize; did you mean tile_size\?"),
        ("kaiko/table1_vits16", ["dino.views.local_vews=3"], "did you mean local_views"),
        ("kaiko/table1_vits16", ["fit.batch_size=x"], "fit.batch_size"),
        ("kaiko/table1_vits16", ["fit.steps=10"], "either steps or epochs"),
        ("kaiko/table1_vits16", ["method=jepa"], "method"),
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
