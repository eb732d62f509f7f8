"""Starts the processes and keeps the system together: observe, decide, act.

One round of the loop, the same at start, after a process died and when nothing happens:
  1. observe: ask every process for its health; one that does not answer is DOWN; a worker that knows a newer placement
     than the controller was told of it by a controller before this one, which died: that placement goes on;
  2. load: tell every NEW process to load; one that FAILED or hangs is restarted after a while, and is NEW again like
     one that died;
  3. connect: tell every ready worker where the shards are or were last, if that changed since it was told and no unit
     is without one; then the shards to serve that placement alone, so that nothing stays of a rebalance whose
     controller died;
  4. publish: tell the gateway which workers serve, which endpoints hold metrics and who answers admin calls;
  5. balance: watch the experts' load and move them while requests run (balance.py), also when shards come or leave;
  6. scale: have more or fewer shards and workers where the configuration lets their load decide (scaling.py);
  7. answer what operators asked (inbox.py), and let those processes end that are drained or replaced (departures.py).
Tokens never pass here: while the controller is gone, everything that runs goes on. Knows nothing of Ray.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial

from cluster.config import RebalancingConfig, ShardScalingConfig, WorkerScalingConfig
from cluster.controller.balance import Balance, Proposer
from cluster.controller.departures import Departures
from cluster.controller.inbox import Inbox
from cluster.controller.membership import MemberChange
from cluster.controller.memory_budget import MemoryBudget, MemoryRoom
from cluster.controller.process import (
    DOWN,
    DRAINS,
    RESTARTS,
    STARTING,
    ClusterStatus,
    ManagedProcess,
    ProcessDied,
    ProcessHealth,
    ProcessState,
    RoleName,
)
from cluster.controller.rebalance import RebalanceCause, RebalancePlan
from cluster.controller.replica_check import ReplicaCheck
from cluster.controller.shard_usage import shards_by_load
from cluster.controller.worker_membership import WorkerMembership
from cluster.controller.worker_usage import workers_by_load
from protos.errors import MobulaError, NotServing, Unavailable
from router.balance_terms import Traffic
from router.expert_map import ExpertMap
from router.trace.trace import ExpertIds

logger = logging.getLogger(__name__)

SILENT = (STARTING, DOWN)
HEALTH_TIMEOUT_S = 5.0  # a process that takes longer is DOWN for this round; its answer is still awaited
ROUND_S = 0.5  # between two rounds; calls through Ray cost some milliseconds of a core each
BUSY_ROUND_S = 0.05  # while the system is not up, when each round may find something to do
MOVE_ROUND_S = 0.2  # while experts move: requests run, and feel what rounds cost
MAX_SAMPLE_BYTES = 2 * 2**20  # of expert ids in one answer, which must be a client's message
HUNG_S = 120.0  # without an answer of a process that lives; longer than a machine that is out of breath takes
RESTART_WAIT_S = 10.0  # after a process was told to load what it then could not


class StartError(Exception):
    """The system did not come up; the message names the process and its reason."""


class Controller:
    """Owns the processes and the expert map. All its state is touched by one thread only: its own.

    admin_address, metrics_address: host:port of this controller's admin calls and of its Prometheus endpoint, which
    gateways are told; set before `start`.
    """

    def __init__(
        self,
        processes: list[ManagedProcess],
        expert_map: ExpertMap,
        proposer: Proposer,
        rebalancing: RebalancingConfig,
        create: Callable[[RoleName, int], ManagedProcess],
        drain_timeout_s: float = 30.0,
        shard_scaling: ShardScalingConfig | None = None,
        worker_scaling: WorkerScalingConfig | None = None,
        memory_budget: MemoryBudget | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """create: starts the shard or worker of a rank, without waiting. drain_timeout_s: for a drained one to end.

        memory_budget: where all processes run on one machine.
        """
        self._processes = processes
        self._expert_map = expert_map
        self._clock = clock
        self.admin_address = ""
        self.metrics_address = ""
        room = MemoryRoom(memory_budget, processes)
        self._balance = Balance(
            processes=processes,
            create_shard=partial(create, RoleName.SHARD),
            expert_map=expert_map,
            proposer=proposer,
            config=rebalancing,
            drain_timeout_s=drain_timeout_s,
            publish=self._use,
            clock=clock,
            room_for_shards=partial(room.check, RoleName.SHARD),
        )
        self._replica_check = ReplicaCheck(lambda: self._members(RoleName.SHARD), clock)
        self._departures = Departures(processes, drain_timeout_s, clock)
        self._workers = WorkerMembership(
            processes, partial(create, RoleName.WORKER), self._departures, clock, partial(room.check, RoleName.WORKER)
        )
        self._shard_scaling = shards_by_load(
            self._balance.membership, shard_scaling or ShardScalingConfig(), clock, room
        )
        self._worker_scaling = workers_by_load(
            processes, self._workers, worker_scaling or WorkerScalingConfig(), clock, room
        )
        self._is_placed = False  # whether the placement that shards load is settled
        self._inbox = Inbox()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._status = ClusterStatus(processes=(), is_serving=False, placement_version=expert_map.placement_version)

    def start(self) -> None:
        """Begins the rounds; `status` shows how far they got."""
        self._thread.start()

    def status(self) -> ClusterStatus:
        """The system after the latest round."""
        return self._status

    def traffic(self) -> Traffic | None:
        """What the shards computed of late; None before it was looked at. From any thread."""
        return self._balance.traffic

    def num_rebalances(self) -> dict[RebalanceCause, int]:
        """That were begun, by why. From any thread."""
        return self._balance.num_begun()

    def plan_rebalance(self) -> RebalancePlan:
        """What a rebalance would do now. From any other thread. Raises RebalanceRefused."""
        return self._inbox.ask(self._balance.plan)

    def rebalance(self) -> RebalancePlan:
        """Begins one; `status` shows how far it is. From any other thread. Raises RebalanceRefused."""
        return self._inbox.ask(self._begin_rebalance)

    def scale_shards(self, count: int) -> MemberChange:
        """From now on that many shards. Returns once it is decided; `status` shows how far it is.

        From any other thread. Raises InvalidRequest, RebalanceRefused, Unavailable.
        """
        return self._inbox.ask(lambda: self._balance.membership.scale(count))

    def drain_shard(self, ep_rank: int) -> MemberChange:
        """The shard gives its units to the others and ends. As scale_shards."""
        return self._inbox.ask(lambda: self._balance.membership.drain(ep_rank))

    def scale_workers(self, count: int) -> MemberChange:
        """From now on that many workers. As scale_shards. Raises InvalidRequest, NotServing, Unavailable."""
        return self._inbox.ask(lambda: self._workers.scale(count))

    def drain_worker(self, dp_rank: int) -> None:
        """The worker hands its requests over and ends. From any other thread. Raises InvalidRequest, NotServing."""
        self._inbox.ask(lambda: self._departures.drain_worker(dp_rank))

    def restart(self, role: RoleName, rank: int) -> None:
        """Another generation takes the process's place. From any other thread. Raises InvalidRequest, NotServing."""
        self._inbox.ask(lambda: self._restart(role, rank))

    def sample_choices(self) -> tuple[bytes, list[tuple[int, ExpertIds]]]:
        """A trace's header as JSON, and by dp_rank which experts tokens chose since this was asked last.

        From any other thread. Raises Unavailable when no worker answers, and what a worker raises.
        """
        workers = self._inbox.ask(lambda: [worker for worker in self._members(RoleName.WORKER) if worker.is_ready])
        share = MAX_SAMPLE_BYTES // max(1, len(workers))
        calls = [(worker.rank, worker.handle.call("sample_choices", share)) for worker in workers]
        wait([call for _, call in calls], timeout=HEALTH_TIMEOUT_S)
        ended = [(rank, call) for rank, call in calls if call.done()]
        answers = [(rank, call.result()) for rank, call in ended if not isinstance(call.exception(), ProcessDied)]
        if not answers:
            raise Unavailable("no worker says what its tokens chose; ask when the system serves", retry_after_s=1.0)
        return answers[0][1][0], [(rank, topk_ids) for rank, (_, topk_ids) in answers]

    def stop(self, drain_timeout_s: float) -> None:
        """Ends the system in the order of the tokens' way: gateways drain, then workers, then shards."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        for role in (RoleName.GATEWAY, RoleName.WORKER, RoleName.SHARD):
            members = self._members(role)
            stops = [process.handle.call("stop", drain_timeout_s) for process in members]
            wait(stops, timeout=drain_timeout_s + HEALTH_TIMEOUT_S)
            for process in members:
                process.handle.kill()

    def _run(self) -> None:
        while not self._stopping.wait(self._wait_s()):
            try:
                self.reconcile()
            except Exception:  # the loop's top: one failed round must not end supervision
                logger.exception("round failed; trying again")

    def _wait_s(self) -> float:
        if not self._balance.is_idle:
            return MOVE_ROUND_S
        return ROUND_S if self._status.is_serving else BUSY_ROUND_S

    def reconcile(self) -> None:
        """One round."""
        self._observe()
        self._follow_newest_placement()
        if not self._is_newest_placement_known():
            return  # what runs goes on; told of an older one shards would load and move what is overtaken
        self._clear_nodes()
        self._load()
        self._balance.round(self._expert_map, is_serving=self._status.is_serving)
        is_settled = self._status.is_serving and self._balance.is_idle and not self._balance.membership.is_changing
        self._shard_scaling.round(is_settled=is_settled and not self._workers.is_missing_one)
        self._worker_scaling.round(is_settled=is_settled and not self._workers.is_changing)
        self._inbox.answer()
        shards = {p.rank: p for p in self._members(RoleName.SHARD) if p.rank in self._expert_map.ep_ranks}
        # Also of those that are away: a worker that knows one's old address uses its replicas until it is back.
        addresses = {rank: shard.address for rank, shard in shards.items() if shard.address}
        if self._expert_map.is_complete_on(addresses):
            placement = (self._expert_map.placement_version, addresses)
            self._tell(RoleName.WORKER, placement, "update_placement", self._expert_map, addresses)
        if self._balance.is_idle and self._is_placement_used_alone():
            self._tell(RoleName.SHARD, self._expert_map.placement_version, "serve_only", self._expert_map)
        workers = {
            p.rank: p.health.address for p in self._members(RoleName.WORKER) if p.is_connected and not p.is_ending
        }
        members = (workers, self._metrics_addresses(), self.admin_address)
        self._tell(RoleName.GATEWAY, members, "update_members", *members)
        self._workers.note_arrivals()
        self._departures.round()
        self._replica_check.round()
        self._publish_status({rank for rank, shard in shards.items() if shard.is_ready})

    def _restart(self, role: RoleName, rank: int) -> None:
        if role is RoleName.SHARD and not self._balance.is_idle:
            raise NotServing(f"experts move, so {role}-{rank} stays; ask again when they have", retry_after_s=5.0)
        self._departures.restart(role, rank, is_serving=self._status.is_serving)

    def _begin_rebalance(self) -> RebalancePlan:
        plan = self._balance.plan()
        self._balance.begin(plan, RebalanceCause.BY_HAND, "asked for", is_serving=self._status.is_serving)
        self._status = replace(self._status, rebalance=self._balance.status())  # who asked for it sees it from now on
        return plan

    def _members(self, role: RoleName) -> list[ManagedProcess]:
        return [process for process in self._processes if process.role is role]

    def _use(self, expert_map: ExpertMap) -> None:
        """From now on workers are told this one, and processes load it."""
        self._expert_map = expert_map

    def _observe(self) -> None:
        for process in self._processes:
            if process.pending_health is None:
                process.pending_health = process.handle.call("health")
                if not process.cannot_say:
                    process.asked_at_s = self._clock()
        # One that did not answer the last time is not waited for: it would keep what the others need waiting each time.
        answering = [p.pending_health for p in self._processes if p.pending_health and p.health not in SILENT]
        wait(answering, timeout=HEALTH_TIMEOUT_S)
        for process in self._processes:
            before = process.health
            process.health = _answer(process)
            process.address = process.health.address or process.address
            process.go_on_with_departure()
            if before.state is not process.health.state:
                logger.info("%s: %s -> %s %s", process.name, before.state, process.health.state, process.health.detail)

    def _follow_newest_placement(self) -> None:
        for worker in self._members(RoleName.WORKER):
            if worker.is_ready and worker.health.placement_version > self._expert_map.placement_version:
                with worker.forgiven("expert_map"):  # another one may know it too
                    expert_map: ExpertMap = worker.handle.call("expert_map").result(HEALTH_TIMEOUT_S)
                    logger.info("%s knows placement version %d", worker.name, expert_map.placement_version)
                    self._use(expert_map)
                    self._balance.membership.are_placed_on(expert_map.ep_ranks)

    def _is_newest_placement_known(self) -> bool:
        versions = [worker.health.placement_version for worker in self._members(RoleName.WORKER) if worker.is_ready]
        return max(versions, default=0) <= self._expert_map.placement_version

    def _is_placement_used_alone(self) -> bool:
        """Whether every worker knows the placement and has no forward under an older one under way."""
        return all(
            (worker.is_joining and not worker.is_ready)  # one that is ready may compute for a controller before this
            or (worker.is_connected and worker.health.oldest_placement_version == self._expert_map.placement_version)
            for worker in self._members(RoleName.WORKER)
        )

    def _clear_nodes(self) -> None:
        """Processes whose node is about to end hand over what they do."""
        for process in [p for p in self._processes if p.health.must_leave and p.is_ready and not p.is_ending]:
            logger.info("%s leaves: its node ends", process.name)
            if process.role is not RoleName.SHARD or not self._hands_over(process.rank):
                process.is_replaced = True

    def _hands_over(self, ep_rank: int) -> bool:
        """Whether the other shards take its units; else forwards wait until it is back somewhere else."""
        try:
            self._balance.membership.replace(ep_rank)
        except MobulaError as error:
            logger.warning("shard-%d keeps its units to its end: %s", ep_rank, error)
            return any(p.is_leaving for p in self._members(RoleName.SHARD) if p.rank == ep_rank)
        return True

    def _load(self) -> None:
        if not self._is_placed and (expert_map := self._balance.placement_at_start(self._expert_map)) is not None:
            self._use(expert_map)
            self._is_placed = True
        for process in self._processes:
            if process.role is RoleName.SHARD and not self._is_placed:
                continue
            is_loading = process.loading is not None and not process.loading.done()
            if process.health.state is ProcessState.NEW and not is_loading and not process.health.must_leave:
                process.loading = process.handle.call("load", self._expert_map)
                process.restart_at_s = self._clock() + RESTART_WAIT_S
            elif process.health.state is ProcessState.FAILED and self._clock() >= process.restart_at_s:
                process.restart_at_s = self._clock() + RESTART_WAIT_S
                process.handle.restart()
            elif process.hangs and self._clock() - process.asked_at_s >= HUNG_S:
                logger.warning("%s has not said for %.0f s how it is, and is started again", process.name, HUNG_S)
                process.asked_at_s = self._clock()
                process.handle.restart()

    def _tell(self, role: RoleName, value: object, method: str, *args: object) -> None:
        """Calls `method` on every ready process of a role that was not told `value` yet."""
        pending: list[tuple[ManagedProcess, tuple[str, object], Future[object]]] = []
        for process in self._processes:
            news = (process.health.generation, value)
            if process.role is role and process.is_ready and process.told != news:
                pending.append((process, news, process.handle.call(method, *args)))
        for process, news, future in pending:
            with process.forgiven(method):
                future.result(HEALTH_TIMEOUT_S)
                process.told = news

    def _metrics_addresses(self) -> dict[str, str]:
        addresses = {
            p.name: p.health.metrics_address
            for p in self._processes
            if p.is_ready and (p.role is not RoleName.GATEWAY or p.rank > 0)  # gateway 0 is who asks
        }
        return addresses | ({"controller": self.metrics_address} if self.metrics_address else {})

    def _publish_status(self, ready_ranks: set[int]) -> None:
        is_serving = ready_ranks >= set(self._expert_map.ep_ranks) and all(
            process.is_connected or process.is_joining
            for process in self._processes
            if process.role is not RoleName.SHARD
        )
        self._status = ClusterStatus(
            processes=tuple((process.name, _shown(process)) for process in self._processes),
            is_serving=is_serving,
            placement_version=self._expert_map.placement_version,
            rebalance=self._balance.status(),
        )


def _shown(process: ManagedProcess) -> ProcessHealth:
    """Its health, and what it cannot know itself."""
    health = replace(process.health, is_leaving=process.is_leaving, replaced_generation=process.replaced_generation)
    if not (process.is_ending and (process.is_ready or process.health.state is ProcessState.DOWN)):
        return health
    if process.is_replaced:
        return replace(health, detail=RESTARTS)
    what = "its units move to the other shards" if process.role is RoleName.SHARD else "others go on with its requests"
    return replace(health, detail=f"{DRAINS}{what}")


def _answer(process: ManagedProcess) -> ProcessHealth:
    """The health that a process reported. A late answer stays awaited for the next round."""
    silent = STARTING if process.health is STARTING else DOWN
    future = process.pending_health
    if future is None or not future.done():
        return silent
    process.pending_health = None
    try:
        return future.result()
    except ProcessDied:
        return silent
    except Exception as error:  # the process's own: the others are looked after all the same
        health = replace(DOWN, detail=f"cannot say how it is: {type(error).__name__}: {error}")
        if process.health != health:  # once, not each round
            logger.exception("%s cannot say how it is", process.name)
        return health
