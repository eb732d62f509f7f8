"""The number of expert shards follows their load. The controller's fourth duty; belongs to its thread.

Every `LOOK_S` the shards are asked what they have done so far. What is decided (autoscale.py) is carried out by the
membership: new shards are given units, leaving ones give theirs up, and the rebalance says with how many bytes. While
shards come, leave or move units nothing is measured. Knows nothing of Ray.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import NamedTuple

from cluster.config import ShardScalingConfig
from cluster.controller.autoscale import CountDecision
from cluster.controller.membership import ShardMembership
from protos.errors import MobulaError

logger = logging.getLogger(__name__)

LOOK_S = 5.0  # between two looks; short beside the windows
ANSWER_TIMEOUT_S = 2.0  # a shard that takes longer is looked at the next time


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


class ShardScaling:
    """Of one system."""

    def __init__(self, membership: ShardMembership, config: ShardScalingConfig, clock: Callable[[], float]) -> None:
        self._membership = membership
        self._config = config
        self._clock = clock
        self._decision = CountDecision(config)
        self._looked_s = float("-inf")
        self._seen: dict[str, ShardWork] = {}  # at the last look, by process and generation

    def round(self, *, is_settled: bool) -> None:
        """is_settled: every process serves, and no shard comes, leaves or moves units."""
        if not self._config.enabled:
            return
        if not is_settled:
            self._seen.clear()
            self._decision.forget()
            return
        now_s = self._clock()
        if now_s - self._looked_s < LOOK_S:
            return
        seconds, self._looked_s = now_s - self._looked_s, now_s
        before, self._seen = self._seen, self._look()
        if not self._seen or before.keys() != self._seen.keys():
            return
        done = [work.since(before[name]) for name, work in self._seen.items()]
        self._scale(now_s, _ratios(done, seconds, self._config))

    def _scale(self, now_s: float, ratios: tuple[float, float]) -> None:
        count = len(self._seen)
        wanted = self._decision.decide(now_s, count, ratios)
        if wanted == count:
            return
        logger.info("from %d to %d shards: usage and queue are %.2f and %.2f of their targets", count, wanted, *ratios)
        self._decision.forget()
        try:
            self._membership.scale(wanted)
        except MobulaError as error:
            logger.warning("no change of the number of shards: %s", error)

    def _look(self) -> dict[str, ShardWork]:
        """Of every shard, or of none when one does not answer."""
        asked: dict[str, Future[ShardWork]] = {
            f"{shard.name} {shard.health.generation}": shard.handle.call("work") for shard in self._membership.shards
        }
        wait(asked.values(), timeout=ANSWER_TIMEOUT_S)
        if any(not answer.done() or answer.exception() for answer in asked.values()):
            return {}
        return {name: answer.result() for name, answer in asked.items()}


def _ratios(done: list[ShardWork], seconds: float, config: ShardScalingConfig) -> tuple[float, float]:
    """Usage of the busiest shard and time in the queue, each over its target."""
    num_forwards = sum(work.num_forwards for work in done)
    if not num_forwards:
        return 0.0, 0.0
    mean_usage = sum(work.compute_s for work in done) / len(done) / seconds
    assignments = [work.num_assignments for work in done]
    imbalance = max(assignments) * len(done) / max(1, sum(assignments))  # f' of the busiest: 1 when all are even
    queue_s = sum(work.queue_s for work in done) / num_forwards
    return min(1.0, mean_usage * imbalance) / config.target_usage_ratio, queue_s / config.target_queue_s
