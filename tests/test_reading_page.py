"""The page "How reading works": its example runs, and the benchmarks behind its figures do."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gigatome.slides.synthetic import SyntheticOptions, make_slide

ROOT = Path(__file__).resolve().parents[1]
SIDE = 2304


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return make_slide(tmp_path_factory.mktemp("page") / "case.svs", "glandular", 0, SyntheticOptions(SIDE, SIDE))


def test_the_example_runs(slide, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "reading.md").read_text("utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(slide.parent)
    names: dict = {}
    exec(compile(code, "reading.md", "exec"), names)
    assert names["rgb"].shape == (256, 256, 3)
    assert re.fullmatch(r"\d+ chunks, \d+ bytes, True\n", capsys.readouterr().out)


def test_the_picture():
    drawing = runpy.run_path(str(ROOT / "docs" / "images" / "reading.py"))
    assert drawing["OUT"].stat().st_size <= 200_000
    states, block = drawing["states"](240), drawing["BLOCK"]
    assert [round((states == drawing[name]).mean(), 2) for name in ("DECODED", "PARSED", "NEVER")] == [0.30, 0.53, 0.17]
    tile = np.zeros((480, 480), bool)
    tile[drawing["TILE_Y"] :, drawing["TILE_X"] :][: drawing["TILE"], : drawing["TILE"]] = True
    touched = tile.reshape(len(states), block, len(states), block).any(axis=(1, 3))
    assert np.array_equal(states == drawing["DECODED"], touched)


def run(module, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_bench_quality(tmp_path):
    out = run(
        "bench_quality", "--slides", tmp_path, "--side", SIDE, "--data", tmp_path, "--tiles", 2, "--write", tmp_path
    )
    results = json.loads(out)
    assert {(item["level"], item["shrink"]) for item in results} == {(0, 2), (0, 4), (0, 8), (1, 2)}
    assert all(item["psnr"] > 30 and max(map(abs, item["colour_shift"])) < 0.5 for item in results)
    (written,) = tmp_path.glob("quality_??????.md")
    assert "| rgb_240 | 0 | 2 | 2 | " in written.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(shutil.which, ("perf", "addr2line", "cc"))), reason="perf or binutils are not installed"
)
def test_profile_read(tmp_path):
    out = run("profile_read", "--slides", tmp_path, "--side", SIDE, "--seconds", 0.5, "--write", tmp_path)
    for item in json.loads(out):
        assert sum(item["shares"].values()) == pytest.approx(1, abs=0.01)
        assert item["entropy_decoding"] > 0.2
        assert item["shares"]["rest of the extension"] < 0.1
    (written,) = tmp_path.glob("profile_*_??????.md")
    assert "rgb_240, 0.5 mpp" in written.read_text(encoding="utf-8")
