"""The benchmark slides are what they say, and the benchmarks run from the repository's root."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from gigatome.slides.slide import open_slide

ROOT = Path(__file__).resolve().parents[1]
SIDE = 2304


def run(module, *arguments, tissue="nowhere"):
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    environment = os.environ | {"GIGATOME_TISSUE": str(tissue)}
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The three slides, of synthetic tissue."""
    folder = tmp_path_factory.mktemp("slides")
    paths = run("slides", folder, "--side", SIDE).split()
    assert [Path(path).name for path in paths] == ["ycc422_256.svs", "ycc420_240.svs", "rgb_240.svs"]
    return folder


@pytest.mark.parametrize(
    ("name", "chunk", "photometric", "sampling", "components"),
    [
        ("ycc422_256", 256, 6, (0x21, 0x11, 0x11), (1, 2, 3)),
        ("ycc420_240", 240, 6, (0x22, 0x11, 0x11), (1, 2, 3)),
        ("rgb_240", 240, 2, (0x11, 0x11, 0x11), (0, 1, 2)),
    ],
)
def test_slide(folder, name, chunk, photometric, sampling, components):
    with open_slide(folder / f"{name}.svs") as slide:
        assert (slide.vendor, slide.reader, slide.mpp) == ("aperio", "tiff", 0.25)
        assert (slide.width, slide.height) == (SIDE, SIDE)
        assert [level.downsample for level in slide.levels] == [1, 4, 16]
        assert {(level.chunk_width, level.chunk_height) for level in slide.levels} == {(chunk, chunk)}
        fine = cv2.resize(slide.read_level(0, 0, 0, SIDE, SIDE), (SIDE // 4,) * 2, interpolation=cv2.INTER_AREA)
        assert np.abs(slide.read_level(1, 0, 0, SIDE // 4, SIDE // 4).astype(int) - fine).mean() < 5
        assert fine.std() > 10
    with tifffile.TiffFile(folder / f"{name}.svs") as tiff:
        assert [page.is_tiled for page in tiff.pages] == [True, False, True, True]
        for page in (tiff.pages[0], tiff.pages[2], tiff.pages[3]):
            assert page.photometric == photometric
            assert page.tags["JPEGTables"].value[:2] == b"\xff\xd8"
            data = first_chunk(tiff, page)
            assert not any(marker in data for marker in (b"\xff\xdb", b"\xff\xc4", b"\xff\xee", b"\xff\xe0"))
            frame = data.index(b"\xff\xc0")
            assert tuple(data[frame + 11 : frame + 19 : 3]) == sampling
            assert tuple(data[frame + 10 : frame + 19 : 3]) == components


def first_chunk(tiff, page):
    tiff.filehandle.seek(page.dataoffsets[0])
    return tiff.filehandle.read(page.databytecounts[0])


def test_what_is_there_is_kept_and_another_size_is_made_anew(folder, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    run("slides", folder, "--side", SIDE)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (tmp_path / "rgb_240.svs").write_bytes((folder / "rgb_240.svs").read_bytes())
    run("slides", tmp_path, "--side", 400)
    with open_slide(tmp_path / "rgb_240.svs") as slide:
        assert slide.width == 400


def test_real_tissue_is_preferred(shared_data, tmp_path):
    run("slides", tmp_path, "--side", 512, tissue=shared_data)
    with open_slide(tmp_path / "rgb_240.svs") as slide:
        assert slide.properties["aperio.Tissue"] == "CMU-1-Small-Region"


def test_bench_read(folder, tmp_path):
    out = run("bench_read", "--slides", folder, "--side", SIDE, "--rounds", 1, "--tiles", 2, "--write", tmp_path)
    readings = json.loads(out)
    assert list(readings) == ["ycc422_256", "ycc420_240", "rgb_240"]
    for reading in readings.values():
        assert [case["mpp"] for case in reading["cases"]] == [0.25, 0.5]
    (written,) = tmp_path.glob("read_*_??????.md")
    text = written.read_text(encoding="utf-8")
    assert "## ycc420_240" in text
    assert "| 0.5 from 0.25 | gigatome | " in text


def test_bench_region_views(tmp_path):
    pytest.importorskip("torch")
    out = json.loads(run("bench_region_views", "--tiny", "--folder", tmp_path / "grids", "--write", tmp_path))
    assert list(out["arms"]) == ["the authors' way", "gigatome", "gigatome, dropout", "gigatome, regions only"]
    assert all(arm["views_per_second"] > 0 for arm in out["arms"].values())
    (written,) = tmp_path.glob("region-views_*_??????.md")
    assert "| gigatome, dropout | " in written.read_text(encoding="utf-8")


def test_bench_slide_images(folder, tmp_path):
    pytest.importorskip("torch")
    found = json.loads(run("bench_slide_images", "--tiny", folder / "ycc420_240.svs", "--write", tmp_path))
    assert [item["size"] for item in found["measured"]] == [96, 2048]


def test_bench_giga():
    pytest.importorskip("torch")
    authors, *ours = json.loads(run("bench_giga", "--tiny"))["measured"]
    assert (authors["arm"], authors["loader_times"], authors["step_times"]) == ("the authors' style", 1, 1)
    assert [item["arm"] for item in ours] == ["on the device", "one packed file", "a file a slide"]
    assert all(item["views_per_second"] > 0 and item["epoch_seconds"] > 0 for item in ours)


@pytest.mark.slow
def test_giga_works(tmp_path):
    size = ("--slides", 48, "--batch-size", 8, "--steps", 4, "--draws", 2, "--seeds", 2, "--tiles", 8)
    run("giga_works", "--tasks", "arrangement", "confounder", "--poolings", "mlp", *size, "--write", tmp_path)
    (written,) = tmp_path.glob("works_*_??????.md")
    assert "| arrangement | mlp, Giga-SSL | 2 | " in written.read_text(encoding="utf-8")


def test_bench_sparse(tmp_path):
    pytest.importorskip("torch")
    assert json.loads(run("bench_sparse", "--tiny", "--write", tmp_path))
    assert list(tmp_path.glob("sparse_*_??????.md"))


def test_bench_longnet(tmp_path):
    pytest.importorskip("torch")
    out = json.loads(run("bench_longnet", "--tiny", "--write", tmp_path))
    (gaps,) = (item["largest_differences"] for item in out["attention"] if "largest_differences" in item)
    assert list(gaps) == ["gigatome", "gigatome, padded to 32", "gigatome, compat"]
    assert max(gaps.values()) < 1e-5
    assert [(step["heads"], step["checkpointing"]) for step in out["steps"]][1:3] == [(16, "block"), (6, "selective")]
    assert list(tmp_path.glob("longnet_*_??????.md"))


def test_bench_mil(tmp_path):
    pytest.importorskip("torch")
    out = json.loads(run("bench_mil", "--tiny", "--folder", tmp_path / "bags", "--write", tmp_path))
    arms = ["gigatome", "gigatome, bf16", "gigatome, drawn", "gigatome, drawn, bf16"]
    assert list(out["speed"]) == ["CLAM's loop", *arms, "CLAM's reading alone"]
    assert all(item["seconds"] > 0 for item in out["speed"].values())
    assert [len(values) for values in out["auroc"].values()] == [2] * 5
    assert list(out["differences"]) == arms
    (written,) = tmp_path.glob("mil_*_??????.md")
    assert "| gigatome, bf16 | " in written.read_text(encoding="utf-8")
