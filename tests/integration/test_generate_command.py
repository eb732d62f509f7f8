"""`mobula generate` before a gateway with and without workers."""

from collections.abc import Callable

import grpc
import pytest
from typer.testing import CliRunner

from cluster.client import Generation, InferenceClient
from cluster.commands.cli import app
from cluster.commands.generate_command import when_up
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


def test_an_address_without_a_gateway_is_not_waited_for() -> None:
    result = CliRunner().invoke(app, ["generate", "hello", "--address", "127.0.0.1:1", "--wait", "60"])
    assert result.exit_code == 1
    assert "nobody answers at 127.0.0.1:1 (Connection refused)" in result.output


def test_without_waiting_the_command_says_that_the_system_is_starting() -> None:
    with front(num_workers=0) as opened:
        result = CliRunner().invoke(app, ["generate", "hello", "--address", opened.address, "--wait", "0"])
    assert result.exit_code == 1
    assert "UNAVAILABLE: no attention worker is ready: the system is starting" in result.output


def test_an_answer_is_printed_after_its_prompt() -> None:
    with front() as opened:
        result = CliRunner().invoke(app, ["generate", "hello", "--address", opened.address])
    assert result.output.startswith("hello0\n")
