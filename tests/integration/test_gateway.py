"""The gateway in front of workers whose answers are known, called by stock clients over real gRPC."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from cluster.gateway.gateway import SERVICE, Gateway
from cluster.gateway.metrics import GatewayMetrics
from protos import errors, generation_pb2, generation_pb2_grpc, rpc
from protos.loop_thread import LoopThread

HOST = "127.0.0.1"


class FakeWorker:
    """Answers with its rank; fails with `error` if that is set; streams for ever if the prompt is "endless"."""

    def __init__(self, dp_rank: int, loop: LoopThread) -> None:
        self.dp_rank = dp_rank
        self.error: errors.MobulaError | None = None
        self.num_calls = 0
        self.num_running = 0
        self._loop = loop
        self.port = loop.run(self._start())

    async def _start(self) -> int:
        self._server = grpc.aio.server()
        handlers = {
            "Generate": rpc.stream_handler(self.generate),
            "GetExpertLoad": rpc.unary_handler(self.get_expert_load),
            "GetModelInfo": rpc.unary_handler(self.get_model_info),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = self._server.add_insecure_port(f"{HOST}:0")
        await self._server.start()
        return port

    def stop(self) -> None:
        self._loop.run(self._server.stop(None))

    async def generate(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        self.num_calls += 1
        if self.error:
            raise self.error
        message = generation_pb2.GenerateRequest.FromString(request)
        self.num_running += 1
        try:
            yield generation_pb2.GenerateResponse(text=str(self.dp_rank)).SerializeToString()
            while message.text == "endless":
                await asyncio.sleep(0.01)
                yield generation_pb2.GenerateResponse(text=".").SerializeToString()
        finally:
            self.num_running -= 1

    async def get_expert_load(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        response = generation_pb2.GetExpertLoadResponse()
        response.layers.add(layer_id=1, num_tokens=[4, 2])
        response.dispatch.num_tokens_by_ranks.extend([0] + [self.dp_rank + 1] * (self.dp_rank + 1))
        response.dispatch.sent_bytes = 100
        response.dispatch.num_dropped_assignments = 3
        return response.SerializeToString()

    async def get_model_info(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return generation_pb2.GetModelInfoResponse(model_id=str(self.dp_rank)).SerializeToString()


class Front:
    """A gateway with workers behind it."""

    def __init__(self, loop: LoopThread, num_workers: int = 2, limit: int = 64) -> None:
        self.workers = [FakeWorker(rank, loop) for rank in range(num_workers)]
        self._loop = loop
        self.metrics = GatewayMetrics()

        async def start() -> tuple[Gateway, int]:
            gateway = Gateway(limit, self.metrics)
            return gateway, await gateway.start(HOST, 0)

        self.gateway, self.port = loop.run(start())
        self.channel = grpc.insecure_channel(f"{HOST}:{self.port}")
        self.stub = generation_pb2_grpc.InferenceStub(self.channel)

    def connect(self) -> None:
        addresses = {worker.dp_rank: f"{HOST}:{worker.port}" for worker in self.workers}
        self._loop.run(self.gateway.update_workers(addresses))

    def disconnect(self) -> None:
        self._loop.run(self.gateway.update_workers({}))

    def generate(self, text: str = "x") -> Iterator[generation_pb2.GenerateResponse]:
        return self.stub.Generate(generation_pb2.GenerateRequest(text=text), timeout=10.0)

    def close(self) -> None:
        self.channel.close()
        self._loop.run(self.gateway.stop(0.0))
        for worker in self.workers:
            worker.stop()


@contextmanager
def front(**settings: int) -> Iterator[Front]:
    loop = LoopThread("test")
    opened = Front(loop, **settings)
    opened.connect()
    try:
        yield opened
    finally:
        opened.close()
        loop.stop()


def test_concurrent_calls_go_to_the_worker_with_the_fewest() -> None:
    with front() as opened:
        first, second = opened.generate("endless"), opened.generate("endless")
        assert {next(iter(first)).text, next(iter(second)).text} == {"0", "1"}


def test_a_worker_that_is_gone_costs_a_retry_on_another_one() -> None:
    with front() as opened:
        opened.workers[0].stop()
        assert [answer.text for answer in opened.generate()] == ["1"]
        assert opened.stub.GetModelInfo(generation_pb2.GetModelInfoRequest(), timeout=10.0).model_id == "1"


def test_a_worker_that_is_no_longer_listed_gets_no_new_calls_and_those_in_flight_go_on() -> None:
    with front(num_workers=1) as opened:
        running = opened.generate("endless")
        next(iter(running))
        opened.disconnect()
        for _ in range(3):
            next(running)
        with pytest.raises(grpc.RpcError) as raised:
            next(iter(opened.generate()))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        opened.connect()  # it was only slow to say that it is well
        next(running)
        assert next(iter(opened.generate()))
        running.cancel()


def test_what_a_worker_refuses_reaches_the_client_with_its_details_and_is_not_retried() -> None:
    with front() as opened:
        for worker in opened.workers:
            worker.error = errors.QueueFull("7 requests wait, limit is 7", retry_after_s=1.5)
        with pytest.raises(grpc.RpcError) as raised:
            next(iter(opened.generate()))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        status = rpc_status.from_call(raised.value)
        assert {detail.type_url.rpartition(".")[2] for detail in status.details} == {"ErrorInfo", "RetryInfo"}
        assert sum(worker.num_calls for worker in opened.workers) == 1


def test_no_worker_at_all_is_unavailable_with_a_retry_hint() -> None:
    with front(num_workers=0) as opened:
        with pytest.raises(grpc.RpcError) as raised:
            next(iter(opened.generate()))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "none of 0 attention workers" in raised.value.details()


def test_more_requests_than_allowed_are_refused_with_the_limit() -> None:
    with front(limit=1) as opened:
        running = opened.generate("endless")
        next(iter(running))
        with pytest.raises(grpc.RpcError) as raised:
            next(iter(opened.generate()))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "limit is 1" in raised.value.details()


def test_calls_in_flight_end_with_a_status_when_the_gateway_stops() -> None:
    with front(num_workers=1) as opened:
        running = opened.generate("endless")
        next(iter(running))
        opened.disconnect()
        opened._loop.run(opened.gateway.stop(0.0))
        with pytest.raises(grpc.RpcError) as raised:
            list(running)
        assert raised.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def test_a_cancelled_call_is_cancelled_at_the_worker() -> None:
    with front(num_workers=1) as opened:
        call = opened.generate("endless")
        next(iter(call))
        call.cancel()
        give_up_s = time.monotonic() + 5.0
        while opened.workers[0].num_running:
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        assert opened.metrics.registry.get_sample_value("mobula_gateway_requests_in_flight") == 0


def test_expert_load_adds_the_dispatch_counters_of_all_workers_but_counts_experts_once() -> None:
    with front() as opened:
        load = opened.stub.GetExpertLoad(generation_pb2.GetExpertLoadRequest(), timeout=10.0)
        assert list(load.layers[0].num_tokens) == [4, 2]
        assert list(load.dispatch.num_tokens_by_ranks) == [0, 1 + 2, 2]
        assert load.dispatch.sent_bytes == 200
        assert load.dispatch.num_dropped_assignments == 6


def test_health_follows_the_workers() -> None:
    loop = LoopThread("test")
    opened = Front(loop)
    health = health_pb2_grpc.HealthStub(opened.channel)
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    assert health.Check(request, timeout=5.0).status == health_pb2.HealthCheckResponse.NOT_SERVING
    opened.connect()
    assert health.Check(request, timeout=5.0).status == health_pb2.HealthCheckResponse.SERVING
    opened.close()
    loop.stop()


def test_a_stock_client_needs_nothing_but_reflection() -> None:
    with front(num_workers=1) as opened:
        database = ProtoReflectionDescriptorDatabase(opened.channel)
        assert SERVICE in database.get_services()
        method = DescriptorPool(database).FindServiceByName(SERVICE).FindMethodByName("Generate")
        request_class, response_class = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        call = opened.channel.unary_stream(
            f"/{SERVICE}/Generate",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        answers = list(call(request_class(text="hello"), timeout=10.0))
        assert [answer.text for answer in answers] == ["0"]


def test_a_taken_port_is_an_error_that_says_so() -> None:
    with front() as opened:

        async def start_again() -> None:
            await Gateway(1, GatewayMetrics()).start(HOST, opened.port)

        loop = LoopThread("second")
        with pytest.raises(errors.Unavailable, match=r"port is taken .*; set gateway\.port"):
            loop.run(start_again())
        loop.stop()
