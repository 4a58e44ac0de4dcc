"""The recipes of HIPT's tables as studies: what they state, what they run on, and that each of them runs."""

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gigatome import config
from gigatome.cli.main import app
from gigatome.core.errors import ConfigError
from gigatome.evaluation.bag_head import BagHead
from gigatome.evaluation.heads import find_head
from gigatome.evaluation.study_run import run_study
from gigatome.mil.zoo import model_options
from gigatome.recipes.schema import load_recipe, recipe_header, recipe_names, recipe_text, study_names
from gigatome.recipes.studies import load_study, read_study

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from made_region_cohorts import CONFIG, make, write_splits

TABLE_1 = {"brca": ("IDC", "ILC"), "nsclc": ("LUAD", "LUSC"), "rcc": ("CCRCC", "PRCC", "CHRCC")}
TABLE_2 = ["brca", "coadread", "ccrcc", "prcc", "luad", "stad"]  # in the order of the paper's columns
STUDIES = sorted(
    [f"hipt/table1_{task}_{share}" for task in TABLE_1 for share in (25, 100)] + [f"hipt/table2_{t}" for t in TABLE_2]
)
QUICK = [
    "fit.epochs=1", "splits.folds=2", "resamples=9", "compare=false", "shuffled=false",
    f"options.hipt_scratch.options.encoder={json.dumps(config.to_dict(CONFIG))}",
    "options.hipt_none.options.hidden=8", "options.deep_graph_conv.options.hidden=8",
    "options.deep_attn_misl.options.clusters=2",
]  # fmt: skip
FIRST = ("hipt/table1_brca_100", "hipt/table1_rcc_25", "hipt/table2_brca")  # which hold all heads between them
PAPER = Path(__file__).resolve().parents[3] / "shared" / "papers"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"), patients=28)


def labels_of(name, made, folder):
    """Labels with the classes of a table."""
    codes = TABLE_1.get(name.split("_")[1], ("IDC", "ILC"))
    rows = made.labels.read_text().splitlines()
    cells = [row.split(",") for row in rows[1:]]
    lines = [",".join([*row[:2], codes[i % len(codes)], *row[3:]]) for i, row in enumerate(cells)]
    path = folder / "labels.csv"
    path.write_text("\n".join([rows[0], *lines]) + "\n")
    return path


def changes(name):
    heads = recipe_header(name)["study"]["heads"]
    return [change for change in QUICK if not change.startswith("options.") or change.split(".")[1] in heads]


def test_the_builtin_studies():
    assert [name for name in study_names() if name.startswith("hipt/")] == STUDIES
    assert not set(study_names()) & set(recipe_names())


@pytest.mark.parametrize("name", STUDIES)
def test_a_builtin_study_states_its_source_and_the_published_training(name):
    study = read_study(name)
    assert list(recipe_header(name))[:6] == ["paper", "table", "command", "hardware", "hours", "status"]
    assert study.command.startswith(f"gigatome evaluate {name} --embeddings JOB --labels ")
    assert (study.name, study.status) == (name, "unverified")
    assert len(recipe_text(name).splitlines()) <= 60
    heads = study.study["heads"]
    assert {row.head for row in study.reproduces} == set(heads) - {"knn_both"}
    assert study.study["fit"] == {"variant": "hipt" if "table1" in name else "hipt_survival"}
    for head in heads:
        model = find_head(head, study.study["options"].get(head))[1]
        if isinstance(model, BagHead):
            assert (model.alpha, model.bins, model.survival_loss) == (0.0, 4, "nll")
            if not model.options.get("weights"):
                model_options(model.model, model.options)


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in STUDIES]
)
def test_a_builtin_study_runs(name, made, tmp_path):
    labels = labels_of(name, made, tmp_path)
    study = run_study(
        load_study(name, embeddings=[made.job], labels=labels, assignments=changes(name)), tmp_path / "out"
    )
    heads = [head for head in read_study(name).study["heads"] if head != "hipt_finetuned"]
    assert sorted(arm.label.split(" on ")[0] for arm in study.arms) == sorted(heads)
    where = {arm.label.split(" on ")[0]: arm.label.split(" on ")[1] for arm in study.arms}
    assert (where["hipt"], where["ds_mil"]) == ("made", "enc")
    assert where.get("knn_both", "enc+made") == "enc+made"
    values = {row.head: row.value for row in read_study(name).reproduces}
    assert {arm.label.split(" on ")[0]: arm.reported for arm in study.arms if arm.reported} == {
        head: value for head, value in values.items() if head != "hipt_finetuned"
    }
    fold = study.arms[0].result.folds[0]
    if "table1" in name:
        assert fold.n_train == (23 if name.endswith("100") else round(23 / 4))


def test_a_region_encoder_and_the_authors_splits_on_the_command_line(made, tmp_path):
    splits = write_splits(tmp_path / "splits", made.names)
    said = run(
        "evaluate", "hipt/table1_brca_100", "--embeddings", made.grids.folder, "--labels", made.labels,
        "--folds", splits, "--set", f"options.hipt_finetuned.options.weights={made.encoder}",
        "--set", "heads=[hipt, hipt_finetuned, knn_tiles]",
        "--set", "fit.variant=hipt_paper", "--set", "fit.epochs=1", "--set", "resamples=9", "-o", tmp_path / "out",
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    saved = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [arm["label"] for arm in saved["arms"] if not arm["null"]] == ["hipt_finetuned", "knn_tiles"]
    assert saved["settings"]["heads"]["hipt_finetuned"]["fit"]["accumulate"] == 32
    assert saved["settings"]["splits"]["name"].startswith("2 splits of splits")


def test_what_is_missing_is_left_out_or_named(made, tmp_path, caplog):
    def load(*paths, name="hipt/table1_brca_100", assignments=()):
        return load_study(name, embeddings=paths, labels="labels.csv", assignments=assignments)

    study = load(made.vectors.folder)
    assert study.heads == ("hipt", "knn_regions")
    assert study.only == {"hipt": (0,), "knn_regions": (0,)}
    told = " ".join(record.message for record in caplog.records)
    assert "left out for want of grids: max, clam_sb, deep_attn_misl" in told
    assert "left out for want of grids + regions: knn_both" in told
    caplog.clear()
    assert "hipt_finetuned" not in load(made.job).heads
    assert "left out for want of a region encoder, to which options.hipt_finetuned.options.weights" in caplog.text
    whole = load(made.job, assignments=["options.hipt_finetuned.options.weights=encoder"])
    assert whole.options["hipt_finetuned"]["options"]["weights"] == "encoder"
    assert len(whole.heads) == 12
    with pytest.raises(ConfigError, match=r"no head can run on .*nothing; it needs grids, regions, grids"):
        load(tmp_path / "nothing")
    other = make(tmp_path, patients=2)
    with pytest.raises(ConfigError, match="are both grids; give --embeddings the folder"):
        load(made.grids.folder, other.grids.folder)
    with pytest.raises(ConfigError, match="there are options of hitp, which is none of the heads"):
        load(made.job, assignments=["options.hitp.fit.epochs=1"])
    assert load(made.job, assignments=["heads=[hipt, max]"]).heads == ("hipt", "max")
    with pytest.raises(ConfigError, match="unknown key heeds; did you mean heads"):
        load(made.job, assignments=["heeds=[max]"])


def test_studies_and_trainings_are_told_apart(made, tmp_path):
    with pytest.raises(ConfigError, match=r"is a study: .* Run gigatome evaluate hipt/table2_luad --embeddings JOB"):
        load_recipe("hipt/table2_luad")
    with pytest.raises(ConfigError, match="trains an encoder; run gigatome train kaiko/table1_vits16"):
        read_study("kaiko/table1_vits16")
    with pytest.raises(ConfigError, match="did you mean hipt/table2_luad"):
        read_study("hipt/table2_luads")
    own = tmp_path / "own.yaml"
    own.write_text(recipe_text("hipt/table2_luad").replace("  level: patient", "  labels: here.csv\n  level: patient"))
    with pytest.raises(ConfigError, match=r"study.labels is not the study's to state"):
        read_study(own)
    own.write_text(recipe_text("hipt/table2_luad").replace("status:", "state:"))
    with pytest.raises(ConfigError, match="unknown key state; did you mean status"):
        read_study(own)
    listed = run("recipes", "list").output
    assert "hipt/table1_rcc_25" in listed
    assert recipe_text("hipt/table1_rcc_25").strip() in run("recipes", "show", "hipt/table1_rcc_25").output
    said = run("evaluate", "hipt/table1_brca_100", "--embeddings", made.job, "--labels", "x.csv", "--target", "y")
    assert "a recipe states target itself" in " ".join(said.stderr.split())
    said = run("evaluate", "hipt/table1_brca_100", "--labels", "x.csv")
    assert "its embeddings with --embeddings" in " ".join(re.sub("[│╭╰─╮╯]", " ", said.stderr).split())


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def pairs():
    """``0.778 ± 0.091`` and the like in the lines after one that begins so."""
    if not PAPER.is_dir():
        pytest.skip("the papers' texts are not on this machine")
    lines = next(PAPER.glob("000_*")).read_text(encoding="utf-8").splitlines()

    def after(start, *, skip=0, occurrence=0):
        at = [i for i, line in enumerate(lines) if line.startswith(start)][occurrence]
        found = [
            tuple(map(float, m.groups())) for line in lines[at:] if (m := re.fullmatch(r"([\d.]+) ± ([\d.]+)", line))
        ]
        return found[skip : skip + 6]

    return after


def printed(name, head):
    return next((row.value, row.sd) for row in read_study(name).reproduces if row.head == head)


@pytest.mark.parametrize(
    ("head", "start", "skip"),
    [
        ("max", "BRCA Subtyping", 0), ("clam_sb", "CLAM-SB ", 0), ("deep_attn_misl", "DeepAttnMISL ", 0),
        ("deep_graph_conv", "GCN-MIL ", 0), ("ds_mil", "DS-MIL ", 0), ("hipt", "DS-MIL ", 6),
        ("knn_tiles", "ViT256-16 (Mean)", 0), ("knn_regions", "ViT4096-256 (Mean)", 0),
    ],
)  # fmt: skip
def test_the_numbers_of_table_1(pairs, head, start, skip):
    names = [f"hipt/table1_{task}_{share}" for task in TABLE_1 for share in (25, 100)]
    assert [printed(name, head) for name in names] == pairs(start, skip=skip)


@pytest.mark.parametrize(
    ("head", "start", "skip"),
    [
        ("abmil", "ABMIL ", 0), ("deep_attn_misl", "DeepAttnMISL ", 0), ("ds_mil", "GCN-MIL ", 0),
        ("deep_graph_conv", "DS-MIL ", 0), ("hipt", "DS-MIL ", 6),
    ],
)  # fmt: skip
def test_the_numbers_of_table_2_with_two_rows_put_right(pairs, head, start, skip):
    names = [f"hipt/table2_{task}" for task in TABLE_2]
    assert [printed(name, head) for name in names] == pairs(start, skip=skip, occurrence=0 if head == "abmil" else 1)
