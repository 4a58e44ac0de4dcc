"""``gigatome embed`` and ``gigatome evaluate`` as a user meets them: what they print, and how they exit."""

import json
import shutil

import pytest
import typer
from typer.testing import CliRunner

from gigatome.cli.embed import embed
from gigatome.cli.evaluate import evaluate
from gigatome.core.errors import CohortError, EvaluationError, StoreError
from gigatome.embeddings.store import EmbeddingStore
from gigatome.encoders.zoo import save_encoder

app = typer.Typer()
app.command()(embed)
app.command()(evaluate)

OPTIONS = ["--tile-size", "64", "--min-tissue", "0.5", "--threads", "2", "--batch-size", "16"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def encoder_folder(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(encoder, folder)
    return folder


@pytest.fixture(scope="module")
def embedded(slides, encoder_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    result = run("embed", slides / "cohort.csv", "--encoder", encoder_folder, "-o", folder, *OPTIONS)
    assert result.exit_code == 0, result.output
    return folder, result


def test_embed_says_where_the_embeddings_are(embedded):
    folder, result = embedded
    store = EmbeddingStore.open(folder)
    assert result.stdout == f"{store.folder}: embeddings of 4 slides by {store.encoder}\n"
    assert "embed: " in result.stderr


def test_embed_exits_with_3_when_slides_failed(slides, encoder_folder, tmp_path):
    folder = shutil.copytree(slides, tmp_path / "slides")
    (folder / "s1.tif").write_bytes(b"gone")
    result = run("embed", folder / "cohort.csv", "--encoder", encoder_folder, "-o", tmp_path / "job", *OPTIONS)
    assert result.exit_code == 3
    assert "embeddings of 3 slides" in result.stdout
    assert "s1: " in result.stdout
    assert (tmp_path / "job" / "failures.csv").read_text().count("s1,") == 1


def test_embed_exits_with_1_when_nothing_came_of_it(slides, encoder_folder, tmp_path):
    result = run("embed", slides / "s0.tif", "--encoder", encoder_folder, "-o", tmp_path / "job", *OPTIONS)
    assert result.exit_code == 1  # the file states no mpp
    assert "mpp" in result.stdout


@pytest.mark.parametrize("shard", ["1", "1/1", "a/b", "-1/2"])
def test_embed_refuses_a_shard_that_is_none(slides, encoder_folder, tmp_path, shard):
    result = run("embed", slides, "--encoder", encoder_folder, "-o", tmp_path, f"--shard={shard}")
    assert result.exit_code == 2
    assert "--shard" in result.stderr


def test_embed_without_slides(encoder_folder, tmp_path):
    result = run("embed", tmp_path / "none", "--encoder", encoder_folder, "-o", tmp_path / "job")
    assert isinstance(result.exception, CohortError)  # which main() turns into one sentence and exit code 1


def test_evaluate_prints_a_table(embedded, slides):
    result = run("evaluate", embedded[0], "--labels", slides / "cohort.csv", "--target", "subtype", "--folds", "2",
                 "--head", "linear")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "AUROC" in result.stdout
    assert "4 slides of 2 patients, 2 stratified folds of patients" in " ".join(result.stdout.split())
    assert "evaluate: 2 of 2" in result.stderr


def test_evaluate_prints_json_and_writes_files(embedded, slides, tmp_path):
    options = ["--folds", "patient", "--level", "tile", "--tiles-per-slide", "5", "--json"]
    result = run(
        "evaluate",
        embedded[0],
        "--labels",
        slides / "cohort.csv",
        "--target",
        "subtype",
        "-o",
        tmp_path / "result.json",
        *options,
    )
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads((tmp_path / "result.json").read_text())
    assert (printed["n_slides"], printed["scores"]["n"]) == (4, 20)
    assert (tmp_path / "result.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--target", "organ"], CohortError, "no label column 'organ'"),
        (["--target", "subtype"], EvaluationError, "folds"),
        (["--target", "subtype", "--folds", "none.tsv"], EvaluationError, "cannot be read"),
        (["--target", "subtype", "--head", "coxx"], EvaluationError, "there is no head coxx"),
        (["--target", "subtype", "--encoder", "uni"], StoreError, "no embeddings of encoder uni"),
    ],
)
def test_evaluate_refuses(embedded, slides, arguments, error, message):
    result = run("evaluate", embedded[0], "--labels", slides / "cohort.csv", *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
