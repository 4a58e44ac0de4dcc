"""Slides and cohorts as Zarr: the same pixels, the bytes of the file, and nothing read or opened without need."""

import asyncio
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from importlib.metadata import EntryPoint
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile

from gigatome.core.errors import DamagedSlideError, StoreError
from gigatome.core.geometry import Box
from gigatome.slides.slide import open_slide
from range_server import serve
from tiff_files import (
    APERIO,
    ASCII,
    LONG,
    aperio_pages,
    chunks_of,
    halved,
    jpeg_page,
    ndpi_pages,
    philips_pages,
    picture,
    raw_page,
    strip_page,
    tiff_bytes,
    tiled_page,
    write_ndpi,
    write_tiff,
)

pytest.importorskip("zarr", minversion="3")
from zarr.abc.store import RangeByteRequest, SuffixByteRequest

from gigatome.slides.zarr_codec import NAME, ChunkCodec
from gigatome.slides.zarr_view import SlideStore, open_zarr
from zarr_values import assert_equal_to_read_level, listed, value

ROOT = Path(__file__).parents[2]
IMAGE = picture(450, 350)
REDUCED = {"t254": (LONG, [1])}


def jpeg2000_page(image, side, compression):
    chunks = [
        imagecodecs.jpeg2k_encode(chunk, codecformat="j2k", reversible=True, mct=compression != 33003)
        for chunk in chunks_of(image, side)
    ]
    return tiled_page(image, side, compression, chunks, t270=(ASCII, APERIO))


def pyramid(page, side, *args, **more):
    return [page(IMAGE, side, *args, **more), page(halved(IMAGE, 2), side, *args, **REDUCED, **more)]


KINDS = {
    "ycbcr-separate-tables": aperio_pages(IMAGE, 64, "420"),
    "rgb": aperio_pages(IMAGE, 80, "rgb"),
    "own-tables": pyramid(jpeg_page, 128, "444", tables=False),
    "jpeg2000-rgb": [jpeg2000_page(IMAGE, 256, 33005)],
    "jpeg2000-ycbcr": [jpeg2000_page(IMAGE, 128, 33003)],
    "deflate-predicted": pyramid(raw_page, 64, 8, 2),
    "lzw-grey": pyramid(lambda image, *args, **more: raw_page(image[..., :1], *args, **more), 64, 5, 2),
    "uncompressed": pyramid(raw_page, 64),
}


@pytest.fixture
def slide(tmp_path):
    with open_slide(write_tiff(tmp_path / "case.svs", aperio_pages(IMAGE))) as slide:
        yield slide


@pytest.mark.parametrize("axes", ["yxc", "cyx"])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_equal_the_slides_and_bytes_the_files(tmp_path, kind, axes):
    path = write_tiff(tmp_path / "a.tif", KINDS[kind])
    with open_slide(path) as slide:
        assert slide.reader == "tiff"
        group = open_zarr(slide, axes=axes)
        assert_equal_to_read_level(slide, group, axes)
        box = Box(61, 130, 203, 99)
        rows, columns = slice(box.y, box.y + box.height), slice(box.x, box.x + box.width)
        crop = group["0"][rows, columns] if axes == "yxc" else group["0"][:, rows, columns].transpose(1, 2, 0)
        assert np.array_equal(crop, slide.read(box))
        level = slide.levels[0]
        wanted = {"y": level.chunk_height, "x": level.chunk_width, "c": 3}
        assert group["0"].chunks == tuple(wanted[axis] for axis in axes)
        file = path.read_bytes()
        stored = [value(group.store, key) for key in listed(group.store.list_prefix("0/c/"))]
        assert sorted(stored) == sorted(KINDS[kind][0].chunks)
        assert all(data in file for data in stored)


def test_left_out_chunks(tmp_path):
    """White at level 0, as a key that is not there; elsewhere made from the finer level, and served as pixels."""
    pages = aperio_pages(IMAGE)
    pages[0].chunks[1] = pages[2].chunks[1] = pages[2].chunks[3] = b""
    with open_slide(write_tiff(tmp_path / "a.svs", pages)) as slide:
        for axes in ("yxc", "cyx"):
            assert_equal_to_read_level(slide, open_zarr(slide, axes=axes), axes)
        store = SlideStore(slide)
        assert value(store, "0/c/0/1/0") is None
        assert "0/c/0/1/0" not in listed(store.list())
        assert value(store, "1/c/1/1/0").startswith(b"gigatome.pixels\0")
        assert value(store, "1/c/1/1/0", SuffixByteRequest(7)) == value(store, "1/c/1/1/0")[-7:]
        assert "1/c/1/1/0" in listed(store.list())
        assert not (open_zarr(slide)["1"][64:, 64:] == 255).all()


def test_restart_intervals_are_chunks(tmp_path):
    """Hamamatsu: the codec holds the header that its chunks have not."""
    with open_slide(write_ndpi(tmp_path / "a.ndpi", ndpi_pages(picture(512, 256)))) as slide:
        assert slide.reader == "tiff"
        group = open_zarr(slide)
        assert group["0"].chunks == (slide.levels[0].chunk_height, slide.levels[0].chunk_width, 3)
        assert group["0"].metadata.codecs[0].coding.header
        assert_equal_to_read_level(slide, group)


def test_formats_whose_gaps_are_white(tmp_path):
    pages = philips_pages(picture(256, 256), missing=(1,))
    with open_slide(write_tiff(tmp_path / "a.tif", pages)) as slide:
        assert slide.reader == "tiff"
        group = open_zarr(slide)
        assert_equal_to_read_level(slide, group)
        assert value(group.store, "1/c/0/1/0") is None
        assert (group["1"][:64, 64:] == 255).all()


def test_a_stored_chunk_as_long_as_one_given_as_pixels(tmp_path):
    page = raw_page(IMAGE, 64)
    page.chunks = [chunk + bytes(16) for chunk in page.chunks]
    with open_slide(write_tiff(tmp_path / "a.tif", [page])) as slide:
        assert_equal_to_read_level(slide, open_zarr(slide))


def test_openslides_levels_are_pixels(tmp_path):
    pytest.importorskip("openslide")
    image = picture(1100, 600)
    pages = [jpeg_page(image, 240), jpeg_page(halved(image, 4), 240, **REDUCED)]
    with open_slide(write_tiff(tmp_path / "a.tif", pages), reader="openslide") as slide:
        group = open_zarr(slide)
        assert_equal_to_read_level(slide, group)
        assert_equal_to_read_level(slide, open_zarr(slide, axes="cyx"), "cyx")
        assert group["0"].chunks == (720, 720, 3)
        assert value(group.store, "0/c/0/1/0", RangeByteRequest(0, 6)) == value(group.store, "0/c/0/1/0")[:6]
        assert asyncio.run(group.store.getsize("0/c/0/1/0")) == 720 * 720 * 3


def test_openslide_interpolates_each_piece(tmp_path):
    """Levels that are no whole factor smaller: a piece is what a read that starts at its corner gives."""
    pytest.importorskip("openslide")
    image = picture(1301, 600)
    smaller = cv2.resize(image, (649, 299), interpolation=cv2.INTER_AREA)
    pages = [jpeg_page(image, 256), jpeg_page(smaller, 256, **REDUCED)]
    with open_slide(write_tiff(tmp_path / "a.tif", pages), reader="openslide") as slide:
        array = open_zarr(slide)["1"]
        assert array.chunks == (512, 512, 3)
        assert np.array_equal(array[:, 512:], slide.read_level(1, 512, 0, 137, 299))


def test_tifffiles_levels_are_pixels(tmp_path):
    image, path = picture(1100, 600), tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        options = {"tile": (64, 64), "photometric": "rgb", "compression": "zstd"}
        writer.write(image, subifds=1, **options)
        writer.write(halved(image, 2), subfiletype=1, **options)
    with open_slide(path) as slide:
        assert (slide.reader, len(slide.levels)) == ("tifffile", 2)
        group = open_zarr(slide)
        assert group["1"].chunks == (512, 512, 3)
        assert_equal_to_read_level(slide, group)


def test_strips_are_cut_in_pieces(tmp_path):
    with open_slide(write_tiff(tmp_path / "a.tif", [strip_page(picture(2100, 600))])) as slide:
        assert slide.reader == "tifffile"
        group = open_zarr(slide)
        assert group["0"].chunks == (600, 512, 3)
        assert_equal_to_read_level(slide, group)


def assert_follows_ome_zarr(group, axes="cyx"):
    """The rules of OME-Zarr 0.5 for "multiscales", "axes", "coordinateTransformations" and "omero"."""
    ome = group.attrs["ome"]
    assert ome["version"] == "0.5"
    (multiscale,) = ome["multiscales"]
    names = [axis["name"] for axis in multiscale["axes"]]
    assert names == list(axes)
    types = [axis["type"] for axis in multiscale["axes"]]
    if axes == "cyx":
        assert types == ["channel", "space", "space"]
    assert [dataset["path"] for dataset in multiscale["datasets"]] == sorted(group.array_keys(), key=int)
    before = [0.0] * 3
    for dataset in multiscale["datasets"]:
        array = group[dataset["path"]]
        assert array.ndim == len(names)
        assert list(array.metadata.dimension_names) == names
        (transformation,) = dataset["coordinateTransformations"]
        assert transformation["type"] == "scale"
        scale = transformation["scale"]
        assert len(scale) == len(names)
        assert all(isinstance(number, float) and number >= least for number, least in zip(scale, before, strict=True))
        before = scale
    channels = ome["omero"]["channels"]
    assert len(channels) == 3
    for channel in channels:
        assert re.fullmatch("[0-9A-F]{6}", channel["color"])
        assert set(channel["window"]) == {"min", "max", "start", "end"}


@pytest.mark.parametrize("axes", ["yxc", "cyx"])
def test_metadata(tmp_path, axes):
    path = write_tiff(tmp_path / "case.1.tif", pyramid(raw_page, 64))
    with open_slide(path) as slide:
        group = open_zarr(slide, axes=axes)
        assert_follows_ome_zarr(group, axes)
        multiscale = group.attrs["ome"]["multiscales"][0]
        assert multiscale["name"] == "case.1"
        assert all("unit" not in axis for axis in multiscale["axes"])
        scales = [dataset["coordinateTransformations"][0]["scale"] for dataset in multiscale["datasets"]]
        assert scales == ([[1, 1, 1], [2, 2, 1]] if axes == "yxc" else [[1, 1, 1], [1, 2, 2]])
        assert group["0"].fill_value == 255
    with open_slide(path, mpp=0.25) as slide:
        multiscale = open_zarr(slide, axes=axes).attrs["ome"]["multiscales"][0]
        assert {axis["name"]: axis.get("unit") for axis in multiscale["axes"]} == {
            "y": "micrometer",
            "x": "micrometer",
            "c": None,
        }
        scale = multiscale["datasets"][1]["coordinateTransformations"][0]["scale"]
        assert sorted(scale) == [0.5, 0.5, 1.0]


def test_metadata_are_understood_by_ome_zarr_models(slide):
    models = pytest.importorskip("ome_zarr_models.v05")
    assert models.Image.from_zarr(open_zarr(slide, axes="cyx"))


def test_codec_in_json(slide):
    """The metadata alone say how to decode, through the codec's entry point."""
    (stated,) = json.loads(value(SlideStore(slide), "0/zarr.json"))["codecs"]
    assert stated["name"] == NAME
    coding = slide._reader.index.levels[0].coding
    assert coding.tables
    assert ChunkCodec.from_dict(stated) == ChunkCodec(slide.uri, 0, coding)
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["zarr.codecs"]
    assert EntryPoint(NAME, points[NAME], "zarr.codecs").load() is ChunkCodec


class SpyBlob:
    """A blob that counts what is read."""

    def __init__(self, blob):
        self.blob, self.reads = blob, []

    def read(self, offset, length):
        self.reads.append((offset, length))
        return self.blob.read(offset, length)

    def __getattr__(self, name):
        return getattr(self.blob, name)


def test_only_what_is_needed_is_read(slide):
    index = slide._reader.index.levels[0]
    spy = slide._reader.blob = SpyBlob(slide._reader.blob)
    store = SlideStore(slide)
    group = open_zarr(slide)
    listed(store.list())
    assert asyncio.run(store.exists("0/c/2/3/0"))
    assert asyncio.run(store.getsize("0/c/2/3/0")) == index.counts[2, 3]
    assert spy.reads == []
    _ = group["0"][64:192, 130:192]
    assert sorted(spy.reads) == [(int(index.offsets[row, 2]), int(index.counts[row, 2])) for row in (1, 2)]
    spy.reads.clear()
    part = value(store, "0/c/2/3/0", RangeByteRequest(10, 30))
    assert spy.reads == [(int(index.offsets[2, 3]) + 10, 20)]
    assert part == value(store, "0/c/2/3/0")[10:30]


def test_over_http(tmp_path):
    data = tiff_bytes([raw_page(picture(600, 500), 64)])
    with serve({"a.tif": data}) as server, open_slide(f"{server.url}/a.tif?signature=secret") as slide:
        group = open_zarr(slide)
        assert "secret" not in repr(group["0"]) + repr(group.store) + str(value(group.store, "0/zarr.json"))
        server.requests.clear()
        crop = group["0"][400:440, 300:330]
        index = slide._reader.index.levels[0]
        ranges = Counter(
            f"bytes={index.offsets[6, column]}-{index.offsets[6, column] + index.counts[6, column] - 1}"
            for column in (4, 5)
        )
        assert Counter(header for _, header in server.requests) == ranges
        assert np.array_equal(crop, picture(600, 500)[400:440, 300:330])


@pytest.mark.parametrize("axes", ["yxc", "cyx"])
def test_a_damaged_chunk_names_its_slide(tmp_path, axes):
    pages = aperio_pages(IMAGE)
    pages[2].chunks[0] = pages[2].chunks[0][: len(pages[2].chunks[0]) // 2]
    with open_slide(write_tiff(tmp_path / "broken.svs", pages)) as slide:
        group = open_zarr(slide, axes=axes)
        with pytest.raises(DamagedSlideError, match=r"broken\.svs: a chunk of level 1: "):
            _ = group["1"][:]
        whole = slide.read_level(0, 0, 0, 450, 350)
        assert np.array_equal(group["0"][:] if axes == "yxc" else group["0"][:].transpose(1, 2, 0), whole)


def test_a_failing_server_names_the_slide(tmp_path):
    data = tiff_bytes([raw_page(picture(600, 500), 64)])
    with serve({"a.tif": data}) as server, open_slide(f"{server.url}/a.tif") as slide:
        group = open_zarr(slide)
        server.faults["a.tif"] = 403
        with pytest.raises(StoreError, match=r"a\.tif: access denied"):
            _ = group["0"][400:410, :64]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_zarr_is_loaded_only_for_the_view(slide):
    code = f"import sys, gigatome as gt; gt.open_slide({slide.uri!r}); gt.Cohort; print('zarr' in sys.modules)"
    assert run(code) == "False"


def test_missing_zarr_says_what_to_install():
    code = """
import sys
sys.modules["zarr"] = None
try:
    import gigatome.slides.zarr_view
except Exception as error:
    print(type(error).__name__, error)
"""
    assert run(code) == "MissingExtraError zarr is needed to open slides as Zarr: pip install 'gigatome[zarr]'"


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    pytest.importorskip("dask")
    pytest.importorskip("xarray")
    image = picture(1500, 900)
    write_tiff(tmp_path / "case.svs", [jpeg_page(image, 256, t270=(ASCII, APERIO)), jpeg_page(halved(image, 4), 256)])
    (tmp_path / "cohort.csv").write_text("slide\ncase.svs\n")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "zarr.md").read_text(), flags=re.DOTALL)
    names = {}
    exec(compile(code, "zarr.md", "exec"), names)
    with open_slide("case.svs") as slide:
        assert np.array_equal(names["crop"], slide.read(Box(1024, 512, 256, 256)))
        assert np.array_equal(names["thumbnail"], slide.read_level(1, 0, 0, 375, 225))
        assert np.array_equal(names["level"].values, slide.read_level(0, 0, 0, 1500, 900))
        assert np.allclose(names["mean"], slide.read_level(0, 0, 0, 1500, 900).mean(axis=(0, 1)))


REAL = ["formats/CMU-1-Small-Region.svs", "formats/TCGA-CR-7395-01A-01-TS1.svs", "formats/OS-1-detail.ome.tif",
        "formats/camelyon_jpeg.dcm", "whole/*"]  # fmt: skip


@pytest.mark.parametrize("pattern", REAL)
def test_real_slides(shared_data, pattern):
    """Every level; of levels beyond 16 megapixels, random crops."""
    rng = np.random.default_rng(0)
    paths = sorted(shared_data.glob(pattern))
    assert paths
    for path in paths:
        with open_slide(path) as slide:
            group = open_zarr(slide)
            for number, level in enumerate(slide.levels):
                array = group[str(number)]
                assert array.shape == (level.height, level.width, 3)
                boxes = [(0, 0, level.width, level.height)]
                if level.width * level.height > 2**24:
                    corners = rng.integers(0, (level.width - 700, level.height - 500), (5, 2))
                    boxes = [(x, y, 700, 500) for x, y in corners.tolist()]
                for x, y, width, height in boxes:
                    expected = slide.read_level(number, x, y, width, height)
                    assert np.array_equal(array[y : y + height, x : x + width], expected), (path.name, number, x, y)
