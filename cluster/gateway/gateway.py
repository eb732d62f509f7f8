"""The front door: relays the inference API to attention workers, and an operator's calls to the controller. Holds no
model state.

The life of a Generate call here: (1) admitted, or RESOURCE_EXHAUSTED; (2) generation.py passes it to a worker and the
answers back, and goes on with another worker when that one is lost; (3) the client's cancellation cancels the worker's
call.
"""

import asyncio
from collections.abc import Sequence

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from cluster.config import GatewayConfig
from cluster.gateway import admin_relay
from cluster.gateway.admin_relay import AdminRelay
from cluster.gateway.admission import Admission
from cluster.gateway.generation import Generation
from cluster.gateway.local_calls import LocalCalls
from cluster.gateway.metrics import GatewayMetrics
from cluster.gateway.relay import abort_as, was_answered
from cluster.gateway.worker_pool import INFERENCE as SERVICE
from cluster.gateway.worker_pool import WorkerChannel, WorkerPool
from cluster.security.caller import current_caller
from protos import errors, generation_pb2, rpc
from protos.credentials import PLAINTEXT, Credentials, ServerCredentials
from protos.guard import Guard
from protos.tracing import NO_TRACING, Tracing

METHOD_TIMEOUT_S = 10.0  # for everything but Generate, which lives as long as its client


class GatewayServicer:
    """The Inference service over raw bytes."""

    def __init__(
        self,
        settings: GatewayConfig,
        pool: WorkerPool,
        admission: Admission,
        metrics: GatewayMetrics,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._settings = settings
        self._admission = admission
        self._pool = pool
        self._metrics = metrics
        self._tracing = tracing

    def handlers(self) -> grpc.GenericRpcHandler:
        methods = {
            "Generate": rpc.stream_handler(
                self.generate, read_timeout_s=self._settings.read_timeout_s, on_cut_off=self._metrics.count_cut_off
            ),
            "GetExpertLoad": rpc.unary_handler(self.get_expert_load),
            "GetModelInfo": rpc.unary_handler(self.get_model_info),
        }
        for name in ("Tokenize", "GetPlacement"):
            methods[name] = rpc.unary_handler(self._relay(name))
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def generate(self, request: bytes, context: grpc.aio.ServicerContext) -> rpc.Responses:
        """Inference.Generate."""
        with (
            self._metrics.request() as outcome,
            self._tracing.span("gateway.Generate", context.invocation_metadata() or ()) as span,
        ):
            rpc.check_size(request)
            costs = self._admission.costs
            try:
                async with self._admission.place(
                    _client_name(context),
                    len(request),
                    context.time_remaining(),
                    current_caller().max_concurrent_requests,
                ) as ticket:
                    generation = Generation(
                        request,
                        self._pool,
                        self._metrics,
                        self._settings.resume_timeout_s,
                        ticket.cost,
                        costs.mean_tokens,
                        span,
                    )
                    async for response in generation.answers(context):
                        yield response
                    if (usage := generation.usage) is not None:
                        # What the client had came with the request, and was computed like its prompt.
                        num_given = usage.num_prompt_tokens + usage.num_received_tokens
                        num_new = usage.num_completion_tokens - usage.num_received_tokens
                        costs.learn_tokens(len(request), num_given, num_new)
                        ticket.used_tokens = num_given + num_new
            except grpc.aio.AioRpcError as error:
                outcome.code = error.code().name
                await abort_as(context, error)

    def _relay(self, method: str) -> rpc.UnaryMethod:
        async def relay(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            rpc.check_size(request)
            tried: list[WorkerChannel] = []
            while True:
                worker = self._pool.choose(tried)
                tried.append(worker)
                if not await worker.connect():
                    continue
                try:
                    return await worker.unary(method)(request, timeout=METHOD_TIMEOUT_S)  # type: ignore[no-any-return]
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE or was_answered(error):
                        await abort_as(context, error)
                except asyncio.CancelledError:
                    if rpc.is_client_gone():
                        raise

        return relay

    async def get_model_info(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """As a worker says, with the number of workers that serve now."""
        answer = await self._relay("GetModelInfo")(request, context)
        info = generation_pb2.GetModelInfoResponse.FromString(answer)
        info.dp_size = len(self._pool.workers)
        return bytes(info.SerializeToString())

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
        settings: GatewayConfig,
        metrics: GatewayMetrics,
        credentials: Credentials = PLAINTEXT,
        front: ServerCredentials = PLAINTEXT,
        guards: Sequence[Guard] = (),
        tracing: Tracing = NO_TRACING,
    ) -> None:
        """credentials: towards workers and controller; front: what clients see; guards: whom they let through."""
        self._settings = settings
        self._pool = WorkerPool(credentials, settings.silence_timeout_s)
        self._admission = Admission(settings.admission, settings.max_concurrent_requests, self._num_places, metrics)
        self._admin = AdminRelay(credentials=credentials)
        self._front = front
        self._metrics = metrics
        self._tracing = tracing
        self.health = health_aio.HealthServicer()
        shares_port = settings.count > 1 and settings.port != 0
        self._server = front.server((), [*rpc.front_options(), ("grpc.so_reuseport", int(shares_port))], guards)

    @property
    def pool(self) -> WorkerPool:
        return self._pool

    async def start(self, host: str, port: int) -> int:
        """Listens; serves once `update_workers` names a worker. Returns the port. Raises Unavailable if it is taken."""
        self._server.add_generic_rpc_handlers(self._handlers())
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
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

    def local_calls(self) -> LocalCalls:
        """The services as this process itself may call them."""
        return LocalCalls(self._handlers())

    @property
    def num_waiting(self) -> int:
        """Requests that have no place yet. From any thread."""
        return self._admission.num_waiting

    async def update_workers(self, addresses: dict[int, str]) -> None:
        """The attention workers that are ready, by dp_rank."""
        await self._pool.update(addresses)
        self._admission.wake()
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

    def _num_places(self) -> int:
        num_places = self._pool.num_places(self._admission.costs.mean_tokens)
        if num_places is None:
            return self._settings.max_concurrent_requests
        return -(-num_places // self._settings.count)  # other gateways have as many

    def _handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        inference = GatewayServicer(self._settings, self._pool, self._admission, self._metrics, self._tracing)
        return inference.handlers(), self._admin.handlers()

    async def _set_serving(self, is_serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        value = status.SERVING if is_serving else status.NOT_SERVING
        for name in ("", SERVICE):
            await self.health.set(name, value)


def _client_name(context: grpc.aio.ServicerContext) -> str:
    """The key's id, or the address without its port."""
    return current_caller().key_id or context.peer().rpartition(":")[0]


def _add_dispatch(total: generation_pb2.DispatchStats, other: generation_pb2.DispatchStats) -> None:
    for ranks, count in enumerate(other.num_tokens_by_ranks):
        if ranks == len(total.num_tokens_by_ranks):
            total.num_tokens_by_ranks.append(0)
        total.num_tokens_by_ranks[ranks] += count
    total.sent_bytes += other.sent_bytes
    total.received_bytes += other.received_bytes
    total.num_dropped_assignments += other.num_dropped_assignments
    total.num_device_limit_violations += other.num_device_limit_violations
    total.max_ranks_per_token = max(total.max_ranks_per_token, other.max_ranks_per_token)
