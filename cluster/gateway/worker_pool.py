"""The gateway's connections to attention workers, and which of them gets the next call. Knows nothing of calls."""

import asyncio
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio

from protos import errors, generation_pb2, rpc, worker_pb2
from protos.credentials import PLAINTEXT, Credentials, PeerRole

INFERENCE = generation_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
WORKER = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name
READY, TRANSIENT_FAILURE, SHUTDOWN = (
    grpc.ChannelConnectivity.READY,
    grpc.ChannelConnectivity.TRANSIENT_FAILURE,
    grpc.ChannelConnectivity.SHUTDOWN,
)
CONNECT_TIMEOUT_S = 1.0  # within a cluster it takes milliseconds


@dataclass(slots=True, eq=False)
class WorkerChannel:
    """The gateway's connection to one attention worker. Equal only to itself."""

    dp_rank: int
    address: str
    channel: grpc.aio.Channel
    num_in_flight: int = 0

    def unary(self, method: str) -> grpc.aio.UnaryUnaryMultiCallable:
        """A method of the Inference service."""
        return self.channel.unary_unary(f"/{INFERENCE}/{method}")

    def generate(self) -> grpc.aio.UnaryStreamMultiCallable:
        """Worker.Generate, which takes a RelayedRequest."""
        return self.channel.unary_stream(f"/{WORKER}/Generate")

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Around a call: it counts as in flight."""
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1

    async def connect(self) -> bool:
        """Whether the connection stands, or does in time."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                while (state := self.channel.get_state(try_to_connect=True)) is not READY:
                    if state in (TRANSIENT_FAILURE, SHUTDOWN):
                        return False
                    await self.channel.wait_for_state_change(state)
        except (TimeoutError, grpc.aio.UsageError):  # the latter when it is closed meanwhile
            return False
        return True


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
    is_closed: bool = False  # for good: the gateway stops

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
        self.is_closed = True
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

    def choose(self, excluded: Collection[WorkerChannel] = ()) -> WorkerChannel:
        """The worker with the fewest calls in flight, the lower rank first. Raises Unavailable if there is none."""
        candidates = [worker for worker in self.workers.values() if worker not in excluded]
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
