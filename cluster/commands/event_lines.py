"""The log of `mobula serve`: one line for each thing that happened to the system, whatever level processes log at."""

import logging
import time
from collections.abc import Callable

from cluster.controller.process import ClusterStatus
from cluster.controller.status_events import Level, StatusEvents

logger = logging.getLogger("mobula")
LEVELS = {Level.GOOD: logging.INFO, Level.INFO: logging.INFO, Level.BAD: logging.WARNING}


class EventLines:
    """placement_version: that workers are told; None before the first status."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events = StatusEvents(clock)
        self._silent_since_s: float | None = None  # the controller
        self.placement_version: int | None = None
        logger.setLevel(logging.INFO)

    def observe(self, status: ClusterStatus | None) -> None:
        """Logs what the status tells beside the one before. None: the controller is being started again."""
        if status is None:
            if self._silent_since_s is None:
                self._silent_since_s = self._clock()
                _log(Level.BAD, "controller", "is away, and is started again; what runs goes on")
            return
        if self._silent_since_s is not None:
            _log(Level.GOOD, "controller", f"is back after {self._clock() - self._silent_since_s:.1f} s")
            self._silent_since_s = None
        self.placement_version = status.placement_version
        for event in self._events.observe(status):
            _log(*event)


def _log(level: Level, subject: str, text: str) -> None:
    logger.log(LEVELS[level], "%s %s", subject, text, extra={"subject": subject})
