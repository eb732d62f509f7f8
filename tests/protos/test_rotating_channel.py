"""A channel whose certificate is renewed, over channels that nobody answers."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from protos.rotating_channel import RETIRED_GRACE_S, RotatingChannel
from tests.virtual_time import run_virtually


class FakeChannel:
    def __init__(self) -> None:
        self.graces: list[float | None] = []  # with which it was closed

    def unary_unary(self, method: str) -> "FakeChannel":
        return self

    async def close(self, grace: float | None = None) -> None:
        self.graces.append(grace)


class Renewed:
    """What a rotating channel is made of; the certificate's version is the test's to change."""

    def __init__(self) -> None:
        self.version = 1
        self.made: list[FakeChannel] = []
        self.channel = RotatingChannel(self.make, lambda: self.version)

    def make(self) -> Any:
        self.made.append(FakeChannel())
        return self.made[-1]

    def used(self) -> Any:
        """The channel that a call of now begins on."""
        return self.channel.unary_unary("/S/M")


def test_calls_after_a_renewal_begin_on_another_channel_and_the_one_before_is_closed_when_its_time_is_over() -> None:
    async def renew() -> None:
        renewed = Renewed()
        first = renewed.used()
        assert renewed.used() is first
        renewed.version = 2
        assert renewed.used() is not first
        await asyncio.sleep(RETIRED_GRACE_S - 1.0)
        assert first.graces == []
        await asyncio.sleep(2.0)
        assert first.graces == [None]
        await renewed.channel.close()
        assert [len(channel.graces) for channel in renewed.made] == [1, 1]

    run_virtually(renew())


def test_the_end_closes_retired_channels_with_the_grace_of_all() -> None:
    async def renew() -> None:
        renewed = Renewed()
        for version in (1, 2, 3):
            renewed.version = version
            renewed.used()
            await asyncio.sleep(1.0)
        await renewed.channel.close(5.0)
        await asyncio.sleep(2 * RETIRED_GRACE_S)
        assert [channel.graces for channel in renewed.made] == [[5.0]] * 3

    run_virtually(renew())


@pytest.mark.parametrize("grace", [None, 0.01])
def test_the_end_cancels_calls_that_began_before_a_renewal(grace: float | None) -> None:
    async def renew() -> None:
        version = 1
        channel = RotatingChannel(lambda: grpc.aio.insecure_channel("unix:/nobody/listens"), lambda: version)
        call = channel.unary_unary("/S/M")(b"", wait_for_ready=True)
        await asyncio.sleep(0)
        version = 2
        channel.unary_unary("/S/M")
        await asyncio.sleep(0)
        await channel.close(grace)
        assert call.cancelled()

    asyncio.run(renew())
