"""Three hosts whose network breaks: requests are answered or refused with a status, tokens never change, and within
RECOVERY_S of healing everything is as before, without anybody's help.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.checkpoints import write_checkpoint
from tests.netns.cluster import HEAD, WORKERS, Cluster, Seen
from tests.netns.hosts import missing

pytestmark = [
    pytest.mark.ray,
    pytest.mark.netns,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

HOLD_S = 6.0
RECOVERY_S = 10.0
CLEAR = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")  # what a client knows how to repeat
NUM_CASES = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not pytest's folder, whose name is too long for the sockets that Ray has in it.
    with TemporaryDirectory(prefix="mobula-") as name, ExitStack() as stack:
        folder = Path(name)
        model = write_checkpoint(folder / "model", "v2", num_hidden_layers=2)
        cluster = stack.enter_context(Cluster(folder, model))
        cluster.wait_until(lambda: len(expected(cluster)) == NUM_CASES, 30.0, "not every case was answered")
        yield cluster


def expected(cluster: Cluster) -> dict[int, list[int]]:
    """The first answer of each case, from before anything broke."""
    tokens: dict[int, list[int]] = {}
    for answer in list(cluster.seen):
        if not answer.error:
            tokens.setdefault(answer.case, answer.token_ids)
    return tokens


def check(cluster: Cluster, break_it: Callable[[], None], heal: Callable[[], None], lost: str | None) -> None:
    """lost: the host that then does not reach the head."""
    tokens = expected(cluster)
    broken_s = time.monotonic()
    break_it()
    try:
        assert [name for name in WORKERS if not cluster.reaches_head(name)] == [lost] * bool(lost)
        time.sleep(HOLD_S)
    finally:
        heal()
        healed_s = time.monotonic()

    def is_as_before() -> bool:
        sent_since = [answer for answer in list(cluster.seen) if answer.sent_s >= healed_s and not answer.error]
        is_serving = any(at_s > healed_s and serves for at_s, serves in list(cluster.serving)[-3:])
        return is_serving and len(sent_since) >= NUM_CASES

    cluster.wait_until(is_as_before, RECOVERY_S, "it did not recover")
    during = [answer for answer in cluster.seen if answer.ended_s > broken_s]
    assert answered(during), "nothing was answered"
    assert [answer for answer in during if answer.error and not answer.error.startswith(CLEAR)] == []
    assert [answer for answer in during if not answer.error and answer.token_ids != tokens[answer.case]] == []


def answered(answers: list[Seen]) -> list[Seen]:
    return [answer for answer in answers if not answer.error]


def test_a_host_that_is_cut_off_comes_back(cluster: Cluster) -> None:
    host = cluster.host(WORKERS[1])
    check(cluster, host.cut_off, host.cut_on, lost=WORKERS[1])


def test_a_host_that_hears_and_is_not_heard_comes_back(cluster: Cluster) -> None:
    host, others = cluster.host(WORKERS[0]), cluster.others(WORKERS[0])
    check(cluster, lambda: host.lose_what_is_sent_to(others), lambda: host.lose_nothing(others), lost=WORKERS[0])


def test_a_slow_network_that_loses_is_served_through(cluster: Cluster) -> None:
    started_s = time.monotonic()
    hosts = (HEAD, *WORKERS)
    check(
        cluster,
        lambda: [cluster.set_weather(name, delay_s=0.05, loss=0.01) for name in hosts],
        lambda: [cluster.set_weather(name) for name in hosts],
        lost=None,
    )
    assert [answer for answer in cluster.seen if answer.ended_s > started_s and answer.error] == []
