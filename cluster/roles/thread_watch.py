"""Notices a thread that hangs: in a kernel, in a driver, in a lock. It cannot be ended; only its process can.

Whoever answers for the process looks now and then. Time that passes between two looks counts a little at most: a
process that was stopped, or a machine that slept, has not computed meanwhile either.
"""

import time
from collections.abc import Callable
from typing import Protocol

STALLED_S = 300.0  # far above any layer of a step, and any computation of a shard
MAX_LOOK_S = 5.0  # that one look counts for


class Watched(Protocol):
    """An engine, or a shard's experts."""

    @property
    def signs_of_life(self) -> int | None:
        """A number that changes while it works; None while there is nothing to do."""


class ThreadWatch:
    """name: of the thread that is looked at. Looks may overlap: then a moment counts twice."""

    def __init__(self, name: str, watched: Watched, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._watched = watched
        self._clock = clock
        self._seen: int | None = None
        self._looked_s = clock()
        self._still_s = 0.0

    def is_stalled(self) -> bool:
        """Whether it has been at the same place for STALLED_S, as far as was looked."""
        signs, now_s = self._watched.signs_of_life, self._clock()
        if signs is None or signs != self._seen:
            self._still_s = 0.0
        else:
            self._still_s += min(now_s - self._looked_s, MAX_LOOK_S)
        self._seen, self._looked_s = signs, now_s
        return self._still_s >= STALLED_S
