"""A client's channel whose certificate is renewed while it is used.

gRPC fixes a channel's credentials when it is made. This one makes another as soon as the certificate on disk is
another, for the calls from then on; those under way end on the channel that they began on.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

RETIRED_GRACE_S = 3600.0  # for calls that began before a renewal; then they are cut off

MakeChannel = Callable[[], grpc.aio.Channel]


class RotatingChannel(grpc.aio.Channel):  # type: ignore[misc]
    """Used on one event loop. What `unary_unary` and its like return is for calls of now: ask again for later ones."""

    def __init__(self, make: MakeChannel, version: Callable[[], int]) -> None:
        """make: a channel with the newest certificate, which has `version()`."""
        self._make = make
        self._newest_version = version
        self._version = version()
        self._channel = make()
        self._retired: dict[grpc.aio.Channel, asyncio.Task[None]] = {}  # each with what will close it

    def unary_unary(self, *args: Any, **kwargs: Any) -> grpc.aio.UnaryUnaryMultiCallable:
        return self._newest().unary_unary(*args, **kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> grpc.aio.UnaryStreamMultiCallable:
        return self._newest().unary_stream(*args, **kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> grpc.aio.StreamUnaryMultiCallable:
        return self._newest().stream_unary(*args, **kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> grpc.aio.StreamStreamMultiCallable:
        return self._newest().stream_stream(*args, **kwargs)

    async def close(self, grace: float | None = None) -> None:
        channels = [self._channel, *self._retired]
        for task in self._retired.values():
            task.cancel()
        self._retired.clear()
        await asyncio.gather(*(channel.close(grace) for channel in channels))

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._newest().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._newest().channel_ready()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(None)

    def _newest(self) -> grpc.aio.Channel:
        version = self._newest_version()
        if version != self._version:
            retired, self._channel, self._version = self._channel, self._make(), version
            self._retired[retired] = asyncio.get_running_loop().create_task(self._retire(retired))
        return self._channel

    async def _retire(self, channel: grpc.aio.Channel) -> None:
        """Not by closing it with that grace: gRPC closes a channel once, so no shorter grace could be given later."""
        await asyncio.sleep(RETIRED_GRACE_S)
        del self._retired[channel]
        await channel.close()
