"""Keeps a long read to a rate, so that it leaves disk, memory and cores to the requests that run."""

import time
from collections.abc import Callable


class Pacer:
    """For one thread. What was not used up to a moment is not saved for later."""

    def __init__(
        self,
        max_bytes_per_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._max_bytes_per_s = max_bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._free_at_s = clock()

    def pace(self, num_bytes: int) -> None:
        """After so many bytes: waits until they are within the rate."""
        self._free_at_s += num_bytes / self._max_bytes_per_s
        now_s = self._clock()
        if self._free_at_s > now_s:
            self._sleep(self._free_at_s - now_s)
        else:
            self._free_at_s = now_s
