"""A placement with the ways to its shards, and which of them may be asked for a layer's units.

Any choice gives the same bits (see plan.py), so this may follow load, connections and trust freely.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from router.compiled import native
from router.expert_map import ExpertMap, Int64Array
from router.replicas import choose_replicas, others_only, usable_replicas
from router.shard_health import ShardHealth
from router.shard_queues import ExpectedQueues, ShardQueues
from router.transport import ShardTransport


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """A placement and the ways to its shards, replaced as a whole.

    transports: by ep_rank; None while the shard is known to be down.
    """

    expert_map: ExpertMap
    transports: tuple[ShardTransport | None, ...]

    def down(self) -> list[int]:
        """The shards that hold anything and cannot be reached now."""
        transports = self.transports
        return [
            ep_rank
            for ep_rank in self.expert_map.ep_ranks
            if (transport := transports[ep_rank]) is None or not transport.is_connected
        ]


class Candidates:
    """Chooses shards for units. Belongs to the engine thread.

    A `row` is that of a layer in the expert map; unit_to_ep_ranks: [num_units, replicas] int64, -1 for none.
    """

    def __init__(self, *, turns: Iterator[int], queues: ShardQueues, health: ShardHealth, late_after_s: float) -> None:
        """turns: numbers that go round, to use replicas in turn; late_after_s: what a late answer costs at least."""
        self._turns = turns
        self._queues = queues
        self._health = health
        self._late_after_s = late_after_s

    def to_plan(self, routing: Routing, row: int) -> tuple[Int64Array, ExpectedQueues | None]:
        """The replicas that a plan may choose from, and by which expectation; one of each unit where it cannot choose.

        Shards that are down or not trusted are there for units that nobody else has.
        """
        unit_to_ep_ranks = routing.expert_map.unit_to_ep_ranks[row]
        if routing.expert_map.max_replicas == 1:
            return unit_to_ep_ranks, None
        usable = self._usable(unit_to_ep_ranks, routing)
        if native() is None:
            return choose_replicas(usable, next(self._turns))[:, None], None
        queues = self._queues.expected(routing.expert_map.ep_size)
        delays = self._health.delays(routing.expert_map.ep_size, self._late_after_s)
        return usable, queues._replace(waits_s=queues.waits_s + delays)

    def to_retry(self, routing: Routing, row: int, failed: int) -> Int64Array:
        """A shard for each unit, where another than `failed` has it: [num_units]."""
        usable = self._usable(routing.expert_map.unit_to_ep_ranks[row], routing)
        return choose_replicas(usable, next(self._turns), avoid=[failed])

    def to_hedge(self, routing: Routing, row: int, late: int) -> Int64Array:
        """A shard for each unit that another than `late` has who can be reached and trusted, else -1: [num_units]."""
        avoid = {*routing.down(), *self._health.avoided(), late}
        return choose_replicas(others_only(routing.expert_map.unit_to_ep_ranks[row], avoid), next(self._turns))

    def _usable(self, unit_to_ep_ranks: Int64Array, routing: Routing) -> Int64Array:
        if unit_to_ep_ranks.shape[1] == 1:
            return unit_to_ep_ranks
        return usable_replicas(usable_replicas(unit_to_ep_ranks, routing.down()), self._health.avoided())
