"""What a worker says of the system, from a router that is a plain object."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from attention.worker_report import WorkerReport
from protos import generation_pb2
from protos.errors import ShardUnavailable
from tests.fake_experts import grouped_gate, placed


class FakeChannel:
    """Its calls go on until it is closed, and are cancelled then, as gRPC's."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self._answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def unary_unary(self, method: str, **_: Any) -> Callable[..., Awaitable[None]]:
        def call(request: object, timeout: float) -> Awaitable[None]:
            self.begun.set()
            return self._answer

        return call

    unary_stream = stream_stream = unary_unary  # of methods that are not called

    async def close(self, grace: float) -> None:
        self._answer.cancel()
        for _ in range(5):  # others have their turn meanwhile
            await asyncio.sleep(0)


def report_of(made: list[FakeChannel]) -> WorkerReport:
    def channel(*_: object) -> FakeChannel:
        made.append(FakeChannel())
        return made[-1]

    router = SimpleNamespace(expert_map=placed(grouped_gate(), 1))
    credentials = SimpleNamespace(channel=channel)
    return WorkerReport(router, grouped_gate(), generation_pb2.GetModelInfoResponse(), credentials)  # type: ignore[arg-type]


def test_a_shard_that_is_let_go_while_it_is_asked_for_its_load_ends_the_call_with_a_status() -> None:
    async def let_go() -> None:
        made: list[FakeChannel] = []
        report = report_of(made)
        await report.update_shards({0: "shard:1"})
        asking = asyncio.create_task(report.expert_load())
        await asyncio.wait_for(made[0].begun.wait(), timeout=10.0)
        await report.update_shards({0: "shard:2"})
        with pytest.raises(ShardUnavailable, match="shard 0 at shard:1 did not report its load"):
            await asking

    asyncio.run(let_go())


def test_a_shard_that_is_let_go_just_before_it_is_asked_ends_the_call_with_a_status() -> None:
    async def let_go() -> None:
        report = report_of([])
        await report.update_shards({0: "shard:1"})
        failure, _ = await asyncio.gather(report.expert_load(), report.update_shards({}), return_exceptions=True)
        assert isinstance(failure, ShardUnavailable)

    asyncio.run(let_go())


def test_a_new_shard_can_be_asked_while_the_one_before_it_is_let_go() -> None:
    async def replace_shard() -> None:
        made: list[FakeChannel] = []
        report = report_of(made)
        await report.update_shards({0: "shard:1"})
        updating = asyncio.create_task(report.update_shards({0: "shard:2"}))
        await asyncio.sleep(0)
        asking = asyncio.create_task(report.expert_load())
        await updating
        assert made[1].begun.is_set()
        asking.cancel()

    asyncio.run(replace_shard())


def test_a_client_that_goes_while_shards_are_asked_ends_the_call() -> None:
    async def go() -> None:
        made: list[FakeChannel] = []
        report = report_of(made)
        await report.update_shards({0: "shard:1"})
        asking = asyncio.create_task(report.expert_load())
        await asyncio.wait_for(made[0].begun.wait(), timeout=10.0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(go())


def test_the_number_of_shards_is_that_of_the_placement_in_use() -> None:
    router = SimpleNamespace(expert_map=placed(grouped_gate(), 2))
    info = generation_pb2.GetModelInfoResponse(model_id="small", dp_size=3)
    report = WorkerReport(router, grouped_gate(), info)  # type: ignore[arg-type]
    assert asyncio.run(report.model_info()).ep_size == 2
    fewer = replace(router.expert_map, placement_version=2, unit_to_ep_ranks=router.expert_map.unit_to_ep_ranks * 0)
    router.expert_map = fewer  # shard 1 was drained
    answer = asyncio.run(report.model_info())
    assert (answer.model_id, answer.dp_size, answer.ep_size) == ("small", 3, 1)
