"""The number of processes follows the load, late and without swinging: a closed loop of traffic, load and decision."""

import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import ConfigError, ScalingConfig, parse_config
from cluster.controller.autoscale import CountDecision

CONFIG = ScalingConfig(enabled=True, min_count=1, max_count=16, up_window_s=30.0, down_window_s=300.0)


def simulate(
    traffic: Callable[[float], float],
    seconds: float,
    count: int = 1,
    start_s: float = 60.0,
    config: ScalingConfig = CONFIG,
    round_s: float = 5.0,
) -> list[tuple[float, int]]:
    """(time, number) after each change.

    traffic: at a time, in processes that it would keep fully busy. start_s: until a new process takes its share.
    """
    decision, changes, ready_s, now_s = CountDecision(config), [], 0.0, 0.0
    while now_s < seconds:
        now_s += round_s
        if now_s < ready_s:
            decision.forget()
            continue
        usage = min(1.0, traffic(now_s) / count)
        waits = max(0.0, traffic(now_s) / count - 1.0)
        wanted = decision.decide(now_s, count, [usage / config.target_usage_ratio, waits / 0.1])
        if wanted != count:
            ready_s = now_s + start_s
            count = wanted
            decision.forget()
            changes.append((now_s, count))
    return changes


def turns(changes: list[tuple[float, int]], first: int = 1) -> int:
    """How often the direction of change turned."""
    counts = [first, *(count for _, count in changes)]
    signs = [math.copysign(1, after - before) for before, after in itertools.pairwise(counts)]
    return sum(one != other for one, other in itertools.pairwise(signs))


def test_a_step_in_traffic_is_followed_once_and_then_the_number_stays() -> None:
    changes = simulate(lambda now_s: 0.5 if now_s < 600 else 4.0, 7200.0)
    assert changes[-1][1] in (6, 7)  # 4.0 / 0.7, to within the tolerance
    assert turns(changes) == 0
    assert changes[-1][0] < 600 + 10 * 60


def test_when_traffic_leaves_processes_go_one_by_one() -> None:
    changes = simulate(lambda now_s: 5.0 if now_s < 1200 else 0.5, 14400.0, count=8)
    counts = [8, *(count for _, count in changes)]
    assert counts[-1] == 1
    assert all(before - after == 1 for before, after in itertools.pairwise(counts))


def test_a_burst_shorter_than_the_window_changes_nothing() -> None:
    assert simulate(lambda now_s: 9.0 if now_s % 600 < 25 else 0.5, 7200.0) == []


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_a_fifth_does_not_make_the_number_swing(seed: int) -> None:
    noise = random.Random(seed)
    changes = simulate(lambda now_s: 4.0 * noise.uniform(0.8, 1.2), 4 * 3600.0)
    assert turns(changes) == 0
    assert 5 <= changes[-1][1] <= 8


def test_traffic_of_a_day_is_followed_with_one_turn_at_its_top() -> None:
    day_s = 24 * 3600.0
    changes = simulate(lambda now_s: 1.0 + 6.0 * math.sin(math.pi * now_s / day_s), day_s, count=2)
    assert turns(changes, first=2) == 1
    assert max(count for _, count in changes) in (10, 11)


@settings(max_examples=30)
@given(traffic=st.floats(0.0, 40.0), count=st.integers(1, 16), start_s=st.floats(0.0, 600.0))
def test_under_constant_traffic_the_number_comes_to_rest(traffic: float, count: int, start_s: float) -> None:
    """Processes that are all busy do not show how many are missing: the number may go too far once, and comes back."""
    changes = simulate(lambda now_s: traffic, 4 * 3600.0, count, start_s, round_s=20.0)
    counts = [count, *(changed for _, changed in changes)]
    assert turns(changes, first=count) <= 1
    assert all(CONFIG.min_count <= changed <= CONFIG.max_count for changed in counts)
    top = counts.index(max(counts))
    assert counts[top:] == sorted(counts[top:], reverse=True)
    assert not changes or changes[-1][0] < 4 * 3600.0 - 600.0


def test_nothing_is_decided_before_a_window_is_full() -> None:
    decision = CountDecision(CONFIG)
    assert [decision.decide(now_s, 2, [2.0]) for now_s in (0.0, 15.0, 29.0)] == [2, 2, 2]
    assert decision.decide(30.0, 2, [2.0]) == 3
    decision.forget()
    assert decision.decide(31.0, 2, [2.0]) == 2


def test_the_highest_measure_decides() -> None:
    decision = CountDecision(CONFIG.model_copy(update={"up_window_s": 0.0}))
    assert decision.decide(0.0, 4, [0.2, 1.5]) == 6


def test_a_range_that_holds_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_count is 3, more than max_count, 2"):
        parse_config({"expert_shards": {"autoscaling": {"min_count": 3, "max_count": 2}}})
