from types import SimpleNamespace

import pytest

from cluster.roles.thread_watch import MAX_LOOK_S, STALLED_S, ThreadWatch


class Watch:
    """A thread, what is seen of it, and the time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.thread = SimpleNamespace(signs_of_life=None)
        self._watch = ThreadWatch("engine", self.thread, lambda: self.now_s)

    def look(self, seconds: float, interval_s: float = 1.0) -> bool:
        """Now and then for so long; what the last look said."""
        is_stalled = False
        for _ in range(round(seconds / interval_s)):
            self.now_s += interval_s
            is_stalled = self._watch.is_stalled()
        return is_stalled


@pytest.fixture
def watch() -> Watch:
    return Watch()


def test_a_thread_that_stays_in_one_place_for_long_is_stalled(watch: Watch) -> None:
    watch.thread.signs_of_life = 7
    assert not watch.look(STALLED_S)  # the first look has seen nothing before
    assert watch.look(1.0)


def test_a_thread_that_has_nothing_to_do_or_goes_on_is_not(watch: Watch) -> None:
    assert not watch.look(2 * STALLED_S)
    for signs in range(4):
        watch.thread.signs_of_life = signs
        assert not watch.look(0.9 * STALLED_S)
    watch.thread.signs_of_life = None
    assert not watch.look(2 * STALLED_S)


def test_time_in_which_nobody_looked_says_nothing(watch: Watch) -> None:
    watch.thread.signs_of_life = 7
    watch.look(1.0)
    assert not watch.look(10 * STALLED_S, interval_s=10 * STALLED_S)
    assert not watch.look(STALLED_S - 2 * MAX_LOOK_S)
    assert watch.look(2 * MAX_LOOK_S)
