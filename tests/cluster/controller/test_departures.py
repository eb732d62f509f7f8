"""Workers that are drained and processes that are replaced, without Ray and without waiting."""

from concurrent.futures import Future

import pytest

from cluster.controller.controller import Controller
from cluster.controller.process import RESTARTS, ProcessState, RoleName
from cluster.controller.rebalancer import Rebalancer
from protos.errors import InvalidRequest, NotServing
from tests.cluster.fake_processes import FakeProcess, run, system


def serving() -> tuple[Controller, dict[str, FakeProcess]]:
    controller, fakes = system()
    run(controller, 4)
    return controller, fakes


def names(controller: Controller) -> list[str]:
    return [name for name, _ in controller.status().processes]


def test_a_drained_worker_gets_nothing_new_before_it_is_told_to_stop_and_is_gone_when_it_has() -> None:
    controller, fakes = serving()
    stopped: Future[None] = Future()
    fakes["worker-0"].answers["stop"] = stopped
    order: list[str] = []
    for name in ("gateway-0", "worker-0"):
        fakes[name].on_call = lambda method, name=name: order.append(f"{name} {method}")  # type: ignore[misc]
    controller._departures.drain_worker(0)
    run(controller, 3)
    steps = [step for step in order if "health" not in step]
    assert steps == ["worker-0 leave", "gateway-0 update_members", "worker-0 stop"]
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {1}
    assert fakes["worker-0"].is_alive
    stopped.set_result(None)
    run(controller, 1)
    assert not fakes["worker-0"].is_alive
    assert "worker-0" not in names(controller)
    assert controller.status().is_serving


def test_a_process_that_does_not_stop_is_killed_when_its_time_is_over() -> None:
    now_s = 0.0
    controller, fakes = system(clock=lambda: now_s)
    run(controller, 4)
    generation = fakes["worker-0"].generation
    fakes["worker-0"].answers["stop"] = Future()
    controller._departures.restart(RoleName.WORKER, 0, is_serving=True)
    run(controller, 4)
    assert fakes["worker-0"].generation == generation
    now_s = 36.0  # 30 s for its requests, 5 s more
    run(controller, 5)
    assert fakes["worker-0"].generation != generation
    assert controller.status().is_serving


def test_a_process_that_is_replaced_is_shown_as_such_while_it_is_away() -> None:
    controller, fakes = serving()
    fakes["shard-0"].restart = fakes["shard-0"].die  # the next one takes its time
    controller._departures.restart(RoleName.SHARD, 0, is_serving=True)
    run(controller, 4)
    health = dict(controller.status().processes)["shard-0"]
    assert (health.state, health.detail) == (ProcessState.DOWN, RESTARTS)


def test_the_last_worker_stays() -> None:
    controller, _ = serving()
    controller._departures.drain_worker(1)
    with pytest.raises(InvalidRequest, match="worker 0 is the last one"):
        controller._departures.drain_worker(0)
    with pytest.raises(InvalidRequest, match="there is no worker 7"):
        controller._departures.drain_worker(7)


def test_a_worker_stays_while_no_other_one_is_ready() -> None:
    controller, fakes = serving()
    fakes["worker-1"].die()
    run(controller, 1)
    with pytest.raises(NotServing, match="no other worker is ready"):
        controller._departures.drain_worker(0)
    fakes["worker-1"].restart()
    run(controller, 4)
    controller._departures.drain_worker(0)
    run(controller, 3)
    assert "worker-0" not in names(controller)


def test_a_process_that_leaves_is_not_replaced_and_is_shown_as_leaving() -> None:
    controller, _ = serving()
    controller._departures.drain_worker(1)
    controller._balance.membership.drain(1)
    for role in (RoleName.WORKER, RoleName.SHARD):
        with pytest.raises(InvalidRequest, match=f"{role}-1 is leaving; nothing takes its place"):
            controller._departures.restart(role, 1, is_serving=True)
    run(controller, 1)
    leaving = {name for name, health in controller.status().processes if health.is_leaving}
    assert leaving == {"worker-1", "shard-1"}


def test_a_shard_is_not_replaced_while_experts_move(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, _ = serving()
    monkeypatch.setattr(Rebalancer, "is_idle", False)
    with pytest.raises(NotServing, match="experts move, so shard-1 stays; ask again when they have"):
        controller._restart(RoleName.SHARD, 1)
    controller._restart(RoleName.WORKER, 1)


@pytest.mark.parametrize("role", list(RoleName))
def test_a_process_is_replaced_and_the_next_one_only_when_everything_serves_again(role: RoleName) -> None:
    controller, fakes = serving()
    name = f"{role}-0"
    generation = fakes[name].generation
    controller._departures.restart(role, 0, is_serving=controller.status().is_serving)
    with pytest.raises(NotServing):
        controller._departures.restart(RoleName.WORKER, 1, is_serving=controller.status().is_serving)
    run(controller, 1)
    with pytest.raises(NotServing):
        controller._departures.restart(RoleName.WORKER, 1, is_serving=controller.status().is_serving)
    run(controller, 6)
    controller._departures.restart(RoleName.WORKER, 1, is_serving=controller.status().is_serving)
    assert fakes[name].generation != generation
    assert dict(controller.status().processes)[name].replaced_generation == generation
    assert controller.status().is_serving
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {0, 1}
    assert len(fakes[name].told("stop")) == 1
    assert fakes["shard-1"].told("stage") == []  # a shard that comes back keeps its units
