"""The shard's gRPC server: raw frames in and out of streams, the ticket of its ring, load, copies of weights, health.
No logic.

Answers go out in the order in which they are ready. A stream that sends bytes that are no frame, or a sequence number
that waits already, ends with INVALID_ARGUMENT; the other streams do not notice. From a worker that does not read its
answers nothing more is read. When a stream ends, its forwards that still wait are dropped.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from experts.batcher import ForwardOutput, WaitingForward
from experts.forward_frame import answer_frame, next_number
from experts.ring_server import RingServer
from experts.shard import ExpertShard
from experts.weight_frames import frames
from protos import expert_pb2, rpc
from protos.codec import decode_frame
from protos.credentials import PLAINTEXT, Credentials, PeerRole
from protos.errors import InternalError, InvalidRequest, MobulaError, StalePlacement, to_status
from protos.memory import Memory
from protos.ring import METADATA_KEY, Ticket

logger = logging.getLogger(__name__)

SERVICE = "mobula.v1.ExpertShard"

# Of one stream; then nothing more is read from it. A worker waits for 64 at most, besides those that it gave up.
MAX_UNWRITTEN_ANSWERS = 256


class ExpertServicer:
    """One shard's methods, over raw bytes."""

    def __init__(self, shard: ExpertShard, ring_ticket: Ticket | None = None) -> None:
        self._shard = shard
        self._metadata = () if ring_ticket is None else ((METADATA_KEY, ring_ticket.to_text()),)

    async def forward(self, request_iterator: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """ExpertShard.Forward."""
        await context.send_initial_metadata(self._metadata)  # tells the worker that the stream is open
        answers = _Answers(asyncio.get_running_loop())
        writer = asyncio.create_task(answers.write_to(context))
        try:
            async for frame in request_iterator:
                answers.take(self._shard, frame)
                if answers.num_unwritten >= MAX_UNWRITTEN_ANSWERS:
                    await answers.written_down_to(MAX_UNWRITTEN_ANSWERS - 1)
            await answers.written_down_to(0)  # what the worker, having closed its side, still waits for
        except InvalidRequest as error:
            logger.warning("the stream of %s is ended: %s", context.peer(), error)
            await context.abort_with_status(to_status(error))
        finally:
            answers.give_up()
            writer.cancel()

    async def get_shard_load(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """ExpertShard.GetShardLoad."""
        rpc.parse(expert_pb2.GetShardLoadRequest, request)
        load = self._shard.load()
        response = expert_pb2.GetShardLoadResponse(
            ep_rank=self._shard.ep_rank,
            num_units=self._shard.num_units,
            num_forwards=load.num_forwards,
            num_rows=load.num_rows,
            num_assignments=load.num_assignments,
            weight_bytes=self._shard.weight_bytes,
            layers=[
                expert_pb2.ShardLayerLoad(layer_id=layer_id, num_tokens=num_tokens.tolist())
                for layer_id, num_tokens in zip(self._shard.moe_layer_ids, load.num_tokens, strict=True)
            ],
        )
        return bytes(response.SerializeToString())

    async def copy_expert(self, request: bytes, context: grpc.aio.ServicerContext) -> rpc.Responses:
        """ExpertShard.CopyExpert. As fast as the other shard reads: a frame waits until the stream takes it."""
        asked = rpc.parse(expert_pb2.CopyExpertRequest, request)
        expert = self._shard.expert(asked.layer_id, asked.expert_id)
        if expert is None:
            raise StalePlacement(f"expert {asked.expert_id} of layer {asked.layer_id} is not held here (any more)")
        for frame in frames(expert):
            yield frame

    def handlers(self) -> grpc.GenericRpcHandler:
        """For grpc.aio.Server.add_generic_rpc_handlers; without (de)serializers, so that frames are not copied."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Forward": grpc.stream_stream_rpc_method_handler(self.forward),
                "GetShardLoad": rpc.unary_handler(self.get_shard_load),
                "CopyExpert": rpc.stream_handler(self.copy_expert),
            },
        )


class _Answers:
    """The answers that a stream waits for. Everything but `_on_done` runs on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._last_number = -1
        self._waiting: dict[int, WaitingForward | None] = {}  # by sequence number; None: refused, its answer is ready
        self._ready: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
        self._written = asyncio.Event()

    @property
    def num_unwritten(self) -> int:
        """Forwards whose answer is not sent, computed or not."""
        return len(self._waiting)

    def take(self, shard: ExpertShard, frame: bytes) -> None:
        """A frame of the worker: a forward, or the cancellation of one. Raises InvalidRequest, CorruptFrame."""
        header, payload = decode_frame(expert_pb2.ForwardHeader, frame)
        number = header.sequence_number
        if header.is_cancellation:
            if (waiting := self._waiting.get(number)) is not None:
                waiting.is_given_up = True
            return
        self._last_number = next_number(number, self._last_number)
        self._waiting[number] = None
        self._waiting[number] = shard.submit(header, Memory.of(payload), lambda outcome: self._on_done(number, outcome))

    def _on_done(self, number: int, outcome: ForwardOutput | MobulaError) -> None:
        """In the compute thread, or at once when it is refused."""
        frame = answer_frame(number, outcome)
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._ready.put_nowait, (number, frame))

    async def write_to(self, context: grpc.aio.ServicerContext) -> None:
        while True:
            number, frame = await self._ready.get()
            await context.write(frame)
            self._waiting.pop(number, None)
            self._written.set()

    async def written_down_to(self, num_unwritten: int) -> None:
        """When no more than so many answers are yet to be computed and sent."""
        while self.num_unwritten > num_unwritten:
            self._written.clear()
            await self._written.wait()

    def give_up(self) -> None:
        for waiting in self._waiting.values():
            if waiting is not None:
                waiting.is_given_up = True


class ExpertServer:
    """A shard's listening server."""

    def __init__(self, server: grpc.aio.Server, health: health_aio.HealthServicer, ring: RingServer, port: int) -> None:
        self.port = port
        self.ring = ring
        self._server = server
        self.health = health

    @classmethod
    async def start(
        cls, shard: ExpertShard, host: str, port: int, credentials: Credentials = PLAINTEXT
    ) -> "ExpertServer":
        """Listens; `port` 0 takes a free one. The shard must have been started.

        Raises InternalError when the port is taken. Not serving to health checks until `set_serving`.
        """
        server = credentials.server((PeerRole.WORKER, PeerRole.SHARD), rpc.frame_options())
        ring = RingServer(shard)
        server.add_generic_rpc_handlers((ExpertServicer(shard, ring.ticket).handlers(),))
        health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        try:
            bound_port = credentials.listen(server, f"{host}:{port}")
        except RuntimeError as error:
            ring.close()
            raise InternalError(f"expert shard {shard.ep_rank} cannot listen on {host}:{port}: {error}") from error
        await server.start()
        started = cls(server, health, ring, bound_port)
        await started.set_serving(False)
        return started

    async def set_serving(self, is_serving: bool) -> None:
        """What grpc.health.v1 says: serving means that the weights of a placement are there."""
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self.health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Not serving; streams, which never end on their own, end after `grace_s` seconds.

        Stop the shard first, so that what waits is answered.
        """
        await self.health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        self.ring.close()
