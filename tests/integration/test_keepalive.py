"""Clients' pings, to the options of the server that clients reach."""

import asyncio
from contextlib import suppress

import grpc
import grpc.aio

from protos import rpc

PING_MS = 150
OPTIONS = (
    ("grpc.keepalive_time_ms", PING_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


async def stays_connected(min_interval_ms: int, seconds: float) -> bool:
    """Whether an idle channel that pings every PING_MS does, to a server that takes pings at `min_interval_ms`."""
    interval = ("grpc.http2.min_ping_interval_without_data_ms", min_interval_ms)
    options = [interval if name == interval[0] else (name, value) for name, value in rpc.front_options()]
    server = grpc.aio.server(options=options)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
            await asyncio.wait_for(channel.channel_ready(), 10.0)
            with suppress(TimeoutError):
                await asyncio.wait_for(channel.wait_for_state_change(grpc.ChannelConnectivity.READY), seconds)
                return False
            return True
    finally:
        await server.stop(None)


def test_a_client_without_calls_may_ping_as_often_as_the_server_says() -> None:
    assert asyncio.run(stays_connected(PING_MS // 3, seconds=6.0))


def test_a_client_that_pings_more_often_is_cut_off() -> None:
    assert not asyncio.run(stays_connected(60_000, seconds=30.0))
