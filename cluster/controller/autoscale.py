"""How many processes a role should have, from how loaded they are. Pure: no processes, no clock.

It answers late and seldom on purpose. A number goes up only when more were wanted during the whole `up_window_s`, by
the least that was wanted; down by one, only when fewer were wanted during the whole `down_window_s`. What lies within
`TOLERANCE` of the target is on target, and one process fewer is wanted only where the rest would then be on target: so
no number is reached on the way down from which the way back is wanted at once.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from cluster.config import ScalingConfig

TOLERANCE = 0.1  # around the target
MAX_RATIO = 1.5  # at once; a queue's length says that there is too much, not how much too much


class _Wish(NamedTuple):
    time_s: float
    wanted: int


class CountDecision:
    """Of one role."""

    def __init__(self, config: ScalingConfig) -> None:
        self._config = config
        self._wishes: deque[_Wish] = deque()  # since the number last changed, as far as the longer window goes back

    def decide(self, now_s: float, count: int, ratios: Sequence[float]) -> int:
        """The number there should be; `count`, the present one, when nothing is to change.

        ratios: each measure of load over its target, averaged over the processes.
        """
        self._wishes.append(_Wish(now_s, self._wanted(count, max(ratios))))
        keep_s = max(self._config.up_window_s, self._config.down_window_s)
        while len(self._wishes) > 1 and self._wishes[1].time_s <= now_s - keep_s:
            self._wishes.popleft()
        more = self._wished_throughout(now_s, self._config.up_window_s)
        fewer = self._wished_throughout(now_s, self._config.down_window_s)
        if more and min(more) > count:
            return min(more)
        if fewer and max(fewer) < count:
            return count - 1
        return count

    def forget(self) -> None:
        """The number has changed, or the processes are not all at work: what was measured before says nothing now."""
        self._wishes.clear()

    def _wanted(self, count: int, ratio: float) -> int:
        wanted = count if abs(ratio - 1.0) <= TOLERANCE else math.ceil(count * min(ratio, MAX_RATIO) - 1e-9)
        return min(max(wanted, self._config.min_count), self._config.max_count)

    def _wished_throughout(self, now_s: float, window_s: float) -> list[int]:
        """The wishes of a window; none while it is not full."""
        if not self._wishes or self._wishes[0].time_s > now_s - window_s:
            return []
        return [wish.wanted for wish in self._wishes if wish.time_s >= now_s - window_s]
