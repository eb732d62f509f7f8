"""Who gets a place, who waits and who is refused, in virtual time."""

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.config import AdmissionConfig
from cluster.gateway.admission import Admission
from cluster.gateway.metrics import GatewayMetrics
from protos.errors import ClientLimit, QueueFull
from tests.virtual_time import run_virtually

NUM_PLACES = 8
SERVICE_S = 0.5  # of a request that has a place, on average
BYTES, TOKENS = 400, 100
CAPACITY = NUM_PLACES / SERVICE_S  # requests a second


@dataclass
class Front:
    """An admission before workers that take SERVICE_S for each request."""

    num_places: int = NUM_PLACES
    max_concurrent_requests: int = 1000
    settings: AdmissionConfig = field(default_factory=lambda: AdmissionConfig(max_wait_s=2.0))
    rng: random.Random = field(default_factory=lambda: random.Random(3))
    done: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    hints_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    most_waiting: int = 0

    def __post_init__(self) -> None:
        self.metrics = GatewayMetrics()
        clock = asyncio.get_running_loop().time
        self.admission = Admission(
            self.settings, self.max_concurrent_requests, lambda: self.num_places, self.metrics, clock
        )

    async def request(self, client: str, deadline_s: float | None = None, service_s: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        arrived_s = loop.time()
        try:
            async with self.admission.place(client, BYTES, deadline_s) as ticket:
                self.waits_s.append(loop.time() - arrived_s)
                await asyncio.sleep(service_s or self.rng.uniform(0.5, 1.5) * SERVICE_S)
                self.admission.costs.learn_tokens(BYTES, TOKENS, TOKENS)
                ticket.used_tokens = 2 * TOKENS
                self.done[client] += 1
        except (QueueFull, ClientLimit) as error:
            self.refused[client] += 1
            self.hints_s.append(error.retry_after_s or 0.0)

    async def load(self, client: str, per_s: float, seconds: float) -> None:
        """Arrivals that do not wait for answers; returns when the last one has ended."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + seconds
        async with asyncio.TaskGroup() as group:
            while loop.time() < end_s:
                group.create_task(self.request(client))
                await asyncio.sleep(self.rng.expovariate(per_s))
                self.most_waiting = max(self.most_waiting, len(self.admission._queue))


def virtually(scenario: Coroutine[Any, Any, None]) -> None:
    run_virtually(scenario)


def test_at_five_times_the_capacity_as_much_is_done_as_at_one_and_what_waits_is_bounded() -> None:
    async def scenario() -> None:
        done = {}
        for factor in (1, 5):
            front = Front()
            await front.load("a", factor * CAPACITY, 60.0)
            done[factor] = front.done["a"]
            assert front.most_waiting <= 2.5 * 2.0 * CAPACITY
            assert max(front.waits_s) <= 2 * front.settings.max_wait_s
        assert done[5] >= 0.9 * done[1]
        assert front.refused["a"] > 2 * done[5]
        assert 0.1 <= min(front.hints_s) <= max(front.hints_s) < 2.0

    virtually(scenario())


def test_a_client_that_asks_for_ten_times_its_share_does_not_take_the_others() -> None:
    async def scenario() -> None:
        front = Front()
        await asyncio.gather(front.load("heavy", 5 * CAPACITY, 30.0), front.load("light", 0.4 * CAPACITY, 30.0))
        asked = front.done["light"] + front.refused["light"]
        assert front.done["light"] >= 0.95 * asked
        assert front.done["heavy"] >= 0.5 * CAPACITY * 30.0

    virtually(scenario())


def test_who_has_no_time_to_wait_is_refused_at_once() -> None:
    async def scenario() -> None:
        front = Front(num_places=1)
        await front.request("a", service_s=1.0)
        running = asyncio.create_task(front.request("a", service_s=1.0))
        await asyncio.sleep(0)
        await front.request("a", deadline_s=0.1)
        assert front.refused["a"] == 1
        await running

    virtually(scenario())


def test_a_client_that_leaves_gives_its_turn_to_the_next() -> None:
    async def scenario() -> None:
        front = Front(num_places=1)
        tasks = [asyncio.create_task(front.request(name, service_s=1.0)) for name in ("a", "b", "c")]
        await asyncio.sleep(0.5)
        tasks[1].cancel()
        await asyncio.wait(tasks)
        assert front.done == {"a": 1, "c": 1}
        assert asyncio.get_running_loop().time() == pytest.approx(2.0)
        assert front.admission._num_running == front.admission._num_bytes == 0

    virtually(scenario())


def test_a_new_worker_is_used_at_once() -> None:
    async def scenario() -> None:
        front = Front(num_places=1)
        tasks = [asyncio.create_task(front.request(name, service_s=1.0)) for name in ("a", "b")]
        await asyncio.sleep(0.1)
        front.num_places = 2
        front.admission.wake()
        await asyncio.wait(tasks)
        assert asyncio.get_running_loop().time() == pytest.approx(1.1)

    virtually(scenario())


def test_requests_are_refused_by_their_number_and_by_their_bytes() -> None:
    async def scenario() -> None:
        front = Front(max_concurrent_requests=3)
        await asyncio.gather(*(front.request("a") for _ in range(5)))
        assert (front.done["a"], front.refused["a"]) == (3, 2)
        front = Front(settings=AdmissionConfig(max_request_mib=3 * BYTES / 2**20))
        await asyncio.gather(*(front.request("a") for _ in range(5)))
        assert (front.done["a"], front.refused["a"]) == (3, 2)
        registry = front.metrics.registry
        assert registry.get_sample_value("mobula_gateway_sheds_total", {"reason": "full"}) == 2
        assert registry.get_sample_value("mobula_gateway_requests_waiting") == 0

    virtually(scenario())
