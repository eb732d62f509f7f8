from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.ring import ALIGNMENT
from router.arena import Arena

NUM_BYTES = 64 * ALIGNMENT


@given(st.lists(st.tuples(st.booleans(), st.integers(0, NUM_BYTES // 4))))
def test_live_regions_never_overlap_and_everything_freed_is_one_block_again(steps):
    arena = Arena(NUM_BYTES)
    live: dict[int, int] = {}
    for is_allocation, number in steps:
        if is_allocation:
            offset = arena.allocate(number)
            if offset is not None:
                assert offset not in live
                live[offset] = number
        elif live:
            offset = sorted(live)[number % len(live)]
            arena.free(offset)
            del live[offset]
        ends = [(offset, offset + size) for offset, size in sorted(live.items())]
        assert all(offset % ALIGNMENT == 0 and end <= NUM_BYTES for offset, end in ends)
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
        assert arena.used_bytes + sum(size for _, size in arena.free_blocks) == NUM_BYTES
    for offset in live:
        arena.free(offset)
    assert arena.free_blocks == [(0, NUM_BYTES)]


def test_the_lowest_offset_that_fits_is_taken():
    arena = Arena(NUM_BYTES)
    first, second, third = (arena.allocate(100) for _ in range(3))
    assert (first, second, third) == (0, 128, 256)
    arena.free(first)
    arena.free(third)
    assert arena.allocate(129) == 256
    assert arena.allocate(128) == 0


def test_what_does_not_fit_gets_none_until_something_is_freed():
    arena = Arena(NUM_BYTES)
    whole = arena.allocate(NUM_BYTES)
    assert whole == 0
    assert arena.allocate(1) is None
    arena.free(whole)
    assert arena.allocate(NUM_BYTES + 1) is None
    assert arena.allocate(NUM_BYTES) == 0


def test_a_region_is_freed_once():
    arena = Arena(NUM_BYTES)
    offset = arena.allocate(10)
    arena.free(offset)
    with pytest.raises(KeyError):
        arena.free(offset)
