"""Whose turn it is, fairly between clients: self-clocked fair queueing (Golestani, INFOCOM 1994).

Each item is stamped with the moment at which it would be done if its client had its share of the service all the time;
the earliest stamp is next. So a client with a thousand requests waits for itself, not others for it. No clock, no I/O.
"""

import heapq
import itertools
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Of items with a cost. The caller bounds how many there are."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str, float, T]] = []  # stamp, arrival, client, cost, item
        self._newest_stamp: dict[str, float] = {}  # of clients that wait
        self._now = 0.0  # stamp of the item that was taken last
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, client: str, cost: float, item: T) -> None:
        """cost: of any unit; what matters is its share of the others'."""
        stamp = self._stamp(client, cost)
        self._newest_stamp[client] = stamp
        heapq.heappush(self._heap, (stamp, next(self._arrivals), client, cost, item))

    def pop(self) -> T:
        """The next one. Raises IndexError when nothing waits."""
        stamp, _, client, _, item = heapq.heappop(self._heap)
        self._now = stamp
        if self._newest_stamp[client] == stamp:
            del self._newest_stamp[client]
        return item

    def remove(self, item: T) -> None:
        """It no longer waits; nothing happens when it does not."""
        self._heap = sorted(entry for entry in self._heap if entry[4] is not item)  # which is a heap too
        self._newest_stamp = {client: stamp for stamp, _, client, _, _ in self._heap}

    def cost_ahead(self, client: str, cost: float) -> float:
        """Of what would be taken before an item of this client that comes now."""
        stamp = self._stamp(client, cost)
        return sum(entry[3] for entry in self._heap if entry[0] <= stamp)

    def _stamp(self, client: str, cost: float) -> float:
        return max(self._now, self._newest_stamp.get(client, 0.0)) + cost
