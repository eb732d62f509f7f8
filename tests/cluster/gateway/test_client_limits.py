"""What one client may have."""

import pytest

from cluster.gateway.client_limits import BURST_S, ClientLimits
from protos.errors import ClientLimit


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_lower_of_two_limits_on_requests_holds_and_others_are_not_concerned() -> None:
    limits = ClientLimits(3, None, Clock())
    for _ in range(2):
        limits.enter("a", 1.0, 2, 1.5)
    with pytest.raises(ClientLimit, match="2 requests of yours are in flight, limit is 2") as raised:
        limits.enter("a", 1.0, 2, 1.5)
    assert raised.value.retry_after_s == 1.5
    limits.enter("b", 1.0, None, 1.5)
    limits.leave("a", 1.0, 1.0)
    limits.enter("a", 1.0, 2, 1.5)


def test_tokens_come_back_with_time_and_the_hint_says_when() -> None:
    clock = Clock()
    limits = ClientLimits(None, 10.0, clock)
    limits.enter("a", 10.0 * BURST_S + 49.0, None, 1.0)
    with pytest.raises(ClientLimit, match="your 10 tokens a second") as raised:
        limits.enter("a", 1.0, None, 1.0)
    assert raised.value.retry_after_s == pytest.approx(5.0)
    clock.now_s += raised.value.retry_after_s
    limits.enter("a", 1.0, None, 1.0)


def test_what_a_request_did_not_use_is_given_back() -> None:
    limits = ClientLimits(None, 10.0, Clock())
    limits.enter("a", 500.0, None, 1.0)
    limits.leave("a", 500.0, 20.0)
    limits.enter("a", 1.0, None, 1.0)


def test_idle_clients_are_forgotten() -> None:
    clock = Clock()
    limits = ClientLimits(None, 10.0, clock)
    for i in range(100):
        limits.enter(f"client {i}", 50.0, None, 1.0)
        limits.leave(f"client {i}", 50.0, 50.0)
    clock.now_s += 5.0
    limits.enter("last", 1.0, None, 1.0)
    limits.leave("last", 1.0, 0.0)
    assert limits._clients == {}
