"""Who is next."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.fair_queue import FairQueue


def drain(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_a_client_with_many_requests_waits_for_itself() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(4):
        queue.push("heavy", 1.0, f"heavy {i}")
    queue.push("light", 1.0, "light")
    assert drain(queue) == ["heavy 0", "light", "heavy 1", "heavy 2", "heavy 3"]


def test_shares_are_of_cost_not_of_requests() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(2):
        queue.push("long", 4.0, f"long {i}")
    for i in range(8):
        queue.push("short", 1.0, f"short {i}")
    assert [item.split()[0] for item in drain(queue)] == ["short"] * 3 + ["long"] + ["short"] * 4 + ["long"] + ["short"]


def test_a_client_that_was_away_has_saved_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(5):
        queue.push("steady", 1.0, f"steady {i}")
    for _ in range(3):
        queue.pop()
    for i in range(3):
        queue.push("late", 1.0, f"late {i}")
    assert drain(queue) == ["steady 3", "late 0", "steady 4", "late 1", "late 2"]


def test_who_leaves_is_not_served() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", 1.0, "first")
    queue.push("b", 1.0, "second")
    queue.remove("first")
    queue.remove("nobody")
    assert drain(queue) == ["second"]
    with pytest.raises(IndexError):
        queue.pop()


def test_what_a_client_gave_up_counts_against_it_no_longer() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", 1.0, "kept")
    queue.push("a", 100.0, "given up")
    queue.push("b", 5.0, "of another")
    queue.remove("given up")
    queue.push("a", 1.0, "next")
    assert drain(queue) == ["kept", "next", "of another"]
    queue.push("b", 2.0, "b's")
    queue.push("a", 1.0, "a's")
    assert drain(queue) == ["a's", "b's"]


def test_a_client_whose_newest_request_was_given_up_has_nothing_against_it_once_the_others_are_served() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", 1.0, "kept")
    queue.push("a", 100.0, "given up")
    queue.remove("given up")
    queue.pop()
    queue.push("b", 5.0, "of another")
    queue.push("a", 1.0, "later")
    assert drain(queue) == ["later", "of another"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), max_size=30), st.sampled_from("abc"))
def test_the_cost_ahead_is_what_is_then_served_before(pushed: list[tuple[str, int]], client: str) -> None:
    queue: FairQueue[int] = FairQueue()
    for i, (name, cost) in enumerate(pushed):
        queue.push(name, cost, i)
    ahead = queue.cost_ahead(client, 2)
    queue.push(client, 2, -1)
    order = [queue.pop() for _ in range(len(queue))]
    assert sum(pushed[i][1] for i in order[: order.index(-1)]) == ahead
