"""`mobula status` and `mobula rebalance` as an operator calls them, through a real gateway."""

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from cluster.commands import admin_command, rebalance_watch
from cluster.commands.cli import app
from cluster.controller.admin_server import AdminServer
from cluster.controller.balance import Proposer
from cluster.controller.process import ProcessHealth, ProcessState
from cluster.controller.rebalance import RebalancePlan, RebalanceState
from protos import errors
from tests.cluster.fake_processes import counted, system
from tests.fake_controller import (
    HOST,
    FakeController,
    GatewayHost,
    admin_server,
    gateway_host,
    life,
    rebalance_plan,
    serving_status,
)
from tests.fake_experts import grouped_gate, random_placement


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalance_watch, "POLL_S", 0.001)


@pytest.fixture
def controller() -> FakeController:
    return FakeController()


@pytest.fixture
def gateway(controller: FakeController) -> Iterator[GatewayHost]:
    with admin_server(controller) as address, gateway_host() as host:
        host.update_admin(address)
        yield host


def run(gateway: GatewayHost, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--address", gateway.address], env={"COLUMNS": "120"})


def test_status_shows_processes_placement_and_rebalance(gateway: GatewayHost) -> None:
    result = run(gateway, "status")
    assert result.exit_code == 0, result.output
    for word in ("shard-1", "10.0.0.1:5001", "1.0 GiB", "serving, placement version 1", "rebalance: idle"):
        assert word in result.output


def test_status_says_why_a_process_failed(gateway: GatewayHost, controller: FakeController) -> None:
    failed = ProcessHealth(generation="a", state=ProcessState.FAILED, detail="OSError: [disk] is gone", pid=7)
    controller.now = replace(serving_status(), processes=(("shard-0", failed),), is_serving=False)
    result = run(gateway, "status")
    assert result.exit_code == 0
    assert "OSError: [disk] is gone" in result.output
    assert "not serving" in result.output


def test_status_as_json_is_one_object_and_nothing_else(gateway: GatewayHost) -> None:
    fields = json.loads(run(gateway, "status", "--json").stdout)
    assert [process["name"] for process in fields["processes"]] == ["shard-0", "shard-1", "worker-0", "gateway-0"]
    assert fields["is_serving"] is True
    assert fields["rebalance"]["state"] == "idle"


def test_a_dry_run_shows_moves_gain_and_cost_and_begins_nothing(
    gateway: GatewayHost, controller: FakeController
) -> None:
    result = run(gateway, "rebalance", "--dry-run")
    assert result.exit_code == 0, result.output
    for word in ("placement version 1 → 2", "5.0 MiB", "0.500 → 0.875", "x 0.750 (-25.0%)", "worth it by itself: yes"):
        assert word in result.output
    assert controller.num_begun == 0


def test_a_dry_run_as_json_has_the_plan_of_the_proto(gateway: GatewayHost) -> None:
    fields = json.loads(run(gateway, "rebalance", "--dry-run", "--json").stdout)
    assert fields["moved_bytes"] == sum(move["num_bytes"] for move in fields["moves"]) == 5 * 2**20
    assert fields["started"] is False
    assert fields["outcome"] is None


def test_a_rebalance_shows_its_plan_and_is_not_waited_for_without_a_terminal(
    gateway: GatewayHost, controller: FakeController
) -> None:
    result = run(gateway, "rebalance")
    assert result.exit_code == 0, result.output
    assert result.output.index("5.0 MiB") < result.output.index("begun")
    assert controller.num_begun == 1


def test_waiting_names_each_stage_and_how_it_ended(gateway: GatewayHost) -> None:
    result = run(gateway, "rebalance", "--wait")
    assert result.exit_code == 0, result.output
    stages = [state.value for state in RebalanceState if state is not RebalanceState.IDLE]
    assert [line.strip() for line in result.output.splitlines() if line.strip() in stages] == stages
    assert "done: version 2 is served: 3 units moved" in result.output


def test_an_aborted_rebalance_ends_with_status_1_and_its_reason(
    gateway: GatewayHost, controller: FakeController
) -> None:
    controller.ahead = life(controller.plan, aborted_while=RebalanceState.STAGING)
    result = run(gateway, "rebalance", "--wait")
    assert result.exit_code == 1
    assert "aborted: version 2 was given up while staging: shard-1 was lost" in result.output


def test_how_it_ended_is_in_the_json_when_it_was_waited_for(gateway: GatewayHost, controller: FakeController) -> None:
    controller.ahead = life(controller.plan, aborted_while=RebalanceState.ACTIVATING)
    result = run(gateway, "rebalance", "--wait", "--json")
    assert result.exit_code == 1
    fields = json.loads(result.stdout)
    assert (fields["started"], fields["outcome"]) == (True, "aborted")
    assert "shard-1 was lost" in fields["result"]


def test_on_a_terminal_it_is_waited_for_with_a_bar_of_bytes(
    gateway: GatewayHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_command, "console", Console(force_terminal=True, width=120))
    result = run(gateway, "rebalance")
    assert result.exit_code == 0, result.output
    assert "5.0/5.0 MiB" in result.output
    assert "is served" in result.output


def test_a_plan_that_moves_nothing_ends_at_once(gateway: GatewayHost, controller: FakeController) -> None:
    controller.plan = rebalance_plan(moves=())
    result = run(gateway, "rebalance", "--wait")
    assert result.exit_code == 0, result.output
    assert "the placement is already the one" in result.output
    assert "nothing is moved" in result.output


def test_a_rebalance_that_cannot_begin_is_an_error_alone_without_a_plan(
    gateway: GatewayHost, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rebalance() -> RebalancePlan:
        raise errors.RebalanceRefused("not every process is ready; ask again when the system serves")

    monkeypatch.setattr(controller, "rebalance", rebalance)
    result = run(gateway, "rebalance")
    assert result.stderr == "error: FAILED_PRECONDITION: not every process is ready; ask again when the system serves\n"
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [["--dry-run"], [], ["--json", "--wait"]])
def test_what_the_controller_refuses_is_said_on_stderr_without_a_traceback(
    gateway: GatewayHost, controller: FakeController, arguments: list[str]
) -> None:
    controller.error = errors.RebalanceRefused("a rebalance to version 2 is staging; ask again when it is done")
    result = run(gateway, "rebalance", *arguments)
    assert result.exit_code == 1
    assert "error: FAILED_PRECONDITION: a rebalance to version 2 is staging" in result.stderr
    assert "mobula serve" not in result.stderr
    assert result.stdout == ""


def test_control_c_ends_the_waiting_and_not_the_rebalance(
    gateway: GatewayHost, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(admin_command, "wait_until_ended", interrupt)
    result = run(gateway, "rebalance", "--wait")
    assert result.exit_code == 130
    assert "the rebalance goes on" in result.stderr
    assert controller.num_begun == 1


def test_a_rebalance_that_never_begins_is_an_error_that_says_where_to_look(
    gateway: GatewayHost, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebalance_watch, "BEGIN_TIMEOUT_S", 0.0)
    controller.ahead = []
    result = run(gateway, "rebalance", "--wait")
    assert result.exit_code == 1
    assert "its log says why; `mobula status` shows how far it is" in result.stderr.replace("\n", " ")


def test_a_gateway_that_does_not_know_the_controller_is_an_error_without_a_wrong_hint() -> None:
    with gateway_host() as host:
        result = run(host, "status")
    assert result.exit_code == 1
    assert "UNAVAILABLE: the gateway does not know the controller yet" in result.stderr
    assert "is this its --address?" not in result.stderr


def test_nobody_at_the_address_is_an_error_with_a_hint() -> None:
    with gateway_host() as host:
        pass
    result = run(host, "status")
    assert result.exit_code == 1
    assert "is this its --address?" in result.stderr.replace("\n", " ")


def test_an_operator_moves_experts_of_a_controller_that_supervises_processes() -> None:
    """The real controller and its thread; the processes are plain objects that obey at once."""
    target = random_placement(grouped_gate(), 2, seed=1)
    proposer = Proposer(
        place=lambda load, current, version, shards: replace(target, placement_version=version), expert_bytes=2**20
    )
    controller, fakes = system(proposer=proposer)
    fakes["shard-0"].answers["load_counts"] = counted(np.full((3, 16), 1000, dtype=np.uint64))
    for worker in ("worker-0", "worker-1"):
        fakes[worker].answers["oldest_placement_version"] = 2
    admin = AdminServer(controller)
    controller.admin_address = admin.start(HOST)
    controller.start()
    try:
        with gateway_host() as host:
            host.update_admin(controller.admin_address)
            wait_until_serving(host)
            assert fakes["gateway-0"].told("update_members")[-1][2] == controller.admin_address
            plan = json.loads(run(host, "rebalance", "--dry-run", "--json").stdout)
            result = run(host, "rebalance", "--wait", "--json")
            assert result.exit_code == 0, result.output
            fields = json.loads(result.stdout)
            assert fields["moves"] == plan["moves"] != []
            assert fields["outcome"] == "done"
            status = json.loads(run(host, "status", "--json").stdout)
            assert (status["placement_version"], status["rebalance"]["num_done"]) == (2, 1)
    finally:
        admin.stop()
        controller.stop(0.0)


def wait_until_serving(gateway: GatewayHost) -> None:
    while not json.loads(run(gateway, "status", "--json").stdout)["is_serving"]:
        pass  # each look takes a moment; the test's own time limit ends it
