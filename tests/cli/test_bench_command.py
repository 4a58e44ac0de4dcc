"""``gigatome bench``."""

import json

import pytest
from typer.testing import CliRunner

from gigatome.cli.main import app
from gigatome.core.errors import ConfigError, MissingMppError
from gigatome.slides.synthetic import SyntheticOptions, make_slide
from tiff_files import picture, raw_page, write_tiff


def run(*arguments, command="read"):
    return CliRunner().invoke(app, ["bench", command, *map(str, arguments)], env={"COLUMNS": "150"})


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A slide of tissue at 0.25 mpp."""
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    return make_slide(path, "solid", 3, SyntheticOptions(1400, 1300, mpp=0.25))


def test_json_and_table(slide):
    reading = json.loads(run(slide, "--json", "--rounds", 1, "--tiles", 2).stdout)
    assert (reading["rounds"], reading["tiles"]) == (1, 2)
    assert [case["mpp"] for case in reading["cases"]] == [0.25]
    assert "gigatome" in [rate["reader"] for rate in reading["cases"][0]["rates"]]
    result = run(slide, "--rounds", 1, "--tiles", 2, "--slide-mpp", 1.5)
    assert result.exit_code == 0
    assert "× OpenSlide" in result.stdout
    assert "1.5" in result.stdout
    assert "Opening: gigatome" in result.stdout
    assert "reading: 1 of 1" in result.stderr


def test_no_mpp(tmp_path):
    path = write_tiff(tmp_path / "a.tif", [raw_page(picture(300, 200), 64)])
    assert isinstance(run(path).exception, MissingMppError)


@pytest.mark.parametrize("option", ["--rounds", "--tiles"])
def test_nothing_to_measure_is_wrong_usage(tmp_path, option):
    assert run(tmp_path / "a.svs", option, 0).exit_code == 2


def stream(*arguments):
    options = ("--tile-size", 64, "--batch-size", 4, "--threads", 2, "--prefetch", 2, "--seconds", 0.1)
    return run(*arguments, *options, command="stream")


def test_stream_says_where_the_time_went_and_what_the_limit_is(slide, tmp_path):
    result = stream(slide, "--mpp", "0.25,0.5", "--job", tmp_path)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    parts = ["part", "waiting", "planning", "opening", "network", "disk", "decoding"]
    assert [line.split()[0] for line in lines[:7]] == parts
    assert "2 threads' time" in lines[6]
    assert "tiles/s: " in lines[-1]
    assert lines[-1].endswith(".")
    assert (tmp_path / "contours_geojson" / "a.geojson").is_file()
    assert list(tmp_path.glob("positions/64px_0.25-0.5mpp_0.4/a.bin"))


def test_stream_as_json(slide):
    found = json.loads(stream(slide.parent, "--mpp", "0.5", "--min-tissue", 0.7, "--step-ms", 50, "--json").stdout)
    assert (found["slides"], found["left_out"], found["threads"], found["step_ms"]) == (1, [], 2, 50)
    assert found["options"]["mpp"] == [0.5]
    assert (found["options"]["min_tissue"], found["options"]["prefetch"]) == (0.7, 2)
    assert found["tiles"] == 4 * found["batches"] > 0
    assert found["opened"] == 0  # that was while it warmed up
    assert found["limit"] == "consumer"
    assert found["sentence"].endswith("of the time.")


def test_stream_names_slides_that_are_left_out(slide, tmp_path):
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    table = tmp_path / "slides.csv"
    table.write_text(f"slide\n{slide}\nbroken.svs\n", encoding="utf-8")
    result = stream(table, "--mpp", "0.5")
    assert result.exit_code == 3
    assert "Left out: broken: " in result.stdout


def test_wrong_resolutions_are_refused(slide):
    result = stream(slide, "--mpp", "0.5,half")
    assert isinstance(result.exception, ConfigError)
    assert "bench stream: mpp.1: " in str(result.exception)
    assert "must be one or more positive numbers" in str(stream(slide, "--mpp", "0").exception)
