import random
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from gigatome.blob import cache as cache_module
from gigatome.blob.cache import ByteCache, Checksums


def test_the_cache_forgets_what_was_unused_the_longest():
    cache = ByteCache(1000)
    for key in range(4):
        cache.put(key, bytes([key]) * 250)
    assert cache.get(0) == bytes(250)
    cache.put(4, b"4" * 250)
    assert [cache.get(key) is not None for key in range(5)] == [True, False, True, True, True]
    assert cache.size == 1000
    cache.put(4, b"44")
    assert (cache.get(4), cache.size) == (b"44", 752)


def test_the_cache_keeps_nothing_large_and_nothing_at_all():
    cache = ByteCache(1000)
    cache.put("large", bytes(251))
    assert (cache.get("large"), cache.size) == (None, 0)
    off = ByteCache(0)
    off.put("a", b"a")
    assert (off.get("a"), off.size) == (None, 0)


def test_the_cache_stays_within_its_limit_under_threads():
    cache = ByteCache(10_000)

    def work(seed):
        for k in range(2000):
            key = (seed * 7919 + k * 31) % 50
            cache.put(key, bytes([key]) * (key * 40))
            part = cache.get((key * 3) % 50)
            assert part is None or set(part) <= {(key * 3) % 50}

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert cache.size == sum(len(cache.get(key) or b"") for key in range(50)) <= 10_000


def test_checksums_tell_other_bytes():
    checksums = Checksums(1024)
    keys = [(1, 0, 5), (2, 0, 5), (3, 0, 5)]
    first = [b"hello", b"hallo", b""]
    assert checksums.differing(keys, first) == []
    assert checksums.differing(keys, first) == []
    assert checksums.differing(keys, [b"hallo", b"hallo", b"h"]) == [0, 2]
    assert checksums.differing(keys, first) == []
    checksums.replace(keys[0], b"hallo")
    assert checksums.differing(keys[:1], [b"hallo"]) == []
    assert checksums.differing(keys[:1], [b"hello"]) == [0]


def test_checksums_in_a_full_table_forget_but_do_not_accuse():
    checksums = Checksums(16)
    keys = [("object", k) for k in range(1000)]
    for _ in range(3):
        assert not any(checksums.differing([key], [zlib.compress(b"%d" % key[1])]) for key in keys)
    assert sum(bool(checksums.differing([key], [b"other"])) for key in keys) <= 16


@pytest.mark.parametrize("native", [True, False])
def test_a_checksum_tells_any_damage(native, monkeypatch):
    if not native:
        monkeypatch.setattr(cache_module, "NATIVE", None)
    rng = random.Random(0)
    for size in (1, 7, 31, 32, 33, 64, 5000):
        data = rng.randbytes(size)
        others = [data[:-1], data + b"\0", data[::-1] + b"x", bytes(size)]
        for bit in rng.sample(range(8 * size), min(8 * size, 50)):
            others.append((int.from_bytes(data, "little") ^ 1 << bit).to_bytes(size, "little"))
        for other in others:
            checksums = Checksums(16)
            assert not checksums.differing(["key"], [data])
            assert not checksums.differing(["key"], [bytes(bytearray(data))])
            assert checksums.differing(["key"], [other]) == [0]


def test_checksums_need_a_power_of_two():
    for count in (0, 3, 1000):
        with pytest.raises(ValueError, match="power of two"):
            Checksums(count)
