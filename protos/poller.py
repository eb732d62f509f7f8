"""Where one thread sleeps until a socket has something for it or another thread calls: epoll and an eventfd.

Sleeps in the kernel, without the interpreter's lock. Knows nothing of what the sockets say.
"""

import os
import select
import threading
import weakref
from collections.abc import Callable

MAX_POLL_S = 3600.0  # epoll counts milliseconds in 32 bits; who wants to wait longer polls again


class Poller:
    """One thread polls, and callbacks run in it; every other method may be called from any thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._on_ready: dict[int, Callable[[], None]] = {}
        self._on_end: dict[int, Callable[[], None]] = {}
        self._is_ended = False
        self._lock = threading.Lock()  # of registering and ending
        self._polling_thread = 0
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._eventfd, select.EPOLLIN | select.EPOLLET)  # each write is an edge: no read needed
        weakref.finalize(self, os.close, self._eventfd).atexit = False

    def register(self, fd: int, on_ready: Callable[[], None], on_end: Callable[[], None] = lambda: None) -> None:
        """Calls `on_ready` whenever a poll finds that `fd` can be read or has been closed by its peer.

        on_end: called, here or there, when nobody polls any more.
        """
        with self._lock:
            if not self._is_ended:
                self._on_ready[fd], self._on_end[fd] = on_ready, on_end
                self._epoll.register(fd, select.EPOLLIN)
                return
        on_end()

    def unregister(self, fd: int) -> None:
        """Before the fd is closed."""
        if self._on_ready.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            del self._on_end[fd]

    def end(self) -> None:
        """When the polling thread has polled for the last time."""
        with self._lock:
            self._is_ended = True
            on_ends = list(self._on_end.values())
        for on_end in on_ends:
            on_end()

    def wake(self) -> None:
        """Ends the poll that is under way, or else the next one.

        From the polling thread it does nothing: that thread looks at its queues before it polls.
        """
        if threading.get_ident() != self._polling_thread:
            os.eventfd_write(self._eventfd, 1)

    def poll(self, timeout_s: float | None) -> bool:
        """Waits until something is ready or `timeout_s` (None: no limit) has passed, and runs its callbacks.

        Whether there were any: a call of another thread is none.
        """
        self._polling_thread = threading.get_ident()
        had_any = False
        for fd, _ in self._epoll.poll(None if timeout_s is None else min(timeout_s, MAX_POLL_S)):
            on_ready = self._on_ready.get(fd)  # none: the eventfd, or unregistered by the callback before
            if on_ready is not None:
                had_any = True
                on_ready()
        return had_any
