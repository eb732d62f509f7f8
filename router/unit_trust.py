"""Which replicas of placement units gave wrong numbers, as this worker saw it or as the shard itself says.

Such a replica is not asked while others have the unit, then tried again after a while, which doubles each time that it
is still wrong. Pure but for the clock.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

logger = logging.getLogger(__name__)

MIN_QUARANTINE_S = 5.0  # a shard reads a damaged unit again in about this time
MAX_QUARANTINE_S = 300.0


class WrongUnit(NamedTuple):
    """A replica that is not asked now."""

    ep_rank: int
    layer_id: int
    unit_id: int
    reason: str


@dataclass(slots=True)
class _Quarantine:
    reason: str
    until_s: float
    seconds: float


class UnitTrust:
    """Belongs to the engine thread, but for `report`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._quarantines: dict[tuple[int, int, int], _Quarantine] = {}  # by layer, unit and ep_rank

    def distrust(self, ep_rank: int, layer_id: int, unit_id: int, reason: str) -> None:
        """A replica's numbers are wrong."""
        key, now_s = (layer_id, unit_id, ep_rank), self._clock()
        known = self._quarantines.get(key)
        if known is not None and now_s < known.until_s:
            return
        seconds = MIN_QUARANTINE_S if known is None else min(2 * known.seconds, MAX_QUARANTINE_S)
        self._quarantines[key] = _Quarantine(reason, now_s + seconds, seconds)
        logger.error(
            "unit %d of layer %d on shard %d is quarantined for %.0f s: %s", unit_id, layer_id, ep_rank, seconds, reason
        )

    def wrong(self, layer_id: int) -> list[tuple[int, int]]:
        """(unit_id, ep_rank) of replicas that are not to be asked now."""
        if not self._quarantines:
            return []
        now_s = self._clock()
        return [
            (unit_id, ep_rank)
            for (layer, unit_id, ep_rank), quarantine in self._quarantines.items()
            if layer == layer_id and now_s < quarantine.until_s
        ]

    def report(self) -> list[WrongUnit]:
        """All that are not to be asked now. From any thread."""
        now_s = self._clock()
        return [
            WrongUnit(ep_rank, layer_id, unit_id, quarantine.reason)
            for (layer_id, unit_id, ep_rank), quarantine in sorted(self._quarantines.copy().items())
            if now_s < quarantine.until_s
        ]
