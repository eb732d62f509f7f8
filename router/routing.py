"""A placement with the ways to its shards, and which of them may be asked for a layer's units.

Any choice gives the same bits (see plan.py), so this may follow load, connections and trust freely.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from router.compiled import native
from router.expert_map import ExpertMap, Int64Array
from router.plan_kernels import UnitAddresses
from router.replicas import choose_replicas, others_only, usable_replicas
from router.shard_health import ShardHealth
from router.shard_queues import ExpectedQueues, ShardQueues
from router.transport import ShardTransport
from router.unit_trust import UnitTrust


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """A placement and the ways to its shards, replaced as a whole.

    transports: by ep_rank; None while the shard is known to be down. max_ranks_per_token: the device limit.
    addresses: of each layer's units.
    """

    expert_map: ExpertMap
    transports: tuple[ShardTransport | None, ...]
    max_ranks_per_token: int
    addresses: tuple[UnitAddresses, ...] = field(init=False)  # this process's, so no part of the map

    def __post_init__(self) -> None:
        arrays = zip(self.expert_map.expert_to_unit, self.expert_map.unit_to_ep_ranks, strict=True)
        object.__setattr__(self, "addresses", tuple(UnitAddresses.of(*of_layer) for of_layer in arrays))

    def down(self) -> list[int]:
        """The shards that hold anything and cannot be reached now."""
        transports = self.transports
        return [
            ep_rank
            for ep_rank in self.expert_map.ep_ranks
            if (transport := transports[ep_rank]) is None or not transport.is_connected
        ]


class PlanChoice(NamedTuple):
    """What plan_layer takes besides the rows."""

    unit_to_ep_ranks: Int64Array  # [num_units, max_replicas]
    queues: ExpectedQueues | None
    addresses: UnitAddresses | None


class Candidates:
    """Chooses shards for units. Belongs to the engine thread.

    A `row` is that of a layer in the expert map; unit_to_ep_ranks: [num_units, replicas] int64, -1 for none.
    """

    def __init__(
        self, *, turns: Iterator[int], queues: ShardQueues, health: ShardHealth, trust: UnitTrust, late_after_s: float
    ) -> None:
        """turns: numbers that go round, to use replicas in turn; late_after_s: what a late answer costs at least."""
        self._turns = turns
        self._queues = queues
        self._health = health
        self._trust = trust
        self._late_after_s = late_after_s

    def to_plan(self, routing: Routing, row: int) -> PlanChoice:
        """The replicas that a plan may choose from, and by which expectation; one of each unit where it cannot choose.

        Shards that are down or not trusted are there for units that nobody else has.
        """
        if routing.expert_map.max_replicas == 1:
            return PlanChoice(routing.expert_map.unit_to_ep_ranks[row], None, routing.addresses[row])
        usable = self._usable(routing, row)
        if native() is None:
            return PlanChoice(choose_replicas(usable, next(self._turns))[:, None], None, None)
        queues = self._queues.expected(routing.expert_map.ep_size)
        delays = self._health.delays(routing.expert_map.ep_size, self._late_after_s)
        if delays is not None:
            queues = queues._replace(waits_s=queues.waits_s + delays)
        return PlanChoice(usable, queues, None)

    def to_retry(self, routing: Routing, row: int, failed: Collection[int]) -> Int64Array:
        """A shard for each unit, where another than those that failed has it: [num_units]."""
        usable = self._usable(routing, row)
        return choose_replicas(usable, next(self._turns), avoid=failed)

    def to_hedge(self, routing: Routing, row: int, late: Collection[int]) -> Int64Array:
        """A shard for each unit that another than the late ones has, else -1: [num_units].

        One that can be reached and that nobody waits for too long, for else an overload would double itself; one that
        is quarantined only where there is no other.
        """
        others = others_only(self._right(routing, row), {*routing.down(), *self._health.suspects(), *late})
        return choose_replicas(usable_replicas(others, self._health.quarantined()), next(self._turns))

    def to_probe(self, routing: Routing) -> int | None:
        """A shard that is not trusted, can be reached, and is to be tried now; None for none."""
        ep_rank = self._health.probe_due()
        return None if ep_rank is None or ep_rank in routing.down() else ep_rank

    def _usable(self, routing: Routing, row: int) -> Int64Array:
        """Wrong numbers are worse than none, and a shard that is down worse than one that is late."""
        unit_to_ep_ranks: Int64Array = routing.expert_map.unit_to_ep_ranks[row]
        if routing.expert_map.max_replicas == 1:
            return unit_to_ep_ranks
        right = self._right(routing, row)
        return usable_replicas(usable_replicas(right, routing.down()), self._health.avoided())

    def _right(self, routing: Routing, row: int) -> Int64Array:
        """Without replicas whose numbers are wrong, but for units that nobody else has."""
        unit_to_ep_ranks: Int64Array = routing.expert_map.unit_to_ep_ranks[row]
        wrong = self._trust.wrong(routing.expert_map.moe_layer_ids[row])
        if not wrong:
            return unit_to_ep_ranks
        right: Int64Array = unit_to_ep_ranks.copy()
        for unit_id, ep_rank in wrong:
            if unit_id < len(right):  # of this placement
                right[unit_id, right[unit_id] == ep_rank] = -1
        has_right = (right >= 0).any(axis=1, keepdims=True)
        return np.where(has_right, right, unit_to_ep_ranks)
