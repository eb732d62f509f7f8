"""What a forward is expected to wait for at each shard, from the answers' own timing.

Shards and workers need no common clock: a shard says how long a forward waited and how long it was computed.
"""

import time
from collections.abc import Callable, Container
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

SMOOTHING = 0.2  # weight of the newest answer in a mean, if it comes at once after the one before
HALF_LIFE_S = 1.0  # of a wait: a shard that seems busy is not asked, and could never show that it is free again
UNKNOWN_S = 1e-6  # an assignment's time while no shard has answered


class ExpectedQueues(NamedTuple):
    """At one moment; both [ep_size] seconds."""

    waits_s: Float64Array  # before a forward that is sent now is computed; the planner adds what it sends
    seconds_per_assignment: Float64Array


class ShardQueues:
    """Of all shards of a worker. Belongs to the engine thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_outstanding: dict[int, int] = {}  # assignments sent by this worker and not ended
        self._queue_s: dict[int, float] = {}
        self._answered_s: dict[int, float] = {}  # when that was
        self._seconds_per_assignment: dict[int, float] = {}

    def sent(self, ep_rank: int, num_assignments: int) -> None:
        """A forward is on its way."""
        self._num_outstanding[ep_rank] = self._num_outstanding.get(ep_rank, 0) + num_assignments

    def ended(self, ep_rank: int, num_assignments: int) -> None:
        """It is no longer waited for."""
        self._num_outstanding[ep_rank] -= num_assignments

    def answered(self, ep_rank: int, num_assignments: int, queue_s: float, compute_s: float) -> None:
        """What the shard says of a forward."""
        now_s = self._clock()
        age_s = now_s - self._answered_s.get(ep_rank, now_s)
        _smooth(self._queue_s, ep_rank, queue_s, weight=1.0 - (1.0 - SMOOTHING) * 0.5 ** (age_s / HALF_LIFE_S))
        self._answered_s[ep_rank] = now_s
        _smooth(self._seconds_per_assignment, ep_rank, compute_s / max(1, num_assignments), weight=SMOOTHING)

    def expected(self, ep_size: int) -> ExpectedQueues:
        """A shard that has not answered yet counts as an average one; a wait counts half after a half-life."""
        known = self._seconds_per_assignment
        mean = sum(known.values()) / len(known) if known else UNKNOWN_S
        per_assignment = np.array([known.get(rank, mean) for rank in range(ep_size)])
        outstanding = np.array([self._num_outstanding.get(rank, 0) for rank in range(ep_size)])
        queued = np.array([self._queue_s.get(rank, 0.0) for rank in range(ep_size)])
        ages_s = self._clock() - np.array([self._answered_s.get(rank, 0.0) for rank in range(ep_size)])
        return ExpectedQueues(queued * 0.5 ** (ages_s / HALF_LIFE_S) + outstanding * per_assignment, per_assignment)

    def keep_shards(self, ep_ranks: Container[int]) -> None:
        """Forgets what the other ones said; what is on its way to them is counted until it ends."""
        for known in (self._queue_s, self._answered_s, self._seconds_per_assignment):
            for ep_rank in [ep_rank for ep_rank in known if ep_rank not in ep_ranks]:
                del known[ep_rank]


def _smooth(means: dict[int, float], ep_rank: int, value: float, *, weight: float) -> None:
    before = means.get(ep_rank, value)
    means[ep_rank] = before + weight * (value - before)
