"""What Ray says of an actor's call, in the controller's words."""

from concurrent.futures import Future
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from cluster.controller.process import ProcessDied
from cluster.roles.actors import _settle
from protos.errors import Unavailable
from protos.loop_thread import LoopEnded


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (ActorDiedError(), ProcessDied),
        (RayTaskError("call", "", LoopEnded("the event loop of thread loop has ended")), ProcessDied),  # it has stopped
        (RayTaskError("call", "", Unavailable("later")), Unavailable),
        (ValueError("of Ray's own"), ValueError),
    ],
)
def test_an_error_of_a_call_is_its_cause_and_a_process_that_has_ended_has_died(
    said: Exception, told: type[Exception]
) -> None:
    done: Future[Any] = Future()
    done.set_exception(said)
    answer: Future[Any] = Future()
    _settle(answer, done)
    assert type(answer.exception()) is told


def test_an_answer_is_passed_on() -> None:
    done: Future[Any] = Future()
    done.set_result(7)
    answer: Future[Any] = Future()
    _settle(answer, done)
    assert answer.result() == 7
