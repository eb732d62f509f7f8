"""`mobula generate` before a gateway with and without workers."""

import socket
from collections.abc import Callable

import grpc
import pytest
from typer.testing import CliRunner

from cluster.client import Generation, InferenceClient
from cluster.commands.cli import app
from cluster.commands.generate_command import wait_until_listening, when_up
from protos import generation_pb2
from tests.gateway_front import front


def asking(client: InferenceClient) -> Callable[[], object]:
    return lambda: client.generate("hello", generation_pb2.SamplingParams(max_tokens=1))


def test_who_asks_before_the_workers_are_up_is_told_so_once_and_answered_when_they_are() -> None:
    said: list[str] = []
    slept: list[float] = []
    with front() as opened, InferenceClient(opened.address) as client:
        opened.disconnect()

        def sleep(duration_s: float) -> None:
            slept.append(duration_s)
            if len(slept) == 3:
                opened.connect()

        answers = list(when_up(asking(client), 60.0, lambda wait_s, why: said.append(why), sleep=sleep))
    assert isinstance(answers[-1], Generation)
    assert answers[-1].text == "0"
    assert slept == [1.0, 1.0, 1.0]  # as the gateway hints
    (why,) = said
    assert "no attention worker is ready: the system is starting" in why


def test_the_refusal_is_shown_when_the_time_is_over() -> None:
    now = [0.0]

    def sleep(duration_s: float) -> None:
        now[0] += duration_s

    with front(num_workers=0) as opened, InferenceClient(opened.address) as client:
        with pytest.raises(grpc.RpcError) as raised:
            list(when_up(asking(client), 5.0, lambda wait_s, why: None, clock=lambda: now[0], sleep=sleep))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert now[0] == 5.0


def test_who_asks_before_the_gateway_listens_is_told_so_once_and_answered_when_it_does() -> None:
    said: list[tuple[float, str]] = []
    slept: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    listening: list[socket.socket] = []

    def sleep(duration_s: float) -> None:
        slept.append(duration_s)
        if len(slept) == 3:
            listening.append(socket.create_server(("127.0.0.1", port)))

    wait_until_listening(f"127.0.0.1:{port}", 60.0, lambda wait_s, why: said.append((wait_s, why)), sleep=sleep)
    listening[0].close()
    assert len(slept) == 3
    assert said == [(30.0, f"nobody listens at 127.0.0.1:{port} yet, as while `mobula serve` starts")]


@pytest.mark.parametrize(("wait_s", "waited_s"), [(5.0, 5.0), (600.0, 30.0), (0.0, 0.0)])
def test_an_address_where_nobody_listens_is_waited_for_as_long_as_it_says(wait_s: float, waited_s: float) -> None:
    now = [0.0]

    def sleep(duration_s: float) -> None:
        now[0] += duration_s

    wait_until_listening("127.0.0.1:1", wait_s, lambda wait_s, why: None, clock=lambda: now[0], sleep=sleep)
    assert now[0] == waited_s


@pytest.mark.parametrize("address", ["nowhere.invalid:1", "127.0.0.1:99999", "127.0.0.1"])
def test_an_address_that_cannot_be_called_is_not_waited_for(address: str) -> None:
    def sleep(duration_s: float) -> None:
        raise AssertionError

    wait_until_listening(address, 60.0, lambda wait_s, why: None, sleep=sleep)


def test_after_the_wait_the_command_says_that_nobody_answers() -> None:
    result = CliRunner().invoke(app, ["generate", "hello", "--address", "127.0.0.1:1", "--wait", "0.5"])
    assert result.exit_code == 1
    assert "waiting up to 0.5 s: nobody listens at 127.0.0.1:1" in result.stderr
    assert "nobody answers at 127.0.0.1:1 (Connection refused)" in result.stderr


def test_without_waiting_the_command_says_that_the_system_is_starting() -> None:
    with front(num_workers=0) as opened:
        result = CliRunner().invoke(app, ["generate", "hello", "--address", opened.address, "--wait", "0"])
    assert result.exit_code == 1
    assert "UNAVAILABLE: no attention worker is ready: the system is starting" in result.output


def test_an_answer_is_printed_after_its_prompt() -> None:
    with front() as opened:
        result = CliRunner().invoke(app, ["generate", "hello", "--address", opened.address])
    assert result.output.startswith("hello0\n")
