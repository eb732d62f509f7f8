"""Shard servers and routers in one process over real gRPC and real rings, for tests and benches."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import numpy as np
import torch

from experts.servicer import ExpertServer
from experts.shard import ExpertShard
from protos import expert_pb2
from protos.errors import MobulaError
from protos.loop_thread import LoopThread
from protos.memory import Memory
from protos.poller import Poller
from router.completions import Completions, ForwardAnswer, ForwardCall
from router.expert_map import ExpertMap
from router.grpc_transport import GrpcTransport
from router.plan import ShardMessage
from router.ring_transport import RingTransport
from router.router import Router
from router.router_config import RouterConfig
from router.transport import ShardTransport
from tests.fake_experts import Rows, grouped_gate, router_to

PATIENT = RouterConfig(forward_timeout_s=60.0, attempt_timeout_s=30.0)
RING_BYTES = 64 * 2**20


class Host:
    """A thread for the loop of workers and servers, and what runs on it."""

    def __init__(self, transport: str = "grpc", ring_bytes: int = RING_BYTES) -> None:
        """transport: "grpc" or "ring", which the routers use."""
        self.thread = LoopThread("test-loop")
        self.poller = Poller()
        self._ring_bytes = ring_bytes if transport == "ring" else 0
        self._servers: list[ExpertServer] = []
        self._routers: list[Router] = []

    def serve(self, shard: ExpertShard, port: int = 0) -> ExpertServer:
        server = self.thread.run(ExpertServer.start(shard, "127.0.0.1", port), 30)
        self._servers.append(server)
        return server

    def kill(self, server: ExpertServer) -> None:
        """Breaks its streams and rings at once."""
        self._servers.remove(server)
        self.thread.run(server.stop(0.0), 30)

    def router(self, expert_map: ExpertMap, servers: list[ExpertServer], config: RouterConfig = PATIENT) -> Router:
        poller = Poller()
        router = router_to(
            grouped_gate(),
            expert_map,
            lambda address: self.connect(address, poller),
            config=config,
            addresses=addresses(servers),
            poller=poller,
        )
        self._routers.append(router)
        assert router.wait_until_connected(30) == []
        return router

    def connect(self, address: str, poller: Poller | None = None) -> ShardTransport:
        if self._ring_bytes:
            return RingTransport(address, self.thread.loop, poller or self.poller, self._ring_bytes)
        return GrpcTransport(address, self.thread.loop)

    def close(self) -> None:
        for router in self._routers:
            router.close()
        for server in list(self._servers):
            self.kill(server)
        self.thread.stop()


@contextmanager
def running_host(transport: str = "grpc", ring_bytes: int = RING_BYTES) -> Iterator[Host]:
    host = Host(transport, ring_bytes)
    try:
        yield host
    finally:
        host.close()


def addresses(servers: list[ExpertServer]) -> dict[int, str]:
    return {ep_rank: f"127.0.0.1:{server.port}" for ep_rank, server in enumerate(servers)}


def combined(router: Router, rows: Rows, layer_id: int = 1) -> torch.Tensor:
    return router.combine(router.dispatch(layer_id, rows.hidden_states, rows.topk_weights, rows.topk_ids))


def wait_until(condition: Callable[[], bool]) -> None:
    give_up_at_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up_at_s, "waited 30 s in vain"
        time.sleep(0.005)


class Forwards:
    """Calls a transport directly, as the engine thread does."""

    def __init__(self, transport: ShardTransport, poller: Poller) -> None:
        self._transport = transport
        self._completions = Completions(poller)
        self.calls: list[ForwardCall] = []

    def send(self, header: expert_pb2.ForwardHeader, rows: torch.Tensor | None = None, answer_bytes: int = 0) -> Future:
        """The future is told when `wait` is called, with an answer whose payload is a copy."""
        future: Future[ForwardAnswer] = Future()

        def tell(outcome) -> None:
            if isinstance(outcome, MobulaError):
                future.set_exception(outcome)
            else:
                future.set_result(ForwardAnswer(outcome.header, Memory.of(bytes(outcome.payload.view))))
                outcome.release()

        hidden_states = torch.zeros(0, 4) if rows is None else rows
        call = ForwardCall(
            sequence_number=header.sequence_number,
            header=header.SerializeToString(),
            hidden_states=hidden_states,
            message=ShardMessage(
                ep_rank=0,
                row_ids=np.arange(len(hidden_states)),
                assignments=np.zeros((4, header.num_assignments), dtype=np.int32),
                partial_sums=np.arange(header.num_partial_sums),
            ),
            answer_bytes=answer_bytes,
            completions=self._completions,
            tell=tell,
        )
        self.calls.append(call)
        self._transport.forward(call)
        return future

    def wait(self, future: Future) -> ForwardAnswer:
        give_up_at_s = time.monotonic() + 30
        while not future.done():
            assert time.monotonic() < give_up_at_s, "waited 30 s in vain"
            self._completions.wait(0.1)
        return future.result()
