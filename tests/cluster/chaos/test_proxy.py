"""gRPC through the proxy of chaos, in all its weathers."""

import time
from collections.abc import Iterator

import grpc
import grpc.aio
import pytest

from cluster.chaos.faults.link import NOT_A_NUMBER, spoil
from cluster.chaos.proxy import CALM, LinkProxy, Weather
from protos.loop_thread import LoopThread

TIMEOUT_S = 5.0


class Echo:
    """A gRPC server that answers with what it was sent."""

    def __init__(self) -> None:
        self.loop = LoopThread("echo")
        self.port = self.loop.run(self._start())

    async def _start(self) -> int:
        async def echo(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            return request

        self._server = grpc.aio.server()
        handler = grpc.method_handlers_generic_handler("echo", {"Echo": grpc.unary_unary_rpc_method_handler(echo)})
        self._server.add_generic_rpc_handlers((handler,))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return port

    def close(self) -> None:
        self.loop.run(self._server.stop(None))
        self.loop.stop()


class Caller:
    """A channel through the proxy."""

    def __init__(self, proxy: LinkProxy, echo: Echo) -> None:
        self.proxy = proxy
        self.ports = [echo.port]
        options = [("grpc.http_proxy", proxy.url), ("grpc.initial_reconnect_backoff_ms", 50)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{echo.port}", options=options)
        self._echo = self.channel.unary_unary("/echo/Echo")

    def call(self, request: bytes = b"hello", timeout: float = TIMEOUT_S) -> bytes:
        return self._echo(request, timeout=timeout, wait_for_ready=True)


@pytest.fixture
def caller() -> Iterator[Caller]:
    echo, proxy = Echo(), LinkProxy()
    caller = Caller(proxy, echo)
    assert caller.call() == b"hello"
    yield caller
    caller.channel.close()
    proxy.close()
    echo.close()


def test_a_cut_link_ends_calls_and_takes_no_new_ones_until_it_is_calm(caller: Caller) -> None:
    caller.proxy.set_weather(caller.ports, Weather(is_cut=True))
    with pytest.raises(grpc.RpcError):
        caller.call(timeout=0.3)
    caller.proxy.set_weather(caller.ports, CALM)
    assert caller.call() == b"hello"


@pytest.mark.parametrize("weather", [Weather(holds_answers=True), Weather(holds_requests=True)])
def test_what_is_held_arrives_when_the_weather_changes(caller: Caller, weather: Weather) -> None:
    caller.proxy.set_weather(caller.ports, weather)
    call = caller.channel.unary_unary("/echo/Echo").future(b"late", timeout=TIMEOUT_S)
    with pytest.raises(grpc.FutureTimeoutError):
        call.result(0.3)
    caller.proxy.set_weather(caller.ports, CALM)
    assert call.result() == b"late"


def test_delay_takes_both_ways(caller: Caller) -> None:
    caller.proxy.set_weather(caller.ports, Weather(delay_s=0.05))
    started_s = time.monotonic()
    assert caller.call() == b"hello"
    assert time.monotonic() - started_s >= 0.1


def test_answers_are_spoiled_and_requests_are_not(caller: Caller) -> None:
    caller.proxy.set_weather(caller.ports, Weather(spoil=lambda chunk: chunk.replace(b"a" * 600, b"b" * 600)))
    assert caller.call(b"a" * 600) == b"b" * 600


def test_other_ports_have_other_weather(caller: Caller) -> None:
    caller.proxy.set_weather([caller.ports[0] + 1], Weather(is_cut=True))
    assert caller.call() == b"hello"


def test_a_spoiled_chunk_has_the_same_length() -> None:
    spoiled = spoil(bytes(1000))
    assert len(spoiled) == 1000
    assert NOT_A_NUMBER in spoiled
    assert spoil(b"short") == b"short"
