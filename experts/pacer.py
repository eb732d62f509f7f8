"""Keeps a long read to a rate, so that it leaves disk, memory and cores to the requests that run."""

import time
from collections.abc import Callable

YIELD_S = 0.001  # a look at whether requests still wait
MAX_YIELD_S = 0.02  # of waiting for them in a row: under full load there is always one, and the read must end too


class Pacer:
    """For one thread. What was not used up to a moment is not saved for later."""

    def __init__(
        self,
        max_bytes_per_s: float,
        num_waiting: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """num_waiting: requests that wait for what the read uses too."""
        self._max_bytes_per_s = max_bytes_per_s
        self._num_waiting = num_waiting
        self._clock = clock
        self._sleep = sleep
        self._free_at_s = clock()

    def pace(self, num_bytes: int) -> None:
        """After so many bytes: waits until they are within the rate, and a little longer while requests wait."""
        self._free_at_s += num_bytes / self._max_bytes_per_s
        now_s = self._clock()
        if self._free_at_s > now_s:
            self._sleep(self._free_at_s - now_s)
        else:
            self._free_at_s = now_s
        give_up_s = self._clock() + MAX_YIELD_S
        while self._num_waiting() and self._clock() < give_up_s:
            self._sleep(YIELD_S)
