import logging
import threading
from collections.abc import Iterator

import pytest

from cluster.config import parse_config
from cluster.roles import role as role_module
from cluster.roles.role import EXIT_DIED
from cluster.roles.thread_watch import MAX_LOOK_S, STALLED_S, ThreadWatch
from cluster.roles.worker_role import WorkerRole
from tests.attention.fake_decoder import CountingDecoder, Listener, make_engine, make_sequence


class Ended(Exception):
    """What the process does instead."""


@pytest.fixture
def role(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerRole]:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(role_module.os, "_exit", end)
    role = WorkerRole(parse_config({}), 0, "127.0.0.1")
    yield role
    role.stop(0.0)


def test_a_worker_whose_engine_hangs_in_a_kernel_ends_and_says_why(
    role: WorkerRole, caplog: pytest.LogCaptureFixture
) -> None:
    now_s, entered, may_go, decoder = 0.0, threading.Event(), threading.Event(), CountingDecoder()

    def hang(token_ids: object) -> None:
        entered.set()
        assert may_go.wait(30)

    decoder.before_forward = hang
    role._engine = engine = make_engine(decoder)
    role._watch = ThreadWatch("engine", engine, lambda: now_s)
    engine.start()
    role.health()
    engine.submit(make_sequence([1], name="request", max_tokens=1), Listener())
    assert entered.wait(30)

    def be_watched() -> None:
        nonlocal now_s
        for _ in range(2 + round(STALLED_S / MAX_LOOK_S)):
            now_s += MAX_LOOK_S
            role.health()

    with caplog.at_level(logging.CRITICAL), pytest.raises(Ended, match=str(EXIT_DIED)):
        be_watched()
    assert now_s >= STALLED_S
    assert "no sign of life for 300 s" in caplog.text
    may_go.set()
    engine.stop()


def test_a_worker_whose_engine_thread_has_ended_ends(role: WorkerRole) -> None:
    role._engine = engine = make_engine()
    engine.start()
    role.health()
    engine.stop()
    with pytest.raises(Ended, match=str(EXIT_DIED)):
        role.health()
