"""What `mobula chaos` says without breaking anything."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.chaos.catalog import SCENARIOS
from cluster.commands.cli import app


def test_every_fault_is_listed() -> None:
    result = CliRunner().invoke(app, ["chaos", "list"])
    assert result.exit_code == 0
    assert all(name in result.stdout for name in SCENARIOS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kill-everything"], "there is no fault kill-everything; there are: kill-shard"),
        (["kill-shard", "--address", "127.0.0.1:1", "--config", "x.yaml"], "with --address one runs already"),
        (["kill-shard", "--address", "127.0.0.1:1"], "does not serve"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["chaos", "run", *arguments])
    assert result.exit_code == 1
    assert said in result.stderr


def test_a_configuration_with_a_fault_starts_nothing(tmp_path: Path) -> None:
    config = tmp_path / "mobula.yaml"
    config.write_text("expert_shards: {coun: 2}\n")
    result = CliRunner().invoke(app, ["chaos", "run", "kill-shard", "--config", str(config)])
    assert result.exit_code == 1
    assert "expert_shards.coun: unknown key" in result.stderr
