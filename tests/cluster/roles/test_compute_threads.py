import os
from pathlib import Path

import pytest

from cluster.roles.compute_threads import share_of, share_of_cores, usable_cores


@pytest.mark.parametrize(("content", "limit"), [("max 100000", None), ("150000 100000", 2), ("50000 100000", 1)])
def test_a_containers_quota_bounds_the_cores(tmp_path: Path, content: str, limit: int | None) -> None:
    (tmp_path / "cpu.max").write_text(content)
    cores = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path / "cpu.max") == min(cores, limit or cores)


def test_without_a_quota_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "nothing") == len(os.sched_getaffinity(0))


def test_every_process_gets_a_thread_and_two_where_there_are_two_cores() -> None:
    assert share_of_cores(1) >= share_of_cores(1000) == min(2, usable_cores())


def test_processes_share_the_cores_out_but_none_has_fewer_threads_than_two() -> None:
    assert [share_of(8, n) for n in (1, 2, 4, 8)] == [8, 4, 2, 2]
    assert share_of(1, 1) == 1
