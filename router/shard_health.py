"""Which shards a worker trusts with rows, judged by its own calls alone. Pure but for the clock.

    suspect       an answer of it is late and still outstanding: others are asked meanwhile
    quarantined   most of its answers of late were late: it gets rows only where nobody else has the unit, and copies of
                  rows now and then; when several answers in a row are punctual it is back

A shard without a connection is neither; the transports know of that.
"""

import logging
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from router.shard_queues import HALF_LIFE_S

logger = logging.getLogger(__name__)

SMOOTHING = 0.2  # weight of the newest answer in the share of late ones
MAX_LATE_SHARE = 0.5  # beyond, a shard is quarantined: after four late answers in a row, coming from none
FORGOTTEN_SHARE = 0.01  # below, a shard is as one that never was late
NUM_PUNCTUAL = 3  # answers in a row, for a shard to be back
MIN_PROBE_INTERVAL_S = 0.5
MAX_PROBE_INTERVAL_S = 30.0  # probes get rarer from one that is late to the next


@dataclass(slots=True)
class _Shard:
    late_share: float = 0.0
    late_s: float = 0.0  # when an answer was late last
    outstanding: set[int] = field(default_factory=set)  # sequence numbers of late forwards
    is_quarantined: bool = False
    num_punctual: int = 0
    probe_interval_s: float = MIN_PROBE_INTERVAL_S
    probe_at_s: float = 0.0


class ShardHealth:
    """Belongs to the engine thread, but for `quarantined`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shards: dict[int, _Shard] = {}

    def late(self, ep_rank: int, sequence_number: int) -> None:
        """A forward's answer is late now."""
        shard = self._shards.setdefault(ep_rank, _Shard())
        shard.outstanding.add(sequence_number)
        shard.late_share += SMOOTHING * (1.0 - shard.late_share)
        shard.late_s = self._clock()
        shard.num_punctual = 0
        if shard.is_quarantined:
            shard.probe_interval_s = min(2 * shard.probe_interval_s, MAX_PROBE_INTERVAL_S)
            shard.probe_at_s = self._clock() + shard.probe_interval_s
        elif shard.late_share > MAX_LATE_SHARE:
            logger.warning(
                "shard %d is quarantined: %.0f %% of its answers of late were late", ep_rank, 100 * shard.late_share
            )
            shard.is_quarantined = True
            shard.probe_interval_s = MIN_PROBE_INTERVAL_S
            shard.probe_at_s = self._clock() + shard.probe_interval_s

    def punctual(self, ep_rank: int) -> None:
        """An answer came in time."""
        shard = self._shards.get(ep_rank)
        if shard is None:
            return
        shard.late_share -= SMOOTHING * shard.late_share
        if not shard.is_quarantined:
            if shard.late_share < FORGOTTEN_SHARE and not shard.outstanding:
                del self._shards[ep_rank]
            return
        shard.num_punctual += 1
        if shard.num_punctual >= NUM_PUNCTUAL:
            logger.warning("shard %d is back: %d answers in a row were punctual", ep_rank, shard.num_punctual)
            self._shards[ep_rank] = _Shard(outstanding=shard.outstanding)

    def ended(self, ep_rank: int, sequence_number: int) -> None:
        """A late forward has its end after all: its answer, or that of its connection."""
        if (shard := self._shards.get(ep_rank)) is not None:
            shard.outstanding.discard(sequence_number)

    def keep_shards(self, ep_ranks: Container[int]) -> None:
        """Forgets the other ones."""
        self._shards = {ep_rank: shard for ep_rank, shard in self._shards.items() if ep_rank in ep_ranks}

    def avoided(self) -> list[int]:
        """Shards that get no rows while others have the unit."""
        return [ep_rank for ep_rank, shard in self._shards.items() if shard.is_quarantined or shard.outstanding]

    def suspects(self) -> list[int]:
        """Those of them that are waited for now."""
        return [ep_rank for ep_rank, shard in self._shards.items() if shard.outstanding]

    def quarantined(self) -> list[int]:
        """Those of them that stay so until they have shown otherwise. From any thread."""
        return [ep_rank for ep_rank, shard in list(self._shards.items()) if shard.is_quarantined]

    def probe_due(self) -> int | None:
        """A quarantined shard that copies of rows are to be sent to now; asked again, there is none for a while."""
        for ep_rank, shard in self._shards.items():
            if shard.is_quarantined and not shard.outstanding and shard.probe_at_s <= self._clock():
                shard.probe_at_s = self._clock() + shard.probe_interval_s
                return ep_rank
        return None

    def delays(self, ep_size: int, seconds: float) -> npt.NDArray[np.float64] | None:
        """What a late answer costs, `seconds`, times how often each shard's are: [ep_size]; None where none is late.

        A share counts half after a half-life without late ones, for who is not asked cannot show that it is better.
        Quarantine goes by the share itself, however slowly answers come.
        """
        if not self._shards:
            return None
        shares = np.zeros(ep_size)
        for ep_rank, shard in self._shards.items():
            if ep_rank < ep_size and (share := self._aged_share(shard)) >= FORGOTTEN_SHARE:
                shares[ep_rank] = share
        return seconds * shares

    def _aged_share(self, shard: _Shard) -> float:
        share: float = shard.late_share * 0.5 ** ((self._clock() - shard.late_s) / HALF_LIFE_S)
        return share
