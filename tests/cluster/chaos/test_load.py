"""Clients against a gateway whose answers are known."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.chaos.load import Case, Load, cases
from cluster.client_access import ClientAccess
from tests.cluster.chaos.fake_gateway import Gateway


@contextmanager
def running_load(num_clients: int = 3) -> Iterator[tuple[Load, Gateway]]:
    gateway = Gateway()
    load = Load(f"127.0.0.1:{gateway.port}", ClientAccess(), cases(max_tokens=4), num_clients, seed=0)
    load.start()
    try:
        yield load, gateway
    finally:
        load.close()
        gateway.close()


def wait_until_every_case_is_answered(load: Load) -> None:
    wait_until(load.has_answered_every_case)


def wait_until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_every_case_is_sent_and_its_answer_kept() -> None:
    with running_load() as (load, _):
        wait_until_every_case_is_answered(load)
        assert load.is_streaming()
        load.drain(20.0)
    assert {answer.case for answer in load.answers} == set(cases(max_tokens=4))
    for answer in load.answers:
        assert answer.token_ids == [answer.case.seed] * 4
        assert len(answer.times_s) == 4
        assert answer.sent_s < answer.times_s[0] <= answer.times_s[-1] <= (answer.ended_s or 0.0)


def test_what_hangs_at_the_end_has_failed() -> None:
    with running_load() as (load, gateway):
        wait_until_every_case_is_answered(load)
        gateway.hangs = True
        time.sleep(0.2)
        load.drain(0.1)
        late = [answer for answer in load.answers if answer.error]
        assert len(late) == 3
        assert all(answer.ended_s for answer in late)


def test_a_gateway_that_is_gone_is_waited_for_and_asked_again() -> None:
    with running_load() as (load, gateway):
        wait_until_every_case_is_answered(load)
        gateway.hangs = True
        time.sleep(0.2)
        gateway.loop.run(gateway._server.stop(None))
        gateway.hangs = False
        num_sent = len(load.answers)
        gateway.loop.run(gateway._start(gateway.port))
        wait_until(lambda: len(load.answers) > num_sent + 3)
        load.drain(20.0)
    assert [answer for answer in load.answers if answer.error] == []
    assert sum(answer.num_repeats > 0 for answer in load.answers) == 3
    assert all(answer.token_ids == [answer.case.seed] * 4 for answer in load.answers)


def test_cases_differ() -> None:
    assert len(set(cases(max_tokens=4))) == len(cases(max_tokens=4)) == 8
    assert isinstance(cases(max_tokens=4)[0], Case)
