"""The controller against processes that are plain objects."""

from concurrent.futures import Future
from dataclasses import replace

import pytest

from cluster.controller import controller as controller_module
from cluster.controller import inbox
from cluster.controller.balance import Proposer
from cluster.controller.process import RESTARTS, ProcessDied, ProcessState, RoleName
from protos.errors import DeadlineExceeded
from tests.cluster.fake_processes import FakeProcess, answered, run, system
from tests.fake_experts import grouped_gate, random_placement


def test_new_processes_are_loaded_connected_and_published() -> None:
    controller, fakes = system()
    run(controller, 4)
    assert controller.status().is_serving
    assert len(fakes["shard-0"].told("load")) == 1
    ((_, shards),) = fakes["worker-1"].told("update_placement")
    assert shards == {0: "shard-0.0:1", 1: "shard-1.0:1"}
    workers, metrics, _ = fakes["gateway-0"].told("update_members")[-1]
    assert set(workers) == {0, 1}
    assert set(metrics) == {"shard-0", "shard-1", "worker-0", "worker-1"}


def test_a_process_loads_while_another_one_has_not_started() -> None:
    controller, fakes = system()
    fakes["shard-1"].is_starting = True
    run(controller, 2)
    assert len(fakes["shard-0"].told("load")) == 1
    assert dict(controller.status().processes)["shard-1"].state is ProcessState.STARTING


def test_a_process_that_hangs_keeps_one_round_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, fakes = system()
    run(controller, 4)
    unanswered: list[int] = []

    def wait(futures: list[Future[object]], timeout: float) -> None:
        unanswered.append(sum(not future.done() for future in futures))

    monkeypatch.setattr(controller_module, "wait", wait)
    fakes["worker-0"].is_starting = True  # does not answer
    run(controller, 3)
    assert unanswered == [1, 0, 0]
    assert dict(controller.status().processes)["worker-0"].state is ProcessState.DOWN


def test_a_process_that_hangs_for_long_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "HEALTH_TIMEOUT_S", 0.0)
    now_s = 0.0
    controller, fakes = system(clock=lambda: now_s)
    run(controller, 4)
    hung = fakes["worker-0"].generation
    fakes["worker-0"].is_starting = True  # does not answer
    now_s = 10.0
    run(controller, 2)
    assert fakes["worker-0"].generation == hung
    num_restarts = 0

    def restart() -> None:  # what waited for the process is told that it died
        nonlocal num_restarts
        num_restarts += 1
        worker.pending_health.set_exception(ProcessDied("killed"))
        FakeProcess.restart(fakes["worker-0"])

    (worker,) = [process for process in controller._processes if process.name == "worker-0"]
    fakes["worker-0"].restart = restart  # type: ignore[method-assign]
    now_s = 131.0
    run(controller, 5)
    assert num_restarts == 1
    assert controller.status().is_serving


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


def test_a_worker_learns_where_a_shard_is_now_while_another_one_is_away() -> None:
    controller, fakes = system()
    run(controller, 4)
    away = f"{fakes['shard-0'].generation}:1"
    fakes["shard-0"].die()
    fakes["shard-1"].restart()
    fakes["worker-0"].restart()
    run(controller, 4)
    assert not controller.status().is_serving
    back = f"{fakes['shard-1'].generation}:1"
    for worker in ("worker-0", "worker-1"):
        assert fakes[worker].told("update_placement")[-1][1] == {0: away, 1: back}
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {0, 1}


def test_a_controller_that_never_saw_a_shard_does_with_its_replicas() -> None:
    controller, fakes = system(num_shards=2, num_replicas=2)
    fakes["shard-1"].die()
    run(controller, 4)
    assert fakes["worker-0"].told("update_placement")[-1][1] == {0: "shard-0.0:1"}
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {0, 1}
    assert not controller.status().is_serving


def test_workers_wait_until_every_unit_has_a_shard() -> None:
    controller, fakes = system()
    fakes["shard-1"].die()
    run(controller, 3)
    assert fakes["worker-0"].told("update_placement") == []
    assert all(workers == {} for workers, *_ in fakes["gateway-0"].told("update_members"))


def test_a_process_that_cannot_say_how_it_is_is_down_with_its_reason_and_the_others_are_looked_after(
    caplog: pytest.LogCaptureFixture,
) -> None:
    controller, fakes = system()
    fakes["worker-0"].answers["health"] = PermissionError("no way in")
    run(controller, 6)
    health = dict(controller.status().processes)["worker-0"]
    assert (health.state, health.detail) == (ProcessState.DOWN, "cannot say how it is: PermissionError: no way in")
    assert caplog.text.count("worker-0 cannot say how it is") == 1
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {1}
    del fakes["worker-0"].answers["health"]
    run(controller, 4)
    assert controller.status().is_serving


def test_a_process_that_cannot_say_how_it_is_for_long_is_replaced() -> None:
    now_s = 0.0
    controller, fakes = system(clock=lambda: now_s)
    run(controller, 4)
    faulty = fakes["worker-0"].generation
    fakes["worker-0"].answers["health"] = PermissionError("no way in")
    for later_s in (10.0, 70.0, 119.0):
        now_s = later_s
        run(controller, 2)
        assert fakes["worker-0"].generation == faulty
    now_s = 131.0
    run(controller, 2)
    again = fakes["worker-0"].generation
    assert again != faulty
    del fakes["worker-0"].answers["health"]
    run(controller, 4)
    assert fakes["worker-0"].generation == again
    assert controller.status().is_serving


def test_a_process_that_now_and_then_cannot_say_how_it_is_stays() -> None:
    now_s = 0.0
    controller, fakes = system(clock=lambda: now_s)
    run(controller, 4)
    generation = fakes["worker-0"].generation
    for later_s in (100.0, 200.0, 300.0):
        now_s = later_s
        fakes["worker-0"].answers["health"] = PermissionError("no way in")
        run(controller, 2)
        del fakes["worker-0"].answers["health"]
        run(controller, 2)
    assert fakes["worker-0"].generation == generation


def test_one_that_is_replaced_says_so_also_while_it_cannot_say_how_it_is() -> None:
    controller, fakes = system()
    run(controller, 4)
    fakes["worker-0"].answers["stop"] = Future()  # it takes time
    answered(controller, lambda: controller.restart(RoleName.WORKER, 0))
    fakes["worker-0"].answers["health"] = PermissionError("no way in")
    run(controller, 2)
    assert dict(controller.status().processes)["worker-0"].detail == RESTARTS


def test_a_process_that_fails_at_what_it_is_told_is_told_again_and_the_others_are_told_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    controller, fakes = system()
    fakes["worker-0"].answers["update_placement"] = ValueError("a fault of its own")
    run(controller, 6)
    assert caplog.text.count("worker-0 did not answer") == caplog.text.count("Traceback") == 1  # the rounds are many
    fakes["worker-0"].answers["update_placement"] = ValueError("another fault")
    run(controller, 2)
    assert caplog.text.count("Traceback") == 2
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {1}
    assert not controller.status().is_serving
    del fakes["worker-0"].answers["update_placement"]
    run(controller, 2)
    assert controller.status().is_serving


def test_the_system_stops_in_the_order_gateway_workers_shards() -> None:
    controller, fakes = system()
    run(controller, 4)
    order: list[str] = []
    for fake in fakes.values():
        fake.kill = lambda name=fake.name: order.append(name)  # type: ignore[method-assign]
    controller.stop(drain_timeout_s=0.0)
    assert order == ["gateway-0", "worker-0", "worker-1", "shard-0", "shard-1"]


def test_the_gateway_is_told_who_answers_admin_calls() -> None:
    controller, fakes = system()
    controller.admin_address = "127.0.0.1:7"
    run(controller, 4)
    assert fakes["gateway-0"].told("update_members")[-1][2] == "127.0.0.1:7"


def test_an_operator_whom_the_controllers_thread_keeps_waiting_is_told_and_his_rebalance_does_not_begin_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = random_placement(grouped_gate(), 2, seed=1)
    proposer = Proposer(
        lambda load, current, version, shards: replace(other, placement_version=version), expert_bytes=1
    )
    controller, fakes = system(proposer=proposer)
    run(controller, 4)
    monkeypatch.setattr(inbox, "ASK_TIMEOUT_S", 0.01)
    with pytest.raises(DeadlineExceeded, match="its status says whether"):
        controller.rebalance()
    run(controller, 2)
    assert fakes["shard-0"].told("stage") == fakes["shard-1"].told("stage") == []
    assert controller.status().rebalance.target_version is None
