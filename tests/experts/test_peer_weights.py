"""Copies whose source is a plain object: which thread touches a call, and how a block is left."""

import asyncio
import threading
from collections.abc import Iterator

import grpc
import pytest

from experts import peer_weights
from experts.peer_weights import PeerWeights
from experts.weight_store import Unit
from protos.credentials import PLAINTEXT
from protos.loop_thread import LoopThread
from tests.fake_experts import small_model

UNIT = Unit(1, 0, (3,))


class FakeCall:
    """Ends without a frame."""

    def __init__(self) -> None:
        self.cancelled_in = ""
        self.is_cancelled = threading.Event()

    async def read(self) -> object:
        return grpc.aio.EOF

    def cancel(self) -> None:
        self.cancelled_in = threading.current_thread().name
        self.is_cancelled.set()


class FakeChannel:
    """Has one call and never closes."""

    def __init__(self, call: FakeCall) -> None:
        self._call = call

    def unary_stream(self, method: str):
        return lambda request, timeout: self._call

    async def close(self, grace: float) -> None:
        await asyncio.Event().wait()


class CancelledCall(FakeCall):
    """Is cancelled on its loop while it is read."""

    async def read(self) -> object:
        raise asyncio.CancelledError


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread("copies")
    yield thread
    thread.stop()


def test_a_call_is_cancelled_where_it_lives_and_a_connection_that_does_not_close_spoils_nothing(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_weights, "FRAME_TIMEOUT_S", 0.2)
    call = FakeCall()
    with PeerWeights(loop, PLAINTEXT, small_model(), {UNIT: "peer:1"}, 1e9) as peers:
        peers._channels["peer:1"] = FakeChannel(call)  # type: ignore[assignment]
        assert peers.copy(UNIT, 3, None) is None  # not whole
        assert call.is_cancelled.wait(5.0)
    assert call.cancelled_in == "copies"


def test_a_copy_that_is_cancelled_on_its_loop_leaves_the_expert_to_the_checkpoint(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_weights, "FRAME_TIMEOUT_S", 0.2)
    with PeerWeights(loop, PLAINTEXT, small_model(), {UNIT: "peer:1"}, 1e9) as peers:
        peers._channels["peer:1"] = FakeChannel(CancelledCall())  # type: ignore[assignment]
        assert peers.copy(UNIT, 3, None) is None
