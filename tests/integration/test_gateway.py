"""The gateway in front of workers whose answers are known, called by stock clients over real gRPC."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

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
from protos import errors, generation_pb2, generation_pb2_grpc
from protos.loop_thread import LoopThread
from protos.rpc import MAX_CLIENT_MESSAGE_BYTES
from tests.gateway_front import HOST, Front, front


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
        assert "no attention worker is ready: the system is starting" in raised.value.details()


def test_a_request_over_the_limit_of_messages_is_told_so_and_reaches_no_worker() -> None:
    request = generation_pb2.GenerateRequest(text="x" * (MAX_CLIENT_MESSAGE_BYTES + 1))
    with front() as opened:
        with pytest.raises(grpc.RpcError) as raised:
            next(iter(opened.stub.Generate(request, timeout=10)))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"limit is {MAX_CLIENT_MESSAGE_BYTES}; send a shorter prompt" in raised.value.details()
        assert sum(worker.num_calls for worker in opened.workers) == 0


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


def test_a_call_without_a_place_waits_until_one_comes_free() -> None:
    loop = LoopThread("test")
    opened = Front(loop, num_workers=1)
    opened.workers[0].max_num_seqs = 1  # and one more is sent, so that it need not wait for the next
    opened.connect()
    worker = next(iter(opened.gateway.pool.workers.values()))
    until(lambda: worker.max_num_seqs == 1)
    running = [opened.generate("endless") for _ in range(2)]
    for call in running:
        next(call)
    waiting = opened.generate("count to 1")
    until(lambda: opened.metrics.registry.get_sample_value("mobula_gateway_requests_waiting") == 1)
    assert opened.workers[0].num_calls == 2
    running[0].cancel()
    assert next(waiting).text == "0 "
    assert opened.metrics.registry.get_sample_value("mobula_gateway_requests_waiting") == 0
    opened.close()
    loop.stop()


def until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


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


def test_several_gateways_share_a_port_and_one_that_ends_costs_only_its_own_calls() -> None:
    with front() as opened:
        settings = GatewayConfig(count=2, port=free_port())
        addresses = {worker.dp_rank: worker.link.address for worker in opened.workers}
        loop = LoopThread("two gateways")

        async def start() -> Gateway:
            gateway = Gateway(settings, GatewayMetrics())
            await gateway.start(HOST, settings.port)
            await gateway.update_workers(addresses)
            return gateway

        first, second = loop.run(start()), loop.run(start())
        # Without connections that are shared, so that the kernel chooses for each.
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.insecure_channel(f"{HOST}:{settings.port}", options) for _ in range(12)]
        stubs = [generation_pb2_grpc.InferenceStub(channel) for channel in channels]
        request = generation_pb2.GenerateRequest(text="endless")
        calls = [stub.Generate(request, timeout=10.0) for stub in stubs]
        for call in calls:
            next(call)
        num_of_first = first.pool.num_in_flight
        assert first.pool.num_in_flight + second.pool.num_in_flight == len(calls)
        assert 0 < num_of_first < len(calls)
        ended: list[grpc.StatusCode] = []
        readers = [threading.Thread(target=read_to_the_end, args=(call, ended)) for call in calls]
        for reader in readers:
            reader.start()
        loop.run(first.stop(0.0))
        until(lambda: len(ended) == num_of_first)
        assert second.pool.num_in_flight == len(calls) - num_of_first
        for stub in stubs:  # a client tries again, and finds the other one
            assert next(stub.Generate(request, timeout=10.0, wait_for_ready=True))
        loop.run(second.stop(0.0))
        for reader in readers:
            reader.join()
        for channel in channels:
            channel.close()
        loop.stop()


def read_to_the_end(call: Iterator[generation_pb2.GenerateResponse], ended: list[grpc.StatusCode]) -> None:
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        ended.append(error.code())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def test_a_taken_port_is_an_error_that_says_so() -> None:
    with front() as opened:

        async def start_again() -> None:
            await Gateway(GatewayConfig(), GatewayMetrics()).start(HOST, opened.port)

        loop = LoopThread("second")
        with pytest.raises(errors.Unavailable, match=r"port is taken .*; set gateway\.port"):
            loop.run(start_again())
        loop.stop()
