"""How much each (layer, expert) is used lately: what placement is computed from.

Two views of the same counts: a decayed one, in which an assignment counts half after each half-life, for placements
that should not jump; and a windowed one, the plain sum of the last seconds, for comparing before with after. Memory is
a fixed number of [num_moe_layers, n_routed_experts] arrays, whatever the traffic. Knows nothing of shards' addresses or
of who polls them; the clock is the caller's.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.integer]


class LoadError(ValueError):
    """Counts or settings that make no load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """How far back load reaches. One more array of 8 bytes per (layer, expert) is kept for each slice."""

    half_life_s: float = 60.0  # an assignment counts half after this; longer is calmer, shorter follows drift
    window_s: float = 60.0  # the windowed sum covers the last so many seconds, give or take a slice
    num_slices: int = 12  # of the window; it moves on by one slice at a time

    def __post_init__(self) -> None:
        for name in ("half_life_s", "window_s"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise LoadError(f"{name} is {value}, must be more than 0 seconds and finite")
        if not 1 <= self.num_slices <= 1024:
            raise LoadError(f"num_slices is {self.num_slices}, must be 1 to 1024: each is an array that is kept")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadEstimate:
    """The load at one moment; its arrays are read-only.

    placement_version: under which it was counted. time_s: by the caller's clock.
    decayed: [num_moe_layers, n_routed_experts] float64, assignments, each weighted by 0.5 ** (age / half_life_s).
    windowed: the same shape, assignments of the last window_s seconds.
    """

    placement_version: int
    time_s: float
    decayed: Float64Array
    windowed: Float64Array


class LoadTracker:
    """Belongs to one thread. Time must not go back; what comes from before the newest moment counts as of that."""

    def __init__(self, num_moe_layers: int, n_routed_experts: int, config: LoadConfig | None = None) -> None:
        self._config = LoadConfig() if config is None else config
        self._shape = num_moe_layers, n_routed_experts
        self._decayed = np.zeros(self._shape)
        self._slices = np.zeros((self._config.num_slices, *self._shape))
        self._slice_number = 0  # of the newest; slice n covers n to n + 1 times window_s / num_slices
        self._now_s = float("-inf")
        self._counters: dict[str, npt.NDArray[np.int64]] = {}

    def add(self, num_assignments: Counts, now_s: float) -> None:
        """num_assignments: [num_moe_layers, n_routed_experts], since the last call. Raises LoadError."""
        self._check(num_assignments)
        self._move_on(now_s)
        self._decayed += num_assignments
        self._slices[self._slice_number % self._config.num_slices] += num_assignments

    def observe(self, source: str, counters: Counts, now_s: float) -> None:
        """Adds what a source (a shard) has counted since it was last observed.

        counters: [num_moe_layers, n_routed_experts], since the source started. The first look at a source only sets
        where counting begins: what it did before has no known time. Counters that went down are of a source that began
        anew, and all of them are new. Raises LoadError.
        """
        self._check(counters)
        now = counters.astype(np.int64)
        before = self._counters.get(source)
        self._counters[source] = now
        if before is None:
            self._move_on(now_s)
            return
        self.add(now - before if (now >= before).all() else now, now_s)

    def keep_sources(self, sources: Collection[str]) -> None:
        """Forgets where the counters of all other sources stood, so that sources may come and go for ever."""
        self._counters = {source: counters for source, counters in self._counters.items() if source in sources}

    def estimate(self, placement_version: int, now_s: float) -> LoadEstimate:
        """The load now."""
        self._move_on(now_s)
        estimate = LoadEstimate(
            placement_version=placement_version,
            time_s=self._now_s,
            decayed=self._decayed.copy(),
            windowed=self._slices.sum(axis=0),
        )
        for array in (estimate.decayed, estimate.windowed):
            array.setflags(write=False)
        return estimate

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in (self._decayed, self._slices, *self._counters.values()))

    def _check(self, counts: Counts) -> None:
        if counts.shape != self._shape:
            raise LoadError(f"counts are {list(counts.shape)}, this model has {list(self._shape)} (layers, experts)")
        if counts.size and counts.min() < 0:
            raise LoadError(f"a count is {counts.min()}, the least possible is 0")

    def _move_on(self, now_s: float) -> None:
        """Ages everything to `now_s`."""
        if now_s <= self._now_s:
            return
        config = self._config
        slice_number = int(now_s * config.num_slices // config.window_s)
        if self._now_s > float("-inf"):
            self._decayed *= 0.5 ** ((now_s - self._now_s) / config.half_life_s)
            for number in range(max(self._slice_number + 1, slice_number - config.num_slices + 1), slice_number + 1):
                self._slices[number % config.num_slices] = 0.0
        self._slice_number = slice_number
        self._now_s = now_s
