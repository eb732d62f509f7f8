"""What other threads ask of the controller's thread, which alone touches the system's state."""

import logging
import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from protos.errors import DeadlineExceeded, InternalError, MobulaError

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 60.0  # a plan for a large model takes seconds

T = TypeVar("T")


class Inbox:
    """`ask` from any thread but the controller's; `answer` from the controller's."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()

    def ask(self, function: Callable[[], T]) -> T:
        """What the function returns or raises, called between two steps of the controller.

        Raises DeadlineExceeded when the controller has no time for it; then it is not called any more.
        """
        answer: Future[T] = Future()
        self._asked.put((function, answer))
        try:
            return answer.result(ASK_TIMEOUT_S)
        except TimeoutError as error:
            answer.cancel()  # nobody is left to be told: what has not begun must not
            raise DeadlineExceeded(
                f"the controller took longer than {ASK_TIMEOUT_S:.0f} s; its status says whether that began"
            ) from error

    def answer(self) -> None:
        """Calls everything that was asked."""
        while not self._asked.empty():
            function, answer = self._asked.get()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(function())
            except MobulaError as error:
                answer.set_exception(error)
            except Exception as error:  # a fault of ours must not leave the operator waiting
                logger.exception("what was asked failed")
                answer.set_exception(InternalError(f"what was asked failed: {error}"))
