"""``gigatome check`` and the function behind it, on cohorts with every kind of fault."""

import csv
import json
import shutil

import numpy as np
import pytest
import tifffile
import typer
from typer.testing import CliRunner

from gigatome.cli.check import check
from gigatome.core.errors import CohortError
from gigatome.slides.check import check_cohort
from gigatome.slides.cohort import Cohort
from gigatome.slides.synthetic import SyntheticOptions, make_slide

OPTIONS = SyntheticOptions(width=700, height=600, pen=0, bubbles=0, fat=0)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_slide(tmp_path_factory.mktemp("good") / "good.svs", "solid", 0, OPTIONS)


def write_tiff(path, side: int = 600, chunk: int = 256, description: str | None = None):
    image = np.full((side, side, 3), 230, np.uint8)
    tifffile.imwrite(path, image, tile=(chunk, chunk), compression="jpeg", description=description, metadata=None)
    return path


def problems(folder) -> dict[str, tuple[str, ...]]:
    return {report.name: report.problems for report in check_cohort(Cohort.read(folder, allow_duplicates=True))}


def test_a_good_slide(good):
    (report,) = check_cohort(Cohort.read(good))
    assert report.problems == ()
    assert report.usable
    assert (report.width, report.height, report.mpp, report.vendor, report.levels) == (700, 600, 0.5, "aperio", 3)


def test_faults_are_reported_one_by_one_and_in_order(good, tmp_path):
    data = good.read_bytes()
    shutil.copy(good, tmp_path / "a_good.svs")
    (tmp_path / "b_short.svs").write_bytes(data[: len(data) // 2])
    (tmp_path / "c_text.svs").write_text("this is no slide")
    (tmp_path / "d_empty.svs").write_bytes(b"")
    write_tiff(tmp_path / "e_no_mpp.tif")
    shutil.copy(good, tmp_path / "f_copy.svs")
    (tmp_path / "g_gone.svs").symlink_to(tmp_path / "nowhere.svs")
    stages = []
    reports = check_cohort(Cohort.read(tmp_path), progress=lambda *stage: stages.append(stage))
    assert [report.name[0] for report in reports] == list("abcdefg")
    assert [report.usable for report in reports] == [True, False, False, False, False, True, False]
    found = {report.name[0]: "; ".join(report.problems) for report in reports}
    assert found["a"] == ""
    assert found["b"]
    assert "not a slide" in found["c"]
    assert "empty" in found["d"]
    assert "no mpp" in found["e"]
    assert found["f"] == f"has the same contents as {tmp_path / 'a_good.svs'}"
    assert found["g"]
    assert stages[-1] == ("check", 7, 7)


def test_damage_of_a_chunk_is_found(good, tmp_path):
    with tifffile.TiffFile(good) as tiff:
        offset, length = tiff.pages[0].dataoffsets[-1], tiff.pages[0].databytecounts[-1]
    data = bytearray(good.read_bytes())
    data[offset : offset + length] = bytes(length)
    (tmp_path / "x.svs").write_bytes(data)
    (report,) = check_cohort(Cohort.read(tmp_path))
    assert not report.usable
    assert report.width == 700  # what is known is told all the same
    assert len(report.problems) == 1


def test_damage_in_between_is_found_when_all_is_read(good, tmp_path):
    with tifffile.TiffFile(good) as tiff:
        offset, length = tiff.pages[0].dataoffsets[1], tiff.pages[0].databytecounts[1]
    data = bytearray(good.read_bytes())
    data[offset : offset + length] = bytes(length)
    (tmp_path / "x.svs").write_bytes(data)
    cohort = Cohort.read(tmp_path)
    assert check_cohort(cohort)[0].usable
    assert not check_cohort(cohort, thorough=True)[0].usable


def test_names_and_rows_that_repeat(good, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shutil.copy(good, tmp_path / "a" / "x.svs")
    make_slide(tmp_path / "b" / "x.svs", "solid", 1, OPTIONS)
    table = tmp_path / "cohort.csv"
    table.write_text("slide\na/x.svs\nb/x.svs\na/x.svs\n")
    reports = check_cohort(Cohort.read(table, allow_duplicates=True))
    assert [report.problems for report in reports] == [
        (),
        (f"has the name of {tmp_path / 'a' / 'x.svs'}",),
        ("stands in the cohort twice",),
    ]


def test_odd_resolutions(good, tmp_path):
    shutil.copy(good, tmp_path / "x.svs")
    make_slide(tmp_path / "coarse.svs", "solid", 2, SyntheticOptions(width=200, height=200, mpp=5.0))
    note = "Aperio Image Library\r\n600x600|AppMag = 40|MPP = 0.5"
    write_tiff(tmp_path / "power.svs", description=note)
    table = tmp_path / "cohort.csv"
    table.write_text("slide,mpp\nx.svs,0.25\ncoarse.svs,\npower.svs,\n")
    found = problems(table)
    assert "states 0.5 mpp itself, and the table says 0.25" in found["x"][0]
    assert found["coarse"] == ("has 5 mpp, and scanners make 0.1 to 4",)
    assert "calls itself 40×" in found["power"][0]


def test_a_large_single_level(tmp_path):
    write_tiff(tmp_path / "flat.tif", side=8448, chunk=1024)
    table = tmp_path / "cohort.csv"
    table.write_text("slide,mpp\nflat.tif,0.5\n")
    assert "is no pyramid" in problems(table)["flat"][0]


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(check)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_says_yes_with_0(command, good):
    result = command(good)
    assert result.exit_code == 0
    assert "ok" in result.stdout
    assert "slides: 1 · patients: 1 · can be used: 1 · with problems: 0" in result.stdout


def test_the_command_says_some_with_3_and_writes_a_table(command, good, tmp_path):
    shutil.copy(good, tmp_path / "a.svs")
    (tmp_path / "b[red].svs").write_text("nothing")
    result = command(tmp_path, "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert "b[red]" in result.stdout
    assert "slides: 2 · patients: 2 · can be used: 1 · with problems: 1" in result.stdout
    assert "data:image/jpeg" in (tmp_path / "out" / "cohort.html").read_text(encoding="utf-8")
    with (tmp_path / "out" / "check.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["name"] for row in rows] == ["a", "b[red]"]
    assert rows[0]["mpp"] == "0.5"
    assert "not a slide" in rows[1]["problems"]


def test_the_command_says_none_with_1_and_json(command, tmp_path):
    (tmp_path / "b.svs").write_text("nothing")
    result = command(tmp_path, "--json")
    assert result.exit_code == 1
    (report,) = json.loads(result.stdout)
    assert (report["name"], report["usable"], report["mpp"]) == ("b", False, None)


def test_the_command_needs_a_cohort(command, tmp_path):
    result = command(tmp_path)
    assert isinstance(result.exception, CohortError)


def test_the_developers_slides(shared_data):
    reports = check_cohort(Cohort.read(shared_data / "whole.csv"))
    assert all(report.usable and not report.problems for report in reports)
    found = problems(shared_data / "formats")
    assert "states no mpp" in found["TCGA-CR-7395-01A-01-TS1"][0]
    assert found["CMU-1-Small-Region"] == ()
