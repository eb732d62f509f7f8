"""`mobula trace record --address`: a running system's choices, through the gateway, as a file that replays."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.commands import trace_sampling
from cluster.commands.cli import app
from protos import errors
from router.trace.trace import ExpertIds
from router.trace.trace_file import TraceFile
from tests.fake_controller import FakeController, GatewayHost, admin_server, gateway_host


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_sampling, "ASK_INTERVAL_S", 0.01)


class LeavingController(FakeController):
    """Away from its third call on, or from `leaves_after`, for `num_away` of them."""

    num_away = 0
    leaves_after = 2

    def sample_choices(self) -> tuple[bytes, list[tuple[int, ExpertIds]]]:
        if self.num_sampled >= self.leaves_after and self.num_away:
            self.num_away -= 1
            raise errors.Unavailable("the controller cannot be reached")
        return super().sample_choices()


@pytest.fixture
def controller() -> LeavingController:
    return LeavingController()


@pytest.fixture
def gateway(controller: FakeController) -> Iterator[GatewayHost]:
    with admin_server(controller) as address, gateway_host() as host:
        host.update_admin(address)
        yield host


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["trace", *arguments], env={"COLUMNS": "200"})


def test_a_running_systems_choices_are_recorded_by_worker_and_replayed(gateway: GatewayHost, tmp_path: Path) -> None:
    out = tmp_path / "live.npz"
    result = run("record", "--address", gateway.address, "--out", str(out), "--tokens", "350")
    assert result.exit_code == 0, result.output
    assert "wrote 350 tokens (worker-0 200, worker-1 150)" in result.output
    trace = TraceFile(out)
    assert (trace.num_tokens, trace.header.model.name) == (350, "tiny")
    assert trace.header.source == f"traffic of {gateway.address}"
    assert run("replay", str(out), "--shards", "2", "--policy", "device_limited").exit_code == 0


def test_a_system_without_traffic_or_that_refuses_leaves_no_file(
    gateway: GatewayHost, controller: FakeController, tmp_path: Path
) -> None:
    out = tmp_path / "live.npz"
    arguments = ("record", "--address", gateway.address, "--out", str(out), "--seconds", "0.05")
    controller.num_sampled = -1000
    result = run(*arguments)
    assert result.exit_code == 1
    assert "no token was computed meanwhile" in result.stderr
    controller.error = errors.InvalidRequest("a trace needs capacity_policy dropless")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "dropless" in result.stderr
    result = run(*arguments, "--prompt", "x")
    assert "--address is given" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_controller_that_is_replaced_meanwhile_costs_nothing(
    gateway: GatewayHost, controller: LeavingController, tmp_path: Path
) -> None:
    controller.num_away = 5
    out = tmp_path / "live.npz"
    result = run("record", "--address", gateway.address, "--out", str(out), "--tokens", "350")
    assert "wrote 350 tokens" in result.output
    assert controller.num_away == 0
    assert TraceFile(out).num_tokens == 350


def test_what_was_recorded_before_the_system_went_is_kept(
    gateway: GatewayHost, controller: LeavingController, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_sampling, "AWAY_S", 0.1)
    controller.num_away = 10**9
    out = tmp_path / "live.npz"
    result = run("record", "--address", gateway.address, "--out", str(out), "--tokens", "350")
    assert "interrupted after 200 tokens" in result.output
    assert TraceFile(out).num_tokens == 200


def test_a_system_that_goes_before_the_first_token_is_told_as_gone(
    gateway: GatewayHost, controller: LeavingController, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_sampling, "AWAY_S", 0.1)
    controller.leaves_after, controller.num_away = 1, 10**9
    result = run("record", "--address", gateway.address, "--out", str(tmp_path / "live.npz"), "--tokens", "350")
    assert result.exit_code == 1
    assert "cannot be reached" in result.stderr
    assert list(tmp_path.iterdir()) == []
