"""Nobody waits for a loop that has ended."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from protos.loop_thread import LoopEnded, LoopThread


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    thread = LoopThread("test")
    yield thread
    thread.stop()


async def seven() -> int:
    return 7


def test_a_coroutine_runs_on_the_loop(thread: LoopThread) -> None:
    assert thread.run(seven()) == 7


def test_what_takes_too_long_is_cancelled(thread: LoopThread) -> None:
    was_cancelled = threading.Event()

    async def sleep() -> None:
        try:
            await asyncio.sleep(60.0)
        except asyncio.CancelledError:
            was_cancelled.set()
            raise

    with pytest.raises(TimeoutError):
        thread.run(sleep(), timeout_s=0.01)
    assert was_cancelled.wait(5.0)


def test_who_waits_when_the_loop_ends_is_told(thread: LoopThread) -> None:
    has_begun = threading.Event()

    async def wait_for_ever() -> None:
        has_begun.set()
        await asyncio.Event().wait()

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(thread.run, wait_for_ever())
        assert has_begun.wait(5.0)
        thread.stop()
        with pytest.raises(LoopEnded):
            waiting.result(5.0)


def test_a_loop_that_has_ended_takes_nothing(thread: LoopThread) -> None:
    thread.stop()
    thread.stop()
    with pytest.raises(LoopEnded, match="has ended"):
        thread.run(seven())


def test_a_loop_that_has_ended_refuses_calls_instead_of_keeping_them_for_ever(thread: LoopThread) -> None:
    thread.stop()
    assert thread.loop.is_closed()
    with pytest.raises(RuntimeError):
        thread.loop.call_soon_threadsafe(print)


def test_a_generator_that_nobody_reads_to_its_end_gives_back_what_it_holds(thread: LoopThread) -> None:
    was_given_back = threading.Event()

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            was_given_back.set()

    held = numbers()

    async def first() -> int:
        return await anext(held)

    assert thread.run(first()) == 1
    thread.stop()
    assert was_given_back.is_set()
