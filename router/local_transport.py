"""A shard in the same process: for tests, and for benchmarks that want to know what the wire costs."""

from collections.abc import Callable
from concurrent.futures import Future

from protos.errors import ShardUnavailable


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

    def forward(self, sequence_number: int, frame: bytes) -> Future[bytes]:
        """The handler pairs its answer by the future, so the sequence number is not looked at."""
        if self._is_closed:
            failed: Future[bytes] = Future()
            failed.set_exception(ShardUnavailable(f"the transport to shard {self._address} is closed"))
            return failed
        return self._handle(frame)

    def close(self) -> None:
        self._is_closed = True
