"""Load that is decayed, windowed and bounded."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.load import LoadConfig, LoadError, LoadTracker

CONFIG = LoadConfig(half_life_s=10.0, window_s=12.0, num_slices=4)


def counts(*values: int) -> npt.NDArray[np.int64]:
    return np.array([values])  # one layer


def test_an_assignment_counts_half_after_a_half_life_and_a_quarter_after_two() -> None:
    load = LoadTracker(1, 2, CONFIG)
    load.add(counts(8, 0), now_s=100.0)
    assert load.estimate(1, now_s=110.0).decayed.tolist() == [[4.0, 0.0]]
    load.add(counts(0, 1), now_s=120.0)
    assert load.estimate(1, now_s=120.0).decayed.tolist() == [[2.0, 1.0]]


def test_the_window_forgets_what_is_older_than_it() -> None:
    load = LoadTracker(1, 2, CONFIG)
    load.add(counts(5, 0), now_s=0.0)
    load.add(counts(0, 7), now_s=9.0)
    assert load.estimate(1, now_s=11.9).windowed.tolist() == [[5.0, 7.0]]
    assert load.estimate(1, now_s=12.0).windowed.tolist() == [[0.0, 7.0]]
    assert load.estimate(1, now_s=1e6).windowed.tolist() == [[0.0, 0.0]]


@given(
    steps=st.lists(st.tuples(st.floats(0, 8), st.integers(0, 50)), min_size=1, max_size=30),
    start_s=st.floats(0, 1e5),
)
def test_both_views_agree_with_adding_up_every_assignment(steps: list[tuple[float, int]], start_s: float) -> None:
    load, now_s, history = LoadTracker(1, 1, CONFIG), start_s, []
    for wait_s, count in steps:
        now_s += wait_s
        load.add(counts(count), now_s)
        history.append((now_s, count))
    estimate = load.estimate(1, now_s)
    assert estimate.decayed[0, 0] == pytest.approx(sum(n * 0.5 ** ((now_s - at_s) / 10.0) for at_s, n in history))
    slice_s = 3.0
    kept = [n for at_s, n in history if at_s // slice_s > now_s // slice_s - CONFIG.num_slices]
    assert estimate.windowed[0, 0] == sum(kept)


def test_counters_of_a_source_are_counted_from_its_first_look_and_anew_after_its_restart() -> None:
    load = LoadTracker(1, 2, CONFIG)
    load.observe("shard 0", counts(100, 50), now_s=1.0)
    assert load.estimate(1, now_s=1.0).decayed.sum() == 0
    load.observe("shard 0", counts(103, 50), now_s=1.0)
    load.observe("shard 1", counts(0, 9), now_s=1.0)
    load.observe("shard 1", counts(0, 10), now_s=1.0)
    assert load.estimate(1, now_s=1.0).windowed.tolist() == [[3.0, 1.0]]
    load.observe("shard 0", counts(2, 4), now_s=1.0)  # restarted
    assert load.estimate(1, now_s=1.0).windowed.tolist() == [[5.0, 5.0]]


def test_an_estimate_stays_as_it_was_made() -> None:
    load = LoadTracker(1, 1, CONFIG)
    load.add(counts(1), now_s=1.0)
    estimate = load.estimate(7, now_s=1.0)
    load.add(counts(1), now_s=2.0)
    assert (estimate.placement_version, estimate.time_s, estimate.windowed.tolist()) == (7, 1.0, [[1.0]])
    with pytest.raises(ValueError, match="read-only"):
        estimate.decayed[0, 0] = 1.0


def test_memory_does_not_grow_with_time_or_with_sources_that_have_gone() -> None:
    load, sizes = LoadTracker(3, 8, CONFIG), []
    for number in range(200):
        source = f"shard {number}"
        load.observe(source, np.full((3, 8), number, dtype=np.uint64), now_s=float(number))
        load.keep_sources([source])
        load.estimate(number, now_s=float(number))
        sizes.append(load.nbytes)
    assert max(sizes) == sizes[-1] == 3 * 8 * 8 * (1 + CONFIG.num_slices + 1)


def test_time_that_goes_back_ages_nothing() -> None:
    load = LoadTracker(1, 1, CONFIG)
    load.add(counts(4), now_s=50.0)
    load.add(counts(4), now_s=20.0)
    assert load.estimate(1, now_s=10.0).decayed.tolist() == [[8.0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"half_life_s": 0.0}, "half_life_s is 0.0, must be more than 0"),
        ({"window_s": float("nan")}, "window_s is nan"),
        ({"num_slices": 0}, "num_slices is 0, must be 1 to 1024"),
        ({"num_slices": 5000}, "num_slices is 5000"),
    ],
)
def test_settings_that_make_no_load_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        LoadConfig(**settings)  # type: ignore[arg-type]


def test_counts_of_another_model_and_negative_ones_are_refused() -> None:
    load = LoadTracker(2, 3)
    with pytest.raises(LoadError, match=r"counts are \[1, 2\], this model has \[2, 3\]"):
        load.add(counts(1, 2), now_s=0.0)
    with pytest.raises(LoadError, match="a count is -1"):
        load.add(np.full((2, 3), -1), now_s=0.0)
