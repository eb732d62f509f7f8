"""Processes that are plain objects, and a controller over them: no Ray, no port, no waiting."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from cluster.config import RebalancingConfig, ShardScalingConfig, WorkerScalingConfig
from cluster.controller.balance import Proposer
from cluster.controller.controller import Controller
from cluster.controller.memory_budget import MemoryBudget
from cluster.controller.process import ManagedProcess, ProcessDied, ProcessHealth, ProcessState, RoleName
from experts.load_snapshot import LoadSnapshot
from tests.fake_experts import grouped_gate, placed

PROPOSER = Proposer(
    place=lambda load, current, version, shards: replace(current, placement_version=version), expert_bytes=1
)

T = TypeVar("T")


def counted(num_tokens: np.ndarray, compute_ns: int = 0) -> LoadSnapshot:
    """What a shard says that computed so many assignments, each row alone."""
    total = int(num_tokens.sum())
    return LoadSnapshot(
        num_tokens=num_tokens,
        rows_by_layer=num_tokens.sum(axis=1).astype(np.uint64),
        num_forwards=total,
        num_rows=total,
        num_assignments=total,
        num_experts_read=total,
        compute_ns=compute_ns,
    )


class FakeProcess:
    """Loads at once when told to; `die` and `restart` do what Ray does to an actor.

    answers: what methods return, by name; a future is returned as it is.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.on_call: Callable[[str], None] = lambda method: None
        self.answers: dict[str, Any] = {
            "load_counts": counted(np.zeros((3, 16), dtype=np.uint64)),
            "known_answers": {},
        }
        self.domain = ""
        self.restart()

    def restart(self) -> None:
        self.generation = f"{self.name}.{len(self.calls)}"
        self.state = ProcessState.NEW
        self.is_alive = True
        self.is_starting = False
        self.placement_version = 0
        self.oldest_placement_version: int | None = None  # under which a forward is under way, if not the newest
        self.must_leave = self.is_leaving = self.is_stopping = False
        self.error: Exception | None = None

    def die(self) -> None:
        self.is_alive = False

    def call(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if not self.is_alive:
            future.set_exception(ProcessDied(self.name))
            return future
        if self.is_starting:
            return future  # never answered: the test has no time to wait
        if self.is_stopping and method not in ("health", "stop"):
            future.set_exception(ProcessDied(self.name))
            return future
        self.calls.append((method, args))
        self.on_call(method)
        self.is_leaving = self.is_leaving or method == "leave"
        self.is_stopping = self.is_stopping or method == "stop"
        if method == "load":
            self.state = ProcessState.FAILED if self.error else ProcessState.READY
        if method == "update_placement":
            self.placement_version = args[0].placement_version
        answer = self.answers.get(method, self._health() if method == "health" else None)
        if isinstance(answer, Future):
            return answer
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return future

    def kill(self) -> None:
        self.is_alive = False

    def told(self, method: str) -> list[tuple[Any, ...]]:
        return [args for name, args in self.calls if name == method]

    def _health(self) -> ProcessHealth:
        address = f"{self.generation}:1" if self.state is ProcessState.READY else ""
        detail = str(self.error) if self.state is ProcessState.FAILED else ""
        return ProcessHealth(
            generation=self.generation,
            domain=self.domain,
            state=self.state,
            address=address,
            metrics_address=address,
            detail=detail,
            pid=1,
            must_leave=self.must_leave,
            is_leaving=self.is_leaving,
            is_stopping=self.is_stopping,
            placement_version=self.placement_version,
            oldest_placement_version=self.oldest_placement_version or self.placement_version,
        )


def system(
    num_shards: int = 2,
    num_workers: int = 2,
    clock: Callable[[], float] = lambda: 0.0,
    proposer: Proposer = PROPOSER,
    rebalancing: RebalancingConfig | None = None,
    scaling: ShardScalingConfig | None = None,
    num_replicas: int = 1,
    worker_scaling: WorkerScalingConfig | None = None,
    memory_budget: MemoryBudget | None = None,
) -> tuple[Controller, dict[str, FakeProcess]]:
    names = [(RoleName.SHARD, rank) for rank in range(num_shards)]
    names += [(RoleName.WORKER, rank) for rank in range(num_workers)] + [(RoleName.GATEWAY, 0)]
    fakes = {f"{role}-{rank}": FakeProcess(f"{role}-{rank}") for role, rank in names}
    controller = controller_of(
        fakes, num_shards, clock, proposer, rebalancing, scaling, num_replicas, worker_scaling, memory_budget
    )
    return controller, fakes


def controller_of(
    fakes: dict[str, FakeProcess],
    num_shards: int,
    clock: Callable[[], float] = lambda: 0.0,
    proposer: Proposer = PROPOSER,
    rebalancing: RebalancingConfig | None = None,
    scaling: ShardScalingConfig | None = None,
    num_replicas: int = 1,
    worker_scaling: WorkerScalingConfig | None = None,
    memory_budget: MemoryBudget | None = None,
) -> Controller:
    """One that has just started, over processes that may have run before."""

    def process(name: str) -> ManagedProcess:
        role, _, rank = name.partition("-")
        return ManagedProcess(role=RoleName(role), rank=int(rank), handle=fakes[name])

    def create(role: RoleName, rank: int) -> ManagedProcess:
        name = f"{role}-{rank}"
        fakes[name] = FakeProcess(name)
        return process(name)

    return Controller(
        [process(name) for name in fakes],
        placed(grouped_gate(), num_shards, num_replicas),
        proposer,
        rebalancing or RebalancingConfig(),
        create,
        shard_scaling=scaling,
        worker_scaling=worker_scaling,
        memory_budget=memory_budget,
        clock=clock,
    )


def run(controller: Controller, rounds: int) -> None:
    for _ in range(rounds):
        controller.reconcile()


def answered(controller: Controller, ask: Callable[[], T]) -> T:
    """What another thread that asks the controller is answered or raised, after as many rounds as it takes."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        answer = pool.submit(ask)
        while not answer.done():
            controller.reconcile()
            time.sleep(0.001)
    return answer.result()
