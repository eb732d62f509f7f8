"""A whole run, on a gateway that hangs, lies or breaks when a fault says so."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pytest

from cluster.chaos import run
from cluster.chaos.fault import Fault
from cluster.chaos.run import RunConfig, RunResult, run_fault
from cluster.chaos.system import ChaosRefused
from cluster.client_access import ClientAccess
from cluster.controller.process import ClusterStatus
from tests.cluster.chaos.fake_gateway import Gateway
from tests.fake_controller import serving_status

CONFIG = RunConfig(seconds=0.5, num_clients=3, max_tokens=8)


class FakeSystem:
    """Serves, but for the `num_down` looks that come next."""

    access = ClientAccess()

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.address = f"127.0.0.1:{gateway.port}"
        self.num_down = 0
        self.shard_pid = 1

    def status(self) -> ClusterStatus | None:
        self.num_down -= 1
        return replace(serving_status(), is_serving=self.num_down < 0)

    def pids(self) -> Mapping[str, int]:
        return {"shard-0": self.shard_pid}

    def cpu_seconds_beside(self, pids: object) -> float:
        return 0.0


class Switch(Fault):
    """Calls one thing, and after a while another."""

    hold_s = 0.3

    def __init__(self, on: Callable[[], object], off: Callable[[], object], lost: Mapping[str, int]) -> None:
        self._on, self._off, self._lost = on, off, lost

    def inject(self, system: object) -> Mapping[str, int]:
        self._on()
        return self._lost

    def heal(self, system: object) -> None:
        self._off()


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSystem]:
    for name, seconds in (("MIN_CALM_S", 0.3), ("MAX_CALM_S", 30.0), ("MIN_TAIL_S", 0.1), ("MAX_RESTORE_S", 1.0)):
        monkeypatch.setattr(run, name, seconds)
    gateway = Gateway()
    yield FakeSystem(gateway)
    gateway.close()


def run_switched(system: FakeSystem, name: str, lost: Mapping[str, int] | None = None) -> RunResult:
    gateway = system.gateway
    fault = Switch(lambda: setattr(gateway, name, True), lambda: setattr(gateway, name, False), lost or {})
    return run_fault(fault, system, CONFIG)  # type: ignore[arg-type]


def test_a_pause_is_a_stall_and_no_loss(system: FakeSystem) -> None:
    report = run_switched(system, "hangs").report
    assert report.is_good
    assert report.stall_max_s is not None
    assert Switch.hold_s * 0.9 < report.stall_max_s < 5.0
    assert report.throughput_ratio is not None


def test_other_tokens_are_told(system: FakeSystem) -> None:
    report = run_switched(system, "lies").report
    assert report.changed > 0
    assert not report.is_good


def test_redundancy_is_back_when_the_lost_process_is_replaced_and_all_serves(system: FakeSystem) -> None:
    missing = run_switched(system, "hangs", lost={"shard-0": system.shard_pid})
    assert missing.report.time_to_redundancy_s is None
    assert any("redundancy was not back" in note for note in missing.notes)
    replaced = run_switched(system, "hangs", lost={"shard-0": system.shard_pid + 1})
    assert replaced.report.time_to_redundancy_s is not None


def test_a_process_that_misses_a_question_is_waited_for(system: FakeSystem) -> None:
    system.num_down = 3
    assert run_switched(system, "hangs").report.is_good


def test_a_system_that_does_not_serve_is_left_alone(system: FakeSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MAX_WHOLE_S", 0.3)
    system.num_down = 1000
    with pytest.raises(ChaosRefused, match="does not serve all of its processes"):
        run_switched(system, "hangs")
