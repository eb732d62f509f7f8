"""Rings over real sockets: what goes through them, and what happens when a peer dies, lies or is somebody else."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experts.ring_server import RingServer
from experts.shard import ExpertShard
from protos import expert_pb2, ring
from protos.errors import ShardUnavailable
from protos.poller import Poller
from router.completions import Carrier
from router.grpc_transport import GrpcTransport
from router.local_transport import LocalTransport
from router.ring_transport import Ring, RingTransport, connect_to
from router.router import Router
from tests.fake_experts import expert_shard, grouped_gate, placed, random_rows, router_to, running_shards, small_model
from tests.shard_host import Forwards, Host, combined, running_host, wait_until

GATE = grouped_gate()
MODEL = small_model()
MAP = placed(GATE, 1)
ROWS = random_rows(GATE, 6, MODEL.hidden_size)
ROOT = Path(__file__).parents[2]


SECRET = bytes(ring.SECRET_BYTES)


@pytest.fixture
def host() -> Iterator[Host]:
    with running_host("ring") as host:
        yield host


def transport_of(router: Router) -> RingTransport:
    return router._routing.transports[0]


def carriers(router: Router) -> set[Carrier]:
    return {carrier for _, carrier in router._metrics._sent_bytes}


def num_mapped_rings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:mobula-ring")


def header_of(number: int) -> expert_pb2.ForwardHeader:
    return expert_pb2.ForwardHeader(sequence_number=number, layer_id=1, placement_version=1, dtype=1)


class BlockedShard:
    """A shard whose computation waits until it may go on."""

    def __init__(self) -> None:
        self.shard = expert_shard(MAP, 0, MODEL)
        self.may_compute, self.is_computing = threading.Event(), threading.Event()
        ffn = self.shard._ffn

        def blocked_ffn(*args):
            self.is_computing.set()
            assert self.may_compute.wait(30)
            return ffn(*args)

        self.shard._ffn = blocked_ffn
        self.shard.start()


@pytest.fixture
def blocked() -> Iterator[BlockedShard]:
    blocked = BlockedShard()
    yield blocked
    blocked.may_compute.set()
    blocked.shard.stop()


def test_rows_and_sums_go_through_the_ring_and_leave_it_empty(host):
    with running_shards(MAP, MODEL) as shards:
        router = host.router(MAP, [host.serve(shards[0])])
        local = router_to(GATE, MAP, lambda rank: LocalTransport(shards[0].forward, rank))
        for layer_id in MAP.moe_layer_ids:
            assert torch.equal(combined(router, ROWS, layer_id), combined(local, ROWS, layer_id))
        assert carriers(router) == {Carrier.RING}
        assert router.stats().sent_bytes == local.stats().sent_bytes
        assert transport_of(router)._ring.used_bytes == 0


def test_a_frame_that_does_not_fit_goes_over_the_stream():
    with running_host("ring", ring_bytes=4096) as host, running_shards(MAP, MODEL) as shards:
        router = host.router(MAP, [host.serve(shards[0])])
        combined(router, random_rows(GATE, 1, MODEL.hidden_size))
        combined(router, random_rows(GATE, 50, MODEL.hidden_size))
        assert transport_of(router).has_ring
        assert carriers(router) == {Carrier.RING, Carrier.GRPC}


def test_without_shared_memory_a_shard_is_reached_over_the_stream_alone(host):
    with running_shards(MAP, MODEL) as shards:
        address = f"127.0.0.1:{host.serve(shards[0]).port}"
        for mebibytes, kind in ((0, GrpcTransport), (1, RingTransport)):
            transport = connect_to(host.thread.loop, Poller(), mebibytes)(address)
            wait_until(lambda transport=transport: transport.is_connected)
            assert type(transport) is kind
            transport.close()


def test_a_ring_that_cannot_be_reached_is_done_without(host):
    with running_shards(MAP, MODEL) as shards:
        server = host.serve(shards[0])
        server.ring.close()  # as if the worker were on another host: nothing listens under the name
        router = host.router(MAP, [server])
        local = router_to(GATE, MAP, lambda rank: LocalTransport(shards[0].forward, rank))
        assert torch.equal(combined(router, ROWS), combined(local, ROWS))
        assert not transport_of(router).has_ring
        assert carriers(router) == {Carrier.GRPC}


@pytest.fixture
def ring_server() -> Iterator[RingServer]:
    shard = expert_shard(MAP, 0, MODEL)
    server = RingServer(shard)
    shard.start()
    yield server
    server.close()
    shard.stop()


@pytest.mark.parametrize(
    ("num_bytes", "seals", "message"),
    [
        (4096, 0, "may shrink"),
        (4096, fcntl.F_SEAL_GROW, "may shrink"),
        (8192, ring._SEALS, "promises 8192 bytes, the memory has 4096"),
        (0, ring._SEALS, "promises 0 bytes"),
        (2**63, ring._SEALS, "promises"),
    ],
)
def test_memory_that_its_maker_could_take_away_is_refused(num_bytes, seals, message):
    worker, shard = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = os.memfd_create("mobula-ring", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    with worker, shard:
        socket.send_fds(worker, [ring._HELLO.pack(ring._MAGIC, num_bytes, SECRET)], [fd])
        with pytest.raises(ring.RingRefused, match=message):
            ring.accept(shard, os.getuid(), SECRET)
    os.close(fd)


@pytest.mark.parametrize(
    "hello",
    [b"x", ring._HELLO.pack(b"mobring9", 4096, SECRET), ring._HELLO.pack(ring._MAGIC, 4096, SECRET)],
)
def test_a_hello_that_is_none_or_has_no_memory_is_refused(hello):
    worker, shard = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with worker, shard:
        worker.send(hello)
        with pytest.raises(ring.RingRefused):
            ring.accept(shard, os.getuid(), SECRET)


def test_who_knocks_without_rest_does_not_fill_the_log(ring_server, caplog):
    for _ in range(100):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as knocking:
            knocking.connect(f"\0{ring_server.ticket.socket_name}")
            knocking.send(b"x")
            assert knocking.recv(1) == b""
    assert 1 <= len(caplog.records) < 50


@pytest.mark.parametrize(
    "garbage",
    [
        b"x",
        ring.pack_forward(b"\xff\xff", ring.Region(0, 0), ring.Region(0, 0)),
        ring.pack_forward(header_of(1).SerializeToString(), ring.Region(4096, 64), ring.Region(0, 0)),
        ring.pack_forward(header_of(1).SerializeToString(), ring.Region(0, 0), ring.Region(2**64 - 1, 2)),
        ring.pack_forward(header_of(1).SerializeToString(), ring.Region(1, 0), ring.Region(0, 0)),
        bytes(ring.MAX_DOORBELL_BYTES + 1),
    ],
)
def test_a_worker_that_sends_garbage_loses_its_ring_and_no_other_notices(ring_server, garbage):
    good, _ = ring.connect(ring_server.ticket, 4096)
    bad, _ = ring.connect(ring_server.ticket, 4096)
    wait_until(lambda: ring_server.num_connections == 2)
    for sock in (good, bad):
        sock.settimeout(30)
    bad.send(garbage)
    assert bad.recv(99) == b""
    good.send(ring.pack_forward(header_of(1).SerializeToString(), ring.Region(0, 0), ring.Region(0, 0)))
    answer = expert_pb2.ForwardResult.FromString(good.recv(4096))
    assert (answer.sequence_number, answer.num_partial_sums, answer.HasField("error")) == (1, 0, False)
    assert ring_server.num_connections == 1
    good.close()
    bad.close()
    wait_until(lambda: ring_server.num_connections == 0)


def test_an_answer_region_of_another_size_is_refused_by_name(ring_server):
    sock, _ = ring.connect(ring_server.ticket, 4096)
    sock.settimeout(30)
    sock.send(ring.pack_forward(header_of(1).SerializeToString(), ring.Region(0, 0), ring.Region(0, 64)))
    answer = expert_pb2.ForwardResult.FromString(sock.recv(4096))
    assert "answer's region has 64 bytes, the partial sums have 0" in answer.error.message
    sock.close()


def connected_pair(max_outstanding: int = 64) -> tuple[socket.socket, Ring, Forwards]:
    """The shard's end of a socket, and a worker's ring and calls at the other."""
    shard, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker.setblocking(False)
    poller = Poller()
    end = Ring("shard:1", worker, memoryview(bytearray(4096)), poller, max_outstanding)

    class Transport:
        def forward(self, call) -> None:
            self.was_taken = end.forward(call)

    return shard, end, Forwards(Transport(), poller)


def answer_to(shard: socket.socket) -> bytes:
    header, _, _ = ring.unpack_forward(shard.recv(4096), 4096)
    number = expert_pb2.ForwardHeader.FromString(header).sequence_number
    return expert_pb2.ForwardResult(sequence_number=number).SerializeToString()


def test_the_region_of_a_call_that_was_given_up_is_free_when_the_shard_has_answered():
    shard, end, forwards = connected_pair()
    with shard:
        future = forwards.send(header_of(1), answer_bytes=100)
        forwards.calls[0].is_given_up = True
        assert end.used_bytes == 128
        shard.send(answer_to(shard))
        forwards.wait(future)
        assert end.used_bytes == 0


def test_calls_beyond_the_limit_and_the_memory_are_left_to_the_stream():
    shard, _, forwards = connected_pair(max_outstanding=2)
    with shard:
        first = forwards.send(header_of(1), answer_bytes=4096 - 64)
        forwards.send(header_of(2), answer_bytes=128)
        assert not forwards._transport.was_taken
        forwards.send(header_of(3), answer_bytes=64)
        assert forwards._transport.was_taken
        forwards.send(header_of(4))
        assert not forwards._transport.was_taken
        shard.send(answer_to(shard))
        forwards.wait(first)
        forwards.send(header_of(5), answer_bytes=64)
        assert forwards._transport.was_taken


@pytest.mark.parametrize("garbage", [b"\xff\xff", expert_pb2.ForwardResult(sequence_number=9).SerializeToString()])
def test_a_shard_that_answers_garbage_loses_the_ring(garbage):
    shard, end, forwards = connected_pair()
    with shard:
        future = forwards.send(header_of(1), answer_bytes=64)
        shard.send(garbage)
        with pytest.raises(ShardUnavailable, match="no ring to shard shard:1"):
            forwards.wait(future)
        assert not end.is_open
        forwards.send(header_of(2))
        assert not forwards._transport.was_taken


def test_when_the_socket_ends_every_pending_call_fails_at_once_and_the_memory_is_given_back():
    shard, end, forwards = connected_pair()
    futures = [forwards.send(header_of(number), answer_bytes=64) for number in (1, 2)]
    shard.close()
    for future in futures:
        with pytest.raises(ShardUnavailable, match=r"the shard ended it|reset by peer"):
            forwards.wait(future)
    assert end._memory.num_bytes == 0


def test_when_a_worker_leaves_its_waiting_forwards_are_dropped(host, blocked):
    server = host.serve(blocked.shard)
    leaves, stays = (host.router(MAP, [server]) for _ in range(2))
    handles = []
    for router, layer_id in ((stays, 1), (leaves, 2), (stays, 4)):
        handles.append(router.dispatch(layer_id, ROWS.hidden_states, ROWS.topk_weights, ROWS.topk_ids))
        assert blocked.is_computing.wait(30)
    leaves.close()
    wait_until(lambda: not transport_of(leaves).is_connected)
    blocked.may_compute.set()
    stays.combine(handles[0])
    stays.combine(handles[2])
    assert blocked.shard.load().num_forwards in (2, 3)  # the poll that finds the doorbell may come before the end
    wait_until(lambda: server.ring.num_connections == 1)


SHARD_PROCESS = """
import time
from protos.loop_thread import LoopThread
from experts.servicer import ExpertServer
from tests.fake_experts import expert_shard, grouped_gate, placed, small_model
shard = expert_shard(placed(grouped_gate(), 1), 0, small_model())
ffn = shard._ffn
shard._ffn = lambda forward, *rest: ffn(forward, *rest) if forward.num_rows < 6 else time.sleep(60)
shard.start()
loop = LoopThread("loop")
server = loop.run(ExpertServer.start(shard, "127.0.0.1", 0))
print(server.port, flush=True)
time.sleep(120)
"""


def test_a_killed_shard_process_fails_what_is_pending_at_once_and_leaves_nothing(host):
    before = num_mapped_rings()
    with subprocess.Popen([sys.executable, "-c", SHARD_PROCESS], stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            address = f"127.0.0.1:{int(process.stdout.readline())}"
            transport = host.connect(address)
            wait_until(lambda: transport.is_connected)
            assert transport.has_ring
            assert num_mapped_rings() == before + 1
            forwards = Forwards(transport, host.poller)
            future = forwards.send(header_of(1))
            forwards.wait(future)
            assert forwards.calls[0].carrier is Carrier.RING
            rows = torch.zeros(6, MODEL.hidden_size)
            header = header_of(2)
            header.num_rows = 6
            hangs = forwards.send(header, rows)
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises(ShardUnavailable, match="no ring"):
                forwards.wait(hangs)
        finally:
            process.kill()
    assert num_mapped_rings() == before
    transport.close()


WORKER_PROCESS = """
import sys, time
from protos import ring
sock, memory = ring.connect(ring.Ticket.from_text(sys.argv[1]), 2**20)
print("connected", flush=True)
time.sleep(120)
"""


def test_a_killed_worker_process_leaves_no_memory_on_the_shard(ring_server):
    before = num_mapped_rings()
    command = [sys.executable, "-c", WORKER_PROCESS, ring_server.ticket.to_text()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            assert process.stdout.readline() == b"connected\n"
            wait_until(lambda: ring_server.num_connections == 1)
            assert num_mapped_rings() == before + 1
        finally:
            process.kill()
    wait_until(lambda: ring_server.num_connections == 0)
    wait_until(lambda: num_mapped_rings() == before)


def test_a_stopped_shard_ends_its_rings():
    shard: ExpertShard = expert_shard(MAP, 0, MODEL)
    server = RingServer(shard)
    shard.start()
    early, _ = ring.connect(server.ticket, 4096)
    wait_until(lambda: server.num_connections == 1)
    shard.stop()
    late, _ = ring.connect(server.ticket, 4096)
    for sock in (early, late):
        sock.settimeout(30)
        assert sock.recv(99) == b""
        sock.close()
    server.close()
