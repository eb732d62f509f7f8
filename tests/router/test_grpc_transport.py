"""The stream to a shard, where no shard is needed."""

from typing import Any

from protos.errors import ShardUnavailable
from protos.loop_thread import LoopThread
from router.grpc_transport import GrpcTransport


class FakeCall:
    """Remembers its ends."""

    def __init__(self) -> None:
        self.ends: list[Any] = []

    def frame(self) -> bytes:
        return b"frame"

    def end(self, outcome: Any) -> None:
        self.ends.append(outcome)


def test_a_forward_after_the_event_loop_has_ended_ends_at_once() -> None:
    thread = LoopThread("loop")
    transport = GrpcTransport("127.0.0.1:1", thread.loop)
    thread.stop()
    call: Any = FakeCall()
    transport.forward(call)
    (end,) = call.ends
    assert isinstance(end, ShardUnavailable)
    transport.cancel(call)
    transport.close()
