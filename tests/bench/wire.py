"""What a layer's round trip to its shards costs beyond their computation: shared memory, gRPC, and gRPC's own floor.

    python -m tests.bench.wire [number of rows ...]

Shards are processes of their own whose computation is next to nothing; what they say that it took is subtracted. Calls
are back to back ("hot"), in blocks of each way in turn. "frame" is one call to one shard, from its rows to its sums,
also under mutual TLS, beyond the shard's computation; "layer" is dispatch and combine of the router over two shards;
"echo" is a bare stream of grpc.aio that sends the same bytes to and fro, which has no other thread to wake on either
side, and "relay" one that wakes as many threads as a frame and does nothing else; "doorbell" is a message of no content
to another process and back, each asleep until it comes: the machine's own price of waking two processes, below which
nothing goes that does not spin.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry
from rich.console import Console

from experts.grouped_ffn import ForwardInput
from experts.metrics import ShardMetrics
from experts.servicer import ExpertServer
from experts.shard import ExpertShard, ShardConfig
from experts.weight_store import ExpertModel, Unit
from protos import expert_pb2, ring, tensor_pb2
from protos.certificates import CertificateFolder
from protos.credentials import Credentials, PeerRole
from protos.loop_thread import LoopThread
from protos.memory import Matrix, as_tensor
from protos.mutual_tls import MutualTls, role_name
from protos.poller import Poller
from router.completions import Completions, ForwardAnswer, ForwardCall
from router.grpc_transport import GrpcTransport
from router.plan import plan_layer
from router.ring_transport import RingTransport
from router.router import Router
from router.transport import ShardTransport
from tests.bench.echo import Call, echo_call, relay_call, start_echo
from tests.bench.row import Options, Param, Row, Unmeasurable
from tests.bench.table import table_of
from tests.certificates import make_authority
from tests.fake_experts import MOE_LAYER_IDS, RandomReader, grouped_gate, placed, random_rows, router_to

ROOT = Path(__file__).parents[2]
HIDDEN_SIZE = 2048
NUM_SHARDS = 2
RING_BYTES = 256 * 2**20
CALLS_IN_A_BLOCK, CALLS_BEFORE = 100, 10
GATE = grouped_gate()
NO_EVENT_ENGINE = {"GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener"}
TIMEOUT_S = 60.0


def rows(options: Options) -> Iterator[Row]:
    """Hot round trips of 1, 8 and 64 rows."""
    for num_rows in (8,) if options.is_quick else (1, 8, 64):
        options.show(f"{num_rows} rows of {HIDDEN_SIZE}")
        options.check_time(30.0)
        yield from measure(num_rows, num_blocks=5 if options.is_quick else 15)


def measure(num_rows: int, num_blocks: int) -> Iterator[Row]:
    """In a process of its own, so that gRPC is set up as in a worker whatever this process has done with it."""
    command = [sys.executable, "-m", "tests.bench.wire", "--measure", str(num_rows), "--blocks", str(num_blocks)]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = (result.stderr.strip() or "it said nothing").splitlines()[-1]
        raise Unmeasurable(f"the measuring process ended with {result.returncode}: {last}")
    blocks: dict[str, list[float]] = json.loads(result.stdout.splitlines()[-1])
    params: dict[str, Param] = {"rows": num_rows, "of": HIDDEN_SIZE, "dtype": "bf16"}
    for name, samples in blocks.items():
        against = {
            "frame grpc": ("frame echo", "frame relay"),
            "frame grpc tls": ("frame grpc",),
            "frame ring": ("frame grpc", "frame doorbell"),
            "layer ring": ("layer grpc",),
        }
        turns = {peer: list(zip(samples, blocks[peer], strict=True)) for peer in against.get(name, ())}
        yield Row.of(f"wire, {name}", params, samples, "us", turns=turns)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"} | NO_EVENT_ENGINE


def blocks_in_turn(num_rows: int, num_blocks: int) -> dict[str, list[float]]:
    """By name, the median microseconds of each block."""
    sys.setswitchinterval(0.0005)
    torch.set_num_threads(1)
    loop, poller = LoopThread("loop"), Poller()
    with ExitStack() as stack:
        certificates = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mobula-bench-")))
        make_authority(certificates)
        shards = [stack.enter_context(shard_process(ep_rank, certificates)) for ep_rank in range(NUM_SHARDS)]
        ports = [json.loads(shard.stdout.readline()) for shard in shards if shard.stdout]
        addresses = {ep_rank: f"127.0.0.1:{port['shard']}" for ep_rank, port in enumerate(ports)}

        def shared_memory(address: str) -> RingTransport:
            return RingTransport(address, loop.loop, poller, RING_BYTES)

        def stream(address: str) -> GrpcTransport:
            return GrpcTransport(address, loop.loop)

        expert_map = placed(GATE, NUM_SHARDS)
        ring_router = router_to(GATE, expert_map, shared_memory, addresses=addresses, poller=poller)
        grpc_router = router_to(GATE, expert_map, stream, addresses=addresses)
        secured = GrpcTransport(
            f"127.0.0.1:{ports[0]['secured']}", loop.loop, credentials=role_credentials(certificates, PeerRole.WORKER)
        )
        transports: list[ShardTransport] = [shared_memory(addresses[0]), stream(addresses[0]), secured]
        wait_until_connected(transports, ring_router, grpc_router)
        echo_address = f"127.0.0.1:{ports[0]['echo']}"
        frame = bytes(num_rows * HIDDEN_SIZE * 2 + 2 * num_rows * 16 + 30)
        example = frame_call(transports[0], poller, num_rows)
        ways = {
            "frame doorbell": doorbell_call(ports[0]["doorbell"]),
            "frame ring": example,
            "frame grpc": frame_call(transports[1], poller, num_rows),
            "frame grpc tls": frame_call(secured, poller, num_rows),
            "frame echo": echo_call(echo_address, frame),
            "frame relay": relay_call(echo_address, frame, loop),
            "layer ring": layer_call(ring_router, num_rows),
            "layer grpc": layer_call(grpc_router, num_rows),
        }
        blocks: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(num_blocks):
            for name, call in ways.items():
                for _ in range(CALLS_BEFORE):
                    call()
                blocks[name].append(1e6 * statistics.median(call() for _ in range(CALLS_IN_A_BLOCK)))
        for shard in shards:
            shard.kill()
    return blocks


def wait_until_connected(transports: list[ShardTransport], *routers: Router) -> None:
    give_up_at_s = time.monotonic() + TIMEOUT_S
    while not all(transport.is_connected for transport in transports):
        if time.monotonic() > give_up_at_s:
            raise Unmeasurable("the shards cannot be reached")
        time.sleep(0.01)
    for router in routers:
        if router.wait_until_connected(TIMEOUT_S):
            raise Unmeasurable("the shards cannot be reached")


def frame_call(transport: ShardTransport, poller: Poller, num_rows: int) -> Call:
    """Each row to two experts of one unit of the first shard."""
    topk_ids = torch.tensor([[0, 1]] * num_rows)
    plan = plan_layer(topk_ids, torch.full((num_rows, 2), 0.5), np.arange(16) // 2, np.zeros(8, dtype=np.int64))
    message = plan.messages[0]
    hidden_states = torch.ones(num_rows, HIDDEN_SIZE, dtype=torch.bfloat16)
    completions = Completions(poller)
    outcomes: list[Any] = []
    numbers = iter(range(1, 2**31))

    def call() -> float:
        started_s = time.perf_counter()
        number = next(numbers)
        header = expert_pb2.ForwardHeader(
            sequence_number=number, layer_id=1, placement_version=1, num_rows=num_rows, num_assignments=2 * num_rows,
            num_partial_sums=num_rows, dtype=tensor_pb2.DTYPE_BFLOAT16,
        )  # fmt: skip
        transport.forward(
            ForwardCall(
                sequence_number=number, header=header.SerializeToString(), hidden_states=hidden_states,
                message=message, answer_bytes=num_rows * HIDDEN_SIZE * 2,
                completions=completions, tell=outcomes.append,
            )
        )  # fmt: skip
        while not outcomes:
            completions.wait(TIMEOUT_S)
        elapsed_s = time.perf_counter() - started_s
        outcome = outcomes.pop()
        if not isinstance(outcome, ForwardAnswer) or outcome.header.HasField("error"):
            raise Unmeasurable(f"the shard answered {outcome}")
        outcome.release()
        return elapsed_s - outcome.header.timing.compute_ns / 1e9

    return call


def layer_call(router: Router, num_rows: int) -> Call:
    """The computation is not subtracted."""
    given = random_rows(GATE, num_rows, HIDDEN_SIZE, dtype=torch.bfloat16)

    def call() -> float:
        started_s = time.perf_counter()
        router.combine(router.dispatch(1, given.hidden_states, given.topk_weights, given.topk_ids))
        return time.perf_counter() - started_s

    return call


def doorbell_call(name: str) -> Call:
    """Sleeps in a poller, as the engine thread does."""
    sock, poller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), Poller()
    sock.connect(f"\0{name}")
    answers: list[bytes] = []
    poller.register(sock.fileno(), lambda: answers.append(sock.recv(ring.MAX_DOORBELL_BYTES)))

    def call() -> float:
        started_s = time.perf_counter()
        sock.send(b"x")
        while not answers:
            poller.poll(TIMEOUT_S)
        answers.clear()
        return time.perf_counter() - started_s

    return call


def role_credentials(certificates: Path, role: PeerRole) -> Credentials:
    return MutualTls(CertificateFolder(certificates / role.value, role_name(role)))


def shard_process(ep_rank: int, certificates: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.bench.wire", "--serve", str(ep_rank), "--certificates", str(certificates)]
    return subprocess.Popen(  # ends with its stdin, so also when this process is killed
        command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def serve(ep_rank: int, certificates: Path) -> None:
    """A shard and an echo, until stdin ends; prints their ports."""
    sys.setswitchinterval(0.0005)
    torch.set_num_threads(1)
    model = ExpertModel(
        moe_layer_ids=MOE_LAYER_IDS, n_routed_experts=16, hidden_size=HIDDEN_SIZE, moe_intermediate_size=8,
        dtype=torch.bfloat16,
    )  # fmt: skip
    shard = ExpertShard(
        ShardConfig(ep_rank=ep_rank), model, RandomReader(model), ShardMetrics(CollectorRegistry(), ep_rank), nothing
    )
    expert_map = placed(GATE, NUM_SHARDS)
    shard.activate(expert_map.placement_version, [Unit(*unit) for unit in expert_map.units_of(ep_rank)])
    shard.start()
    loop = LoopThread("loop")
    server = loop.run(ExpertServer.start(shard, "127.0.0.1", 0))
    credentials = role_credentials(certificates, PeerRole.SHARD)
    secured = loop.run(ExpertServer.start(shard, "127.0.0.1", 0, credentials))
    echo, echo_port = loop.run(start_echo())
    ports = {"shard": server.port, "secured": secured.port, "echo": echo_port, "doorbell": start_doorbell()}
    print(json.dumps(ports), flush=True)
    sys.stdin.read()
    del echo


def nothing(forward: ForwardInput, experts: object, out: Matrix | None) -> Matrix:
    """In the place of grouped_ffn: memory is written, and nothing is computed."""
    if out is None:
        return torch.zeros(forward.num_partial_sums, HIDDEN_SIZE, dtype=torch.bfloat16)
    as_tensor(out).zero_()
    return out


def start_doorbell() -> str:
    """Answers one connection under the name that is returned."""
    name, poller = ring.Ticket.random().socket_name, Poller()
    listener = ring.listen(name)

    def answer() -> None:
        sock, _ = listener.accept()
        poller.register(sock.fileno(), lambda: sock.sendall(sock.recv(ring.MAX_DOORBELL_BYTES)))
        while True:
            poller.poll(None)

    threading.Thread(target=answer, name="doorbell", daemon=True).start()
    return name


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.wire", description=__doc__)
    parser.add_argument("num_rows", type=int, nargs="*", default=[8])
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--certificates", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.serve is not None:
        serve(parsed.serve, parsed.certificates)
    elif parsed.measure is not None:
        print(json.dumps(blocks_in_turn(parsed.measure, parsed.blocks)))
    else:
        Console().print(table_of([row for num_rows in parsed.num_rows for row in measure(num_rows, parsed.blocks)]))


if __name__ == "__main__":
    main()
