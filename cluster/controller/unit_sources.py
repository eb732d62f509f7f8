"""From which shard each unit is copied that another one lacks: of those that have it, the one with least to do.

Knows of processes only where they listen.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from cluster.controller.process import ManagedProcess, RoleName
from cluster.controller.rebalance import RebalancePlan
from router.expert_map import PlacementUnit


class UnitSources:
    """Of one rebalance."""

    def __init__(self, plan: RebalancePlan | None) -> None:
        self._holders: dict[PlacementUnit, list[int]] = defaultdict(list)  # ep_ranks
        self._busy: dict[int, float] = {}  # by ep_rank: its load and what it gives, each as a share of all
        self._num_moves = len(plan.moves) if plan else 1
        if plan:
            total = sum(plan.shard_load) or 1.0
            for ep_rank in plan.old.ep_ranks:
                self._busy[ep_rank] = plan.shard_load[ep_rank] / total
                for unit in plan.old.units_of(ep_rank):
                    self._holders[unit].append(ep_rank)

    def addresses(
        self, units: Iterable[PlacementUnit], reader: ManagedProcess, processes: Sequence[ManagedProcess]
    ) -> tuple[str, ...]:
        """For each unit host:port of the shard that gives it, or "" where none can: then the checkpoint has it."""
        ready = {p.rank: p.health.address for p in processes if p.role is RoleName.SHARD and p.is_ready}
        chosen = []
        for unit in units:
            givers = [rank for rank in self._holders.get(unit, ()) if rank in ready and rank != reader.rank]
            if not givers:
                chosen.append("")
                continue
            giver = min(givers, key=lambda rank: (self._busy[rank], rank))
            self._busy[giver] += 1 / self._num_moves
            chosen.append(ready[giver])
        return tuple(chosen)


NO_SOURCES = UnitSources(None)
