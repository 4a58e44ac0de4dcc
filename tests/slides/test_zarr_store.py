"""The Zarr stores of slides and cohorts, and those who use them: zarr, dask and xarray."""

import asyncio
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gigatome.core.errors import ConfigError, NotASlideError, StoreError
from gigatome.slides import cohort as cohort_module
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.slides.slide import open_slide
from tiff_files import aperio_pages, picture, write_tiff

zarr = pytest.importorskip("zarr", minversion="3")
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest  # noqa: E402
from zarr.core.buffer import default_buffer_prototype  # noqa: E402

from gigatome.slides.zarr_view import CohortStore, SlideStore, open_zarr  # noqa: E402
from zarr_values import assert_equal_to_read_level, listed, value  # noqa: E402

IMAGE = picture(450, 350)


@pytest.fixture
def slide(tmp_path):
    with open_slide(write_tiff(tmp_path / "case.svs", aperio_pages(IMAGE))) as slide:
        yield slide


@pytest.fixture
def cohort(tmp_path):
    """Six slides of different pictures, two levels each, and one file that is no slide."""
    for seed in range(6):
        write_tiff(tmp_path / f"s{seed}.svs", aperio_pages(picture(200, 150, seed)))
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    names = [f"s{seed}" for seed in range(6)] + ["bad"]
    return Cohort(tuple(CohortSlide(str(tmp_path / f"{name}.svs"), name, name) for name in names), "slides")


def test_keys(slide):
    store = SlideStore(slide)
    assert listed(store.list_dir("")) == ["zarr.json", "0", "1"]
    assert listed(store.list_dir("0/")) == ["zarr.json", "c"]
    assert listed(store.list_dir("1/c")) == ["0", "1"]
    assert listed(store.list_dir("0/c/3")) == [str(column) for column in range(8)]
    assert listed(store.list_dir("0/c/3/7")) == ["0"]
    assert listed(store.list_dir("0/nothing")) == listed(store.list_dir("9")) == []
    keys = listed(store.list())
    assert len(keys) == len(set(keys)) == 3 + 6 * 8 + 2 * 2
    assert all(len(value(store, key)) == asyncio.run(store.getsize(key)) for key in keys)
    for prefix in ("0/c/3", "1", "0/zarr", "0/c/1/", "zarr", "2"):
        assert listed(store.list_prefix(prefix)) == [key for key in keys if key.startswith(prefix)]
    for key in ("", "0", "c", "0/c", "2/zarr.json", "0/c/6/0/0", "0/c/0/8/0", "0/c/0/0/1", "0/c/0/0", "0/c/00/0/0",
                "0/c/-1/0/0", "0/c/0/0/0/0", "0/c/0/" + "9" * 5000 + "/0", ".zgroup", "/0/zarr.json"):  # fmt: skip
        assert value(store, key) is None, key
        assert not asyncio.run(store.exists(key))
    with pytest.raises(FileNotFoundError):
        asyncio.run(store.getsize("0/c/6/0/0"))
    assert not asyncio.run(store.is_empty(""))


@pytest.mark.parametrize("key", ["zarr.json", "1/zarr.json", "0/c/5/7/0"])
def test_parts_of_values(slide, key):
    store = SlideStore(slide)
    whole = value(store, key)
    assert value(store, key, RangeByteRequest(3, 9)) == whole[3:9]
    assert value(store, key, RangeByteRequest(3, 10**9)) == whole[3:]
    assert value(store, key, OffsetByteRequest(20)) == whole[20:]
    assert value(store, key, OffsetByteRequest(10**9)) == b""
    assert value(store, key, SuffixByteRequest(5)) == whole[-5:]
    assert value(store, key, SuffixByteRequest(10**9)) == whole
    requests = [(key, None), ("nothing", None), (key, RangeByteRequest(0, 2))]
    found = asyncio.run(store.get_partial_values(default_buffer_prototype(), requests))
    assert [buffer and buffer.to_bytes() for buffer in found] == [whole, None, whole[:2]]


def test_writing_is_refused(slide):
    group, store = open_zarr(slide), SlideStore(slide)
    assert store.read_only
    buffer = default_buffer_prototype().buffer.from_bytes(b"x")

    def write_pixels():
        group["0"][:64, :64] = 0

    def delete():
        del group["0"]

    for write in (
        write_pixels,
        delete,
        lambda: group.create_group("new"),
        lambda: group.attrs.update(a=1),
        lambda: asyncio.run(store.set("a", buffer)),
        lambda: asyncio.run(store.set_if_not_exists("a", buffer)),
        lambda: asyncio.run(store.delete("zarr.json")),
        lambda: asyncio.run(store.clear()),
    ):
        with pytest.raises(StoreError, match=r"case\.svs: .*read-only"):
            write()
    for mode in ("a", "w", "r+"):
        with pytest.raises(ValueError, match="read-only"):
            zarr.open_group(store, mode=mode)
    assert_equal_to_read_level(slide, group)


def test_cohort(cohort):
    group = open_zarr(cohort)
    for slide in cohort.slides[:6]:
        with slide.open() as opened:
            assert_equal_to_read_level(opened, group[slide.name])
    assert group["s1"].attrs["ome"]["multiscales"][0]["name"] == "s1"
    with pytest.raises(KeyError):
        _ = group["nobody"]
    with pytest.raises(NotASlideError, match=r"bad\.svs"):
        _ = group["bad"]


def test_keys_of_a_cohort(cohort):
    cohort = cohort.select([f"s{seed}" for seed in range(6)])
    store = CohortStore(cohort)
    assert listed(store.list_dir("")) == ["zarr.json", "s0", "s1", "s2", "s3", "s4", "s5"]
    assert listed(store.list_dir("s3")) == ["zarr.json", "0", "1"]
    assert listed(store.list_dir("s3/1")) == ["zarr.json", "c"]
    assert listed(store.list_dir("nobody")) == []
    keys = listed(store.list())
    assert keys[0] == "zarr.json"
    assert len(keys) == len(set(keys)) == 1 + 6 * (3 + 4 * 3 + 1)
    for prefix in ("s", "s3", "s3/", "s3/1/c", "s3/zarr.json", "z", "nobody", "nobody/0"):
        assert listed(store.list_prefix(prefix)) == [key for key in keys if key.startswith(prefix)]
    assert all(len(value(store, key)) == asyncio.run(store.getsize(key)) for key in keys if key.startswith("s4"))
    assert value(store, "s3") is value(store, "s3/") is value(store, "nobody/zarr.json") is None
    assert len(list(open_zarr(cohort).groups())) == 6


@pytest.fixture
def opened(monkeypatch):
    """Names of the slides that cohorts open, in order."""
    names = []

    def opening(uri, mpp):
        names.append(Path(uri).stem)
        time.sleep(0.01)
        return open_slide(uri, mpp=mpp)

    monkeypatch.setattr(cohort_module, "open_slide", opening)
    return names


def test_slides_last_used_stay_open(cohort, opened):
    store = CohortStore(cohort, open_slides=2)
    for name in ("s0", "s1", "s0", "s2", "s0", "s1"):
        assert value(store, f"{name}/zarr.json")
    assert opened == ["s0", "s1", "s2", "s1"]


def test_threads_open_a_slide_once(cohort, opened):
    store = CohortStore(cohort)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda key: value(store, key), ["s3/zarr.json"] * 4))
    assert opened == ["s3"]


def test_a_large_cohort_opens_only_what_is_asked_for(tmp_path, opened):
    path = str(write_tiff(tmp_path / "a.svs", aperio_pages(IMAGE)))
    cohort = Cohort(tuple(CohortSlide(path, f"slide-{k}", f"slide-{k}") for k in range(30_000)))
    store = CohortStore(cohort)
    group = zarr.open_group(store, mode="r", zarr_format=3)
    assert len(listed(store.list_dir(""))) == 30_001
    assert opened == []
    assert np.array_equal(group["slide-29999"]["1"][:], group["slide-29999/1"][:])
    assert len(opened) == 1


def test_open_slides_are_bounded(cohort, tmp_path):
    def files():
        return sum(os.path.realpath(link).startswith(str(tmp_path)) for link in Path("/proc/self/fd").iterdir())

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    store = CohortStore(cohort, open_slides=2)
    group = zarr.open_group(store, mode="r", zarr_format=3)
    arrays = [group[f"s{seed}/0"] for seed in range(6)]
    expected = [array[:] for array in arrays]
    assert files() == 2

    def read(k):
        return np.array_equal(arrays[k % 6][:], expected[k % 6])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(48)))
    assert files() == 2
    with pytest.raises(NotASlideError):
        value(store, "bad/zarr.json")
    assert files() <= 2
    store.close()
    assert files() == 0
    assert read(3)


def test_dask(slide):
    da = pytest.importorskip("dask.array")
    array = da.from_zarr(open_zarr(slide)["0"])
    pixels = slide.read_level(0, 0, 0, 450, 350)
    assert array.chunksize == (64, 64, 3)
    assert np.array_equal(array.compute(scheduler="threads"), pixels)
    assert np.array_equal(array[100:300:3, 50:60].compute(), pixels[100:300:3, 50:60])
    assert np.allclose(array.mean(axis=(0, 1)).compute(), pixels.mean(axis=(0, 1)))


def test_pickled_arrays_open_the_slide_anew(slide, cohort):
    for group, array in ((open_zarr(slide), "0"), (open_zarr(cohort, axes="cyx"), "s2/1")):
        again = pickle.loads(pickle.dumps(group[array]))
        assert np.array_equal(again[:], group[array][:])
        assert again.store == group.store
        assert again.store is not group.store
    assert SlideStore(slide) != SlideStore(slide, "cyx")


def test_xarray(slide, cohort):
    xr = pytest.importorskip("xarray")
    pixels = slide.read_level(0, 0, 0, 450, 350)
    dataset = xr.open_dataset(SlideStore(slide), engine="zarr", drop_variables=["1"])
    assert dataset["0"].dims == ("y", "x", "c")
    assert dataset["0"].dtype == np.uint8
    assert np.array_equal(dataset["0"].isel(y=slice(30, 90), x=7), pixels[30:90, 7])
    pytest.importorskip("dask")
    dataset = xr.open_zarr(CohortStore(cohort), group="s0", drop_variables=["0"])
    with cohort.slides[0].open() as first:
        assert np.array_equal(dataset["1"].compute(), first.read_level(1, 0, 0, 50, 37))


def test_zarr_dask_and_xarray_at_once(cohort):
    da, xr = pytest.importorskip("dask.array"), pytest.importorskip("xarray")
    store = CohortStore(cohort, open_slides=1)
    group = zarr.open_group(store, mode="r", zarr_format=3)
    names = ["s0", "s1", "s2", "s3"]
    expected = {}
    for slide in cohort.slides[:4]:
        with slide.open() as opened:
            expected[slide.name] = opened.read_level(0, 0, 0, 200, 150)
    ways = [
        lambda name: group[name]["0"][:],
        lambda name: da.from_zarr(group[name]["0"]).compute(scheduler="threads"),
        lambda name: xr.open_zarr(store, group=name, drop_variables=["1"])["0"].values,
    ]
    with ThreadPoolExecutor(4) as pool:
        results = [(name, pool.submit(way, name)) for _ in range(3) for name in names for way in ways]
        assert all(np.array_equal(future.result(), expected[name]) for name, future in results)


def test_axes_are_checked(slide, cohort):
    for source in (slide, cohort):
        with pytest.raises(ConfigError, match="yxc, cyx, not 'xyc'"):
            open_zarr(source, axes="xyc")
