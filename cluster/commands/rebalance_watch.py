"""Whether a rebalance that was begun has come to its end, judged from one status after another.

A status may be a moment old: just after a rebalance was accepted, it may not show it yet, or still show the one before.
"""

from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

import grpc

from cluster.controller.process import ClusterStatus
from cluster.controller.rebalance import RebalanceState, RebalanceStatus

POLL_S = 0.25  # as often as the controller looks
BEGIN_TIMEOUT_S = 30.0  # until the controller shows what it accepted: a few of its longest rounds
SILENCE_TIMEOUT_S = 60.0  # for a gateway that is started again
SILENT_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Outcome(Enum):
    """How a rebalance ended."""

    DONE = "done"
    ABORTED = "aborted"


class Ended(NamedTuple):
    """A rebalance that has come to its end; `result` is the controller's account of it."""

    outcome: Outcome
    result: str


class LostSight(Exception):
    """It cannot be said how the rebalance ended."""


class RebalanceWatch:
    """Follows one rebalance. One is under way at a time, and each that ends is counted once as done or as aborted."""

    def __init__(self, before: ClusterStatus, target_version: int) -> None:
        """before: from just before the rebalance was asked for; target_version: what it leads to."""
        is_one_ending = before.rebalance.state is not RebalanceState.IDLE  # else ours would have been refused
        self._num_ended_before = _num_ended(before) + is_one_ending
        self._target_version = target_version
        self.has_begun = False  # as far as was seen

    def outcome(self, status: ClusterStatus) -> Outcome | None:
        """None while it is under way, or not shown yet."""
        self.has_begun |= status.rebalance.target_version == self._target_version
        if _num_ended(status) <= self._num_ended_before:
            return None
        return Outcome.DONE if status.placement_version >= self._target_version else Outcome.ABORTED


def statuses(
    ask: Callable[[], ClusterStatus], clock: Callable[[], float], sleep: Callable[[float], None]
) -> Iterator[ClusterStatus]:
    """One status after another, for ever. Raises LostSight, or the call's error, when nobody answers for long."""
    answered_s = clock()
    while True:
        try:
            status = ask()
        except grpc.RpcError as error:
            if error.code() not in SILENT_CODES:
                raise
            if clock() - answered_s > SILENCE_TIMEOUT_S:
                raise LostSight(f"no status for {SILENCE_TIMEOUT_S:.0f} s: {error.details()}") from error
        else:
            answered_s = clock()
            yield status
        sleep(POLL_S)


def wait_until_ended(
    watch: RebalanceWatch,
    polled: Iterator[ClusterStatus],
    show: Callable[[RebalanceStatus], None],
    clock: Callable[[], float],
) -> Ended:
    """Shows each status until it has ended. Raises LostSight when it is never seen to begin."""
    begin_by_s = clock() + BEGIN_TIMEOUT_S
    for status in polled:
        show(status.rebalance)
        if outcome := watch.outcome(status):
            return Ended(outcome, status.rebalance.last_result)
        if not watch.has_begun and clock() > begin_by_s:
            break
    raise LostSight(f"the controller did not begin within {BEGIN_TIMEOUT_S:.0f} s; its log says why")


def _num_ended(status: ClusterStatus) -> int:
    return status.rebalance.num_done + status.rebalance.num_aborted
