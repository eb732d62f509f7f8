"""What is said of a Ray cluster that is not there, before Ray looks for it."""

import socket
from typing import Any

import pytest

from cluster.config import parse_config
from cluster.controller.controller import StartError
from cluster.roles import launch, ray_address
from cluster.roles.launch import Deployment
from cluster.roles.ray_address import check_answers


def refuse_with(monkeypatch: pytest.MonkeyPatch, error: OSError) -> list[Any]:
    """What is connected to from now on."""
    tried: list[Any] = []

    def connect(where: tuple[str, int], timeout_s: float) -> None:
        tried.append(where)
        raise error

    monkeypatch.setattr(socket, "create_connection", connect)
    return tried


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "connection refused; is `ray start --head` running there"),
        (TimeoutError("timed out"), "no answer in 3 s; is `ray start"),
        (socket.gaierror(-2, "Name or service not known"), "name or service not known; is `ray start"),
    ],
)
@pytest.mark.parametrize("address", ["10.0.0.1:6399", "ray://10.0.0.1:6399"])
def test_an_address_where_nobody_answers_is_told_with_the_reason_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch, address: str, error: OSError, reason: str
) -> None:
    tried = refuse_with(monkeypatch, error)
    with pytest.raises(ConnectionError, match=r"Leave ray\.address out") as raised:
        check_answers(address)
    assert str(raised.value).startswith(reason)
    assert tried == [("10.0.0.1", 6399)]


def test_ray_is_not_asked_to_join_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_with(monkeypatch, ConnectionRefusedError(111, "Connection refused"))
    monkeypatch.setattr(launch, "check", lambda config: None)
    monkeypatch.setattr(launch.ray, "init", lambda **settings: pytest.fail("asked"))
    with (
        pytest.raises(StartError, match=r"cannot join Ray at ray\.address 127\.0\.0\.1:6399: connection refused; "),
        Deployment(parse_config({"ray": {"address": "127.0.0.1:6399"}})),
    ):
        pass


def test_auto_is_what_the_environment_says_before_what_this_machine_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = refuse_with(monkeypatch, ConnectionRefusedError(111, "Connection refused"))
    remembered: list[str | None] = ["10.0.0.2:6379"]
    monkeypatch.setattr(ray_address.services, "canonicalize_bootstrap_address", lambda address: remembered[0])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6399")
    with pytest.raises(ConnectionError, match=r"^10\.0\.0\.1:6399 \(RAY_ADDRESS\): connection refused; "):
        check_answers("auto")
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(
        ConnectionError, match=r"^10\.0\.0\.2:6379 \(the latest that was started here\): connection refused"
    ):
        check_answers("auto")
    assert tried == [("10.0.0.1", 6399), ("10.0.0.2", 6379)]
    remembered[0] = None
    with pytest.raises(
        ConnectionError, match=r"^no Ray runs on this machine: `ray start --head` starts one; or leave ray.address out"
    ):
        check_answers("auto")


def test_an_address_in_the_environment_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "foo")
    with pytest.raises(ConnectionError, match="RAY_ADDRESS is 'foo', must be HOST:PORT or ray://HOST:PORT"):
        check_answers("auto")
