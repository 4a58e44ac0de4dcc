from hypothesis import given
from hypothesis import strategies as st

from gigatome.blob.ranges import join


def spans(ranges):
    joined = join(ranges)
    return list(zip(joined.starts, joined.lengths, strict=True))


def test_neighbours_are_joined_and_rows_are_not():
    tile = [(1000, 12_000), (13_000, 11_000), (900_000, 12_000), (912_000, 10_000)]
    assert spans(tile) == [(1000, 23_000), (900_000, 22_000)]
    assert join(tile).owner == [0, 0, 1, 1]
    assert spans(tile[::-1]) == spans(tile)


def test_small_gaps_are_joined_and_others_are_not():
    assert spans([(0, 10_000), (10_500, 10_000)]) == [(0, 20_500)]
    assert spans([(0, 5000), (5600, 5000)]) == [(0, 5000), (5600, 5000)]
    assert spans([(0, 1 << 20), ((1 << 20) + 5000, 1 << 20)]) == [(0, 1 << 20), ((1 << 20) + 5000, 1 << 20)]


def test_requests_do_not_grow_without_end():
    assert len(spans([(k << 20, 1 << 20) for k in range(32)])) == 4


def test_overlaps_twins_and_empty_ranges():
    joined = join([(100, 50), (100, 50), (120, 100), (7, 0)])
    assert (joined.starts, joined.lengths, joined.owner, joined.needed) == ([100], [120], [0, 0, 0, -1], 120)


@given(st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 3000)), max_size=30))
def test_requests_cover_the_ranges_and_little_else(ranges):
    joined = join(ranges)
    wanted = {byte for offset, length in ranges for byte in range(offset, offset + length)}
    covered = [byte for start, length in spans(ranges) for byte in range(start, start + length)]
    assert wanted <= set(covered)
    assert len(covered) == len(set(covered))
    assert joined.needed == len(wanted)
    assert len(covered) <= 1.05 * len(wanted)
    for (offset, length), owner in zip(ranges, joined.owner, strict=True):
        if length:
            start, size = joined.starts[owner], joined.lengths[owner]
            assert start <= offset
            assert offset + length <= start + size
