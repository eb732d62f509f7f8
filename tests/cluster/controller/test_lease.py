"""Who commands the controller."""

from cluster.controller.lease import LEASE_S, Lease


class Time:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.on_sleep = lambda: None

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.on_sleep()
        self.now_s += seconds


def lease(owner: str = "first") -> tuple[Lease, Time]:
    time = Time()
    return Lease(owner, time, time.sleep), time


def test_the_creator_commands_and_nobody_else() -> None:
    held, _ = lease()
    assert held.take("first")
    assert not held.renew("second")
    assert held.is_held_by("first")
    assert not held.is_held_by("second")


def test_a_silent_owner_is_replaced_once_its_time_is_over() -> None:
    held, time = lease()
    time.now_s += 5.0
    assert held.take("second")
    assert time.now_s == 100.0 + LEASE_S
    assert held.is_held_by("second")
    assert not held.renew("first")


def test_an_owner_that_is_heard_of_meanwhile_stays() -> None:
    held, time = lease()
    time.now_s += 5.0
    time.on_sleep = lambda: held.renew("first")
    assert not held.take("second")
    assert held.is_held_by("first")
