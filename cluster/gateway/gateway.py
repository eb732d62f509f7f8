"""The front door: relays the inference API to attention workers, and an operator's calls to the controller. Holds no
model state and parses no tokens.

The life of a Generate call here: (1) admitted, or RESOURCE_EXHAUSTED; (2) the worker with the fewest calls in flight
is chosen; (3) its answers are passed on as raw bytes; (4) a worker that is gone before its first answer costs a retry
on another one; (5) the client's cancellation cancels the worker's call.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from cluster.gateway import admin_relay
from cluster.gateway.admin_relay import AdminRelay
from cluster.gateway.metrics import GatewayMetrics, RequestOutcome
from cluster.gateway.relay import abort_as, forwarded, is_client_gone, was_answered
from protos import errors, generation_pb2, rpc
from protos.credentials import PLAINTEXT, Credentials, PeerRole

logger = logging.getLogger(__name__)

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
METHOD_TIMEOUT_S = 10.0  # for everything but Generate, which lives as long as its client


@dataclass(slots=True)
class WorkerChannel:
    """The gateway's connection to one attention worker."""

    dp_rank: int
    address: str
    channel: grpc.aio.Channel
    num_in_flight: int = 0

    def unary(self, method: str) -> grpc.aio.UnaryUnaryMultiCallable:
        return self.channel.unary_unary(f"/{SERVICE}/{method}")

    def generate(self) -> grpc.aio.UnaryStreamMultiCallable:
        return self.channel.unary_stream(f"/{SERVICE}/Generate")


@dataclass(slots=True)
class WorkerPool:
    """The workers that can be called now. Used from the event loop only.

    leaving: no longer listed, but with calls in flight, which may end: a worker that was slow to say that it is well is
        not gone, and the connection to one that is gone breaks by itself.
    """

    max_concurrent_requests: int
    credentials: Credentials = PLAINTEXT
    workers: dict[int, WorkerChannel] = field(default_factory=dict)
    leaving: list[WorkerChannel] = field(default_factory=list)

    @property
    def num_in_flight(self) -> int:
        return sum(worker.num_in_flight for worker in (*self.workers.values(), *self.leaving))

    async def update(self, addresses: dict[int, str]) -> None:
        """Connects to new addresses and chooses those that are no longer listed no more."""
        stale = [worker for rank, worker in self.workers.items() if addresses.get(rank) != worker.address]
        for worker in stale:
            del self.workers[worker.dp_rank]
        for dp_rank, address in sorted(addresses.items()):
            if dp_rank not in self.workers:
                self.workers[dp_rank] = self._connection(dp_rank, address)
        self.leaving += stale
        await self.close_idle()

    async def close_idle(self) -> None:
        """Lets go of leaving workers without calls."""
        idle = [worker for worker in self.leaving if not worker.num_in_flight]
        self.leaving = [worker for worker in self.leaving if worker.num_in_flight]
        for worker in idle:
            await worker.channel.close(grace=0)

    async def close(self) -> None:
        """Lets go of all, and ends their calls."""
        await self.update({})
        for worker in self.leaving:
            await worker.channel.close(grace=0)

    def _connection(self, dp_rank: int, address: str) -> WorkerChannel:
        for worker in self.leaving:
            if (worker.dp_rank, worker.address) == (dp_rank, address):
                self.leaving.remove(worker)
                return worker
        channel = self.credentials.channel(address, PeerRole.WORKER, rpc.relay_options())
        return WorkerChannel(dp_rank, address, channel)

    def choose(self, excluded: set[int]) -> WorkerChannel:
        """The worker with the fewest calls in flight, the lower rank first. Raises Unavailable if there is none."""
        candidates = [worker for worker in self.workers.values() if worker.dp_rank not in excluded]
        if not candidates:
            raise errors.Unavailable(
                f"none of {len(self.workers)} attention workers can be reached; retry later", retry_after_s=1.0
            )
        return min(candidates, key=lambda worker: (worker.num_in_flight, worker.dp_rank))

    def admit(self) -> None:
        """Raises QueueFull when as many calls are in flight as are allowed."""
        if self.num_in_flight >= self.max_concurrent_requests:
            raise errors.QueueFull(
                f"{self.num_in_flight} requests are in flight, limit is {self.max_concurrent_requests}; retry later",
                retry_after_s=1.0,
            )


class GatewayServicer:
    """The Inference service over raw bytes."""

    def __init__(self, pool: WorkerPool, metrics: GatewayMetrics) -> None:
        self._pool = pool
        self._metrics = metrics

    def handlers(self) -> grpc.GenericRpcHandler:
        methods = {
            "Generate": rpc.stream_handler(self.generate),
            "GetExpertLoad": rpc.unary_handler(self.get_expert_load),
        }
        for name in ("Tokenize", "GetModelInfo", "GetPlacement"):
            methods[name] = rpc.unary_handler(self._relay(name))
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def generate(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        with self._metrics.request() as outcome:
            async for response in self._generate(request, context, outcome):
                yield response

    async def _generate(
        self, request: bytes, context: grpc.aio.ServicerContext, outcome: RequestOutcome
    ) -> AsyncIterator[bytes]:
        self._pool.admit()
        tried: set[int] = set()
        while True:
            worker = self._pool.choose(tried)
            tried.add(worker.dp_rank)
            num_answers = 0
            worker.num_in_flight += 1
            call = worker.generate()(request, timeout=context.time_remaining(), metadata=forwarded(context))
            try:
                async for response in call:
                    num_answers += 1
                    yield response
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or was_answered(error):
                    outcome.code = error.code().name
                    await abort_as(context, error)
                _note_loss(worker, num_answers, error.details())
            except asyncio.CancelledError:
                if is_client_gone():
                    raise
                _note_loss(worker, num_answers, "the gateway stops")
            else:
                return
            finally:
                worker.num_in_flight -= 1
                call.cancel()

    def _relay(self, method: str) -> rpc.UnaryMethod:
        async def relay(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            tried: set[int] = set()
            while True:
                worker = self._pool.choose(tried)
                tried.add(worker.dp_rank)
                try:
                    return await worker.unary(method)(request, timeout=METHOD_TIMEOUT_S)  # type: ignore[no-any-return]
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE or was_answered(error):
                        await abort_as(context, error)
                except asyncio.CancelledError:
                    if is_client_gone():
                        raise

        return relay

    async def get_expert_load(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """The experts' counters, which every worker reads alike, and the dispatch counters of all workers added up."""
        rpc.parse(generation_pb2.GetExpertLoadRequest, request)
        calls = [
            worker.unary("GetExpertLoad")(request, timeout=METHOD_TIMEOUT_S) for worker in self._pool.workers.values()
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        loads = [generation_pb2.GetExpertLoadResponse.FromString(data) for data in answers if isinstance(data, bytes)]
        if not loads:
            failures = [error for error in answers if isinstance(error, grpc.aio.AioRpcError)]
            if failures:
                await abort_as(context, failures[0])
            raise errors.Unavailable("no attention worker can be reached; retry later", retry_after_s=1.0)
        merged = loads[0]
        for other in loads[1:]:
            _add_dispatch(merged.dispatch, other.dispatch)
        return merged.SerializeToString()


class Gateway:
    """The gateway's server: inference, admin calls, health, reflection. Lives on one event loop."""

    def __init__(
        self,
        max_concurrent_requests: int,
        metrics: GatewayMetrics,
        credentials: Credentials = PLAINTEXT,
        front: Credentials = PLAINTEXT,
    ) -> None:
        """credentials: towards workers and controller; front: what clients see."""
        self._pool = WorkerPool(max_concurrent_requests, credentials)
        self._admin = AdminRelay(credentials=credentials)
        self._front = front
        self._metrics = metrics
        self._health = health_aio.HealthServicer()
        self._server = front.server((), rpc.client_options())

    @property
    def pool(self) -> WorkerPool:
        return self._pool

    async def start(self, host: str, port: int) -> int:
        """Listens; serves once `update_workers` names a worker. Returns the port. Raises Unavailable if it is taken."""
        inference = GatewayServicer(self._pool, self._metrics)
        self._server.add_generic_rpc_handlers((inference.handlers(), self._admin.handlers()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        names = (SERVICE, admin_relay.SERVICE, health, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self._set_serving(False)
        try:
            bound = self._front.listen(self._server, f"{host}:{port}")
        except RuntimeError as error:
            raise errors.Unavailable(
                f"cannot listen on {host}:{port}: the port is taken or the address is not of this machine; "
                "set gateway.port or gateway.host"
            ) from error
        await self._server.start()
        return int(bound)

    async def update_workers(self, addresses: dict[int, str]) -> None:
        """The attention workers that are ready, by dp_rank."""
        await self._pool.update(addresses)
        await self._set_serving(bool(addresses))

    async def update_admin(self, address: str) -> None:
        """Where the controller serves the admin calls; "" while it does not."""
        await self._admin.update(address)

    async def stop(self, drain_timeout_s: float) -> None:
        """Refuses new calls, lets those in flight end, then stops."""
        await self._set_serving(False)
        await self._server.stop(grace=drain_timeout_s)
        await self._pool.close()
        await self._admin.update("")

    async def _set_serving(self, is_serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        value = status.SERVING if is_serving else status.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, value)


def _note_loss(worker: WorkerChannel, num_answers: int, detail: str | None) -> None:
    """Raises Unavailable when the client has had answers of the worker that is lost; else another may be tried."""
    if num_answers:
        raise errors.Unavailable(
            f"attention worker {worker.dp_rank} was lost after {num_answers} answers; send it again", retry_after_s=1.0
        )
    logger.warning("worker %d at %s is gone, trying another: %s", worker.dp_rank, worker.address, detail)


def _add_dispatch(total: generation_pb2.DispatchStats, other: generation_pb2.DispatchStats) -> None:
    for ranks, count in enumerate(other.num_tokens_by_ranks):
        if ranks == len(total.num_tokens_by_ranks):
            total.num_tokens_by_ranks.append(0)
        total.num_tokens_by_ranks[ranks] += count
    total.sent_bytes += other.sent_bytes
    total.received_bytes += other.received_bytes
    total.num_dropped_assignments += other.num_dropped_assignments
    total.max_ranks_per_token = max(total.max_ranks_per_token, other.max_ranks_per_token)
