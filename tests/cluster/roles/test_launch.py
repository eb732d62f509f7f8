"""Starting and taking over a system whose controller is a plain object, without Ray."""

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import parse_config
from cluster.controller.controller import StartError
from cluster.controller.process import ClusterStatus, ProcessHealth, ProcessState
from cluster.roles import launch
from cluster.roles.launch import Deployment

FAILED = ProcessHealth(generation="a", state=ProcessState.FAILED, detail="disk is gone")
READY = ProcessHealth(generation="b", state=ProcessState.READY)


class FakeController:
    """Answers each call at once. is_created: by the one who calls `start`."""

    def __init__(self, *, is_created: bool, healths: list[ProcessHealth]) -> None:
        self._healths = healths
        self.num_stops = 0
        self.start = SimpleNamespace(remote=lambda owner, config: is_created)
        self.status = SimpleNamespace(remote=lambda owner: self._status())
        self.stop = SimpleNamespace(remote=lambda owner, timeout_s: self._stop())

    def _status(self) -> ClusterStatus:
        health = self._healths.pop(0) if len(self._healths) > 1 else self._healths[0]
        return ClusterStatus(processes=(("shard-0", health),), is_serving=health is READY, placement_version=1)

    def _stop(self) -> bool:
        self.num_stops += 1
        return True


def waited(monkeypatch: pytest.MonkeyPatch, controller: FakeController, start_timeout_s: float = 5.0) -> ClusterStatus:
    """What waiting for it gives, after which the deployment is left."""
    monkeypatch.setattr(launch, "check", lambda config: None)
    monkeypatch.setattr(launch, "POLL_S", 0.0)
    monkeypatch.setattr(launch, "end_everything", lambda namespace: None)
    monkeypatch.setattr(launch.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(launch.ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(launch.ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr(Deployment, "_create_controller", lambda self: controller)
    settings: dict[str, Any] = {"ray": {"address": "auto", "start_timeout_s": start_timeout_s}}
    with Deployment(parse_config(settings)) as deployment:
        return deployment.wait_until_serving(lambda status: None)


def test_a_system_that_cannot_start_is_ended_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = FakeController(is_created=True, healths=[FAILED])
    with pytest.raises(StartError, match="shard-0: disk is gone"):
        waited(monkeypatch, controller)
    assert controller.num_stops == 1


def test_a_process_of_a_system_that_ran_before_may_have_failed_and_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = FakeController(is_created=False, healths=[FAILED, FAILED, READY])
    assert waited(monkeypatch, controller).is_serving
    assert controller.num_stops == 1  # at the end of the block, by its owner


def test_a_system_that_ran_before_goes_on_when_who_took_it_over_has_waited_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = FakeController(is_created=False, healths=[FAILED])
    with pytest.raises(StartError, match="not ready after"):
        waited(monkeypatch, controller, start_timeout_s=0.01)
    assert controller.num_stops == 0
