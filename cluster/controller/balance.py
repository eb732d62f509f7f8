"""Watches the experts' load, and decides when a rebalance is worth its bytes. The controller's third duty.

One round: take the shards' counters, move a rebalance that is under way on, answer what operators asked, and, where the
configuration says so, begin a rebalance that is worth it. Belongs to the controller's thread but for `ask`.
"""

import logging
import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from cluster.config import RebalancingConfig
from cluster.controller.process import ManagedProcess
from cluster.controller.rebalance import (
    Float64Array,
    Hysteresis,
    RebalancePlan,
    RebalanceStatus,
    largest_weight_bytes,
    plan_rebalance,
)
from cluster.controller.rebalancer import Rebalancer
from protos.errors import DeadlineExceeded, InternalError, MobulaError, RebalanceRefused
from router.expert_map import ExpertMap
from router.load import LoadConfig, LoadTracker
from router.placement import PlacementError

logger = logging.getLogger(__name__)

LOAD_INTERVAL_S = 2.0  # between two looks at the shards' counters
ASK_TIMEOUT_S = 60.0  # a plan for a large model takes seconds


class Proposer(NamedTuple):
    """How placements are computed.

    place: the placement for a load ([num_moe_layers, n_routed_experts] assignments), given the one in use and the
        version of the new one; raises PlacementError.
    """

    place: Callable[[Float64Array, ExpertMap, int], ExpertMap]
    expert_bytes: int
    max_weight_bytes: int | None = None  # of a shard


class Balance:
    """Of one system; its shards and workers are the controller's records."""

    def __init__(
        self,
        *,
        shards: list[ManagedProcess],
        workers: list[ManagedProcess],
        expert_map: ExpertMap,
        proposer: Proposer,
        config: RebalancingConfig,
        publish: Callable[[ExpertMap], None],
        clock: Callable[[], float],
    ) -> None:
        """publish: makes an expert map the one in use."""
        self._shards = shards
        self._proposer = proposer
        self._config = config
        self._clock = clock
        self._rebalancer = Rebalancer(
            shards=shards,
            workers=workers,
            max_bytes_per_s=config.max_mib_per_s * 2**20,
            publish=publish,
            clock=clock,
        )
        num_layers, num_experts = expert_map.expert_to_unit.shape
        self._tracker = LoadTracker(
            num_layers, num_experts, LoadConfig(half_life_s=config.half_life_s, window_s=config.half_life_s)
        )
        self._counts: dict[str, Future[Any]] = {}  # asked for, by process and generation
        self._looked_s = float("-inf")
        self._ended_s = clock()  # the last rebalance
        self._newest_version = expert_map.placement_version
        self._asked: queue.SimpleQueue[tuple[bool, Future[RebalancePlan]]] = queue.SimpleQueue()

    @property
    def is_idle(self) -> bool:
        """Whether no rebalance is under way."""
        return self._rebalancer.is_idle

    def status(self) -> RebalanceStatus:
        """The rebalance under way and those before."""
        return self._rebalancer.status()

    def ask(self, *, start: bool) -> RebalancePlan:
        """The plan for the load as it is, begun if `start`. From any thread but the controller's.

        Raises RebalanceRefused when it cannot begin now, or no placement satisfies the configuration; DeadlineExceeded
        when the controller's thread has no time for it.
        """
        answer: Future[RebalancePlan] = Future()
        self._asked.put((start, answer))
        try:
            return answer.result(ASK_TIMEOUT_S)
        except TimeoutError as error:
            answer.cancel()  # nobody is left to be told: what has not begun must not
            raise DeadlineExceeded(
                f"the controller took longer than {ASK_TIMEOUT_S:.0f} s; its status says whether a rebalance began"
            ) from error

    def round(self, expert_map: ExpertMap, *, is_serving: bool) -> None:
        """One round under the placement in use."""
        self._observe_load()
        was_idle = self.is_idle
        self._rebalancer.step()
        if self.is_idle and not was_idle:
            self._ended_s = self._clock()
        self._answer(expert_map, is_serving)
        self._rebalance_by_itself(expert_map, is_serving)

    def _observe_load(self) -> None:
        for source, counts in list(self._counts.items()):
            if counts.done():
                del self._counts[source]
                if counts.exception() is None:  # else the process is gone, and its health says so
                    self._tracker.observe(source, counts.result(), self._clock())
        if self._clock() - self._looked_s < LOAD_INTERVAL_S:
            return
        self._looked_s = self._clock()
        sources = {f"{shard.name} {shard.health.generation}": shard for shard in self._shards if shard.is_ready}
        self._tracker.keep_sources(sources)
        for source, shard in sources.items():
            if source not in self._counts:
                self._counts[source] = shard.handle.call("load_counts")

    def _answer(self, expert_map: ExpertMap, is_serving: bool) -> None:
        while not self._asked.empty():
            start, answer = self._asked.get()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                plan = self._plan(expert_map)
                if start:
                    self._begin(plan, is_serving)
                answer.set_result(plan)
            except MobulaError as error:
                answer.set_exception(error)
            except Exception as error:  # a fault of a policy must not leave the operator waiting
                logger.exception("no plan could be made")
                answer.set_exception(InternalError(f"no plan could be made: {error}"))

    def _rebalance_by_itself(self, expert_map: ExpertMap, is_serving: bool) -> None:
        is_due = self._clock() - self._ended_s >= self._config.min_interval_s
        if not (self._config.enabled and is_due and self.is_idle and is_serving):
            return
        self._ended_s = self._clock()  # looked at again after another interval
        try:
            plan = self._plan(expert_map)
            logger.info("rebalance: %s", plan.reason)
            if plan.is_worth_it:
                self._begin(plan, is_serving)
        except RebalanceRefused as error:
            logger.warning("no rebalance: %s", error)

    def _plan(self, expert_map: ExpertMap) -> RebalancePlan:
        load = self._tracker.estimate(expert_map.placement_version, self._clock()).decayed
        try:
            new = self._proposer.place(load, expert_map, self._newest_version + 1)
        except PlacementError as error:
            raise RebalanceRefused(f"no placement can be computed: {error}") from error
        hysteresis = Hysteresis(self._config.min_gain, self._config.min_assignments)
        return plan_rebalance(expert_map, new, load, self._proposer.expert_bytes, hysteresis)

    def _begin(self, plan: RebalancePlan, is_serving: bool) -> None:
        status = self._rebalancer.status()
        if not self.is_idle:
            raise RebalanceRefused(
                f"a rebalance to version {status.target_version} is {status.state}; ask again when it is done",
                retry_after_s=5.0,
            )
        if not is_serving:
            raise RebalanceRefused("not every process is ready; ask again when the system serves", retry_after_s=5.0)
        limit = self._proposer.max_weight_bytes
        if limit is not None and (needed := largest_weight_bytes(plan, self._proposer.expert_bytes)) > limit:
            raise RebalanceRefused(
                f"a shard would hold {needed} bytes of old and new units while they move, its limit is {limit}; raise "
                "expert_shards.max_weight_gib, or add shards"
            )
        if plan.moves:
            self._newest_version = plan.new.placement_version
            self._rebalancer.begin(plan)
