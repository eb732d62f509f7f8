"""Who commands the controller: whoever created it, or, when that one has been silent for a while, who asks next. Two
`mobula serve` on one system would stop it for each other.
"""

import threading
import time
from collections.abc import Callable

LEASE_S = 15.0  # an owner calls every few seconds


class Lease:
    """Safe to use from any thread."""

    def __init__(
        self,
        owner: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._owner = owner
        self._seen_s = clock()

    def is_held_by(self, owner: str) -> bool:
        """Whether it commands."""
        return self._owner == owner

    def renew(self, owner: str) -> bool:
        """Says that `owner` is there, and whether it commands."""
        with self._lock:
            now_s = self._clock()
            if self._owner != owner and now_s - self._seen_s < LEASE_S:
                return False
            self._owner, self._seen_s = owner, now_s
            return True

    def take(self, owner: str) -> bool:
        """As `renew`, after waiting until the present owner is heard of or must be taken for dead."""
        seen_s = self._seen_s
        if not self.renew(owner):
            self._sleep(max(0.0, seen_s + LEASE_S - self._clock()))
        return self.renew(owner)
