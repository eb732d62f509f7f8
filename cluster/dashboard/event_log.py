"""What happened to the system, in words: processes that come and go, placements, rebalances with their reasons.

Compares one status with the next. Pure; the clock is the caller's.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from cluster.controller.process import ClusterStatus, ProcessHealth, ProcessState
from cluster.controller.rebalance import RebalanceState

MAX_EVENTS = 300  # the oldest go first


class Level(StrEnum):
    """How an operator should take it."""

    GOOD = "good"
    INFO = "info"
    BAD = "bad"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line. number: counts up from 1. time_s: seconds since 1970."""

    number: int
    time_s: float
    level: Level
    subject: str
    text: str


_STATE_LEVELS = {
    ProcessState.READY: Level.GOOD,
    ProcessState.FAILED: Level.BAD,
    ProcessState.DOWN: Level.BAD,
}


class EventLog:
    """Belongs to one thread."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._num_events = 0
        self._last: ClusterStatus | None = None

    def observe(self, status: ClusterStatus, time_s: float) -> None:
        """The first status is one event; each later one gives an event for each difference."""
        last, self._last = self._last, status
        if last is None:
            serves = "serves" if status.is_serving else "does not serve yet"
            self._add(time_s, Level.INFO, "system", f"{serves}; placement version {status.placement_version}")
            return
        for level, subject, text in (*_process_changes(last, status), *_placement_changes(last, status)):
            self._add(time_s, level, subject, text)
        if last.is_serving is not status.is_serving:
            level, text = (Level.GOOD, "serves") if status.is_serving else (Level.BAD, "not every process is ready")
            self._add(time_s, level, "system", text)

    def after(self, number: int) -> list[dict[str, Any]]:
        """The events that are newer than the one of this number, oldest first."""
        return [asdict(event) for event in self._events if event.number > number]

    def _add(self, time_s: float, level: Level, subject: str, text: str) -> None:
        self._num_events += 1
        self._events.append(Event(number=self._num_events, time_s=time_s, level=level, subject=subject, text=text))


Change = tuple[Level, str, str]


def _process_changes(last: ClusterStatus, now: ClusterStatus) -> Iterator[Change]:
    before, after = dict(last.processes), dict(now.processes)
    for name in before.keys() - after.keys():
        yield Level.INFO, name, "left"
    for name, health in after.items():
        old = before.get(name)
        if old is None:
            yield Level.INFO, name, f"joined, is {health.state}"
        elif old.state is not health.state:
            yield _STATE_LEVELS.get(health.state, Level.INFO), name, _state_text(health)
        elif health.generation and old.generation and old.generation != health.generation:
            yield Level.INFO, name, f"was replaced by another process, pid {health.pid}"


def _state_text(health: ProcessHealth) -> str:
    return f"is {health.state}: {health.detail}" if health.detail else f"is {health.state}"


def _placement_changes(last: ClusterStatus, now: ClusterStatus) -> Iterator[Change]:
    before, after = last.rebalance, now.rebalance
    if before.state is RebalanceState.IDLE and after.state is not RebalanceState.IDLE:
        yield Level.INFO, "rebalance", f"to version {after.target_version} began: {_size(after.planned_bytes)} to read"
    if after.num_aborted > before.num_aborted:
        yield Level.BAD, "rebalance", after.last_result
    if after.num_done > before.num_done:
        yield Level.GOOD, "rebalance", after.last_result
    if last.placement_version != now.placement_version:
        yield Level.INFO, "placement", f"workers are told version {now.placement_version}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
