"""When a worker counts as silent, in virtual time."""

import asyncio
from dataclasses import dataclass, field

from cluster.gateway.silence import SilenceWatch
from tests.virtual_time import run_virtually

LIMIT_S = 0.5
NEVER_S = 3600.0


@dataclass
class Worker:
    """Answers each question after so long; the last time goes on for ever."""

    answer_times_s: list[float]
    dp_rank: int = 0
    num_in_flight: int = 1
    is_silent: bool = False
    is_there: bool = True
    num_asked: int = 0
    handed_over_s: list[float] = field(default_factory=list)

    async def answers(self) -> bool:
        self.num_asked += 1
        await asyncio.sleep(self.answer_times_s.pop(0) if len(self.answer_times_s) > 1 else self.answer_times_s[0])
        return self.is_there

    def watch(self, seconds: float) -> None:
        async def scenario() -> None:
            clock = asyncio.get_running_loop().time
            watch = SilenceWatch(self, LIMIT_S, lambda: self.handed_over_s.append(clock()))
            task = asyncio.create_task(watch.run())
            await asyncio.sleep(seconds)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        run_virtually(scenario())


def test_calls_are_handed_over_when_an_answer_stays_away_and_only_then() -> None:
    worker = Worker([0.3] * 20 + [NEVER_S])
    worker.watch(20 * 0.5)
    assert not worker.handed_over_s
    assert worker.num_asked == 20
    worker = Worker([0.01, NEVER_S])
    worker.watch(3.0)
    assert worker.is_silent
    assert worker.handed_over_s[0] < 0.01 + 2 * 0.2 + LIMIT_S + 0.2
    assert len(worker.handed_over_s) > 10  # again and again: another worker may have come


def test_a_worker_that_is_heard_again_is_not_silent() -> None:
    worker = Worker([NEVER_S / 1000, 0.01])
    worker.watch(3.0)
    assert worker.is_silent
    worker = Worker([NEVER_S / 1000, 0.01])
    worker.watch(5.0)
    assert not worker.is_silent


def test_a_worker_that_is_slow_all_the_time_is_given_longer() -> None:
    worker = Worker([*(0.1 * n for n in range(1, 5)), *[0.45, 0.35] * 10, 0.7, 0.3])
    worker.watch(20.0)
    assert not worker.handed_over_s


def test_a_connection_that_is_gone_is_no_silence_and_a_worker_without_calls_is_not_asked() -> None:
    gone = Worker([0.01], is_there=False)
    gone.watch(3.0)
    assert not gone.is_silent
    assert not gone.handed_over_s
    idle = Worker([NEVER_S], num_in_flight=0)
    idle.watch(3.0)
    assert not idle.num_asked
