"""What a run cost, on answers made by hand."""

import pytest

from cluster.chaos.load import Answer, Case
from cluster.chaos.report import Timeline, make_report, quantile

GREEDY = Case(text="a", temperature=0.0, seed=0, max_tokens=3)
DRAWN = Case(text="a", temperature=0.8, seed=0, max_tokens=3)
TIMELINE = Timeline(steady_s=0.0, injected_s=10.0, healed_s=11.0, restored_s=14.0, ended_s=30.0)


def answer(
    sent_s: float, *times_s: float, tokens: tuple[int, ...] = (), case: Case = GREEDY, error: str = ""
) -> Answer:
    token_ids = list(tokens or range(len(times_s)))
    ended_s = times_s[-1] if times_s else sent_s
    return Answer(case=case, sent_s=sent_s, times_s=list(times_s), token_ids=token_ids, ended_s=ended_s, error=error)


CALM = [answer(start, start + 0.5, start + 0.6, start + 0.7) for start in (1.0, 2.0, 3.0)]


def test_a_stall_is_the_longest_wait_beyond_the_undisturbed_median() -> None:
    report = make_report([*CALM, answer(9.0, 9.5, 9.6, 12.6)], TIMELINE)
    assert report.stall_max_s == pytest.approx(3.0 - 0.1)


def test_the_first_token_is_waited_for_from_the_request() -> None:
    report = make_report([*CALM, answer(10.5, 12.5, 12.6, 12.7)], TIMELINE)
    assert report.stall_max_s == pytest.approx(2.0 - 0.5)


def test_waits_before_and_after_the_fault_are_no_stalls_of_it() -> None:
    report = make_report([*CALM, answer(4.0, 4.5, 8.5, 10.5), answer(13.0, 13.5, 13.6, 20.0)], TIMELINE)
    assert report.stall_max_s == pytest.approx(13.6 + 6.4 - 13.6 - 0.1)  # 13.6 to 20.0 begins within the fault
    report = make_report([*CALM, answer(13.0, 13.5, 13.99, 14.09), answer(15.0, 15.5, 25.0)], TIMELINE)
    assert report.stall_max_s == pytest.approx(0.39)


def test_another_token_is_a_change_and_so_is_a_missing_one() -> None:
    changed = answer(11.0, 11.5, 11.6, 11.7, tokens=(0, 1, 7))
    short = answer(11.0, 11.5, 11.6)
    assert make_report([*CALM, changed, short], TIMELINE).changed == 2


def test_a_request_that_failed_has_changed_nothing_by_ending_early() -> None:
    report = make_report([*CALM, answer(11.0, 11.5, error="UNAVAILABLE: gone")], TIMELINE)
    assert (report.failed, report.changed, report.is_good) == (1, 0, False)


def test_greedy_and_drawn_answers_are_told_apart() -> None:
    before = answer(1.0, 1.5, 1.6, 1.7, tokens=(5, 6, 7), case=DRAWN)
    after = answer(11.0, 11.5, 11.6, 11.7, tokens=(5, 6, 7), case=DRAWN)
    report = make_report([*CALM, before, after], TIMELINE)
    assert report.changed == 0
    assert report.is_good


def test_throughput_is_compared_with_the_cores_that_starting_processes_leave() -> None:
    timeline = Timeline(steady_s=0.0, injected_s=10.0, healed_s=10.0, restored_s=20.0, ended_s=30.0)
    calm = [answer(second, second + 0.5) for second in range(10)]  # one token a second
    after = [answer(second, second + 0.5) for second in range(10, 20, 2)]  # half a token a second
    assert make_report(calm + after, timeline).throughput_ratio == pytest.approx(0.5)
    report = make_report(calm + after, timeline, startup_cpu_s=5.0, num_cores=2)
    assert report.throughput_ratio == pytest.approx(0.5 / 0.75)


def test_redundancy_counts_from_the_end_of_the_fault() -> None:
    assert make_report(CALM, TIMELINE).time_to_redundancy_s == pytest.approx(3.0)
    never = Timeline(steady_s=0.0, injected_s=10.0, healed_s=11.0, restored_s=None, ended_s=30.0)
    assert make_report(CALM, never).time_to_redundancy_s is None


def test_without_any_request_nothing_is_good() -> None:
    report = make_report([], TIMELINE)
    assert not report.is_good
    assert report.stall_max_s is None
    assert report.throughput_ratio is None


def test_a_quantile_is_one_of_the_values() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.99) == 4.0
    assert quantile([float(value) for value in range(1, 201)], 0.99) == 198.0
    assert quantile([], 0.5) is None
