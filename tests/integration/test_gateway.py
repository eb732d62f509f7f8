"""The gateway in front of workers whose answers are known, called by stock clients over real gRPC."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from cluster.config import GatewayConfig
from cluster.gateway.gateway import SERVICE, Gateway
from cluster.gateway.metrics import GatewayMetrics
from cluster.gateway.worker_pool import WORKER
from protos import errors, generation_pb2, generation_pb2_grpc, rpc, worker_pb2
from protos.loop_thread import LoopThread
from tests.cut_link import CutLink

HOST = "127.0.0.1"


class FakeWorker:
    """Answers with its rank; fails with `error` if that is set; streams for ever if the prompt is "endless".

    A prompt "count to N" is answered with the tokens 0 to N - 1 that are missing; the link to the worker is cut after
    `num_until_cut` of them.
    """

    def __init__(self, dp_rank: int, loop: LoopThread) -> None:
        self.dp_rank = dp_rank
        self.error: errors.MobulaError | None = None
        self.num_until_cut: int | None = None
        self.relayed: list[worker_pb2.RelayedRequest] = []
        self.num_calls = 0
        self.num_running = 0
        self._loop = loop
        self.link = CutLink(loop.run(self._start()), loop)

    async def _start(self) -> int:
        self._server = grpc.aio.server()
        handlers = {
            "GetExpertLoad": rpc.unary_handler(self.get_expert_load),
            "GetModelInfo": rpc.unary_handler(self.get_model_info),
        }
        worker_handlers = {"Generate": rpc.stream_handler(self.generate)}
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, handlers),
                grpc.method_handlers_generic_handler(WORKER, worker_handlers),
            )
        )
        port = self._server.add_insecure_port(f"{HOST}:0")
        await self._server.start()
        return port

    def stop(self) -> None:
        self.link.cut()
        self._loop.run(self._server.stop(None))

    async def generate(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes, None]:
        self.num_calls += 1
        if self.error:
            raise self.error
        self.relayed.append(worker_pb2.RelayedRequest.FromString(request))
        message = generation_pb2.GenerateRequest.FromString(self.relayed[-1].request)
        self.num_running += 1
        try:
            if message.text.startswith("count to "):
                async for response in self._count(len(self.relayed[-1].output_token_ids), int(message.text[9:])):
                    yield response
                return
            yield generation_pb2.GenerateResponse(text=str(self.dp_rank)).SerializeToString()
            while message.text == "flood":
                yield generation_pb2.GenerateResponse(text="." * 10_000).SerializeToString()
            while message.text == "endless":
                await asyncio.sleep(0.01)
                yield generation_pb2.GenerateResponse(text=".").SerializeToString()
        finally:
            self.num_running -= 1

    async def _count(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        for token_id in range(start, stop):
            await self._cut_after(token_id - start)
            answer = generation_pb2.GenerateResponse(text=f"{token_id} ", token_ids=[token_id])
            if token_id == stop - 1:
                answer.finish_reason = generation_pb2.FINISH_REASON_LENGTH
            yield answer.SerializeToString()
        await self._cut_after(stop - start)

    async def _cut_after(self, num_answers: int) -> None:
        if num_answers == self.num_until_cut:
            await asyncio.sleep(0.05)  # what was written is on its way
            await self.link._cut()
            await asyncio.sleep(60.0)

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

    def __init__(self, loop: LoopThread, num_workers: int = 2, **settings: Any) -> None:
        """settings: of GatewayConfig."""
        self.workers = [FakeWorker(rank, loop) for rank in range(num_workers)]
        self._loop = loop
        self.metrics = GatewayMetrics()

        async def start() -> tuple[Gateway, int]:
            gateway = Gateway(GatewayConfig(**settings), self.metrics)
            return gateway, await gateway.start(HOST, 0)

        self.gateway, self.port = loop.run(start())
        self.channel = grpc.insecure_channel(f"{HOST}:{self.port}")
        self.stub = generation_pb2_grpc.InferenceStub(self.channel)

    def connect(self) -> None:
        addresses = {worker.dp_rank: worker.link.address for worker in self.workers}
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
def front(**settings: Any) -> Iterator[Front]:
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


def test_an_answer_goes_on_with_another_worker_when_its_own_is_lost() -> None:
    with front() as opened:
        opened.workers[0].num_until_cut = 3
        answers = list(opened.generate("count to 6"))
        assert "".join(answer.text for answer in answers) == "0 1 2 3 4 5 "
        assert [token_id for answer in answers for token_id in answer.token_ids] == [0, 1, 2, 3, 4, 5]
        first, second = opened.workers[0].relayed[0], opened.workers[1].relayed[0]
        assert list(second.output_token_ids) == [0, 1, 2]
        assert (first.request, first.seed, first.request_id) == (second.request, second.seed, second.request_id)
        registry = opened.metrics.registry
        assert registry.get_sample_value("mobula_gateway_resumes_total", {"reason": "lost"}) == 1
        assert registry.get_sample_value("mobula_gateway_resume_pause_seconds_count") == 1


def test_a_worker_that_is_lost_after_the_last_answer_is_not_missed() -> None:
    with front() as opened:
        opened.workers[0].num_until_cut = 2
        assert [answer.text for answer in opened.generate("count to 2")] == ["0 ", "1 "]
        assert not opened.workers[1].relayed


def test_an_answer_that_has_begun_waits_for_a_worker_and_ends_when_none_comes() -> None:
    with front(num_workers=1, resume_timeout_s=0.5) as opened:
        opened.workers[0].num_until_cut = 1
        answers = opened.generate("count to 3")
        assert next(answers).text == "0 "
        with pytest.raises(grpc.RpcError) as raised:
            next(answers)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_request_that_loses_worker_after_worker_is_given_up() -> None:
    with front(num_workers=4) as opened:
        for worker in opened.workers:
            worker.num_until_cut = 1
        answers = opened.generate("count to 9")
        with pytest.raises(grpc.RpcError) as raised:
            list(answers)
        assert "3 attention workers were lost" in raised.value.details()
        assert not opened.workers[3].relayed


def test_a_worker_that_stops_hands_its_requests_over() -> None:
    with front() as opened:
        opened.workers[0].error = errors.WorkerStopping("the worker has stopped")
        assert [answer.text for answer in opened.generate("count to 2")] == ["0 ", "1 "]


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
    with front(max_concurrent_requests=1) as opened:
        running = opened.generate("endless")
        next(iter(running))
        with pytest.raises(grpc.RpcError) as raised:
            next(iter(opened.generate()))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "limit is 1" in raised.value.details()


def test_a_client_that_does_not_read_is_cut_off_and_its_worker_is_free_again() -> None:
    with front(num_workers=1, read_timeout_s=0.3) as opened:
        call = opened.generate("flood")
        next(call)
        give_up_s = time.monotonic() + 8.0
        while opened.workers[0].num_running:
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        assert opened.metrics.registry.get_sample_value("mobula_gateway_cut_offs_total") == 1
        assert opened.metrics.registry.get_sample_value("mobula_gateway_requests_in_flight") == 0
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
        assert raised.value.code() is grpc.StatusCode.ABORTED
        assert "nothing was read for 0.3 s" in raised.value.details()


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
            await Gateway(GatewayConfig(), GatewayMetrics()).start(HOST, opened.port)

        loop = LoopThread("second")
        with pytest.raises(errors.Unavailable, match=r"port is taken .*; set gateway\.port"):
            loop.run(start_again())
        loop.stop()
