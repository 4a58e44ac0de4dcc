"""The stream's benchmark runs, in small, and its peers read the tiles that gigatome reads."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(module, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def peers():
    known = {"OpenSlide Dataset": "openslide", "wsistream": "wsistream", "wsistream, own sampler": "wsistream"}
    return [name for name, module in known.items() if importlib.util.find_spec(module)]


@pytest.mark.slow
def test_bench_stream(tmp_path):
    sizes = ("--side", 2304, "--rounds", 1, "--seconds", 0.1)
    result = run("bench_stream", "--slides", tmp_path, *sizes, "--write", tmp_path / "results")
    assert [mix["mpp"] for mix in result["mixes"]] == [[0.25, 0.5, 1, 2], [0.5]]
    assert set(result["two_threads"]) == {"gigatome", "hashing"}
    for mix in result["mixes"]:
        assert list(mix["cpu_us"]) == ["drawing", "planning", "reading"]
        rates = mix["streams"]
        assert [rate["stream"] for rate in rates] == ["gigatome", *peers()]
        assert rates[0]["difference"] == 0
        for rate in rates:
            assert rate["gigatome_times"] == pytest.approx(rates[0]["tiles_per_second"] / rate["tiles_per_second"])
    assert set(result["left_out"]) | {*peers()} >= {"OpenSlide Dataset", "wsistream"}
    (written,) = (tmp_path / "results").glob("stream_*_??????.md")
    text = written.read_text(encoding="utf-8")
    assert "## 0.5 mpp" in text
    assert "| gigatome | " in text


def test_very_many_slides(tmp_path):
    result = run(
        "stream_many", "--many", 300, "--seconds", 0.2, "--open-slides", 2, "--side", 1600, "--folder", tmp_path
    )
    assert [course["kept"] for course in result["courses"]] == ["nothing", "positions", "positions and indexes"]
    for course in result["courses"]:
        assert course["slides"] == 300
        assert len(course["seconds"]) == len(course["megabytes"]) == len(course["files"]) == len(course["rates"]) + 1
        assert course["report"]["opened"] > 0  # few stay open
        assert "tiles/s: " in course["limit"]
    assert not list(tmp_path.iterdir())
