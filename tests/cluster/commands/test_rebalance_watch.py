"""Whether a rebalance has ended, from statuses that may be a moment old. The clock is a list of moments."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.commands.rebalance_watch import (
    BEGIN_TIMEOUT_S,
    POLL_S,
    SILENCE_TIMEOUT_S,
    LostSight,
    Outcome,
    RebalanceWatch,
    statuses,
    wait_until_ended,
)
from cluster.controller.process import ClusterStatus
from cluster.controller.rebalance import RebalanceState, RebalanceStatus
from tests.fake_controller import life, rebalance_plan, serving_status

BEFORE_PUBLISHING = (RebalanceState.STAGING, RebalanceState.ACTIVATING)


class Clock:
    """Goes on only when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class CallError(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "gone"


def answers(*items: ClusterStatus | grpc.RpcError) -> Callable[[], ClusterStatus]:
    """One after another; the last one for ever."""
    left = list(items)

    def ask() -> ClusterStatus:
        item = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(item, grpc.RpcError):
            raise item
        return item

    return ask


@given(st.data())
def test_it_ends_as_it_did_and_not_before_whichever_statuses_are_seen(data: st.DataObject) -> None:
    state = data.draw(st.sampled_from([None, *BEFORE_PUBLISHING]))
    shown = life(rebalance_plan(), aborted_while=state)
    seen = [status for status in shown[:-1] if data.draw(st.booleans())]
    watch = RebalanceWatch(serving_status(1), 2)
    assert [watch.outcome(status) for status in seen] == [None] * len(seen)
    assert watch.outcome(shown[-1]) is (Outcome.ABORTED if state else Outcome.DONE)


@given(st.booleans(), st.booleans())
def test_one_that_was_ending_when_it_was_asked_for_is_not_taken_for_it(is_shown_ended: bool, is_aborted: bool) -> None:
    """The status before may show the earlier rebalance under way, though it has ended: else it had been refused."""
    first = life(rebalance_plan(), aborted_while=RebalanceState.STAGING if is_aborted else None)
    ended = first[-1]
    watch = RebalanceWatch(ended if is_shown_ended else first[-2], 3)
    for status in (first[-2], ended):
        assert watch.outcome(status) is None
    under_way = replace(ended.rebalance, state=RebalanceState.STAGING, target_version=3)
    assert watch.outcome(replace(ended, rebalance=under_way)) is None
    done = replace(ended.rebalance, num_done=ended.rebalance.num_done + 1)
    assert watch.outcome(replace(ended, placement_version=3, rebalance=done)) is Outcome.DONE


def test_a_later_rebalance_does_not_hide_the_end() -> None:
    later = RebalanceStatus(state=RebalanceState.STAGING, target_version=3, num_done=1)
    assert RebalanceWatch(serving_status(1), 2).outcome(serving_status(2, later)) is Outcome.DONE
    later = replace(later, num_done=0, num_aborted=1)
    assert RebalanceWatch(serving_status(1), 2).outcome(serving_status(1, later)) is Outcome.ABORTED


def test_waiting_shows_every_status_and_returns_the_controllers_account() -> None:
    shown, states = iter(life(rebalance_plan())), []
    ended = wait_until_ended(
        RebalanceWatch(serving_status(1), 2), shown, lambda status: states.append(status.state), Clock()
    )
    assert ended.outcome is Outcome.DONE
    assert ended.result == "version 2 is served: 3 units moved"
    assert list(dict.fromkeys(states)) == list(RebalanceState)


def test_what_is_never_shown_to_begin_is_not_waited_for() -> None:
    clock = Clock()
    polled = statuses(lambda: serving_status(1), clock, clock.sleep)
    with pytest.raises(LostSight, match="did not begin within 30 s"):
        wait_until_ended(RebalanceWatch(serving_status(1), 2), polled, lambda status: None, clock)
    assert clock.now_s == pytest.approx(BEGIN_TIMEOUT_S, abs=2 * POLL_S)


def test_what_has_begun_is_waited_for_as_long_as_it_takes() -> None:
    clock = Clock()
    shown = life(rebalance_plan())

    def slowly() -> Iterator[ClusterStatus]:
        for status in shown:
            yield status
            clock.sleep(BEGIN_TIMEOUT_S - POLL_S if status is shown[0] else 3600.0)

    ended = wait_until_ended(RebalanceWatch(serving_status(1), 2), slowly(), lambda status: None, clock)
    assert ended.outcome is Outcome.DONE


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_a_gateway_that_is_started_again_is_waited_for(code: grpc.StatusCode) -> None:
    clock = Clock()
    polled = statuses(answers(serving_status(1), CallError(code), serving_status(2)), clock, clock.sleep)
    assert [next(polled).placement_version for _ in range(2)] == [1, 2]


def test_a_long_silence_ends_the_waiting_with_its_reason() -> None:
    clock = Clock()
    polled = statuses(answers(CallError(grpc.StatusCode.UNAVAILABLE)), clock, clock.sleep)
    with pytest.raises(LostSight, match="no status for 60 s: gone"):
        next(polled)
    assert clock.now_s == pytest.approx(SILENCE_TIMEOUT_S, abs=2 * POLL_S)


def test_an_answer_that_waiting_cannot_mend_is_an_error_at_once() -> None:
    clock = Clock()
    with pytest.raises(CallError):
        next(statuses(answers(CallError(grpc.StatusCode.UNIMPLEMENTED)), clock, clock.sleep))
    assert clock.now_s == 0.0
