"""A shard on the same host: forwards go through shared memory, and over the gRPC stream when they cannot.

The stream comes first and stays: it names the ring, carries what does not fit into it, and when it breaks the ring is
given up too. protos/ring.py has the protocol.

A forward's life:
1. `forward` takes a region for the request and its answer, writes the rows there and rings the shard.
2. The engine thread, waiting in its poller, finds the shard's doorbell on the socket and tells the answer in place.
3. Whoever was told has read it and releases the region; that of a call that was given up is free also only when it was
   answered, because the shard may still write to it.
4. When the socket ends, so do all pending calls, with ShardUnavailable, and the ring is never used again.
"""

import asyncio
import logging
import socket
from collections.abc import Mapping
from contextlib import suppress

from google.protobuf.message import DecodeError

from protos import expert_pb2, ring
from protos.credentials import PLAINTEXT, Credentials
from protos.errors import ShardUnavailable
from protos.memory import Memory
from protos.poller import Poller
from protos.ring import ALIGNMENT, MAX_DOORBELL_BYTES, Region, RingRefused, pack_forward
from router.arena import Arena
from router.completions import Carrier, ForwardAnswer, ForwardCall
from router.grpc_transport import MAX_OUTSTANDING_FORWARDS, GrpcTransport
from router.transport import TransportFactory

logger = logging.getLogger(__name__)


def connect_to(
    loop: asyncio.AbstractEventLoop, poller: Poller, shared_memory_mib: int, credentials: Credentials = PLAINTEXT
) -> TransportFactory:
    """How a router reaches its shards: through `shared_memory_mib` of each ring where it can, else over gRPC."""
    if shared_memory_mib == 0:
        return lambda address: GrpcTransport(address, loop, credentials=credentials)
    return lambda address: RingTransport(address, loop, poller, shared_memory_mib * 2**20, credentials)


class RingTransport:
    """The way to the shard at `address` ("host:port"). Connects in the background from the start."""

    def __init__(
        self,
        address: str,
        loop: asyncio.AbstractEventLoop,
        poller: Poller,
        memory_bytes: int,
        credentials: Credentials = PLAINTEXT,
    ) -> None:
        """poller: the engine thread's. memory_bytes: of the ring's memory."""
        self._poller = poller
        self._memory_bytes = memory_bytes
        self._ring: Ring | None = None
        self._stream = GrpcTransport(
            address, loop, on_open=self._open_ring, on_broken=self._give_up_ring, credentials=credentials
        )

    @property
    def address(self) -> str:
        return self._stream.address

    @property
    def is_connected(self) -> bool:
        return self._stream.is_connected

    @property
    def has_ring(self) -> bool:
        """Whether forwards need not take the stream."""
        return self._ring is not None and self._ring.is_open

    def forward(self, call: ForwardCall) -> None:
        """See ShardTransport."""
        opened = self._ring
        if opened is None or not opened.forward(call):
            self._stream.forward(call)

    def cancel(self, call: ForwardCall) -> None:
        """See ShardTransport."""
        if call.carrier is Carrier.GRPC:
            self._stream.cancel(call)
        elif self._ring is not None:
            self._ring.cancel(call)

    def close(self) -> None:
        """See ShardTransport."""
        self._stream.close()
        self._give_up_ring()

    async def _open_ring(self, metadata: Mapping[str, str]) -> None:
        """On the loop, while the stream is not yet used."""
        text = metadata.get(ring.METADATA_KEY)
        if text is None:
            return
        try:
            sock, memory = await asyncio.to_thread(ring.connect, ring.Ticket.from_text(text), self._memory_bytes)
        except (OSError, RingRefused) as error:
            logger.info("no shared memory with shard %s, the stream carries the data: %s", self.address, error)
            return
        self._ring = Ring(self.address, sock, memory, self._poller)

    def _give_up_ring(self) -> None:
        given_up, self._ring = self._ring, None
        if given_up is not None:
            given_up.shut_down()


class Ring:
    """The shared memory and socket. Belongs to the engine thread but for `shut_down`."""

    def __init__(
        self,
        address: str,
        sock: socket.socket,
        memory: memoryview,
        poller: Poller,
        max_outstanding: int = MAX_OUTSTANDING_FORWARDS,
    ) -> None:
        self._address = address
        self._sock = sock
        self._memory = Memory.of(memory)
        self._poller = poller
        self._max_outstanding = max_outstanding
        self._arena = Arena(len(memory))
        self._pending: dict[int, tuple[ForwardCall, int, int]] = {}  # with the offsets of region and answer
        self.is_open = True
        poller.register(sock.fileno(), self._on_ready)

    @property
    def used_bytes(self) -> int:
        """Of the memory, by calls that are not answered or whose answer is not released."""
        return self._arena.used_bytes

    def forward(self, call: ForwardCall) -> bool:
        """Sends the call; whether there was room for it."""
        if not self.is_open or len(self._pending) >= self._max_outstanding:
            return False
        payload_bytes = call.payload_bytes
        answer_start = -(-payload_bytes // ALIGNMENT) * ALIGNMENT
        offset = self._arena.allocate(answer_start + call.answer_bytes)
        if offset is None:
            return False
        call.write_payload(self._memory.part(offset, payload_bytes).address)
        answer = Region(offset + answer_start, call.answer_bytes)
        try:
            self._sock.send(pack_forward(call.header, Region(offset, payload_bytes), answer))
        except BlockingIOError:  # the shard is behind; what it has not been told of is free
            self._arena.free(offset)
            return False
        except OSError as error:
            self._lose(str(error))
            return False
        call.carrier = Carrier.RING
        self._pending[call.sequence_number] = (call, offset, answer.offset)
        return True

    def cancel(self, call: ForwardCall) -> None:
        """Takes a call back; its region is free when the shard has answered, as ever."""
        if self.is_open and call.sequence_number in self._pending:
            nothing = Region(0, 0)
            with suppress(OSError):  # the shard is behind, or gone
                self._sock.send(pack_forward(call.cancellation(), nothing, nothing))

    def shut_down(self) -> None:
        """From any thread: the engine thread finds the end of the socket at its next poll."""
        ring.shut_down(self._sock)

    def _on_ready(self) -> None:
        """One doorbell; the poller comes again while there are more."""
        try:
            doorbell = self._sock.recv(MAX_DOORBELL_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(str(error))
            return
        if not doorbell:
            self._lose("the shard ended it")
            return
        try:
            header = expert_pb2.ForwardResult.FromString(doorbell)
        except DecodeError as error:
            self._lose(f"its doorbell is not a ForwardResult: {error}")
            return
        pending = self._pending.pop(header.sequence_number, None)
        if pending is None:
            self._lose(f"it answered a forward {header.sequence_number} that is not outstanding")
            return
        call, offset, answer_offset = pending
        num_bytes = 0 if header.HasField("error") else call.answer_bytes
        payload = self._memory.part(answer_offset, num_bytes)
        call.tell(ForwardAnswer(header, payload, release=lambda: self._arena.free(offset)))

    def _lose(self, failure: str) -> None:
        if not self.is_open:
            return
        self.is_open = False
        logger.warning("the ring to shard %s is lost: %s", self._address, failure)
        self._poller.unregister(self._sock.fileno())
        self._sock.close()
        pending, self._pending = self._pending, {}
        self._memory = Memory.of(b"")  # gives it back
        for call, _, _ in pending.values():
            call.end(ShardUnavailable(f"no ring to shard {self._address}: {failure}"))
