"""The guard before a server's methods: at first, while a stream lasts, and what it writes into the log."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from protos.credentials import PLAINTEXT
from protos.errors import MobulaError, QueueFull, Unauthenticated
from protos.guard import MAX_LOGGED_PER_S, Guard, RefusalLog

ADDRESS = "127.0.0.1"


class Door:
    """A check that fails when `error` is set."""

    def __init__(self) -> None:
        self.error: MobulaError | None = None
        self.num_checks = 0

    def __call__(self, method: str, context: grpc.aio.ServicerContext) -> None:
        self.num_checks += 1
        if self.error:
            raise self.error


class Handlers:
    """One method of each of the kinds that last."""

    def __init__(self) -> None:
        self.num_ended = 0

    async def generate(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0.005)
        finally:
            self.num_ended += 1

    async def echo(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        try:
            await context.send_initial_metadata(())
            async for request in requests:
                await context.write(request)
        finally:
            self.num_ended += 1


async def run(door: Door, handlers: Handlers, method: str, then: MobulaError | None) -> grpc.aio.AioRpcError | None:
    """Calls the method, reads five answers, has the check fail with `then` or leaves, and waits for the end."""
    server = PLAINTEXT.server((), (), [Guard(door, recheck_s=0.02)])
    methods = {
        "Generate": grpc.unary_stream_rpc_method_handler(handlers.generate),
        "Echo": grpc.stream_stream_rpc_method_handler(handlers.echo),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("T", methods),))
    port = PLAINTEXT.listen(server, f"{ADDRESS}:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"{ADDRESS}:{port}") as channel:
            call = (
                channel.unary_stream("/T/Generate")(b"") if method == "Generate" else channel.stream_stream("/T/Echo")()
            )
            for _ in range(5):
                if method == "Echo":
                    await call.write(b"x")
                assert await call.read() == b"x"
            door.error = then
            if then is None:
                call.cancel()
                await asyncio.sleep(0.1)
                return None
            while await call.read() is not grpc.aio.EOF:
                pass
    except grpc.aio.AioRpcError as error:
        return error
    finally:
        await server.stop(None)
    raise AssertionError("the call ended without a status")


@pytest.mark.parametrize("method", ["Generate", "Echo"])
def test_a_stream_ends_with_the_status_when_the_check_fails_later(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    door, handlers = Door(), Handlers()
    error = asyncio.run(run(door, handlers, method, Unauthenticated("revoked meanwhile")))
    assert error
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAUTHENTICATED, "revoked meanwhile")
    assert handlers.num_ended == 1
    assert door.num_checks >= 2
    assert f"refused /T/{method} from ipv4:127.0.0.1" in caplog.text


@pytest.mark.parametrize("method", ["Generate", "Echo"])
def test_a_client_that_leaves_is_not_refused(method: str, caplog: pytest.LogCaptureFixture) -> None:
    handlers = Handlers()
    assert asyncio.run(run(Door(), handlers, method, None)) is None
    assert handlers.num_ended == 1
    assert "refused" not in caplog.text


def test_refusals_are_logged_up_to_a_limit_and_the_rest_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 7.2
    log = RefusalLog(lambda: now_s)
    for _ in range(MAX_LOGGED_PER_S + 5):
        log.refused("/T/x", "peer", QueueFull("full"))
    assert len(caplog.records) == MAX_LOGGED_PER_S
    now_s = 8.0
    log.refused("/T/x", "peer", QueueFull("full"))
    assert [record.getMessage() for record in caplog.records[-2:]] == [
        "5 more calls were refused",
        "refused /T/x from peer: full",
    ]
