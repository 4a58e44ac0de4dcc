"""The GPU benchmarks run on a CPU, in small, and name what is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, isolated=False):
    # -S and -E: without what is installed, as on a machine that has nothing but Python
    flags = ["-S", "-E"] if isolated else []
    command = [sys.executable, *flags, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def test_stream():
    size = ("--batch-size", 4, "--steps", 6, "--rounds", 1, "--slides", 2, "--side", 1200, "--threads", 2)
    done = run("stream", "--device", "cpu", "--tiny", *size)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["device"], found["options"]["threads"]) == ("CPU", 2)
    held, streamed = found["images_per_second_held"], found["images_per_second_stream"]
    assert min(held, streamed, found["host_waited_ms_a_step"]) > 0
    assert found["waited_share"] == pytest.approx(1 - streamed / held)
    (sentence,) = found["stream"]
    assert "tiles/s: " in sentence


def test_mil(tmp_path):
    done = run("mil", "--device", "cpu", "--tiny", "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["options"]["name"] == "mil"


@pytest.mark.parametrize("name", ["region_views", "sparse", "longnet"])
def test_scripts(name, tmp_path):
    where = ["--folder", tmp_path] if name == "region_views" else []
    done = run(name, "--device", "cpu", "--tiny", *where)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["options"]["name"] == name


def test_giga(tmp_path):
    done = run("giga", "--device", "cpu", "--tiny", "--write", tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["measured"]
    assert found["arm"] == "on the device"
    assert found["thousand_epochs_minutes"] == pytest.approx(found["epoch_seconds"] * 1000 / 60, abs=0.01)
    (written,) = tmp_path.glob("giga_*_??????.md")
    assert "| on the device | " in written.read_text(encoding="utf-8")


def test_regions(tmp_path):
    pytest.importorskip("openslide")
    done = run("regions", "--device", "cpu", "--tiny", "--folder", tmp_path, "--threads", 2, "--write", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["regions"] >= 2
    assert 0 < found["tissue_share"] < 1
    ways = ["HIPT's way", *(f"gigatome, {p}, {t}" for t in ("all tiles", "tissue") for p in ("fp32", "bf16"))]
    assert list(found["arms"]) == ways
    assert found["arms"]["gigatome, fp32, all tiles"]["cosine"] > 0.999  # the same regions, whatever reads them
    (written,) = tmp_path.glob("regions_*_??????.md")
    assert "| gigatome, bf16, tissue | " in written.read_text(encoding="utf-8")


def test_what_is_missing_is_named():
    done = run("stream", isolated=True)
    assert done.returncode == 1
    assert "missing here: imagecodecs " in done.stderr
    assert "pip install --no-index --find-links wheels imagecodecs " in done.stderr


def test_a_device_that_is_not_there_is_named():
    done = run("stream", "--device", "cuda:99", "--tiny")
    assert done.returncode == 1
    assert "device cuda:99 cannot be used" in done.stderr
