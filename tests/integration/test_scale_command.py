"""`mobula scale shards` and `mobula drain shard` as an operator calls them, through a real gateway."""

from collections.abc import Iterator

import pytest
from typer.testing import CliRunner, Result

from cluster.commands.cli import app
from protos import errors
from tests.fake_controller import FakeController, GatewayHost, admin_server, gateway_host


@pytest.fixture
def controller() -> FakeController:
    """Of two shards."""
    return FakeController()


@pytest.fixture
def gateway(controller: FakeController) -> Iterator[GatewayHost]:
    with admin_server(controller) as address, gateway_host() as host:
        host.update_admin(address)
        yield host


def run(gateway: GatewayHost, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--address", gateway.address], env={"COLUMNS": "120"})


@pytest.mark.parametrize(
    ("role", "count", "words"),
    [
        ("shards", "4", "shards 2 and 3 start and are then given units; `mobula status`"),
        ("shards", "3", "shard 2 starts and is then given units; `mobula status`"),
        ("shards", "1", "shard 1 gives up its units and then ends; `mobula status`"),
        ("shards", "2", "there are 2 shards already"),
        ("workers", "3", "workers 1 and 2 start and are then given requests"),
        ("workers", "1", "there is 1 worker already"),
    ],
)
def test_scaling_says_which_processes_come_or_go(gateway: GatewayHost, role: str, count: str, words: str) -> None:
    result = run(gateway, "scale", role, count)
    assert result.exit_code == 0, result.output
    assert words in result.output


def test_draining_says_that_it_has_begun(gateway: GatewayHost, controller: FakeController) -> None:
    result = run(gateway, "drain", "shard", "1")
    assert result.exit_code == 0, result.output
    assert "shard 1 gives up its units" in result.output
    assert controller.drained == [1]


def test_what_is_refused_is_one_line_on_stderr(gateway: GatewayHost, controller: FakeController) -> None:
    controller.error = errors.RebalanceRefused("no placement can be computed: too few shards")
    for arguments in (("drain", "shard", "0"), ("scale", "shards", "1"), ("scale", "workers", "2")):
        result = run(gateway, *arguments)
        assert result.exit_code == 1
        assert "too few shards" in result.stderr
