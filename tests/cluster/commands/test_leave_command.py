"""`mobula leave` writes the file and waits until nobody listens."""

import os
import socket
import threading
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from cluster.commands import leave_command
from cluster.commands.cli import app
from cluster.config import parse_config
from cluster.roles.gateway_role import GatewayRole

HOST = "127.0.0.8"


@pytest.fixture(autouse=True)
def pod_ip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_IP", HOST)
    monkeypatch.setattr(leave_command, "POLL_S", 0.01)


def test_it_waits_until_the_port_is_closed(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]

        def close() -> None:
            server.accept()[0].close()
            assert (tmp_path / "leave").exists()
            server.close()

        closing = threading.Thread(target=close)
        closing.start()
        result = CliRunner().invoke(app, ["leave", str(tmp_path / "leave"), "--health-port", str(port)])
        closing.join()
    assert (result.exit_code, result.output.strip()) == (0, "handed over")


def test_it_gives_up_after_its_time(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as server:
        port = str(server.getsockname()[1])
        arguments = ["leave", str(tmp_path / "leave"), "--health-port", port, "--timeout-s", "0.05"]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1


def test_the_file_of_a_container_before_means_nothing(tmp_path: Path) -> None:
    file = tmp_path / "leave"
    file.touch()
    before_s = psutil.Process(os.getppid()).create_time() - 5.0
    os.utime(file, (before_s, before_s))
    role = GatewayRole(parse_config({"leave_file": str(file)}), HOST)
    assert not role.health().must_leave
    file.touch()
    assert role.health().must_leave
    assert "says that its node ends" in role.health().detail


def test_a_process_notices_the_file_and_does_not_take_it_back(tmp_path: Path) -> None:
    file = tmp_path / "leave"
    role = GatewayRole(parse_config({"leave_file": str(file)}), HOST)
    assert not role.health().must_leave
    file.touch()
    assert role.health().must_leave
    file.unlink()
    assert role.health().must_leave


def test_a_file_that_cannot_be_looked_at_keeps_no_process_from_saying_how_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    role = GatewayRole(parse_config({"leave_file": str(tmp_path / "file" / "leave")}), HOST)  # no folder
    assert not role.health().must_leave
