"""A client's answer goes on when its gateway ends: the client asks another one for the rest."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from typer.testing import CliRunner

from cluster import client as client_module
from cluster.client import InferenceClient
from cluster.client_access import ClientAccess
from cluster.commands.cli import app
from protos import generation_pb2

MAX_TOKENS = 6


class BreakingGateway:
    """Counts; ends the connection after so many tokens of each call, with this status, until none is left."""

    def __init__(self, num_until_broken: list[int], code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        self.requests: list[generation_pb2.GenerateRequest] = []
        self._num_until_broken = num_until_broken
        self._code = code
        method = grpc.unary_stream_rpc_method_handler(
            self._generate,
            generation_pb2.GenerateRequest.FromString,
            generation_pb2.GenerateResponse.SerializeToString,
        )
        self._server = grpc.server(ThreadPoolExecutor(2))
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("mobula.v1.Inference", {"Generate": method}),)
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.GenerateResponse]:
        self.requests.append(request)
        num_left = self._num_until_broken.pop(0) if self._num_until_broken else MAX_TOKENS
        for token_id in range(len(request.received_token_ids), MAX_TOKENS):
            if not num_left:
                context.abort(self._code, "the gateway ends")
            num_left -= 1
            answer = generation_pb2.GenerateResponse(text=f"{token_id} ", token_ids=[token_id])
            if token_id == MAX_TOKENS - 1:
                answer.finish_reason = generation_pb2.FINISH_REASON_LENGTH
            yield answer

    def close(self) -> None:
        self._server.stop(None)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RESUME_PAUSE_S", 0.01)


def texts(gateway: BreakingGateway, params: generation_pb2.SamplingParams) -> list[str]:
    with InferenceClient(gateway.address, ClientAccess()) as client:
        return [generation.text for generation in client.generate("count", params)]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_the_rest_of_an_answer_is_asked_for_with_the_tokens_that_came(code: grpc.StatusCode) -> None:
    gateway = BreakingGateway([2, 0, 3], code)
    shown = texts(gateway, generation_pb2.SamplingParams(temperature=0.8))
    assert shown == [" ".join(map(str, range(n))) + " " for n in range(1, MAX_TOKENS + 1)]
    assert [list(request.received_token_ids) for request in gateway.requests] == [[], [0, 1], [0, 1], [0, 1, 2, 3, 4]]
    (seed,) = {request.sampling_params.seed for request in gateway.requests}
    assert gateway.requests[0].sampling_params.HasField("seed")
    assert seed > 0  # drawn by the client: a server would draw another one for the rest
    gateway.close()


def test_a_seed_that_was_given_stays() -> None:
    gateway = BreakingGateway([1])
    texts(gateway, generation_pb2.SamplingParams(seed=7))
    assert [request.sampling_params.seed for request in gateway.requests] == [7, 7]
    gateway.close()


@pytest.mark.parametrize(
    ("num_until_broken", "code"), [(0, grpc.StatusCode.UNAVAILABLE), (2, grpc.StatusCode.INTERNAL)]
)
def test_a_call_without_a_token_and_other_errors_are_the_callers(num_until_broken: int, code: grpc.StatusCode) -> None:
    gateway = BreakingGateway([num_until_broken], code)
    with pytest.raises(grpc.RpcError) as raised:
        texts(gateway, generation_pb2.SamplingParams())
    assert raised.value.code() is code
    assert len(gateway.requests) == 1
    gateway.close()


def test_after_a_while_without_a_token_the_error_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RESUME_S", 0.2)
    gateway = BreakingGateway([2, *[0] * 1000])
    with pytest.raises(grpc.RpcError, match="the gateway ends"):
        texts(gateway, generation_pb2.SamplingParams())
    assert len(gateway.requests) > 2
    gateway.close()


def test_mobula_generate_shows_the_whole_answer_and_that_the_connection_broke() -> None:
    gateway = BreakingGateway([2, 0, 0, 3])
    result = CliRunner().invoke(app, ["generate", "count", "--address", gateway.address])
    assert result.exit_code == 0, result.output
    assert result.stdout == "count0 1 2 3 4 5 \n"
    assert result.output.count("the connection broke: asking for the rest, for up to 60 s") == 2
    gateway.close()


def test_mobula_generate_says_that_an_answer_breaks_off() -> None:
    gateway = BreakingGateway([2], grpc.StatusCode.INTERNAL)
    result = CliRunner().invoke(app, ["generate", "count", "--address", gateway.address])
    assert result.exit_code == 1
    assert "the answer is not complete: it breaks off after 2 tokens" in result.output
    assert "error: INTERNAL: the gateway ends" in result.output
    gateway.close()
