"""What other threads tell the engine thread, which sleeps in its poller while there is nothing.

So that it also sees to the sockets there: a ring that ends while nobody asks for anything is closed at once.
"""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from protos.poller import Poller

MessageT = TypeVar("MessageT")


class Inbox(Generic[MessageT]):
    """`put` is for any thread, the rest for the one that polls."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._messages: deque[MessageT] = deque()

    def put(self, message: MessageT) -> None:
        """At the end."""
        self._messages.append(message)
        self._poller.wake()

    def take_all(self) -> Iterator[MessageT]:
        """Messages in their order, also those that come meanwhile."""
        while self._messages:
            yield self._messages.popleft()

    def wait(self) -> None:
        """Until there is a message."""
        while not self._messages:
            self._poller.poll(None)
