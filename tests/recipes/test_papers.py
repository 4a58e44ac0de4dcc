"""The numbers of the built-in recipes are those that stand in the papers' texts, which only the developers have."""

import re
from pathlib import Path

import pytest

from gigatome.recipes.schema import load_recipe, recipe_names

PAPERS = Path(__file__).resolve().parents[3] / "shared" / "papers"
NUMBER = re.compile(r"(?<![\d.])0\.\d{3}")


@pytest.fixture(scope="module")
def lines():
    """Lines of a paper's text."""
    if not PAPERS.is_dir():
        pytest.skip("the papers' texts are not on this machine")
    return {path.name[:3]: path.read_text(encoding="utf-8").splitlines() for path in PAPERS.glob("*.txt")}


def numbers(text):
    return [float(number) for number in NUMBER.findall(text)]


def row(lines, start):
    """Numbers of the first line that begins so and has some."""
    return next(found for line in lines if line.startswith(start) and (found := numbers(line)))


def reported(name):
    return [value.reported for value in load_recipe(name).reproduces]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("vits16", "DINO ViT-S16"), ("vits8", "DINO ViT-S8"), ("vitb16", "DINO ViT-B16"), ("vitb8", "DINO ViT-B8"),
        ("vitl14", "DINOv2 ViT-L14"),
    ],
)  # fmt: skip
def test_kaikos_table_1(lines, name, model):
    assert reported(f"kaiko/table1_{name}") == row(lines["003"], f"{model} (ours) TCGA")


@pytest.mark.parametrize(
    ("column", "name"), list(enumerate(["40x", "20x", "10x", "5x", "20x_40x", "5x_10x_20x", "5x_10x_20x_40x"]))
)
def test_kaikos_table_2(lines, column, name):
    tasks = ("BACH (3.47", "CRC (20", "MHIST (5", "PCam/val (10", "PCam/test (10")
    table = [row(lines["003"], task) for task in tasks]
    assert {len(values) for values in table} == {7}
    assert reported(f"kaiko/table2_{name}") == [values[column] for values in table]


@pytest.mark.parametrize("share", [1, 10, 30, 100])
def test_kaikos_table_3(lines, share):
    assert reported(f"kaiko/table3_{share}percent") == row(lines["003"], f"TCGA {share}%")


@pytest.mark.parametrize("power", [3, 4, 5, 6])
def test_kaikos_table_4(lines, power):
    assert reported(f"kaiko/table4_1e{power}") == row(lines["003"], f"10{power}superscript")


@pytest.mark.parametrize(("name", "row"), [("stage1_vit256", "ViT256-16"), ("stage2_vit4096", "ViT4096-256")])
def test_hipts_table_1(lines, name, row):
    start = lines["000"].index(f"{row} (Mean)")
    quarter_then_all = [value for line in lines["000"][start + 1 : start + 7] for value in numbers(line)[:1]]
    assert reported(f"hipt/{name}") == quarter_then_all[1::2]


def test_giga_ssls_table_2(lines):
    parts = [[numbers(line) for line in lines["002"] if re.match(rf"{part} 0\.\d{{3}} ± ", line)] for part in (100, 25)]
    assert [len(values) for values in parts] == [6, 6]
    # each value has its deviation beside it
    assert reported("gigassl/pretrain_resnet18") == [found[0] for values in parts for found in values]
    assert reported("gigassl/moco_resnet18") == [found[2] for found in parts[0]]


@pytest.mark.parametrize(
    ("name", "start"),
    [("no_slide_augmentation", "w/o slide-aug "), ("not_shared", "NS "), ("imagenet_tiles", "Giga-SSLim 0")],
)
def test_giga_ssls_table_3(lines, name, start):
    rows = [re.findall(r" (0\.\d+)", line) for line in lines["002"] if line.startswith(start)]
    (found,) = [row for row in rows if len(row) == 6]
    assert reported(f"gigassl/table3_{name}") == [float(value) for value in found]


def test_longvits_table_5(lines):
    def value(key):
        return next(line.split("\t")[1] for line in lines["001"] if line.startswith(f"{key}\t"))

    recipe = load_recipe("longvit/pretrain_1024")
    encoder, fit, views = recipe.encoder, recipe.fit, recipe.dino.views
    sizes = "Layers", "Hidden size", "FFN inner hidden size", "Attention heads", "Training epochs", "Batch size"
    ours = encoder.depth, encoder.dim, encoder.ffn_dim, encoder.heads, fit.epochs, fit.batch_size
    assert [int(value(key).replace(",", "")) for key in sizes] == list(ours)
    assert float(value("Peak learning rate")) == fit.lr * fit.batch_size / 256
    assert (fit.lr_scaling, int(value("Warmup epochs"))) == ("linear", fit.warmup_epochs)
    assert float(value("Drop path")) == recipe.dino.drop_path
    assert value("Segment lengths") == f"{{{', '.join(map(str, encoder.encoder().attention.segments))}}}"
    assert value("Dilated ratios") == f"{{{', '.join(map(str, encoder.ratios))}}}"
    assert (value("Global crops scale"), value("Local crops scale")) == (
        str(views.global_scale),
        str(views.local_scale),
    )
    stated = [re.match(r"\$?([\d,]+)\^", value(f"{kind} crops size"))[1] for kind in ("Global", "Local")]
    assert [int(size.replace(",", "")) for size in stated] == [views.global_size, views.local_size]


def test_those_of_the_papers_that_report_nothing_say_so():
    silent = [name for name in recipe_names() if not reported(name)]
    assert silent == ["demo/dino_vit_mini", "kaiko/table7_dino", "kaiko/table7_dinov2", "longvit/pretrain_1024"]
