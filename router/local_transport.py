"""A shard in the same process: for tests, and for benchmarks that want to know what the wire costs."""

from collections.abc import Callable
from concurrent.futures import Future

from protos import expert_pb2
from protos.codec import decode_frame
from protos.errors import MobulaError, ShardUnavailable
from protos.memory import Memory
from router.completions import ForwardAnswer, ForwardCall


class LocalTransport:
    """Calls `handle` (frame in, future frame out, e.g. ExpertShard.forward) in the caller's thread."""

    def __init__(self, handle: Callable[[bytes], Future[bytes]], address: str = "local") -> None:
        self._handle = handle
        self._address = address
        self._is_closed = False

    @property
    def address(self) -> str:
        return self._address

    @property
    def is_connected(self) -> bool:
        return not self._is_closed

    def forward(self, call: ForwardCall) -> None:
        """See ShardTransport."""
        if self._is_closed:
            call.end(ShardUnavailable(f"the transport to shard {self._address} is closed"))
            return
        self._handle(call.frame()).add_done_callback(lambda answer: _end(call, answer))

    def cancel(self, call: ForwardCall) -> None:
        """See ShardTransport; here it is computed all the same."""

    def close(self) -> None:
        self._is_closed = True


def _end(call: ForwardCall, answer: Future[bytes]) -> None:
    try:
        header, payload = decode_frame(expert_pb2.ForwardResult, answer.result())
        call.end(ForwardAnswer(header, Memory.of(payload)))
    except MobulaError as error:
        call.end(error)
