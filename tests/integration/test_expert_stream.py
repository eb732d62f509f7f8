"""Router and shards over real gRPC on loopback and over rings, in one process and without Ray."""

import asyncio
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from experts.servicer import SERVICE, ExpertServer
from experts.weight_store import Unit
from protos import expert_pb2, expert_pb2_grpc
from protos.errors import QueueFull, ShardUnavailable
from router.grpc_transport import GrpcTransport
from router.local_transport import LocalTransport
from router.router_config import RouterConfig
from tests.fake_experts import (
    expert_shard,
    grouped_gate,
    placed,
    random_rows,
    reference_sums,
    router_to,
    running_shards,
    small_model,
)
from tests.shard_host import Forwards, Host, addresses, combined, running_host, wait_until

GATE = grouped_gate()
MODEL = small_model()


@pytest.fixture(params=["grpc", "ring"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    with running_host(request.param) as host:
        yield host


@pytest.fixture
def grpc_host() -> Iterator[Host]:
    with running_host("grpc") as host:
        yield host


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_grpc_the_sums_are_those_of_the_reference_to_the_bit(host, dtype):
    model = small_model(dtype)
    expert_map = placed(GATE, 3)
    rows = random_rows(GATE, 9, model.hidden_size, dtype=dtype)
    with running_shards(expert_map, model) as shards:
        router = host.router(expert_map, [host.serve(shard) for shard in shards])
        local = router_to(GATE, expert_map, lambda rank: LocalTransport(shards[int(rank)].forward, rank))
        for row, layer_id in enumerate(expert_map.moe_layer_ids):
            over_grpc = combined(router, rows, layer_id)
            assert torch.equal(over_grpc, combined(local, rows, layer_id))
            assert torch.equal(over_grpc, reference_sums(rows, layer_id, expert_map.expert_to_unit[row], model))
        assert router.stats().sent_bytes == local.stats().sent_bytes


def test_a_frame_far_above_grpcs_default_limit_goes_through(host):
    model = small_model(hidden_size=2048)
    expert_map = placed(GATE, 1)
    rows = random_rows(GATE, 1024, model.hidden_size)  # 8 MiB of hidden states
    with running_shards(expert_map, model) as shards:
        router = host.router(expert_map, [host.serve(shards[0])])
        local = router_to(GATE, expert_map, lambda rank: LocalTransport(shards[0].forward, rank))
        assert torch.equal(combined(router, rows), combined(local, rows))
        assert router.stats().sent_bytes > 8 * 2**20


def test_a_killed_shard_is_reported_within_the_deadline_with_its_name(host):
    expert_map = placed(GATE, 2)
    with running_shards(expert_map, MODEL) as shards:
        servers = [host.serve(shard) for shard in shards]
        router = host.router(expert_map, servers, RouterConfig(forward_timeout_s=0.5, attempt_timeout_s=0.5))
        rows = random_rows(GATE, 6, MODEL.hidden_size)
        combined(router, rows)
        host.kill(servers[1])
        started_s = time.monotonic()
        with pytest.raises(ShardUnavailable, match=rf"shard 1 at 127.0.0.1:{servers[1].port} .* layer 4 .* 0.5 s"):
            combined(router, rows, layer_id=4)
        assert time.monotonic() - started_s < 5.0


def test_a_stream_that_breaks_fails_what_is_outstanding_at_once(grpc_host):
    host = grpc_host
    shard = expert_shard(placed(GATE, 1), 0, MODEL)  # never started, so never answers
    server = host.serve(shard)
    transport = host.connect(f"127.0.0.1:{server.port}")
    wait_until(lambda: transport.is_connected)
    forwards = Forwards(transport, host.poller)
    future = forwards.send(expert_pb2.ForwardHeader(sequence_number=5, layer_id=1, placement_version=1, dtype=1))
    wait_until(lambda: shard.num_waiting_forwards == 1)
    host.kill(server)
    with pytest.raises(ShardUnavailable, match=f"no stream to shard 127.0.0.1:{server.port}"):
        forwards.wait(future)
    wait_until(lambda: not transport.is_connected)
    with pytest.raises(ShardUnavailable):
        forwards.wait(forwards.send(expert_pb2.ForwardHeader(sequence_number=6)))
    transport.close()


@pytest.mark.parametrize("same_port", [True, False])
def test_a_shard_that_dies_and_comes_back_costs_a_pause_and_no_error(host, same_port):
    expert_map = placed(GATE, 2)
    rows = random_rows(GATE, 6, MODEL.hidden_size)
    with running_shards(expert_map, MODEL) as shards:
        servers = [host.serve(shard) for shard in shards]
        router = host.router(expert_map, servers)
        expected = combined(router, rows)
        host.kill(servers[1])
        handle = router.dispatch(1, rows.hidden_states, rows.topk_weights, rows.topk_ids)
        wait_until(lambda: not router._routing.transports[1].is_connected)
        servers[1] = host.serve(shards[1], servers[1].port if same_port else 0)
        if not same_port:
            router.update_placement(expert_map, addresses(servers))
        assert torch.equal(router.combine(handle), expected)
        assert torch.equal(combined(router, rows), expected)


def test_a_stale_version_is_retried_until_the_new_map_arrives(host):
    old, new = placed(GATE, 2), placed(GATE, 2, placement_version=2)
    rows = random_rows(GATE, 6, MODEL.hidden_size)
    with running_shards(old, MODEL) as shards:
        router = host.router(old, servers := [host.serve(shard) for shard in shards])
        expected = combined(router, rows)
        for ep_rank, shard in enumerate(shards):
            shard.activate(2, [Unit(*unit) for unit in new.units_of(ep_rank)])
            shard.release(1)
        handle = router.dispatch(1, rows.hidden_states, rows.topk_weights, rows.topk_ids)
        router.update_placement(new, addresses(servers))
        assert torch.equal(router.combine(handle), expected)
        assert router._metrics._retries["stale_placement"] >= 1


def test_a_shard_that_is_too_slow_is_given_up_and_serves_the_next_forward(host):
    expert_map = placed(GATE, 1)
    shard = expert_shard(expert_map, 0, MODEL)  # not started: takes forwards and does not compute
    router = host.router(expert_map, [host.serve(shard)], RouterConfig(forward_timeout_s=0.3, attempt_timeout_s=0.1))
    rows = random_rows(GATE, 6, MODEL.hidden_size)
    with pytest.raises(ShardUnavailable, match=r"layer 2 within .* 0.3 s \(\d attempts"):
        combined(router, rows, layer_id=2)
    shard.start()
    assert torch.equal(combined(router, rows), reference_sums(rows, 1, expert_map.expert_to_unit[0], MODEL))
    shard.stop()


def test_forwards_of_two_workers_are_computed_as_one_and_answered_apart(grpc_host):
    host = grpc_host
    expert_map = placed(GATE, 1)
    shard = expert_shard(expert_map, 0, MODEL)
    server = host.serve(shard)
    inputs = [random_rows(GATE, num_tokens, MODEL.hidden_size, seed=num_tokens) for num_tokens in (3, 5)]
    routers = [host.router(expert_map, [server]) for _ in inputs]
    handles = [
        router.dispatch(1, rows.hidden_states, rows.topk_weights, rows.topk_ids)
        for router, rows in zip(routers, inputs, strict=True)
    ]
    wait_until(lambda: shard.num_waiting_forwards == 2)
    shard.start()
    for router, handle, rows in zip(routers, handles, inputs, strict=True):
        assert torch.equal(router.combine(handle), reference_sums(rows, 1, expert_map.expert_to_unit[0], MODEL))
    shard._metrics.wait_until_counted()
    assert shard._metrics.batched_calls.total == 2
    assert shard._metrics.num_forwards == 2
    shard.stop()


def test_when_a_worker_leaves_its_waiting_forwards_are_dropped(grpc_host):
    host = grpc_host
    expert_map = placed(GATE, 1)
    shard = expert_shard(expert_map, 0, MODEL)
    server = host.serve(shard)
    leaves, stays = (host.router(expert_map, [server]) for _ in range(2))
    rows = random_rows(GATE, 4, MODEL.hidden_size)
    leaves.dispatch(1, rows.hidden_states, rows.topk_weights, rows.topk_ids)
    handle = stays.dispatch(1, rows.hidden_states, rows.topk_weights, rows.topk_ids)
    wait_until(lambda: shard.num_waiting_forwards == 2)
    leaves.close()
    wait_until(lambda: any(waiting.is_given_up for waiting in shard._batcher._waiting))
    shard.start()
    stays.combine(handle)
    assert shard.load().num_forwards == 1
    shard.stop()


def test_a_forward_that_nobody_waits_for_is_dropped_from_the_shards_queue_and_answered(host):
    expert_map = placed(GATE, 1)
    shard = expert_shard(expert_map, 0, MODEL)
    is_computing, may_compute, ffn = threading.Event(), threading.Event(), shard._ffn

    def blocked_ffn(*args):
        is_computing.set()
        assert may_compute.wait(30)
        return ffn(*args)

    shard._ffn = blocked_ffn
    shard.start()
    router = host.router(expert_map, [host.serve(shard)])
    rows = random_rows(GATE, 4, MODEL.hidden_size)
    first, given_up = (router.dispatch(i, rows.hidden_states, rows.topk_weights, rows.topk_ids) for i in (1, 2))
    assert is_computing.wait(30)
    wait_until(lambda: shard.num_waiting_forwards == 1 or host._ring_bytes)
    router.abandon(given_up)
    wait_until(lambda: host._ring_bytes or all(waiting.is_given_up for waiting in shard._batcher._waiting))
    may_compute.set()
    router.combine(first)
    combined(router, rows)
    assert shard.load().num_forwards == 2
    shard.stop()


def test_a_sequence_number_that_waits_already_ends_the_stream_and_computes_nothing_twice(grpc_host):
    host = grpc_host
    shard = expert_shard(placed(GATE, 1), 0, MODEL)
    server = host.serve(shard)
    transport = host.connect(f"127.0.0.1:{server.port}")
    wait_until(lambda: transport.is_connected)
    forwards = Forwards(transport, host.poller)
    header = expert_pb2.ForwardHeader(sequence_number=5, layer_id=1, placement_version=1, dtype=1)
    futures = [forwards.send(header), forwards.send(header)]
    with pytest.raises(ShardUnavailable, match="forward 5 comes after forward 5"):
        forwards.wait(futures[1])
    shard.start()
    wait_until(lambda: shard.num_waiting_forwards == 0)
    assert shard.load().num_forwards == 0
    transport.close()
    shard.stop()


def test_bytes_that_are_no_frame_end_their_own_stream_with_invalid_argument(host):
    expert_map = placed(GATE, 1)
    with running_shards(expert_map, MODEL) as shards:
        server = host.serve(shards[0])
        router = host.router(expert_map, [server])

        async def send_nonsense(frame: bytes) -> grpc.StatusCode:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                call = channel.stream_stream(f"/{SERVICE}/Forward")()
                await call.write(frame)
                async for _ in call:
                    pass
                raise AssertionError("the stream ended without a status")

        for frame in (b"", b"\x00", b"\x0a\x05ab", b"\x0a\x02\xff\xff", b"\x12\x00"):
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                host.thread.run(send_nonsense(frame), 30)
            assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT, frame
        rows = random_rows(GATE, 4, MODEL.hidden_size)
        combined(router, rows)  # on the stream that was open all the time
        assert router._metrics._retries.total() == 0


def test_any_protobuf_client_can_call_a_shard_by_its_proto(host):
    expert_map = placed(GATE, 2)
    with running_shards(expert_map, MODEL) as shards:
        server = host.serve(shards[0])
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = expert_pb2_grpc.ExpertShardStub(channel)
            header = expert_pb2.ForwardHeader(
                sequence_number=9, layer_id=1, placement_version=1, num_rows=1, num_assignments=1, num_partial_sums=1,
                dtype=1,
            )  # fmt: skip
            tensors = (torch.ones(MODEL.hidden_size), torch.ones(1), *torch.zeros(3, 1, dtype=torch.int32))
            payload = b"".join(tensor.numpy().tobytes() for tensor in tensors)
            header.crc32 = zlib.crc32(payload, zlib.crc32(header.SerializeToString()))
            (answer,) = stub.Forward(iter([expert_pb2.ForwardRequest(header=header, payload=payload)]), timeout=30)
            assert (answer.header.sequence_number, answer.header.num_partial_sums) == (9, 1)
            load = stub.GetShardLoad(expert_pb2.GetShardLoadRequest(), timeout=30)
            assert (load.ep_rank, load.num_units, load.num_forwards, load.num_rows) == (0, 12, 1, 1)
            assert load.weight_bytes == shards[0].weight_bytes >= 24 * MODEL.expert_bytes
            assert [layer.layer_id for layer in load.layers] == [1, 2, 4]
            assert list(load.layers[0].num_tokens) == [1] + [0] * 15


def test_health_follows_what_the_shard_is_told(host):
    shard = expert_shard(placed(GATE, 1), 0, MODEL)
    server = host.serve(shard)
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def status() -> int:
            return stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=30).status

        assert status() == health_pb2.HealthCheckResponse.NOT_SERVING
        host.thread.run(server.set_serving(True), 30)
        assert status() == health_pb2.HealthCheckResponse.SERVING


def test_outstanding_forwards_are_bounded_and_given_up_ones_make_room(grpc_host):
    host = grpc_host
    shard = expert_shard(placed(GATE, 1), 0, MODEL)
    server = host.serve(shard)
    transport = GrpcTransport(f"127.0.0.1:{server.port}", host.thread.loop, max_outstanding=2)
    wait_until(lambda: transport.is_connected)

    forwards = Forwards(transport, host.poller)

    def forward(number: int) -> Future:
        return forwards.send(expert_pb2.ForwardHeader(sequence_number=number, layer_id=1, placement_version=1, dtype=1))

    _, second = forward(1), forward(2)
    with pytest.raises(QueueFull, match=r"2 forwards .* are outstanding, limit is 2"):
        forwards.wait(forward(3))
    wait_until(lambda: shard.num_waiting_forwards == 2)
    forwards.calls[0].is_given_up = True
    third = forward(4)
    wait_until(lambda: shard.num_waiting_forwards == 3)
    shard.start()
    assert forwards.wait(second)
    assert forwards.wait(third)
    transport.close()
    shard.stop()


def test_a_taken_port_is_reported_with_the_address(host):
    shard = expert_shard(placed(GATE, 1), 0, MODEL)
    port = host.serve(shard).port
    with pytest.raises(Exception, match=f"cannot listen on 127.0.0.1:{port}"):
        host.thread.run(ExpertServer.start(shard, "127.0.0.1", port), 30)


def test_a_closed_transport_leaves_no_task_behind(host):
    server = host.serve(expert_shard(placed(GATE, 1), 0, MODEL))
    transport = host.connect(f"127.0.0.1:{server.port}")
    wait_until(lambda: transport.is_connected)
    transport.close()

    async def transport_tasks() -> list[str]:
        return [task.get_coro().__qualname__ for task in asyncio.all_tasks() if "GrpcTransport" in repr(task)]

    wait_until(lambda: host.thread.run(transport_tasks(), 30) == [])
    forwards = Forwards(transport, host.poller)
    with pytest.raises(ShardUnavailable, match="closed"):
        forwards.wait(forwards.send(expert_pb2.ForwardHeader(sequence_number=1)))
