"""What tests of the Zarr view share."""

import asyncio

import numpy as np
import pytest

pytest.importorskip("zarr", minversion="3")
from zarr.core.buffer import default_buffer_prototype


def assert_equal_to_read_level(slide, group, axes="yxc"):
    for number, level in enumerate(slide.levels):
        expected = slide.read_level(number, 0, 0, level.width, level.height)
        array = group[str(number)][:]
        assert array.dtype == np.uint8
        assert np.array_equal(array if axes == "yxc" else array.transpose(1, 2, 0), expected), number


def value(store, key, byte_range=None):
    buffer = asyncio.run(store.get(key, default_buffer_prototype(), byte_range))
    return None if buffer is None else buffer.to_bytes()


def listed(keys):
    async def collect():
        return [key async for key in keys]

    return asyncio.run(collect())
