"""The shard's end of rings: accepts workers of the same host and user, computes in their memory. protos/ring.py has the
protocol.

The compute thread owns a connection once it is accepted: it reads the doorbells, and answers in place. Nothing that a
worker writes is trusted; one that sends garbage, or does not read its answers, loses its ring, and no other notices.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

from experts.batcher import ForwardOutput, WaitingForward
from experts.forward_frame import answer_header, next_number
from experts.shard import ExpertShard
from protos import expert_pb2, ring
from protos.errors import InvalidRequest, MobulaError
from protos.guard import RefusalLog
from protos.memory import Memory

logger = logging.getLogger(__name__)

ACCEPT_RETRY_S = 0.1


class RingServer:
    """Listens for those who know `ticket` until `close`."""

    def __init__(self, shard: ExpertShard, uid: int | None = None) -> None:
        """uid: the user whose processes may connect; None for this process's own."""
        self.ticket = ring.Ticket.random()
        self._shard = shard
        self._uid = os.getuid() if uid is None else uid
        self._listener = ring.listen(self.ticket.socket_name)
        self._connections: set[RingConnection] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        self._refusals = RefusalLog(time.monotonic)
        self._thread = threading.Thread(target=self._accept, name="ring", daemon=True)
        self._thread.start()

    @property
    def num_connections(self) -> int:
        """Open ones."""
        return len(self._connections)

    def close(self) -> None:
        """Ends every connection; workers notice at once."""
        with self._lock:
            self._is_closed = True
            connections = list(self._connections)
        ring.shut_down(self._listener)
        self._thread.join()
        self._listener.close()
        for connection in connections:
            connection.shut_down()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._is_closed:
                    return
                logger.warning("a ring could not be accepted: %s", error)  # too many open files, say
                time.sleep(ACCEPT_RETRY_S)
                continue
            try:
                self._admit(sock)
            except (OSError, ring.RingRefused) as error:
                self._refusals.refused("a ring", "a process of this host", error)
                sock.close()
            del sock

    def _admit(self, sock: socket.socket) -> None:
        connection = RingConnection(self._shard, sock, ring.accept(sock, self._uid, self.ticket.secret), self._forget)
        with self._lock:
            self._connections.add(connection)
            if self._is_closed:
                connection.shut_down()
        self._shard.poller.register(sock.fileno(), connection.on_ready, connection.on_end)

    def _forget(self, connection: "RingConnection") -> None:
        with self._lock:
            self._connections.discard(connection)


class RingConnection:
    """One worker's ring. Belongs to the compute thread but for `shut_down`."""

    def __init__(
        self,
        shard: ExpertShard,
        sock: socket.socket,
        memory: memoryview,
        on_closed: Callable[["RingConnection"], None],
    ) -> None:
        self._shard = shard
        self._sock = sock
        self._memory = Memory.of(memory)
        self._on_closed = on_closed
        self._waiting: dict[int, WaitingForward] = {}
        self._last_number = -1
        self._is_open = True

    def shut_down(self) -> None:
        """From any thread: the compute thread finds the end of the socket."""
        ring.shut_down(self._sock)

    def on_ready(self) -> None:
        """One doorbell; the poller comes again while there are more, and other workers have their turn between."""
        try:
            doorbell = self._sock.recv(ring.MAX_DOORBELL_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._close(str(error))
            return
        if not doorbell:
            self._close("the worker ended it")
            return
        try:
            header_bytes, payload, answer = ring.unpack_forward(doorbell, self._memory.num_bytes)
            header = expert_pb2.ForwardHeader.FromString(header_bytes)
        except (DecodeError, InvalidRequest) as error:
            self._close(f"not a forward's doorbell: {error}")
            return
        number = header.sequence_number
        if header.is_cancellation:
            if number in self._waiting:
                self._waiting[number].is_given_up = True
            return
        try:
            self._last_number = next_number(number, self._last_number)
        except InvalidRequest as error:
            logger.warning("a worker's ring is ended: %s", error)
            self._close(str(error))
            return
        waiting = self._shard.submit(
            header,
            self._memory.part(*payload),
            on_done=lambda outcome: self._answer(number, outcome),
            answer=self._memory.part(*answer),
        )
        if waiting is not None:
            self._waiting[number] = waiting

    def on_end(self) -> None:
        """The compute thread has ended."""
        self._close("the shard has stopped")

    def _answer(self, number: int, outcome: ForwardOutput | MobulaError) -> None:
        self._waiting.pop(number, None)
        if not self._is_open:
            return
        header = answer_header(number, outcome)
        try:
            self._sock.send(header.SerializeToString())
        except OSError as error:  # also when the worker lets doorbells pile up
            self._close(f"the answer cannot be sent: {error}")

    def _close(self, reason: str) -> None:
        if not self._is_open:
            return
        self._is_open = False
        logger.info("a ring has ended: %s", reason)
        self._shard.poller.unregister(self._sock.fileno())
        self._sock.close()
        for waiting in self._waiting.values():
            waiting.is_given_up = True
        self._waiting.clear()
        self._memory = Memory.of(b"")  # gives it back, once what is being computed is done
        self._on_closed(self)
