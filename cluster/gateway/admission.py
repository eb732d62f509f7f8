"""Who gets a place at the workers, who waits, and who is told at once to come back later.

1. A client with too many requests or tokens of its own is refused (client_limits.py).
2. There are as many places as workers compute sequences at once and their caches hold; who finds one free takes it.
3. Others wait, fairly between clients (fair_queue.py), if they should get a place in time, going by how fast places
   came free so far. Who would wait for too long is refused with the time after which it would not: work that nobody
   waits for any more is the way in which overload costs throughput.
4. A place that comes free goes to the next one.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from cluster.config import AdmissionConfig
from cluster.gateway.client_limits import ClientLimits
from cluster.gateway.fair_queue import FairQueue
from cluster.gateway.metrics import GatewayMetrics, ShedReason
from cluster.gateway.request_cost import CostModel, RequestCost
from protos.errors import ClientLimit, QueueFull

MIN_RETRY_S = 0.1
FIRST_RETRY_S = 1.0  # while nothing was measured


@dataclass(slots=True)
class Ticket:
    """A request that has a place. Whoever serves it writes down what it cost, if it ended well."""

    cost: RequestCost
    used_tokens: int | None = None


@dataclass(slots=True, eq=False)
class _Waiting:
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """Of one gateway. Used from its event loop only."""

    def __init__(
        self,
        settings: AdmissionConfig,
        max_concurrent_requests: int,
        num_places: Callable[[], int],
        metrics: GatewayMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """num_places: at the workers that are there now."""
        self.costs = CostModel()
        self._settings = settings
        self._max_requests = max_concurrent_requests
        self._num_places = num_places
        self._metrics = metrics
        self._clock = clock
        self._clients = ClientLimits(settings.max_requests_per_client, settings.max_tokens_per_s_per_client, clock)
        self._queue: FairQueue[_Waiting] = FairQueue()
        self._num_running = 0
        self._num_bytes = 0

    @property
    def num_waiting(self) -> int:
        """Requests that have no place yet. From any thread."""
        return len(self._queue)

    @asynccontextmanager
    async def place(
        self, client: str, num_bytes: int, max_wait_s: float | None, own_max_requests: int | None = None
    ) -> AsyncIterator[Ticket]:
        """Around a request: it has a place inside.

        num_bytes: of the request. max_wait_s: what its client's deadline leaves. Raises QueueFull, ClientLimit.
        """
        cost = self.costs.estimate(num_bytes)
        self._refuse_what_is_too_much(num_bytes)
        limit_s = self._settings.max_wait_s if max_wait_s is None else min(self._settings.max_wait_s, max_wait_s)
        self._refuse_what_would_wait(client, cost, limit_s)
        self._enter(client, cost, own_max_requests)
        ticket = Ticket(cost)
        self._num_bytes += num_bytes
        try:
            await self._turn(client, cost)
            started_s = self._clock()
            try:
                yield ticket
            finally:
                self._num_running -= 1
                if ticket.used_tokens is not None:
                    self.costs.learn_time(cost, self._clock() - started_s)
        finally:
            self._num_bytes -= num_bytes
            used_tokens = cost.tokens if ticket.used_tokens is None else ticket.used_tokens
            self._clients.leave(client, cost.tokens, used_tokens)
            self.wake()

    def wake(self) -> None:
        """Gives free places away; to be called when there are more."""
        while self._queue and self._num_running < self._num_places():
            turn = self._queue.pop().turn
            if not turn.done():  # else its client is gone
                self._num_running += 1
                turn.set_result(None)
        self._metrics.set_waiting(len(self._queue))

    async def _turn(self, client: str, cost: RequestCost) -> None:
        """Returns with a place."""
        waiting = _Waiting()
        self._queue.push(client, cost.tokens, waiting)
        self.wake()
        try:
            async with asyncio.timeout(2 * self._settings.max_wait_s):
                await waiting.turn
        except (asyncio.CancelledError, TimeoutError) as error:
            if waiting.turn.done() and not waiting.turn.cancelled():
                self._num_running -= 1  # it came at the same moment
            self._queue.remove(waiting)
            if isinstance(error, TimeoutError):
                raise self._shed(ShedReason.WAIT, "no place came free in time", self._hint_s()) from error
            raise

    def _enter(self, client: str, cost: RequestCost, own_max_requests: int | None) -> None:
        try:
            self._clients.enter(client, cost.tokens, own_max_requests, self._hint_s())
        except ClientLimit:
            self._metrics.count_shed(ShedReason.CLIENT)
            raise

    def _refuse_what_is_too_much(self, num_bytes: int) -> None:
        num_requests, limit = self._num_running + len(self._queue), self._max_requests
        if num_requests >= limit:
            text = f"{num_requests} requests are in flight, limit is {limit}"
            raise self._shed(ShedReason.FULL, text, self._hint_s())
        max_bytes = int(self._settings.max_request_mib * 2**20)
        if self._num_bytes + num_bytes > max_bytes:
            text = f"requests in flight have {self._num_bytes} bytes, yours {num_bytes}, limit is {max_bytes}"
            raise self._shed(ShedReason.FULL, text, self._hint_s())

    def _refuse_what_would_wait(self, client: str, cost: RequestCost, limit_s: float) -> None:
        if self._num_running + len(self._queue) < self._num_places():
            return
        seconds_per_token = self.costs.seconds_per_token
        if seconds_per_token is None:
            return
        ahead = self._queue.cost_ahead(client, cost.tokens) + self.costs.mean_tokens
        wait_s = ahead * seconds_per_token / max(1, self._num_places())
        if wait_s > limit_s:
            text = f"a place is expected in {wait_s:.1f} s, limit is {limit_s:.1f} s"
            raise self._shed(ShedReason.WAIT, text, wait_s - limit_s)

    def _hint_s(self) -> float:
        """After which, as measured, a place comes free."""
        seconds_per_token = self.costs.seconds_per_token
        if seconds_per_token is None:
            return FIRST_RETRY_S
        return self.costs.mean_tokens * seconds_per_token / max(1, self._num_places())

    def _shed(self, reason: ShedReason, text: str, retry_after_s: float) -> QueueFull:
        self._metrics.count_shed(reason)
        return QueueFull(f"{text}; retry later", retry_after_s=max(MIN_RETRY_S, retry_after_s))
