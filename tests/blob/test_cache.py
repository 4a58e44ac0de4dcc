import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

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
    assert checksums.agree((1, 0, 5), b"hello")
    assert checksums.agree((1, 0, 5), b"hello")
    assert not checksums.agree((1, 0, 5), b"hallo")
    assert checksums.agree((1, 0, 5), b"hello")
    assert checksums.agree((2, 0, 5), b"hallo")
    checksums.replace((1, 0, 5), b"hallo")
    assert checksums.agree((1, 0, 5), b"hallo")
    assert not checksums.agree((1, 0, 5), b"hello")


def test_checksums_in_a_full_table_forget_but_do_not_accuse():
    checksums = Checksums(16)
    for _ in range(3):
        for key in range(1000):
            assert checksums.agree(("object", key), zlib.compress(b"%d" % key))
    assert sum(not checksums.agree(("object", key), b"other") for key in range(1000)) <= 16


def test_checksums_need_a_power_of_two():
    for count in (0, 3, 1000):
        with pytest.raises(ValueError, match="power of two"):
            Checksums(count)
