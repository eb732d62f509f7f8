"""How long forwards take at each shard by this worker's own clock, and from when on an answer is late.

A mean and a spread for each shard and size of forward, as TCP keeps them of its round trips (RFC 6298). A shard is
measured against its peers too, or one that became slow would soon count as punctual. Knows nothing of what follows.
"""

import statistics
from collections.abc import Container

SMOOTHING = 0.125  # weight of the newest time in a mean
SPREAD_SMOOTHING = 0.25  # and in its spread
MEAN_FACTOR, SPREAD_FACTOR = 2.0, 4.0  # an answer is late after so many means and spreads
PEER_FACTOR = 4.0  # and after so many times what is late at a shard's median peer


class Estimate:
    """How long one kind of thing takes: forwards of a size at a shard, a question to a worker."""

    __slots__ = ("mean_s", "spread_s")

    def __init__(self, seconds: float) -> None:
        self.mean_s = seconds
        self.spread_s = seconds / 2  # mean absolute deviation

    def update(self, seconds: float) -> None:
        deviation_s = seconds - self.mean_s
        self.mean_s += SMOOTHING * deviation_s
        self.spread_s += SPREAD_SMOOTHING * (abs(deviation_s) - self.spread_s)

    @property
    def late_after_s(self) -> float:
        return MEAN_FACTOR * self.mean_s + SPREAD_FACTOR * self.spread_s


class ServiceTimes:
    """Of all shards of a worker. Belongs to the engine thread."""

    def __init__(self, min_s: float, max_s: float) -> None:
        """No answer is late sooner than `min_s`, and every one after `max_s`, also while nothing is known."""
        self._min_s = min_s
        self._max_s = max_s
        self._estimates: dict[int, dict[int, Estimate]] = {}  # by ep_rank and size: a forward's assignments in bits

    def answered(self, ep_rank: int, num_assignments: int, seconds: float) -> None:
        """A forward's answer came so long after it was sent."""
        mine = self._estimates.setdefault(ep_rank, {})
        size = num_assignments.bit_length()
        known = mine.get(size)
        if known is None:
            mine[size] = Estimate(seconds)
        else:
            known.update(seconds)

    def keep_shards(self, ep_ranks: Container[int]) -> None:
        """Forgets the other ones."""
        self._estimates = {ep_rank: known for ep_rank, known in self._estimates.items() if ep_rank in ep_ranks}

    def late_after_s(self, ep_rank: int, num_assignments: int) -> float:
        """Seconds after it was sent from which on a forward's answer is late."""
        size = num_assignments.bit_length()
        own = self._known(ep_rank, size)
        peers = [
            known for peer in self._estimates if peer != ep_rank and (known := self._known(peer, size)) is not None
        ]
        limits = [] if own is None else [own]
        if peers:
            limits.append(PEER_FACTOR * statistics.median(peers))
        return max(self._min_s, min([*limits, self._max_s]))

    def _known(self, ep_rank: int, size: int) -> float | None:
        """When a forward of that size is late by the shard's own times; an upper bound where only others are known."""
        mine = self._estimates.get(ep_rank)
        if not mine:
            return None
        larger = [known for known in mine if known >= size]
        if larger:
            return mine[min(larger)].late_after_s
        largest = max(mine)
        return mine[largest].late_after_s * 2.0 ** (size - largest)  # a time grows at most like the assignments
