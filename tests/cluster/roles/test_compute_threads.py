import os

import pytest

from cluster.roles import cgroup
from cluster.roles.compute_threads import share_of, share_of_cores, usable_cores


@pytest.mark.parametrize(("quota", "limit"), [(None, None), (1.5, 2), (0.5, 1)])
def test_a_containers_quota_bounds_the_cores(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, limit: int | None
) -> None:
    monkeypatch.setattr(cgroup, "core_quota", lambda: quota)
    cores = len(os.sched_getaffinity(0))
    assert usable_cores() == min(cores, limit or cores)


def test_every_process_gets_a_thread_and_two_where_there_are_two_cores() -> None:
    assert share_of_cores(1) >= share_of_cores(1000) == min(2, usable_cores())


def test_processes_share_the_cores_out_but_none_has_fewer_threads_than_two() -> None:
    assert [share_of(8, n) for n in (1, 2, 4, 8)] == [8, 4, 2, 2]
    assert share_of(1, 1) == 1
