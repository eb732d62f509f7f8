"""The servicer without a server."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import grpc.aio
import pytest

from cluster.controller.admin_server import AdminServicer
from protos import admin_pb2
from tests.fake_controller import FakeController

CONTEXT = Mock(spec=grpc.aio.ServicerContext)


@pytest.fixture
def planner() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=1) as executor:
        yield executor


def test_a_caller_that_leaves_before_its_turn_begins_nothing(planner: ThreadPoolExecutor) -> None:
    controller, may_end = FakeController(), threading.Event()
    servicer = AdminServicer(controller, planner)
    busy = planner.submit(may_end.wait, 30.0)  # somebody else's plan

    async def ask_and_leave() -> None:
        call = asyncio.create_task(servicer.rebalance(admin_pb2.RebalanceRequest().SerializeToString(), CONTEXT))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(ask_and_leave())
    may_end.set()
    busy.result()
    planner.submit(lambda: None).result()  # whatever was kept had its turn before this
    assert controller.num_begun == 0


def test_plans_are_computed_off_the_event_loop(planner: ThreadPoolExecutor) -> None:
    threads = []

    class Noting(FakeController):
        def plan_rebalance(self):
            threads.append(threading.current_thread())
            return super().plan_rebalance()

    request = admin_pb2.RebalanceRequest(dry_run=True).SerializeToString()
    asyncio.run(AdminServicer(Noting(), planner).rebalance(request, CONTEXT))
    assert threads != [threading.main_thread()]
