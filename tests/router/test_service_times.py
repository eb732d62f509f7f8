"""When an answer is late, by plain numbers."""

import pytest

from router.service_times import ServiceTimes


def test_an_answer_is_late_by_measured_times():
    times = ServiceTimes(0.05, 20.0)
    assert times.late_after_s(0, 10) == 20.0  # nothing is known
    for _ in range(100):
        times.answered(0, 10, 0.2)
        times.answered(1, 10, 0.2)
    assert 0.4 <= times.late_after_s(0, 10) < 0.45
    assert times.late_after_s(0, 1) == times.late_after_s(0, 10)  # smaller ones are no slower
    assert times.late_after_s(0, 10 * 16) == pytest.approx(16 * times.late_after_s(0, 10))  # nor larger ones than so
    assert times.late_after_s(2, 10) == pytest.approx(1.6, rel=0.1)  # a shard without answers: by its peers


def test_a_shard_that_became_slow_is_late_by_its_peers_times():
    times = ServiceTimes(0.05, 20.0)
    for _ in range(100):
        times.answered(0, 10, 0.1)
        times.answered(1, 10, 2.0)
    assert times.late_after_s(1, 10) < 1.0
    assert times.late_after_s(0, 10) < 0.3
    for _ in range(100):
        times.answered(0, 10, 0.001)
    assert times.late_after_s(0, 10) == 0.05
