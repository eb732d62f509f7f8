"""The gateway's connections to attention workers, and which of them gets the next call. Knows nothing of calls."""

import asyncio
import logging
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from cluster.gateway.request_cost import RequestCost
from cluster.gateway.silence import SilenceWatch
from protos import errors, generation_pb2, rpc, worker_pb2
from protos.credentials import PLAINTEXT, Credentials, PeerRole

logger = logging.getLogger(__name__)

INFERENCE = generation_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
WORKER = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
READY, IDLE, TRANSIENT_FAILURE, SHUTDOWN = (
    grpc.ChannelConnectivity.READY,
    grpc.ChannelConnectivity.IDLE,
    grpc.ChannelConnectivity.TRANSIENT_FAILURE,
    grpc.ChannelConnectivity.SHUTDOWN,
)
REACHABLE = (READY, IDLE)  # as far as is known
CAPACITY_TIMEOUT_S = 10.0
QUESTION_TIMEOUT_S = 10.0  # of one that asks whether a worker is there
NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
DEFAULT_NUM_SEQS = 64  # until a worker has said how many it computes at once
CONNECT_TIMEOUT_S = 1.0  # within a cluster it takes milliseconds


@dataclass(slots=True, eq=False)
class WorkerChannel:
    """The gateway's connection to one attention worker. Equal only to itself.

    is_silent: the connection stands, and nothing comes through it. calls: those of Generate that are under way.
    """

    dp_rank: int
    address: str
    channel: grpc.aio.Channel
    num_in_flight: int = 0
    pending_tokens: float = 0.0  # of prompts that it was sent and has not answered yet, as far as they are known
    max_num_seqs: int = DEFAULT_NUM_SEQS  # that it computes at once
    num_cache_tokens: int | None = None  # that its latent cache holds; None until it has said so
    is_silent: bool = False
    calls: set[grpc.aio.Call] = field(default_factory=set)

    def unary(self, method: str) -> grpc.aio.UnaryUnaryMultiCallable:
        """A method of the Inference service."""
        return self.channel.unary_unary(f"/{INFERENCE}/{method}")

    def generate(self) -> grpc.aio.UnaryStreamMultiCallable:
        """Worker.Generate, which takes a RelayedRequest."""
        return self.channel.unary_stream(f"/{WORKER}/Generate")

    async def answers(self) -> bool:
        """Whether it says anything when it is asked for its health."""
        try:
            await self.channel.unary_unary(f"/{HEALTH}/Check")(b"", timeout=QUESTION_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return error.code() not in NO_ANSWER
        return True

    def num_places(self, mean_tokens: float) -> int:
        """Requests of so many tokens each that it should have: what it computes at once, and a few to go on with."""
        fitting = math.inf if self.num_cache_tokens is None else self.num_cache_tokens // max(1.0, mean_tokens)
        computed = int(max(1, min(self.max_num_seqs, fitting)))
        return computed + max(1, computed // 8)

    @contextmanager
    def occupied(self, cost: RequestCost) -> Iterator["Occupancy"]:
        """Around a call."""
        occupancy = Occupancy(self, cost)
        try:
            yield occupancy
        finally:
            occupancy.end()

    async def learn_capacity(self) -> None:
        """Asks what it can take; whoever does not answer keeps the default until it is connected anew."""
        try:
            answer = await self.unary("GetModelInfo")(b"", timeout=CAPACITY_TIMEOUT_S, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            logger.warning("worker %d at %s does not say what it can take: %s", self.dp_rank, self.address, error)
            return
        info = generation_pb2.GetModelInfoResponse.FromString(answer)
        self.max_num_seqs = info.max_num_seqs or self.max_num_seqs
        self.num_cache_tokens = info.num_cache_tokens or None

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


class Occupancy:
    """A call's share of a worker's work: its prompt until the first answer, and a place until it ends."""

    def __init__(self, worker: WorkerChannel, cost: RequestCost) -> None:
        self._worker = worker
        self._pending_tokens = cost.prompt_tokens
        worker.num_in_flight += 1
        worker.pending_tokens += self._pending_tokens

    def begin(self) -> None:
        """The worker has answered: the prompt is computed."""
        self._worker.pending_tokens -= self._pending_tokens
        self._pending_tokens = 0.0

    def end(self) -> None:
        """The call has ended."""
        self.begin()
        self._worker.num_in_flight -= 1


@dataclass(slots=True)
class WorkerPool:
    """The workers that can be called now. Used from the event loop only.

    leaving: no longer listed, but with calls in flight, which may end: a worker that was slow to say that it is well is
        not gone, and the connection to one that is gone breaks by itself.
    """

    credentials: Credentials = PLAINTEXT
    silence_timeout_s: float = 0.5  # that a worker may say nothing
    workers: dict[int, WorkerChannel] = field(default_factory=dict)
    leaving: list[WorkerChannel] = field(default_factory=list)
    _learning: set[asyncio.Task[None]] = field(default_factory=set)  # kept alive until they are done
    _watches: dict[WorkerChannel, asyncio.Task[None]] = field(default_factory=dict)  # until the channel is closed
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
                worker = self.workers[dp_rank] = self._connection(dp_rank, address)
                learning = asyncio.create_task(worker.learn_capacity())
                self._learning.add(learning)
                learning.add_done_callback(self._learning.discard)
        self.leaving += stale
        await self.close_idle()

    async def close_idle(self) -> None:
        """Lets go of leaving workers without calls."""
        idle = [worker for worker in self.leaving if not worker.num_in_flight]
        self.leaving = [worker for worker in self.leaving if worker.num_in_flight]
        for worker in idle:
            await self._disconnect(worker)

    async def close(self) -> None:
        """Lets go of all, and ends their calls. Safe to call twice."""
        self.is_closed = True
        await self.update({})
        busy, self.leaving = self.leaving, []
        for worker in busy:
            await self._disconnect(worker)

    def _connection(self, dp_rank: int, address: str) -> WorkerChannel:
        for worker in self.leaving:
            if (worker.dp_rank, worker.address) == (dp_rank, address):
                self.leaving.remove(worker)
                return worker
        channel = self.credentials.channel(address, PeerRole.WORKER, rpc.relay_options())
        worker = WorkerChannel(dp_rank, address, channel)
        watch = SilenceWatch(worker, self.silence_timeout_s, lambda: self._hand_over(worker))
        self._watches[worker] = asyncio.create_task(watch.run())
        return worker

    async def _disconnect(self, worker: WorkerChannel) -> None:
        self._watches.pop(worker).cancel()
        await worker.channel.close(grace=0)

    def _hand_over(self, silent: WorkerChannel) -> None:
        """Ends the calls of a worker that is silent if there is another one that can be reached and is not."""
        if any(not worker.is_silent and worker.channel.get_state() in REACHABLE for worker in self.workers.values()):
            for call in silent.calls:
                call.cancel()

    def num_places(self, mean_tokens: float) -> int | None:
        """Requests that the workers should have together; None without workers: then there is nothing to wait for."""
        if not self.workers:
            return None
        return sum(worker.num_places(mean_tokens) for worker in self.workers.values())

    def choose(self, excluded: Collection[WorkerChannel] = (), mean_tokens: float = 1.0) -> WorkerChannel:
        """The worker with the fewest tokens before it: prompts not computed yet, and for each call in flight the mean.

        The lower rank first; one that is silent only without others. Raises Unavailable if there is none.
        """
        if not self.workers:
            raise errors.Unavailable(
                "no attention worker is ready: the system is starting, or all are being started again; "
                "retry, `mobula status` shows how far it is",
                retry_after_s=1.0,
            )
        candidates = [worker for worker in self.workers.values() if worker not in excluded]
        if not candidates:
            raise errors.Unavailable(
                f"none of {len(self.workers)} attention workers can be reached; retry later", retry_after_s=1.0
            )
        return min(
            candidates,
            key=lambda worker: (
                worker.is_silent,
                worker.pending_tokens + worker.num_in_flight * mean_tokens,
                worker.dp_rank,
            ),
        )
