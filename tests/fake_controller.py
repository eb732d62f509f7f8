"""A controller whose answers are known, with a server of its own or behind a gateway."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from cluster.config import GatewayConfig
from cluster.controller.admin_server import AdminServer
from cluster.controller.membership import MemberChange
from cluster.controller.process import ClusterStatus, ProcessHealth, ProcessState, RoleName
from cluster.controller.rebalance import RebalancePlan, RebalanceState, RebalanceStatus, UnitMove
from cluster.gateway.gateway import Gateway
from cluster.gateway.metrics import GatewayMetrics
from protos.credentials import PLAINTEXT, ServerCredentials
from protos.guard import Guard
from protos.loop_thread import LoopThread
from router.trace.header_json import header_to_json
from router.trace.trace import ExpertIds, TraceHeader
from tests.fake_experts import grouped_gate, placed
from tests.router.trace.traces import random_ids, tiny_model

HOST = "127.0.0.1"
MOVES = (UnitMove(0, 1, 3, 2**20), UnitMove(0, 2, 3, 2**20), UnitMove(1, 4, 0, 3 * 2**20))


def rebalance_plan(moves: tuple[UnitMove, ...] = MOVES, placement_version: int = 1) -> RebalancePlan:
    """To the next version."""
    return RebalancePlan(
        old=placed(grouped_gate(), 2, placement_version=placement_version),
        new=placed(grouped_gate(), 2, placement_version=placement_version + 1),
        moves=moves,
        balancedness_before=0.5,
        balancedness_after=0.875,
        step_time_ratio=0.75,
        num_tokens=12_345,
        shard_load=(8_000.0, 4_345.0),
        is_worth_it=bool(moves),
        reason="expected to save 25.0% of the experts' time" if moves else "the placement is already the one",
    )


def serving_status(placement_version: int = 1, rebalance: RebalanceStatus | None = None) -> ClusterStatus:
    """Two shards, a worker and a gateway, all ready."""
    names = ("shard-0", "shard-1", "worker-0", "gateway-0")
    health = {
        name: ProcessHealth(
            generation=f"{name}.0",
            state=ProcessState.READY,
            address=f"10.0.0.1:{5000 + number}",
            pid=100 + number,
            weight_bytes=2**30 if name.startswith("shard") else 0,
        )
        for number, name in enumerate(names)
    }
    return ClusterStatus(
        processes=tuple(health.items()),
        is_serving=True,
        placement_version=placement_version,
        rebalance=rebalance or RebalanceStatus(),
    )


class FakeController:
    """Goes through `ahead`, a status a look, once a rebalance began; then stays with the last one.

    error: what planning raises instead.
    """

    def __init__(self, plan: RebalancePlan | None = None) -> None:
        self.plan = plan or rebalance_plan()
        self.now = serving_status()
        self.ahead: list[ClusterStatus] = life(self.plan)
        self.error: Exception | None = None
        self.num_begun = 0
        self.drained: list[int] = []
        self.num_sampled = 0
        self.ended: list[str] = []

    def status(self) -> ClusterStatus:
        if self.num_begun and self.ahead:
            self.now = self.ahead.pop(0)
        return self.now

    def plan_rebalance(self) -> RebalancePlan:
        if self.error:
            raise self.error
        return self.plan

    def rebalance(self) -> RebalancePlan:
        plan = self.plan_rebalance()
        self.num_begun += 1
        return plan

    def sample_choices(self) -> tuple[bytes, list[tuple[int, ExpertIds]]]:
        """Nothing at first, then tokens of two workers each time."""
        if self.error:
            raise self.error
        self.num_sampled += 1
        model = tiny_model()
        header = header_to_json(TraceHeader(model=model, source="tiny"))
        ranks = (0, 1) if self.num_sampled > 1 else ()
        return header, [(dp_rank, random_ids(model, 100, seed=self.num_sampled)) for dp_rank in ranks]

    def scale_shards(self, count: int) -> MemberChange:
        """As if there were two shards."""
        if self.error:
            raise self.error
        return MemberChange(added=tuple(range(2, count)), drained=tuple(range(count, 2)))

    def scale_workers(self, count: int) -> MemberChange:
        """As if there were one worker."""
        if self.error:
            raise self.error
        return MemberChange(added=tuple(range(1, count)), drained=tuple(range(count, 1)))

    def drain_shard(self, ep_rank: int) -> MemberChange:
        if self.error:
            raise self.error
        self.drained.append(ep_rank)
        return MemberChange(drained=(ep_rank,))

    def drain_worker(self, dp_rank: int) -> None:
        self.ended.append(f"drain worker-{dp_rank}")

    def restart(self, role: RoleName, rank: int) -> None:
        self.ended.append(f"restart {role}-{rank}")


def life(plan: RebalancePlan, *, aborted_while: RebalanceState | None = None) -> list[ClusterStatus]:
    """What statuses show of a rebalance, from one that is not shown yet to its end."""
    old, target, total = plan.old.placement_version, plan.new.placement_version, plan.moved_bytes
    under_way = RebalanceStatus(target_version=target, planned_bytes=total)
    shown = [serving_status(old)]
    for state in (state for state in RebalanceState if state is not RebalanceState.IDLE):
        is_published = state in (RebalanceState.PUBLISHING, RebalanceState.DRAINING, RebalanceState.RELEASING)
        for moved_bytes in (0, total // 2, total) if state is RebalanceState.STAGING else (total,):
            status = replace(under_way, state=state, moved_bytes=moved_bytes)
            shown.append(serving_status(target if is_published else old, status))
        if state is aborted_while:
            result = f"version {target} was given up while {state}: shard-1 was lost"
            ended = replace(status, state=RebalanceState.IDLE, target_version=None, num_aborted=1, last_result=result)
            return [*shown, serving_status(old, ended)]
    result = f"version {target} is served: {len(plan.moves)} units moved"
    ended = replace(
        status,
        state=RebalanceState.IDLE,
        target_version=None,
        num_done=1,
        last_result=result,
        seconds_since_success=0.5,
    )
    return [*shown, serving_status(target, ended)]


@contextmanager
def admin_server(controller: FakeController) -> Iterator[str]:
    """Its host:port."""
    server = AdminServer(controller)
    try:
        yield server.start(HOST)
    finally:
        server.stop()


class GatewayHost:
    """A gateway without workers, on a loop of its own."""

    def __init__(self, front: ServerCredentials = PLAINTEXT, guards: Sequence[Guard] = ()) -> None:
        self._front, self._guards = front, guards
        self.loop = LoopThread("gateway")
        self.gateway, port = self.loop.run(self._start())
        self.address = f"{HOST}:{port}"

    async def _start(self) -> tuple[Gateway, int]:
        gateway = Gateway(GatewayConfig(), GatewayMetrics(), front=self._front, guards=self._guards)
        return gateway, await gateway.start(HOST, 0)

    def update_admin(self, address: str) -> None:
        self.loop.run(self.gateway.update_admin(address))

    def stop(self) -> None:
        self.loop.run(self.gateway.stop(0.0))
        self.loop.stop()


@contextmanager
def gateway_host(front: ServerCredentials = PLAINTEXT, guards: Sequence[Guard] = ()) -> Iterator[GatewayHost]:
    host = GatewayHost(front, guards)
    try:
        yield host
    finally:
        host.stop()
