"""``gigatome info``."""

import json

import pytest
import typer
from typer.testing import CliRunner

from gigatome.cli.info import info
from gigatome.core.errors import NotASlideError
from tiff_files import aperio_pages, picture, raw_page, write_tiff


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(info)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_json(tmp_path, run):
    path = write_tiff(tmp_path / "case.svs", aperio_pages(picture(900, 700)))
    facts = json.loads(run(path, "--json").stdout)
    assert (facts["slide"], facts["vendor"], facts["reader"]) == ("case", "aperio", "tiff")
    assert (facts["width"], facts["height"], facts["mpp"]) == (900, 700, 0.25)
    assert [level["downsample"] for level in facts["levels"]] == [1, 4]
    assert facts["levels"][1]["mpp"] == 1.0
    assert facts["levels"][0]["chunk_width"] == 64
    assert facts["properties"]["aperio.AppMag"] == "40"
    assert json.loads(run(path, "--json", "--slide-mpp", "0.3").stdout)["mpp"] == 0.3


def test_table_tells_what_is_missing_and_prints_brackets_as_they_are(tmp_path, run):
    tags = {"t305": (2, "writer [bold]1[/bold]")}
    result = run(write_tiff(tmp_path / "a.tif", [raw_page(picture(100, 80), 64, **tags)]))
    assert result.exit_code == 0
    assert "--slide-mpp" in result.stdout
    assert "64 × 64" in result.stdout
    assert "[bold]1[/bold]" in result.stdout


def test_no_slide(tmp_path, run):
    (tmp_path / "a.txt").write_text("no slide")
    assert isinstance(run(tmp_path / "a.txt").exception, NotASlideError)
