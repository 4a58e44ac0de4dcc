"""What is wrong with the input is said in one sentence, with the right exit code, whatever the command."""

import sys

import numpy as np
import pytest
import tifffile

from gigatome.cli.main import main
from gigatome.slides.synthetic import SyntheticOptions, make_slide


@pytest.fixture
def gigatome(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["gigatome", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "400")
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return call


def write_tiff(path, *, mpp=None):
    pixels = np.full((512, 512, 3), 240, np.uint8)
    options = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), **options)
    return path


def test_not_a_slide(gigatome, tmp_path):
    (tmp_path / "a.svs").write_text("hello")
    code, _, err = gigatome("info", tmp_path / "a.svs")
    assert code == 1
    assert "a.svs: " in err
    assert "Traceback" not in err


def test_a_truncated_slide_is_reported_and_the_rest_goes_on(gigatome, tmp_path):
    slide = make_slide(tmp_path / "good.svs", "solid", 0, SyntheticOptions(width=1024, height=1024))
    (tmp_path / "cut.svs").write_bytes(slide.read_bytes()[: slide.stat().st_size // 2])
    code, out, _ = gigatome("check", tmp_path)
    assert code == 3
    assert "can be used: 1" in out
    code, _, _ = gigatome("tissue", tmp_path, "-o", tmp_path / "job")
    assert code == 3
    assert (tmp_path / "job" / "contours_geojson" / "good.geojson").is_file()
    assert (tmp_path / "job" / "failures.csv").read_text().splitlines()[1].startswith("cut,tissue,")


def test_a_slide_without_mpp_says_how_to_give_one(gigatome, tmp_path):
    write_tiff(tmp_path / "flat.tif")
    code, out, _ = gigatome("tissue", tmp_path / "flat.tif", "-o", tmp_path / "job")
    assert code == 1
    assert "--slide-mpp" in out
    assert "column mpp" in out


def test_zero_tissue(gigatome, tmp_path):
    write_tiff(tmp_path / "glass.tif", mpp=0.5)
    code, out, _ = gigatome("tile", tmp_path / "glass.tif", "-o", tmp_path / "job")
    assert code == 1
    assert "no tissue" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "{empty}"), "no slide"),
        (("train", "demo/dino_vit_mini", "--data", "{empty}", "--dry-run"), "no slide"),
        (("train", "demo/dino_vit_mini", "--data", "x", "--dry-run", "--set", "fit.stepz=3"), "did you mean steps?"),
        (("train", "kaiko/table1_vit16", "--data", "x", "--dry-run"), "did you mean kaiko/table1_vits16?"),
        (("embed", "{empty}", "--encoder", "nowhere", "-o", "job"), "no slide"),
        (("evaluate", "{empty}", "--labels", "none.csv", "--target", "x"), "holds no tile embeddings"),
        (("demo", "--slides", "{empty}"), "no slide"),
        (("recipes", "show", "nothing/like/this"), "no recipe"),
    ],
)
def test_one_sentence_and_exit_code_1(gigatome, tmp_path, arguments, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    code, _, err = gigatome(*(argument.format(empty=empty) for argument in arguments))
    assert code == 1
    assert err.startswith("Error: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [("nothing",), ("train", "demo/dino_vit_mini"), ("info", "--wrong"), ()])
def test_wrong_usage_is_2(gigatome, arguments):
    assert gigatome(*arguments)[0] == 2
