"""The controller against processes that are plain objects: no Ray, no port, no waiting."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from cluster.controller import Controller
from cluster.process import ManagedProcess, ProcessDied, ProcessHealth, ProcessState, RoleName
from tests.fake_experts import grouped_gate, placed


class FakeProcess:
    """Loads at once when told to; `die` and `restart` do what Ray does to an actor."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.restart()

    def restart(self) -> None:
        self.generation = f"{self.name}.{len(self.calls)}"
        self.state = ProcessState.NEW
        self.is_alive = True
        self.is_starting = False
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
        self.calls.append((method, args))
        if method == "load":
            self.state = ProcessState.FAILED if self.error else ProcessState.READY
        future.set_result(self._health() if method == "health" else None)
        return future

    def kill(self) -> None:
        self.is_alive = False

    def told(self, method: str) -> list[tuple[Any, ...]]:
        return [args for name, args in self.calls if name == method]

    def _health(self) -> ProcessHealth:
        address = f"{self.generation}:1" if self.state is ProcessState.READY else ""
        detail = str(self.error) if self.state is ProcessState.FAILED else ""
        return ProcessHealth(
            generation=self.generation, state=self.state, address=address, metrics_address=address, detail=detail, pid=1
        )


def system(
    num_shards: int = 2, num_workers: int = 2, clock: Callable[[], float] = lambda: 0.0
) -> tuple[Controller, dict[str, FakeProcess]]:
    names = [(RoleName.SHARD, rank) for rank in range(num_shards)]
    names += [(RoleName.WORKER, rank) for rank in range(num_workers)] + [(RoleName.GATEWAY, 0)]
    fakes = {f"{role}-{rank}": FakeProcess(f"{role}-{rank}") for role, rank in names}
    processes = [ManagedProcess(role=role, rank=rank, handle=fakes[f"{role}-{rank}"]) for role, rank in names]
    return Controller(processes, placed(grouped_gate(), num_shards), clock), fakes


def run(controller: Controller, rounds: int) -> None:
    for _ in range(rounds):
        controller.reconcile()


def test_new_processes_are_loaded_connected_and_published() -> None:
    controller, fakes = system()
    run(controller, 4)
    assert controller.status().is_serving
    assert len(fakes["shard-0"].told("load")) == 1
    ((_, shards),) = fakes["worker-1"].told("update_placement")
    assert shards == {0: "shard-0.0:1", 1: "shard-1.0:1"}
    workers, metrics = fakes["gateway-0"].told("update_members")[-1]
    assert set(workers) == {0, 1}
    assert set(metrics) == {"shard-0", "shard-1", "worker-0", "worker-1"}


def test_a_process_loads_while_another_one_has_not_started() -> None:
    controller, fakes = system()
    fakes["shard-1"].is_starting = True
    run(controller, 2)
    assert len(fakes["shard-0"].told("load")) == 1
    assert dict(controller.status().processes)["shard-1"].state is ProcessState.STARTING


def test_nothing_is_told_twice_while_nothing_changes() -> None:
    controller, fakes = system()
    run(controller, 10)
    assert len(fakes["worker-0"].told("update_placement")) == 1
    assert len(fakes["worker-0"].told("load")) == 1


def test_a_restarted_shard_is_loaded_again_and_its_new_address_reaches_every_worker() -> None:
    controller, fakes = system()
    run(controller, 4)
    fakes["shard-1"].die()
    run(controller, 1)
    assert not controller.status().is_serving
    fakes["shard-1"].restart()
    run(controller, 4)
    assert controller.status().is_serving
    assert fakes["worker-0"].told("update_placement")[-1][1][1] == f"{fakes['shard-1'].generation}:1"


def test_a_dead_worker_leaves_the_gateway_and_returns_after_its_restart() -> None:
    controller, fakes = system()
    run(controller, 4)
    fakes["worker-0"].die()
    run(controller, 1)
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {1}
    fakes["worker-0"].restart()
    run(controller, 4)
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {0, 1}


def test_a_process_that_cannot_load_is_named_with_its_reason() -> None:
    controller, fakes = system()
    fakes["shard-0"].error = ValueError("tensor x is truncated")
    run(controller, 3)
    assert controller.status().failures == ["shard-0: tensor x is truncated"]


def test_a_process_that_could_not_load_is_replaced_after_a_while() -> None:
    now_s = 0.0
    controller, fakes = system(clock=lambda: now_s)
    fakes["shard-0"].error = OSError("disk is gone")
    run(controller, 5)
    assert len(fakes["shard-0"].told("load")) == 1
    failed = fakes["shard-0"].generation
    now_s = 60.0
    run(controller, 4)
    assert fakes["shard-0"].generation != failed
    assert controller.status().is_serving


def test_a_restarted_worker_serves_only_when_it_knows_the_shards() -> None:
    controller, fakes = system()
    run(controller, 4)
    fakes["shard-1"].die()
    fakes["worker-0"].restart()
    run(controller, 4)
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {1}
    fakes["shard-1"].restart()
    run(controller, 4)
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {0, 1}
    assert controller.status().is_serving


def test_workers_wait_until_every_shard_is_ready() -> None:
    controller, fakes = system()
    fakes["shard-1"].die()
    run(controller, 3)
    assert fakes["worker-0"].told("update_placement") == []
    assert all(workers == {} for workers, _ in fakes["gateway-0"].told("update_members"))


def test_the_system_stops_in_the_order_gateway_workers_shards() -> None:
    controller, fakes = system()
    run(controller, 4)
    order: list[str] = []
    for fake in fakes.values():
        fake.kill = lambda name=fake.name: order.append(name)  # type: ignore[method-assign]
    controller.stop(drain_timeout_s=0.0)
    assert order == ["gateway-0", "worker-0", "worker-1", "shard-0", "shard-1"]
