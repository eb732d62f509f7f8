"""Calls within the gateway's process."""

import asyncio

import grpc
import grpc.aio
import pytest

from cluster.gateway.local_calls import LocalCallFailed, LocalCalls
from protos import errors, generation_pb2, rpc


async def aborts(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "nobody is there")
    return b""


async def raises(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    raise errors.Unavailable("nobody is there")


@pytest.mark.parametrize("method", [aborts, raises])
def test_the_status_of_a_method_reaches_the_caller_as_it_is(
    method: rpc.UnaryMethod, caplog: pytest.LogCaptureFixture
) -> None:
    calls = LocalCalls([grpc.method_handlers_generic_handler("S", {"M": rpc.unary_handler(method)})])
    with pytest.raises(LocalCallFailed, match="UNAVAILABLE: nobody is there"):
        asyncio.run(calls.call("S/M", generation_pb2.GetModelInfoRequest(), generation_pb2.GetModelInfoResponse))
    assert not caplog.records, "what a method says to its caller is no fault of ours"
