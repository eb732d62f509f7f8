"""A worker that says nothing although its connection stands: noticed here, and its calls handed to another one.

Keepalive sees a peer whose kernel is gone; not bytes that are held up on their way, nor in time a process that is
stopped. A worker that has calls is therefore asked for its health, one question after the other: any answer shows that
both directions live, and a step that waits for a shard delays none.
Silence is counted in turns of this process's own loop: while that was stopped itself, nobody was silent.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from router.service_times import Estimate

logger = logging.getLogger(__name__)

QUESTION_S = 0.2  # from an answer to the next question
TURN_S = 0.1
MAX_LIMIT_S = 5.0  # keepalive ends the connection then


class Watched(Protocol):
    """A worker as it is seen here."""

    dp_rank: int
    num_in_flight: int
    is_silent: bool

    def answers(self) -> Coroutine[Any, Any, bool]:
        """Asks for its health; whether it, rather than its connection, has ended that."""


class SilenceWatch:
    """Of one worker; `run` until it is cancelled."""

    def __init__(self, worker: Watched, min_limit_s: float, hand_over: Callable[[], None]) -> None:
        """min_limit_s: no silence is shorter; how long one must be follows from how long answers took.

        hand_over: called every TURN_S while the worker is silent.
        """
        self._worker = worker
        self._min_limit_s = min_limit_s
        self._hand_over = hand_over
        self._times: Estimate | None = None

    async def run(self) -> None:
        worker = self._worker
        while True:
            await asyncio.sleep(QUESTION_S)
            if not (worker.num_in_flight or worker.is_silent):
                continue
            waited_s, is_answer = await self._ask()
            if not is_answer:  # the connection is not there, or broke: whoever calls sees that by itself
                continue
            if worker.is_silent:
                logger.warning("worker %d is heard again", worker.dp_rank)
            worker.is_silent = False
            if self._times is None:
                self._times = Estimate(waited_s)
            else:
                self._times.update(waited_s)

    async def _ask(self) -> tuple[float, bool]:
        """How long the end of a question took, seconds, and whether that was an answer."""
        question = asyncio.create_task(self._worker.answers())
        waited_s = 0.0
        try:
            while not (await asyncio.wait({question}, timeout=TURN_S))[0]:
                waited_s += TURN_S
                if waited_s >= self._limit_s:
                    self._tell(waited_s)
            return waited_s, not question.cancelled() and question.result()
        finally:
            question.cancel()

    @property
    def _limit_s(self) -> float:
        measured_s = 0.0 if self._times is None else self._times.late_after_s
        return min(MAX_LIMIT_S, max(self._min_limit_s, measured_s))

    def _tell(self, waited_s: float) -> None:
        if not self._worker.is_silent:
            logger.warning("worker %d has said nothing for %.1f s", self._worker.dp_rank, waited_s)
        self._worker.is_silent = True
        self._hand_over()
