"""One long-lived bidirectional gRPC stream to a shard, carrying raw frames.

Everything but `forward`, `close` and the properties runs on the event loop that the caller provides, and that loop owns
the state. Answers are paired with their calls by sequence number. Knows nothing of what the frames say beyond that.

A forward's life:
1. `forward` makes the frame and hands it to the loop.
2. On the loop the call becomes pending and its frame is queued for the writer.
3. The writer task writes one frame at a time to the stream.
4. The reader finds the pending call of each answer and ends it; answers without one are late and ignored.
5. When the stream breaks, every pending call ends with ShardUnavailable at once, and the stream is reopened, waiting
   longer from attempt to attempt. Meanwhile new calls fail at once.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import grpc
import grpc.aio

from protos import expert_pb2, rpc
from protos.codec import decode_frame, join_frame
from protos.credentials import PLAINTEXT, Credentials, PeerRole
from protos.errors import Cancelled, InvalidRequest, QueueFull, ShardUnavailable
from protos.memory import Memory
from router.completions import Carrier, ForwardAnswer, ForwardCall

logger = logging.getLogger(__name__)

FORWARD_METHOD = "/mobula.v1.ExpertShard/Forward"

CONNECT_TIMEOUT_S = 5.0  # until the shard has opened its side of the stream
MIN_RECONNECT_WAIT_S = 0.05
MAX_RECONNECT_WAIT_S = 1.0  # a shard that is back is used again within about this time
MAX_OUTSTANDING_FORWARDS = 64  # a worker has one per layer and micro-batch in flight, so more means that nobody waits


_Outgoing = asyncio.Queue[tuple[ForwardCall | None, bytes]]  # frames, with their call where they have one
OnOpen = Callable[[Mapping[str, str]], Awaitable[None]]


async def _nothing_to_open(metadata: Mapping[str, str]) -> None:
    """A stream without anything beside it."""


class GrpcTransport:
    """The stream to the shard at `address` ("host:port"). Connects in the background from the start."""

    def __init__(
        self,
        address: str,
        loop: asyncio.AbstractEventLoop,
        max_outstanding: int = MAX_OUTSTANDING_FORWARDS,
        on_open: OnOpen = _nothing_to_open,
        on_broken: Callable[[], None] = lambda: None,
        credentials: Credentials = PLAINTEXT,
    ) -> None:
        """on_open: awaited with the shard's metadata before an open stream is used; on_broken: called at its end."""
        self._address = address
        self._loop = loop
        self._max_outstanding = max_outstanding
        self._credentials = credentials
        self._on_open = on_open
        self._on_broken = on_broken
        self._pending: dict[int, ForwardCall] = {}
        self._outgoing: _Outgoing | None = None  # while connected
        self._last_failure = "not connected yet"
        self._is_closed = False
        self._runner = asyncio.run_coroutine_threadsafe(self._keep_connected(), loop)

    @property
    def address(self) -> str:
        return self._address

    @property
    def is_connected(self) -> bool:
        return self._outgoing is not None

    def forward(self, call: ForwardCall) -> None:
        """See ShardTransport."""
        call.carrier = Carrier.GRPC
        try:
            self._loop.call_soon_threadsafe(self._send, call, call.frame())
        except RuntimeError:  # the loop is closed
            call.end(self._unavailable("the event loop has ended"))

    def cancel(self, call: ForwardCall) -> None:
        """See ShardTransport."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._cancel, call)

    def close(self) -> None:
        """See ShardTransport."""
        self._is_closed = True
        self._runner.cancel()

    def _send(self, call: ForwardCall, frame: bytes) -> None:
        if self._outgoing is None or self._is_closed:
            call.end(self._unavailable(self._last_failure))
            return
        if len(self._pending) >= self._max_outstanding:
            for given_up in [pending for pending in self._pending.values() if pending.is_given_up]:
                self._end_unanswered(given_up)
        is_stuck = self._outgoing.qsize() >= MAX_OUTSTANDING_FORWARDS  # with frames of calls that were given up
        if is_stuck or len(self._pending) >= self._max_outstanding:
            call.end(
                QueueFull(
                    f"{len(self._pending)} forwards to shard {self._address} are outstanding, limit is "
                    f"{self._max_outstanding}; wait for answers"
                )
            )
            return
        if len(frame) > rpc.MAX_FRAME_BYTES:
            call.end(
                InvalidRequest(
                    f"the frame for shard {self._address} has {len(frame)} bytes, limit is {rpc.MAX_FRAME_BYTES}; "
                    "lower max_num_batched_tokens"
                )
            )
            return
        self._pending[call.sequence_number] = call
        self._outgoing.put_nowait((call, frame))

    def _cancel(self, call: ForwardCall) -> None:
        if call.sequence_number in self._pending and self._outgoing is not None:
            self._outgoing.put_nowait((None, join_frame(call.cancellation(), ())))

    def _end_unanswered(self, call: ForwardCall) -> None:
        """Of a call that was given up, and whose answer is not awaited any more."""
        del self._pending[call.sequence_number]
        call.end(Cancelled(f"a forward to shard {self._address} was given up"))

    async def _keep_connected(self) -> None:
        """The loop's top: one stream after the other until `close`."""
        wait_s = MIN_RECONNECT_WAIT_S
        try:
            async with self._credentials.channel(self._address, PeerRole.SHARD, rpc.frame_options()) as channel:
                while True:
                    try:
                        was_connected = await self._run_stream(channel)
                    except Exception:
                        logger.exception("the stream to shard %s failed in an unexpected way", self._address)
                        was_connected = False
                        self._fail_pending("internal error of the transport, see the log")
                    wait_s = MIN_RECONNECT_WAIT_S if was_connected else min(2 * wait_s, MAX_RECONNECT_WAIT_S)
                    await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
        finally:
            self._is_closed = True
            self._fail_pending("the transport was closed")

    async def _run_stream(self, channel: grpc.aio.Channel) -> bool:
        """Opens a stream and serves it until it breaks; whether it was open."""
        call = channel.stream_stream(FORWARD_METHOD)()
        was_connected = False
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await call.wait_for_connection()
                metadata = {key: str(value) for key, value in await call.initial_metadata()}
            await self._on_open(metadata)
            was_connected = True
            logger.info("connected to shard %s", self._address)
            await self._serve(call)
            failure = "the shard ended the stream"
        except TimeoutError:
            failure = f"no connection within {CONNECT_TIMEOUT_S} s"
        except grpc.aio.AioRpcError as error:
            failure = f"{error.code().name}: {error.details()}"
        except InvalidRequest as error:
            failure = f"the shard's answer is not a ForwardResponse: {error}"
        finally:
            call.cancel()
            self._on_broken()
        self._fail_pending(failure)
        logger.log(
            logging.WARNING if was_connected else logging.DEBUG, "no stream to shard %s: %s", self._address, failure
        )
        return was_connected

    async def _serve(self, call: grpc.aio.StreamStreamCall) -> None:
        """Writes and reads until the stream ends; a write that fails ends it for the reader too."""
        outgoing: _Outgoing = asyncio.Queue()
        writer = asyncio.create_task(self._write_frames(call, outgoing))
        self._outgoing = outgoing
        try:
            await self._read_answers(call)
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write_frames(self, call: grpc.aio.StreamStreamCall, outgoing: _Outgoing) -> None:
        while True:
            forward, frame = await outgoing.get()
            if forward is None or not forward.is_given_up:
                await call.write(frame)
            elif forward.sequence_number in self._pending:
                self._end_unanswered(forward)

    async def _read_answers(self, call: grpc.aio.StreamStreamCall) -> None:
        async for frame in call:
            header, payload = decode_frame(expert_pb2.ForwardResult, frame)
            forward = self._pending.pop(header.sequence_number, None)
            if forward is not None:
                forward.end(ForwardAnswer(header, Memory.of(payload)))

    def _fail_pending(self, failure: str) -> None:
        self._outgoing = None
        self._last_failure = failure
        pending, self._pending = self._pending, {}
        for forward in pending.values():
            forward.end(self._unavailable(failure))

    def _unavailable(self, failure: str) -> ShardUnavailable:
        return ShardUnavailable(f"no stream to shard {self._address}: {failure}")
