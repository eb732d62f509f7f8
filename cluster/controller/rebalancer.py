"""Moves experts while requests run: stage, activate, publish, drain, release. One change at a time.

1. stage: each shard reads the units that it lacks, a part at a time, while the old version is served;
2. activate: every shard serves the new version beside the old one;
3. publish: the controller tells the workers; from then on there is no way back, and a shard that starts loads the new
   version;
4. drain: until no worker has a forward under the old version under way;
5. release: shards drop what only the old version needed.

A shard that dies or fails before step 3 ends it: what was read is dropped, the old version goes on. Belongs to the
controller's thread. Knows nothing of load or policies.
"""

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from cluster.controller.process import ManagedProcess, RoleName
from cluster.controller.rebalance import (
    RebalanceCause,
    RebalancePlan,
    RebalanceState,
    RebalanceStatus,
    StagePart,
    parts_to_stage,
)
from cluster.controller.unit_sources import NO_SOURCES, UnitSources
from router.expert_map import ExpertMap

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # of a shard to read units in one rebalance
URGENT_BYTES_PER_S = 4 * 2**30  # no limit in practice, and still a part now and then
PART_S = 1.0  # of reading asked for in one call to a shard, or one unit: how long a shard reads on after an abort


class Rebalancer:
    """`step` is called once a round, after the processes were observed."""

    def __init__(
        self,
        *,
        processes: list[ManagedProcess],
        max_bytes_per_s: float,
        copies_from_peers: bool,
        publish: Callable[[ExpertMap], None],
        clock: Callable[[], float],
    ) -> None:
        """processes: the controller's records, which come and go. max_bytes_per_s: that a shard reads.

        copies_from_peers: units that another shard has are read from it, else all from the checkpoint.

        publish: makes an expert map the one that workers are told.
        """
        self._processes = processes
        self._max_bytes_per_s = max_bytes_per_s
        self._copies_from_peers = copies_from_peers
        self._rate = max_bytes_per_s  # of the rebalance under way
        self._sources = NO_SOURCES
        self._num_failures: dict[str, int] = {}  # to read units, by process
        self._publish = publish
        self._clock = clock
        self._plan: RebalancePlan | None = None
        self._generations: dict[int, str] = {}
        self._parts: dict[int, list[StagePart]] = {}  # yet to be read, by ep_rank; the first may be under way
        self._calls: dict[str, Future[Any]] = {}  # by process
        self._status = RebalanceStatus()
        self.num_begun: Counter[RebalanceCause] = Counter()
        self._began_s = 0.0  # the latest
        self._succeeded_s: float | None = None

    @property
    def is_idle(self) -> bool:
        return self._plan is None

    def status(self) -> RebalanceStatus:
        """How far it is."""
        since = None if self._succeeded_s is None else self._clock() - self._succeeded_s
        return replace(self._status, seconds_since_success=since)

    def begin(self, plan: RebalancePlan, cause: RebalanceCause, reason: str, *, is_urgent: bool = False) -> None:
        """Starts a rebalance; every shard that has units in the new placement must be ready.

        reason: why, in words.
        is_urgent: requests wait for units that nobody has: shards read as fast as they can.
        """
        assert self.is_idle
        self._rate = URGENT_BYTES_PER_S if is_urgent else self._max_bytes_per_s
        self._plan = plan
        self._generations = {shard.rank: shard.health.generation for shard in self._shards(plan)}
        self._num_failures = {}
        self._parts = parts_to_stage(plan, int(PART_S * self._rate))
        self._calls = {}
        self._sources = UnitSources(plan) if self._copies_from_peers else NO_SOURCES
        self._status = replace(
            self._status,
            state=RebalanceState.STAGING,
            target_version=plan.new.placement_version,
            moved_bytes=0,
            planned_bytes=plan.moved_bytes,
            reason=reason,
        )
        self._began_s = self._clock()
        self.num_begun[cause] += 1
        logger.info("rebalance to version %d: %d units, %s", plan.new.placement_version, len(plan.moves), reason)

    def step(self) -> None:
        """As far as it gets without waiting."""
        if self._plan is None:
            return
        if self._status.state in (RebalanceState.STAGING, RebalanceState.ACTIVATING):
            if (failure := self._failure(self._plan)) is not None:
                self._abort(failure)
                return
            if self._status.state is RebalanceState.STAGING:
                self._stage(self._plan)
            elif self._all_done():
                self._publish(self._plan.new)
                self._enter(RebalanceState.PUBLISHING)
        elif self._status.state is RebalanceState.PUBLISHING:
            if all(_knows(worker, self._plan.new.placement_version) for worker in self._workers()):
                self._ask_workers()
                self._enter(RebalanceState.DRAINING)
        elif self._status.state is RebalanceState.DRAINING:
            self._drain(self._plan)
        elif self._all_done():
            self._finish(self._plan)

    def _shards(self, plan: RebalancePlan) -> list[ManagedProcess]:
        """That have units in the new placement."""
        ep_ranks = plan.new.ep_ranks
        return [p for p in self._processes if p.role is RoleName.SHARD and p.rank in ep_ranks]

    def _workers(self) -> list[ManagedProcess]:
        return [process for process in self._processes if process.role is RoleName.WORKER and process.is_ready]

    def _stage(self, plan: RebalancePlan) -> None:
        for shard in self._shards(plan):
            call = self._calls.get(shard.name)
            if call is not None and call.done() and call.exception() is not None:
                del self._calls[shard.name]  # asked again below; what it has read of the part it keeps
            elif call is not None and call.done():
                part = self._parts[shard.rank].pop(0)
                self._status = replace(self._status, moved_bytes=self._status.moved_bytes + part.num_bytes)
                del self._calls[shard.name]
            if shard.name not in self._calls and self._parts.get(shard.rank):
                units = self._parts[shard.rank][0].units
                addresses = self._sources.addresses(units, shard, self._processes)
                self._calls[shard.name] = shard.handle.call("stage", units, self._rate, addresses)
        if not self._calls:
            for shard in self._shards(plan):
                units = plan.new.units_of(shard.rank)
                self._calls[shard.name] = shard.handle.call("activate", plan.new.placement_version, units)
            self._enter(RebalanceState.ACTIVATING)

    def _failure(self, plan: RebalancePlan) -> str | None:
        """Why it cannot go on, before anything was published."""
        for shard in self._shards(plan):
            if not shard.is_ready or shard.health.generation != self._generations[shard.rank]:
                return f"{shard.name} was lost: it {shard.health.detail or f'is {shard.health.state} again'}"
        for name, call in self._calls.items():
            if not call.done() or (error := call.exception()) is None:
                continue
            self._num_failures[name] = self._num_failures.get(name, 0) + 1
            if self._num_failures[name] >= MAX_FAILURES or self._status.state is not RebalanceState.STAGING:
                return f"{name} could not take its units: {error}"
            logger.warning("%s could not read its units, and is asked again: %s", name, error)
        return None

    def _abort(self, failure: str) -> None:
        assert self._plan
        version = self._plan.new.placement_version
        for shard in self._shards(self._plan):
            shard.handle.call("release", version)  # also drops what was only staged; one that is gone has nothing
        result = (
            f"version {version} was given up while {self._status.state}, after {self._duration_s():.1f} s: {failure}"
        )
        logger.warning("rebalance: %s; version %d goes on", result, self._plan.old.placement_version)
        self._end(replace(self._status, num_aborted=self._status.num_aborted + 1, last_result=result))

    def _ask_workers(self) -> None:
        self._calls = {worker.name: worker.handle.call("oldest_placement_version") for worker in self._workers()}

    def _drain(self, plan: RebalancePlan) -> None:
        if not self._all_done():
            return
        # One that has ended is not asked again, for it is not ready.
        if any(call.exception() or call.result() < plan.new.placement_version for call in self._calls.values()):
            self._ask_workers()
            return
        self._calls = {
            shard.name: shard.handle.call("release", plan.old.placement_version)
            for shard in self._processes
            if shard.role is RoleName.SHARD and shard.is_ready
        }
        self._enter(RebalanceState.RELEASING)

    def _finish(self, plan: RebalancePlan) -> None:
        for name, call in self._calls.items():
            if (error := call.exception()) is not None:  # it has loaded, or will load, the new version alone
                logger.warning("%s did not release version %d: %s", name, plan.old.placement_version, error)
        self._succeeded_s = self._clock()
        version, duration_s = plan.new.placement_version, self._duration_s()
        result = f"version {version} is served: {len(plan.moves)} units moved in {duration_s:.1f} s"
        logger.info("rebalance: %s", result)
        self._end(replace(self._status, num_done=self._status.num_done + 1, last_result=result))

    def _end(self, status: RebalanceStatus) -> None:
        self._status = replace(status, state=RebalanceState.IDLE, target_version=None)
        self._plan, self._calls, self._parts = None, {}, {}

    def _duration_s(self) -> float:
        return self._clock() - self._began_s

    def _enter(self, state: RebalanceState) -> None:
        self._status = replace(self._status, state=state)

    def _all_done(self) -> bool:
        return all(call.done() for call in self._calls.values())


def _knows(worker: ManagedProcess, placement_version: int) -> bool:
    """Whether this very process was told of the version."""
    return worker.is_connected and worker.told_version == placement_version
