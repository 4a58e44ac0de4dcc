"""The cache of slide indexes: the same index as from the slide, and never an error."""

import os
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gigatome.blob.store import open_blob
from gigatome.core.geometry import Box
from gigatome.slides.index import Coding, LevelIndex, SlideIndex
from gigatome.slides.index_cache import IndexCache, default_cache_folder
from gigatome.slides.tiff import TiffFile
from gigatome.slides.vendors import recognise
from tiff_files import aperio_pages, jpeg_page, ndpi_pages, philips_pages, picture, write_ndpi, write_tiff


def index_of(path):
    return recognise(TiffFile(open_blob(path), "a"))


def assert_same(index, other):
    for field in ("vendor", "mpp", "properties", "bounds", "gaps"):
        assert getattr(index, field) == getattr(other, field)
    assert len(index.levels) == len(other.levels)
    for level, twin in zip(index.levels, other.levels, strict=True):
        for field in ("width", "height", "scale_x", "scale_y", "chunk_width", "chunk_height", "coding"):
            assert getattr(level, field) == getattr(twin, field)
        for array, copy in ((level.offsets, twin.offsets), (level.counts, twin.counts)):
            assert array.dtype == copy.dtype
            assert np.array_equal(array, copy)


def made(offsets, counts, **more):
    level = LevelIndex(512, 256, 1.0, 1.0, 256, 256, Coding(7, 6, 3, 1, b"t"), offsets, counts)
    fields = {"mpp": (0.25, 0.3), "properties": {"a": "ä\ud7ff", "b": ""}, "bounds": Box(0, 0, 512, 256)}
    return SlideIndex(**{"vendor": "aperio", "levels": (level,), **fields, **more})


def files(folder):
    return [path for path in folder.iterdir() if path.suffix == ".gtindex"]


@pytest.fixture
def cache(tmp_path):
    return IndexCache(tmp_path / "cache")


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    return write_tiff(tmp_path_factory.mktemp("svs") / "a.svs", aperio_pages(picture(900, 700)))


def test_the_same_index_as_from_the_slide(tmp_path, cache, svs):
    image = picture(512, 384)
    generic = [jpeg_page(image, 64, tables=False)]
    for number, path in enumerate([
        svs,
        write_tiff(tmp_path / "big.tif", generic, order=">", big=True),
        write_tiff(tmp_path / "sparse.tif", philips_pages(image, missing=(0, 3, 5))),
        write_ndpi(tmp_path / "a.ndpi", ndpi_pages(image)),
        write_ndpi(tmp_path / "wide.ndpi", ndpi_pages(image), start=5 << 30),
    ]):  # fmt: skip
        index = index_of(path)
        cache.store(path, 10, "1", index)
        assert_same(index, cache.load(path, 10, "1"))
        assert len(files(tmp_path / "cache")) == number + 1


def test_real_slides(cache, shared_data):
    paths = [path for path in sorted(shared_data.rglob("*")) if path.suffix in (".svs", ".tif")]
    assert len(paths) > 20
    for path in paths:
        index = index_of(path)
        cache.store(path, path.stat().st_size, "1", index)
        assert_same(index, cache.load(path, path.stat().st_size, "1"))


@pytest.mark.parametrize(
    ("offsets", "counts"),
    [
        ([8, 18], [10, 20]),
        ([8, 20], [10, 20]),
        ([18, 8], [10, 20]),
        ([0, 0], [0, 0]),
        ([8, 0], [70_000, 0]),
        ([8, (1 << 32) - 1], [1 << 20, 1]),
    ],
)
@pytest.mark.parametrize("kind", [np.uint32, np.uint64])
def test_any_layout_of_chunks(cache, offsets, counts, kind):
    index = made(np.array([offsets], kind), np.array([counts], np.uint32), mpp=None, gaps="white")
    cache.store("a", 1, "1", index)
    assert_same(index, cache.load("a", 1, "1"))
    one = made(np.array([offsets[:1]], kind), np.array([counts[:1]], np.uint32))
    cache.store("b", 1, "1", one)
    assert_same(one, cache.load("b", 1, "1"))


def test_chunks_in_order_take_two_bytes_each(tmp_path, cache):
    counts = np.random.default_rng(0).integers(5000, 20_000, (300, 300)).astype(np.uint32)
    offsets = (np.cumsum(counts.ravel()) - counts.ravel() + 16).astype(np.uint32).reshape(300, 300)
    index = made(offsets, counts)
    cache.store("a", 1, "1", index)
    assert_same(index, cache.load("a", 1, "1"))
    assert files(tmp_path / "cache")[0].stat().st_size < 2 * counts.size + 1000


def test_another_state_of_the_slide_is_not_found(cache, svs):
    index = index_of(svs)
    assert cache.load(svs, 10, "1") is None
    cache.store(svs, 10, "1", index)
    assert cache.load(svs, 11, "1") is None
    assert cache.load(svs, 10, "2") is None
    assert cache.load(str(svs) + "x", 10, "1") is None
    assert cache.load(svs, 10, "") is None
    cache.store(svs, 11, "2", replace(index, vendor="other"))
    assert cache.load(svs, 10, "1") is None
    assert cache.load(svs, 11, "2").vendor == "other"


def test_without_a_stamp_nothing_is_kept(tmp_path, cache, svs):
    cache.store(svs, 10, "", index_of(svs))
    assert not (tmp_path / "cache").exists()


def test_addresses(tmp_path, cache, svs, monkeypatch):
    """A signature is no part of the address; a relative path is the same slide as the absolute one."""
    index = index_of(svs)
    cache.store("https://user:secret@host/a.svs?sig=1", 10, "etag", index)
    assert cache.load("https://host/a.svs?sig=2", 10, "etag") is not None
    assert cache.load("https://host/b.svs?sig=1", 10, "etag") is None
    assert b"secret" not in files(tmp_path / "cache")[0].read_bytes()
    cache.store(svs, 10, "1", index)
    monkeypatch.chdir(svs.parent)
    assert cache.load("a.svs", 10, "1") is not None
    assert cache.load(f"file://{svs}", 10, "1") is not None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=6), st.integers(0, 4000), st.booleans()
)
def test_damaged_files_are_passed_over(tmp_path, svs, changes, length, sealed):
    """Truncated and altered files, some with a checksum that is right again, as a foreign file might have."""
    cache, index = IndexCache(tmp_path / "damaged"), index_of(svs)
    cache.store(svs, 10, "1", index)
    path = files(tmp_path / "damaged")[0]
    data = bytearray(path.read_bytes()[: max(length, 40)])
    whole = data == path.read_bytes() or length >= path.stat().st_size
    for position, value in changes:
        data[position % len(data)] = value
    if sealed and len(data) > 32:
        struct.pack_into("<I", data, 24, zlib.crc32(data[32:]))
    path.write_bytes(data)
    found = cache.load(svs, 10, "1")
    if not sealed and found is not None:
        assert whole
        assert_same(index, found)
    cache.store(svs, 10, "1", index)
    assert_same(index, cache.load(svs, 10, "1"))


def test_foreign_files_are_passed_over(tmp_path, cache, svs):
    index = index_of(svs)
    cache.store(svs, 10, "1", index)
    path = files(tmp_path / "cache")[0]
    head = path.read_bytes()[:24]
    for text in (b"", b"[1]", b"{}", b"null", b'{"levels": 5}', b"[" * 100_000, b'{"vendor": {"a": "b"}}', b"\xff"):
        path.write_bytes(head + struct.pack("<II", zlib.crc32(text), len(text)) + text)
        assert cache.load(svs, 10, "1") is None
    path.unlink()
    path.mkdir()
    assert cache.load(svs, 10, "1") is None
    cache.store(svs, 10, "1", index)
    assert cache.load(svs, 10, "1") is None


def test_a_folder_that_cannot_be_written(tmp_path, svs, caplog):
    (tmp_path / "file").write_bytes(b"")
    cache = IndexCache(tmp_path / "file" / "cache")
    for _ in range(3):
        cache.store(svs, 10, "1", index_of(svs))
        assert cache.load(svs, 10, "1") is None
    assert len(caplog.records) == 1
    assert "no slide index can be kept" in caplog.text


def test_the_folder_is_bounded_and_the_oldest_go_first(tmp_path, svs):
    index = index_of(svs)
    first = IndexCache(tmp_path / "cache")
    first.store("0", 1, "1", index)
    size = files(tmp_path / "cache")[0].stat().st_size
    cache = IndexCache(tmp_path / "cache", 20 * size)
    for number in range(60):
        cache.store(str(number), 1, "1", index)
        for path in files(tmp_path / "cache"):  # a coarse clock would make them of one age
            os.utime(path, ns=(path.stat().st_mtime_ns - 10**9,) * 2)
        assert len(files(tmp_path / "cache")) <= 22
    assert len(files(tmp_path / "cache")) >= 15
    found = [cache.load(str(number), 1, "1") is not None for number in range(60)]
    assert found == sorted(found)
    assert found[-1]


def test_what_dead_writers_left_is_removed(tmp_path, svs):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, age in (("dead.tmp", 7200), ("alive.tmp", 10), ("other.txt", 7200)):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (time.time() - age,) * 2)
    IndexCache(folder).store(svs, 10, "1", index_of(svs))
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".gtindex") == ["alive.tmp", "other.txt"]


def test_many_writers_and_readers(tmp_path, svs):
    """Threads and two processes store and load the same slides; what is found is always whole."""
    index, folder = index_of(svs), tmp_path / "cache"
    code = (
        "import sys; from gigatome.slides.index_cache import IndexCache; from gigatome.blob.store import open_blob;"
        "from gigatome.slides.tiff import TiffFile; from gigatome.slides.vendors import recognise;"
        "cache = IndexCache(sys.argv[1], 8000); index = recognise(TiffFile(open_blob(sys.argv[2]), 'a'));"
        "[cache.store(str(k % 5), 1, '1', index) for k in range(100)]"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, folder, svs]) for _ in range(2)]
    cache = IndexCache(folder, 8000)

    def work(number):
        cache.store(str(number % 5), 1, "1", index)
        found = cache.load(str(number % 5), 1, "1")
        if found is not None:
            assert_same(index, found)
        return found is not None

    with ThreadPoolExecutor(4) as pool:
        assert any(pool.map(work, range(200)))
    assert [process.wait() for process in others] == [0, 0]
    assert not list(folder.glob("*.tmp"))


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("GIGATOME_INDEX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "gigatome" / "index"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(default_cache_folder()) == "/home/me/.cache/gigatome/index"
    monkeypatch.setenv("GIGATOME_INDEX_CACHE", "/scratch/index")
    assert str(default_cache_folder()) == "/scratch/index"
    monkeypatch.setenv("GIGATOME_INDEX_CACHE", "")
    assert default_cache_folder() is None
