"""Watches the experts' load, and decides when a rebalance is worth its bytes. The controller's third duty.

One round: take the shards' counters, move a rebalance that is under way on, and begin one when shards came or are to
leave or, where the configuration says so, when it is worth it. Belongs to the controller's thread.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from cluster.config import RebalancingConfig
from cluster.controller.membership import ShardMembership
from cluster.controller.process import ManagedProcess, ProcessState
from cluster.controller.rebalance import (
    Float64Array,
    Hysteresis,
    RebalanceCause,
    RebalancePlan,
    RebalanceStatus,
    plan_rebalance,
    weight_bytes_while_moving,
)
from cluster.controller.rebalancer import Rebalancer
from cluster.controller.shard_traffic import ShardTraffic
from protos.errors import RebalanceRefused
from router.balance_terms import Traffic
from router.expert_map import ExpertMap
from router.load import LoadConfig, LoadTracker
from router.placement import PlacementError
from router.placement.members import ShardTraits

logger = logging.getLogger(__name__)

LOAD_INTERVAL_S = 2.0  # between two looks at the shards' counters
CHANGE_RETRY_S = 10.0  # after a rebalance for shards that came or leave could not begin or was given up


class Proposer(NamedTuple):
    """How placements are computed.

    place: the placement for a load ([num_moe_layers, n_routed_experts] assignments), given the one in use, the version
        of the new one, and the shards that it may use, by ep_rank; raises PlacementError.
    traits: of the shard of a rank, as configured.
    needs_domains: units have replicas, which shall lie in several failure domains: no shard is told to load before all
        have said where they are.
    """

    place: Callable[[Float64Array, ExpertMap, int, Mapping[int, ShardTraits]], ExpertMap]
    expert_bytes: int
    traits: Callable[[int], ShardTraits] = lambda ep_rank: ShardTraits()
    needs_domains: bool = False


class Balance:
    """Of one system; its shards and workers are the controller's records."""

    def __init__(
        self,
        *,
        processes: list[ManagedProcess],
        create_shard: Callable[[int], ManagedProcess],
        expert_map: ExpertMap,
        proposer: Proposer,
        config: RebalancingConfig,
        drain_timeout_s: float,
        publish: Callable[[ExpertMap], None],
        clock: Callable[[], float],
        room_for_shards: Callable[[int], None],
    ) -> None:
        """processes: the controller's records. create_shard: starts the one of a rank. drain_timeout_s: for a shard
        to end in order. publish: makes an expert map the one in use. room_for_shards: as in ShardMembership.
        """
        self.membership = ShardMembership(
            processes, expert_map.ep_ranks, create_shard, self._check_members, room_for_shards
        )
        self._expert_map = expert_map  # in use
        self._members: frozenset[int] = frozenset()  # that the rebalance under way is for
        self._proposer = proposer
        self._config = config
        self._drain_timeout_s = drain_timeout_s
        self._clock = clock
        self._rebalancer = Rebalancer(
            processes=processes,
            max_bytes_per_s=config.max_mib_per_s * 2**20,
            copies_from_peers=config.copy_from_peers,
            publish=publish,
            clock=clock,
        )
        num_layers, num_experts = expert_map.expert_to_unit.shape
        self._tracker = LoadTracker(
            num_layers, num_experts, LoadConfig(half_life_s=config.half_life_s, window_s=config.half_life_s)
        )
        self._shard_traffic = ShardTraffic(config.half_life_s)
        self.traffic: Traffic | None = None  # of late, replaced as a whole; None before the first look
        self._counts: dict[str, tuple[int, Future[Any]]] = {}  # asked for, of which ep_rank; by process and generation
        self._looked_s = float("-inf")
        self._ended_s = clock()  # the last rebalance
        self._newest_version = expert_map.placement_version
        self._change_at_s = float("-inf")  # not before this

    @property
    def is_idle(self) -> bool:
        """Whether no rebalance is under way."""
        return self._rebalancer.is_idle

    def status(self) -> RebalanceStatus:
        """The rebalance under way and those before."""
        return self._rebalancer.status()

    def num_begun(self) -> dict[RebalanceCause, int]:
        """Rebalances since the start, by why. From any thread."""
        begun = self._rebalancer.num_begun
        return {cause: begun[cause] for cause in RebalanceCause}

    def round(self, expert_map: ExpertMap, *, is_serving: bool) -> None:
        """One round under the placement in use."""
        self._expert_map = expert_map
        self.membership.note_absences(self._clock(), self._config.lost_after_s)
        self._observe_load()
        was_idle, num_done = self.is_idle, self.status().num_done
        self._rebalancer.step()
        if self.is_idle and not was_idle:
            self._ended_s = self._clock()
            if self.status().num_done > num_done:
                self.membership.are_placed_on(self._members)
            else:
                self._change_at_s = self._clock() + CHANGE_RETRY_S
        self._rebalance_for_members()
        self._rebalance_by_itself(is_serving)

    def placement_at_start(self, expert_map: ExpertMap) -> ExpertMap | None:
        """The one to begin with, now that the shards' failure domains are known; None while they are not.

        That is `expert_map` where shards have loaded already, and where their domains change nothing or allow no other.
        """
        shards = self.membership.shards
        states = {shard.health.state for shard in shards}
        domains = {shard.health.domain for shard in shards}
        if not self._proposer.needs_domains or not states <= {ProcessState.STARTING, ProcessState.NEW}:
            return expert_map
        if ProcessState.STARTING in states:
            return None
        if len(domains) == 1:
            return expert_map
        even = np.ones(expert_map.expert_to_unit.shape)
        traits = self._traits([shard.rank for shard in shards])
        try:
            return self._proposer.place(even, expert_map, expert_map.placement_version, traits)
        except PlacementError as error:
            logger.warning("replicas of a unit may lie in one failure domain of %s: %s", sorted(domains), error)
            return expert_map

    def plan(self) -> RebalancePlan:
        """What a rebalance would do now. Raises RebalanceRefused when no placement satisfies the configuration."""
        load = self._tracker.estimate(self._expert_map.placement_version, self._clock()).decayed
        new = self._place(load, self.membership.members())
        hysteresis = Hysteresis(self._config.min_gain, self._config.min_assignments)
        traits = self._traits([shard.rank for shard in self.membership.shards])
        speeds = {ep_rank: known.speed or 1.0 for ep_rank, known in traits.items()}
        return plan_rebalance(self._expert_map, new, load, self._proposer.expert_bytes, hysteresis, speeds)

    def begin(self, plan: RebalancePlan, cause: RebalanceCause, reason: str, *, is_serving: bool) -> None:
        """Begins what was planned, if there is anything to move. Raises RebalanceRefused when it cannot begin now.

        cause, reason: why, for series and in words.
        """
        status = self._rebalancer.status()
        if not self.is_idle:
            raise RebalanceRefused(
                f"a rebalance to version {status.target_version} is {status.state}; ask again when it is done",
                retry_after_s=5.0,
            )
        if not is_serving or self._is_one_replaced():
            raise RebalanceRefused("not every process is ready; ask again when the system serves", retry_after_s=5.0)
        for ep_rank, needed in weight_bytes_while_moving(plan, self._proposer.expert_bytes).items():
            limit = self._proposer.traits(ep_rank).max_weight_bytes
            if limit is not None and needed > limit:
                raise RebalanceRefused(
                    f"shard {ep_rank} would hold {needed} bytes of old and new units while they move, its limit is "
                    f"{limit}; raise expert_shards.max_weight_gib, or add shards"
                )
        if plan.changes_anything:
            self._newest_version = plan.new.placement_version
            logger.info("version %d moves %d units, %d bytes", self._newest_version, len(plan.moves), plan.moved_bytes)
            self._members = self.membership.members()
            is_urgent = any(shard.is_lost for shard in self.membership.shards)
            self._rebalancer.begin(plan, cause, reason, is_urgent=is_urgent)

    def _observe_load(self) -> None:
        for source, (ep_rank, counts) in list(self._counts.items()):
            if counts.done():
                del self._counts[source]
                if counts.exception() is None:  # else the process is gone, and its health says so
                    self._tracker.observe(source, counts.result().num_tokens, self._clock())
                    self._shard_traffic.observe(ep_rank, source, counts.result(), self._clock())
        if self._clock() - self._looked_s < LOAD_INTERVAL_S:
            return
        self._looked_s = self._clock()
        sources = {
            f"{shard.name} {shard.health.generation}": shard for shard in self.membership.shards if shard.is_ready
        }
        self._tracker.keep_sources(sources)
        self._shard_traffic.keep({shard.rank for shard in self.membership.shards})
        self.traffic = self._shard_traffic.traffic(self._expert_map)
        for source, shard in sources.items():
            if source not in self._counts:
                self._counts[source] = shard.rank, shard.handle.call("load_counts")

    def _rebalance_for_members(self) -> None:
        if not self.is_idle:
            return
        if self.membership.is_due():
            if self._clock() < self._change_at_s or self._is_one_replaced():
                return
            members = self.membership.members()
            try:
                plan = self.plan()
                are_ready = all(s.is_ready for s in self.membership.shards if s.rank in members)
                cause, reason = self.membership.change()
                self.begin(plan, cause, reason, is_serving=are_ready)
            except RebalanceRefused as error:
                logger.warning("shards %s cannot take over yet: %s", sorted(members), error)
                self._change_at_s = self._clock() + CHANGE_RETRY_S
                return
            if self.is_idle:
                self.membership.are_placed_on(members)
        else:
            self.membership.remove_drained(self._expert_map, self._drain_timeout_s, self._clock())

    def _is_one_replaced(self) -> bool:
        """Whether a shard ends as asked, and is to come back: what it reads meanwhile would be lost with it."""
        return any(shard.is_replaced and not shard.is_lost for shard in self.membership.shards)

    def _check_members(self, ep_ranks: Collection[int]) -> None:
        """Raises RebalanceRefused where no placement on these shards satisfies the configuration."""
        self._place(self._tracker.estimate(self._expert_map.placement_version, self._clock()).decayed, ep_ranks)

    def _place(self, load: Float64Array, ep_ranks: Collection[int]) -> ExpertMap:
        if not ep_ranks:
            raise RebalanceRefused("every shard is gone; ask again when one is ready", retry_after_s=5.0)
        try:
            newest = max(self._newest_version, self._expert_map.placement_version)
            return self._proposer.place(load, self._expert_map, newest + 1, self._traits(ep_ranks))
        except PlacementError as error:
            raise RebalanceRefused(f"no placement can be computed: {error}") from error

    def _traits(self, ep_ranks: Collection[int]) -> dict[int, ShardTraits]:
        """As configured, else as measured; the domain as the shards say."""
        domains = {shard.rank: shard.health.domain for shard in self.membership.shards}
        measured = self._shard_traffic.speeds()
        traits = {}
        for rank in ep_ranks:
            known = self._proposer.traits(rank)
            speed = measured.get(rank) if known.speed is None else known.speed
            traits[rank] = replace(known, speed=speed, domain=domains.get(rank, ""))
        return traits

    def _rebalance_by_itself(self, is_serving: bool) -> None:
        is_due = self._clock() - self._ended_s >= self._config.min_interval_s
        if not (self._config.enabled and is_due and self.is_idle and is_serving):
            return
        self._ended_s = self._clock()  # looked at again after another interval
        try:
            plan = self.plan()
            logger.info("rebalance: %s", plan.reason)
            if plan.is_worth_it:
                self.begin(plan, RebalanceCause.GAIN, plan.reason, is_serving=is_serving)
        except RebalanceRefused as error:
            logger.warning("no rebalance: %s", error)
