"""The controller changes the number of workers, by hand and by their load; workers are plain objects."""

import itertools
import math
import random
from collections.abc import Callable

import pytest

from cluster.config import WorkerScalingConfig
from cluster.controller.controller import Controller
from cluster.controller.memory_budget import MemoryBudget
from cluster.controller.process import ProcessState, RoleName
from cluster.controller.worker_membership import JOIN_TIMEOUT_S
from cluster.controller.worker_usage import WorkerWork
from protos.errors import InvalidRequest, NotServing
from tests.cluster.fake_processes import FakeProcess, answered, run, system

CONFIG = WorkerScalingConfig(enabled=True, min_count=1, max_count=6, up_window_s=30.0, down_window_s=60.0)
CAPACITY = 64  # sequences that a worker computes at once
GIB = 2**30
PLACES = CAPACITY + CAPACITY // 8  # that gateways give it


def names(controller: Controller) -> list[str]:
    return [name for name, _ in controller.status().processes if name.startswith("worker")]


class Loaded:
    """A controller with two workers, and requests: so many at once."""

    def __init__(self, config: WorkerScalingConfig = CONFIG, memory_budget: MemoryBudget | None = None) -> None:
        self.now_s = 0.0
        self.counts = [2]  # after each change
        self.controller: Controller
        self.fakes: dict[str, FakeProcess]
        self.controller, self.fakes = system(
            2, clock=lambda: self.now_s, worker_scaling=config, memory_budget=memory_budget
        )
        self.bear(lambda: 0.0, 10.0)
        assert self.controller.status().is_serving

    def bear(self, num_requests: Callable[[], float], seconds: float, cache_ratio: float = 0.0) -> None:
        """cache_ratio: of every worker's latent cache."""
        for _ in range(int(seconds)):
            self.now_s += 1.0
            workers = [fake for name, fake in self.fakes.items() if name.startswith("worker") and fake.is_alive]
            there = num_requests()
            each = min(PLACES, math.ceil(there / len(workers)))
            running = min(CAPACITY, each)
            for worker in workers:
                usage = max(cache_ratio, running / CAPACITY)
                worker.answers["work"] = WorkerWork(usage, running, each - running)
            self.fakes["gateway-0"].answers["num_waiting"] = max(0, int(there) - each * len(workers))
            run(self.controller, 3)
            if len(names(self.controller)) != self.counts[-1]:
                self.counts.append(len(names(self.controller)))

    @property
    def turns(self) -> int:
        """How often the direction of change turned."""
        signs = [math.copysign(1, after - before) for before, after in itertools.pairwise(self.counts)]
        return sum(one != other for one, other in itertools.pairwise(signs))


def test_requests_that_wait_at_the_gateway_ask_for_workers_and_fewer_requests_let_them_go() -> None:
    system = Loaded()
    system.bear(lambda: 4 * CAPACITY, 300.0)
    assert 5 <= len(names(system.controller)) <= 6  # 4 / 0.7, to within the tolerance
    assert system.turns == 0
    system.bear(lambda: 10.0, 900.0)
    assert names(system.controller) == ["worker-0"]
    assert system.turns == 1
    assert all(len(fake.told("stop")) == 1 for name, fake in system.fakes.items() if name in ("worker-1", "worker-2"))
    assert system.controller.status().is_serving


def test_full_latent_caches_ask_for_workers_though_nothing_waits() -> None:
    system = Loaded()
    system.bear(lambda: 4.0, 35.0, cache_ratio=0.95)
    assert names(system.controller) == ["worker-0", "worker-1", "worker-2"]


def test_load_on_target_and_a_burst_change_nothing() -> None:
    system = Loaded()
    system.bear(lambda: 2 * CAPACITY * 0.7, 600.0)
    system.bear(lambda: 20.0 * CAPACITY, 20.0)
    system.bear(lambda: 2 * CAPACITY * 0.7, 600.0)
    assert system.counts == [2]


@pytest.mark.parametrize("seed", range(3))
def test_noise_of_a_fifth_does_not_make_the_number_swing(seed: int) -> None:
    noise = random.Random(seed)
    system = Loaded()
    system.bear(lambda: 3 * CAPACITY * noise.uniform(0.8, 1.2), 2400.0)
    assert system.turns == 0
    assert 4 <= system.counts[-1] <= 6


def test_a_worker_or_gateway_that_does_not_answer_decides_nothing() -> None:
    system = Loaded()
    system.fakes["gateway-0"].on_call = lambda method: system.fakes["gateway-0"].answers.update(
        num_waiting=RuntimeError("lost")
    )
    system.bear(lambda: 4 * CAPACITY, 120.0)
    assert system.counts == [2]


def test_a_worker_that_is_added_gets_requests_when_it_is_ready_and_is_missed_by_nobody_before() -> None:
    controller, fakes = system(2)
    run(controller, 4)
    change = answered(controller, lambda: controller.scale_workers(3))
    assert (change.added, change.drained) == ((2,), ())
    fakes["worker-2"].state = ProcessState.LOADING
    run(controller, 3)
    assert controller.status().is_serving
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {0, 1}
    fakes["worker-2"].state = ProcessState.READY
    run(controller, 3)
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {0, 1, 2}
    fakes["worker-2"].die()
    run(controller, 1)
    assert not controller.status().is_serving


def test_a_worker_that_never_starts_holds_up_no_restart_and_no_shards_and_is_given_up_in_time() -> None:
    now_s = 0.0
    controller, fakes = system(2, clock=lambda: now_s)
    run(controller, 4)
    answered(controller, lambda: controller.scale_workers(3))
    fakes["worker-2"].die()
    run(controller, 2)
    assert controller._workers.is_changing
    assert not controller._workers.is_missing_one
    generation = fakes["worker-0"].generation
    answered(controller, lambda: controller.restart(RoleName.WORKER, 0))
    run(controller, 6)
    assert fakes["worker-0"].generation != generation
    now_s = JOIN_TIMEOUT_S - 1.0
    run(controller, 4)
    assert names(controller) == ["worker-0", "worker-1", "worker-2"]
    now_s = JOIN_TIMEOUT_S + 1.0
    run(controller, 4)
    assert names(controller) == ["worker-0", "worker-1"]
    assert not controller._workers.is_changing
    assert controller.status().is_serving


def test_a_worker_that_loads_for_long_is_awaited() -> None:
    now_s = 0.0
    controller, fakes = system(2, clock=lambda: now_s)
    run(controller, 4)
    answered(controller, lambda: controller.scale_workers(3))
    fakes["worker-2"].state = ProcessState.LOADING
    controller._workers.workers[2].is_joining = True  # it had no time to load at once
    for _ in range(3):
        now_s += JOIN_TIMEOUT_S
        run(controller, 1)
    assert names(controller) == ["worker-0", "worker-1", "worker-2"]


def test_a_drained_worker_comes_back_under_its_number() -> None:
    controller, fakes = system(2)
    run(controller, 4)
    answered(controller, lambda: controller.drain_worker(0))
    run(controller, 4)
    assert names(controller) == ["worker-1"]
    assert answered(controller, lambda: controller.scale_workers(2)).added == (0,)
    run(controller, 4)
    assert names(controller) == ["worker-0", "worker-1"]
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {0, 1}
    assert answered(controller, lambda: controller.scale_workers(2)) == ((), ())


def test_more_processes_than_the_machines_memory_takes_are_refused_with_the_number_that_it_takes() -> None:
    budget = MemoryBudget(num_bytes=8 * GIB, worker_bytes=2 * GIB, shard_bytes=GIB)
    controller, _ = system(2, memory_budget=budget)  # two shards, two workers
    run(controller, 4)
    for count in (4, 40):
        message = rf"count is {count}: .* for 3 workers of about 2\.0 GiB beside 2 shards; ask for at most 3,"
        with pytest.raises(InvalidRequest, match=message):
            answered(controller, lambda count=count: controller.scale_workers(count))
    with pytest.raises(InvalidRequest, match=r"count is 5: .* for 4 shards of about 1\.0 GiB beside 2 workers; ask"):
        answered(controller, lambda: controller.scale_shards(5))
    assert answered(controller, lambda: controller.scale_workers(3)).added == (2,)
    with pytest.raises(InvalidRequest, match=r"2 shards of about 1\.0 GiB beside 3 workers"):
        answered(controller, lambda: controller.scale_shards(3))
    run(controller, 4)
    assert answered(controller, lambda: controller.scale_workers(1)).drained == (1, 2)
    assert answered(controller, lambda: controller.scale_shards(4)).added == (2, 3)  # who leaves is not counted


def test_a_machine_that_takes_fewer_processes_than_there_are_lets_them_be() -> None:
    controller, _ = system(2, memory_budget=MemoryBudget(GIB, GIB, GIB))
    run(controller, 4)
    assert answered(controller, lambda: controller.scale_workers(2)) == ((), ())
    assert answered(controller, lambda: controller.scale_shards(2)) == ((), ())
    assert answered(controller, lambda: controller.scale_workers(1)).drained == (1,)


def test_load_adds_as_many_workers_as_the_machines_memory_takes() -> None:
    system = Loaded(memory_budget=MemoryBudget(8 * GIB, 2 * GIB, GIB))
    system.bear(lambda: 4 * CAPACITY, 300.0)
    assert names(system.controller) == ["worker-0", "worker-1", "worker-2"]
    assert system.controller.status().is_serving


def test_workers_leave_only_while_one_that_stays_is_ready() -> None:
    controller, fakes = system(2)
    run(controller, 4)
    fakes["worker-0"].die()
    run(controller, 1)
    with pytest.raises(NotServing, match=r"no worker that would stay is ready \(worker 0\)"):
        answered(controller, lambda: controller.scale_workers(1))
    with pytest.raises(InvalidRequest, match="count is 0"):
        answered(controller, lambda: controller.scale_workers(0))
    with pytest.raises(InvalidRequest, match="count is 500, 2 workers are there and at most 16 are added"):
        answered(controller, lambda: controller.scale_workers(500))
    with pytest.raises(InvalidRequest, match="at most 16 are added"):
        answered(controller, lambda: controller.scale_workers(2**32 - 1))
    assert names(controller) == ["worker-0", "worker-1"]
