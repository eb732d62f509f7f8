"""Who waits while the dashboard asks processes that are slow to answer: one page at most."""

import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.dashboard import dashboard
from cluster.dashboard.dashboard import Dashboard


class SlowLoop:
    """Answers at once until it is told to be slow; then when `go_on` is set."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.is_asked = threading.Event()
        self.num_asked = 0

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float) -> dict[str, Any]:
        coroutine.close()
        self.num_asked += 1
        self.is_asked.set()
        assert self.go_on.wait(10.0)
        return {"asked": self.num_asked, "errors": {}}


def test_a_page_that_asks_while_another_one_collects_gets_what_was_known_before(monkeypatch: Any) -> None:
    monkeypatch.setattr(dashboard, "MAX_AGE_S", 0.0)
    monkeypatch.setattr(dashboard, "MAX_WAIT_S", 0.02)
    loop = SlowLoop()
    board = Dashboard(None, loop, list)  # type: ignore[arg-type]
    assert board.state(0, 0)["asked"] == 1
    loop.go_on.clear()
    loop.is_asked.clear()
    with ThreadPoolExecutor(max_workers=1) as pool:
        slow = pool.submit(board.state, 0, 0)
        assert loop.is_asked.wait(10.0)
        assert [board.state(0, 0)["asked"] for _ in range(3)] == [1, 1, 1]
        loop.go_on.set()
        assert slow.result(10.0)["asked"] == 2


def test_pages_that_ask_at_once_share_one_answer() -> None:
    loop = SlowLoop()
    loop.go_on.clear()
    board = Dashboard(None, loop, list)  # type: ignore[arg-type]
    with ThreadPoolExecutor(max_workers=4) as pool:
        pages = [pool.submit(board.state, 0, 0) for _ in range(4)]
        assert loop.is_asked.wait(10.0)
        loop.go_on.set()
        assert [page.result(10.0)["asked"] for page in pages] == [1, 1, 1, 1]
