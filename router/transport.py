"""How a frame reaches a shard and its answer comes back: the interface every transport has."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol


class ShardTransport(Protocol):
    """A way to one shard, for one worker. Every method may be called from any thread and returns at once."""

    @property
    def address(self) -> str:
        """For messages to people."""

    @property
    def is_connected(self) -> bool:
        """Whether a forward would be on its way now; may be out of date by the time it is used."""

    def forward(self, sequence_number: int, frame: bytes) -> Future[bytes]:
        """Sends a ForwardRequest frame whose header has `sequence_number`; the future is the ForwardResponse frame.

        The future fails with ShardUnavailable when the shard cannot be reached or the connection breaks, and with
        QueueFull when too many forwards are outstanding. The deadline is the caller's: cancelling the future gives the
        forward up, and its late answer is ignored.
        """

    def close(self) -> None:
        """Ends the connection; forwards that are outstanding fail with ShardUnavailable."""


TransportFactory = Callable[[str], ShardTransport]  # takes the shard's address
