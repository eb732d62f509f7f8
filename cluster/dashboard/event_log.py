"""The latest of what happened to the system, numbered, for pages that ask for what is new."""

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from cluster.controller.process import ClusterStatus
from cluster.controller.status_events import Level, StatusEvents

MAX_EVENTS = 300  # the oldest go first


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line. number: counts up from 1. time_s: seconds since 1970."""

    number: int
    time_s: float
    level: Level
    subject: str
    text: str


class EventLog:
    """Belongs to one thread."""

    def __init__(self) -> None:
        self._source = StatusEvents()
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._num_events = 0

    def observe(self, status: ClusterStatus, time_s: float) -> None:
        """Adds what the status tells beside the one before."""
        for level, subject, text in self._source.observe(status):
            self._num_events += 1
            event = Event(number=self._num_events, time_s=time_s, level=level, subject=subject, text=text)
            self._events.append(event)

    def after(self, number: int) -> list[dict[str, Any]]:
        """The events that are newer than the one of this number, oldest first."""
        return [asdict(event) for event in self._events if event.number > number]
