"""Replicas of units on shards while they are being placed: who holds what, how busy each shard is, what still fits.

Knows the limits (memory, one replica of a unit a shard, failure domains) and the busy times; knows no strategy.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.expert_map import Int64Array
from router.placement.request import Float64Array

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """Where units can go. speeds: [ep_size], mean 1; capacity: [ep_size] experts; domains: [ep_size] from 0."""

    speeds: Float64Array
    capacity: Int64Array
    domains: Int64Array

    @property
    def ep_size(self) -> int:
        return len(self.speeds)

    @property
    def num_domains(self) -> int:
        return int(self.domains.max()) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """What is placed. All arrays [num_moe_layers, num_units].

    load: assignments; sizes: experts; num_replicas: each carries an equal share of the load; min_domains: failure
    domains that the replicas must lie in.
    """

    load: Float64Array
    sizes: Int64Array
    num_replicas: Int64Array
    min_domains: Int64Array

    @property
    def share(self) -> Float64Array:
        """The load of one replica."""
        return np.asarray(self.load / self.num_replicas)


class Assignment:
    """A placement in the making; it never breaks a limit, but may still lack replicas.

    holds: [num_moe_layers, num_units, ep_size]. domain_counts: replicas in each domain, [..., num_domains].
    busy: [num_moe_layers, ep_size], time of each shard in each layer; total: its sum over layers. room: [ep_size].
    """

    def __init__(self, units: Units, shards: Shards) -> None:
        num_layers, num_units = units.load.shape
        self.units, self.shards = units, shards
        self.share = units.share
        self.holds = np.zeros((num_layers, num_units, shards.ep_size), dtype=np.bool_)
        self.domain_counts = np.zeros((num_layers, num_units, shards.num_domains), dtype=np.int64)
        self.busy = np.zeros((num_layers, shards.ep_size))
        self.total = np.zeros(shards.ep_size)
        self.room = shards.capacity.copy()

    def put(self, layer: int, unit: int, shard: int) -> None:
        """One more replica."""
        self._change(layer, unit, shard, 1)

    def take(self, layer: int, unit: int, shard: int) -> None:
        """One replica less."""
        self._change(layer, unit, shard, -1)

    def _change(self, layer: int, unit: int, shard: int, sign: int) -> None:
        time = sign * self.share[layer, unit] / self.shards.speeds[shard]
        self.holds[layer, unit, shard] = sign > 0
        self.domain_counts[layer, unit, self.shards.domains[shard]] += sign
        self.busy[layer, shard] += time
        self.total[shard] += time
        self.room[shard] -= sign * self.units.sizes[layer, unit]

    def can_take(self, layer: int, unit: int) -> BoolArray:
        """Shards that may hold one more replica: [ep_size]."""
        can = (self.room >= self.units.sizes[layer, unit]) & ~self.holds[layer, unit]
        counts = self.domain_counts[layer, unit]
        missing = self.units.num_replicas[layer, unit] - counts.sum()
        if missing <= self.units.min_domains[layer, unit] - (counts > 0).sum():  # each must open a domain
            can &= (counts == 0)[self.shards.domains]
        return np.asarray(can)

    @property
    def is_complete(self) -> bool:
        return bool((self.holds.sum(axis=2) == self.units.num_replicas).all())

    def time(self) -> float:
        """ep_size times the expected step time (scores.expected_step_time)."""
        return float(self.busy.max(axis=1).sum() + (self.shards.ep_size - 1) * self.total.max())

    def recount(self) -> None:
        """Computes busy times anew, without the rounding of many small changes."""
        self.busy = np.einsum("lus,lu->ls", self.holds, self.share) / self.shards.speeds
        self.total = self.busy.sum(axis=0)

    def unit_to_ep_ranks(self) -> Int64Array:
        """[num_moe_layers, num_units, max_replicas], shards ascending, -1 pads."""
        ep_size = self.shards.ep_size
        ranks = np.where(self.holds, np.arange(ep_size), ep_size)
        ranks.sort(axis=2)
        ranks = ranks[:, :, : int(self.holds.sum(axis=2).max())]
        return np.where(ranks == ep_size, -1, ranks)
