from hypothesis import given
from hypothesis import strategies as st

from experts.pacer import Pacer


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=20), work=st.floats(0.0, 3.0))
def test_reading_never_goes_faster_than_the_rate_and_is_not_slowed_below_it(sizes, work):
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    pacer = Pacer(max_bytes_per_s=100.0, clock=lambda: now[0], sleep=sleep)
    for size in sizes:
        now[0] += work  # the read itself
        pacer.pace(size)
    assert now[0] >= sum(sizes) / 100.0 - 1e-6
    assert now[0] <= sum(max(size / 100.0, work) for size in sizes) + 1e-6
    assert all(seconds > 0 for seconds in slept)
