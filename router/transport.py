"""How a forward reaches a shard and its answer comes back: the interface every transport has."""

from collections.abc import Callable
from typing import Protocol

from router.completions import ForwardCall


class ShardTransport(Protocol):
    """A way to one shard, for one worker."""

    @property
    def address(self) -> str:
        """For messages to people."""

    @property
    def is_connected(self) -> bool:
        """Whether a forward would be on its way now; may be out of date by the time it is used. Any thread asks."""

    def forward(self, call: ForwardCall) -> None:
        """Sends the call and returns at once; the engine thread's method.

        The call ends with the shard's answer, with ShardUnavailable when the shard cannot be reached or the connection
        breaks, or with QueueFull when too many forwards are outstanding. The deadline is the caller's, who may give a
        call up; its late answer is ignored.
        """

    def cancel(self, call: ForwardCall) -> None:
        """Tells the shard that nobody waits for a call, so that it is not computed if it still waits there.

        A hint, which may be lost; the call ends all the same. The engine thread's method.
        """

    def close(self) -> None:
        """Ends the connection; forwards that are outstanding end with ShardUnavailable. From any thread."""


TransportFactory = Callable[[str], ShardTransport]  # takes the shard's address
