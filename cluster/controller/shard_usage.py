"""How loaded the expert shards are, from what they say they have done so far."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import NamedTuple

from cluster.config import ShardScalingConfig
from cluster.controller.membership import ShardMembership
from cluster.controller.memory_budget import MemoryRoom
from cluster.controller.process import RoleName
from cluster.controller.scaling import ANSWER_TIMEOUT_S, Scaling, Usage


class ShardWork(NamedTuple):
    """What a shard has done since it started."""

    compute_s: float
    queue_s: float  # that forwards waited for the compute thread, added up
    num_forwards: int
    num_assignments: int

    def since(self, before: "ShardWork") -> "ShardWork":
        """What was done after `before`."""
        return ShardWork(
            self.compute_s - before.compute_s,
            self.queue_s - before.queue_s,
            self.num_forwards - before.num_forwards,
            self.num_assignments - before.num_assignments,
        )


class ShardUsage:
    """Of one system. Implements scaling.UsageMeter."""

    def __init__(self, membership: ShardMembership, config: ShardScalingConfig) -> None:
        self._membership = membership
        self._config = config
        self._seen: dict[str, ShardWork] = {}  # at the last look, by process and generation

    def forget(self) -> None:
        """Units move, or shards come or leave."""
        self._seen.clear()

    def look(self, seconds: float) -> Usage | None:
        """None at the first look, and when a shard does not answer or is another one."""
        before, self._seen = self._seen, self._work()
        if not self._seen or before.keys() != self._seen.keys():
            return None
        done = [work.since(before[name]) for name, work in self._seen.items()]
        return Usage(len(done), _ratios(done, seconds, self._config))

    def _work(self) -> dict[str, ShardWork]:
        """Of every shard, or of none when one does not answer."""
        asked: dict[str, Future[ShardWork]] = {
            f"{shard.name} {shard.health.generation}": shard.handle.call("work") for shard in self._membership.shards
        }
        wait(asked.values(), timeout=ANSWER_TIMEOUT_S)
        if any(not answer.done() or answer.exception() for answer in asked.values()):
            return {}
        return {name: answer.result() for name, answer in asked.items()}


def shards_by_load(
    membership: ShardMembership, config: ShardScalingConfig, clock: Callable[[], float], room: MemoryRoom
) -> Scaling:
    """The number of shards follows their load."""
    return Scaling(RoleName.SHARD, config, ShardUsage(membership, config), membership.scale, clock, room)


def _ratios(done: Sequence[ShardWork], seconds: float, config: ShardScalingConfig) -> dict[str, float]:
    """Usage of the busiest shard and time in the queue, each over its target."""
    num_forwards = sum(work.num_forwards for work in done)
    if not num_forwards:
        return {"usage": 0.0, "queue": 0.0}
    mean_usage = sum(work.compute_s for work in done) / len(done) / seconds
    assignments = [work.num_assignments for work in done]
    imbalance = max(assignments) * len(done) / max(1, sum(assignments))  # f' of the busiest: 1 when all are even
    queue_s = sum(work.queue_s for work in done) / num_forwards
    usage = min(1.0, mean_usage * imbalance)
    return {"usage": usage / config.target_usage_ratio, "queue": queue_s / config.target_queue_s}
