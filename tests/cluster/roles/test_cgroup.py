from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.roles.cgroup import core_quota, memory_left

GIB = 2**30
NO_LIMIT_V1 = 9223372036854771712


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def membership(root: Path, text: str) -> Path:
    file = root.parent / "membership"
    file.write_text(text)
    return file


def write(folder: Path, files: Mapping[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def memory_v2(limit: object, used: int, file_pages: int = 0) -> dict[str, object]:
    stat = f"anon 1\ninactive_file {file_pages}\nactive_file 0\nshmem 5"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


def test_a_containers_own_group_lies_at_the_top_and_bounds_its_memory_and_its_cores(root: Path) -> None:
    write(root, memory_v2(8 * GIB, 3 * GIB) | {"cpu.max": "150000 100000"})
    own = membership(root, "0::/\n")
    assert memory_left(root, own) == 5 * GIB
    assert core_quota(root, own) == 1.5


def test_files_that_are_kept_in_memory_give_way(root: Path) -> None:
    write(root, memory_v2(8 * GIB, 7 * GIB, file_pages=4 * GIB))
    assert memory_left(root, membership(root, "0::/\n")) == 5 * GIB


def test_of_nested_groups_the_first_to_be_full_counts(root: Path) -> None:
    write(root / "pod", memory_v2(4 * GIB, 3 * GIB) | {"cpu.max": "400000 100000"})
    write(root / "pod" / "container", memory_v2(8 * GIB, 2 * GIB) | {"cpu.max": "max 100000"})
    own = membership(root, "0::/pod/container\n")
    assert memory_left(root, own) == GIB
    assert core_quota(root, own) == 4


def test_without_a_limit_there_is_none(root: Path) -> None:
    write(root, memory_v2("max", GIB) | {"cpu.max": "max 100000"})
    own = membership(root, "0::/\n")
    assert memory_left(root, own) is None
    assert core_quota(root, own) is None


def test_where_there_are_no_groups_there_is_no_limit(root: Path) -> None:
    assert memory_left(root, root / "nothing") is None
    assert core_quota(root, membership(root, "0::/elsewhere\n")) is None


def test_version_1_has_a_folder_for_each_controller_and_counts_the_groups_within(root: Path) -> None:
    stat = f"inactive_file 7\nactive_file 7\ntotal_cache 9\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}"
    files = {"memory.limit_in_bytes": 6 * GIB, "memory.usage_in_bytes": 5 * GIB, "memory.stat": stat}
    write(root / "memory" / "docker", files)
    write(root / "memory", files | {"memory.limit_in_bytes": NO_LIMIT_V1})
    write(root / "cpu" / "docker", {"cpu.cfs_quota_us": 250000, "cpu.cfs_period_us": 100000})
    write(root / "cpu", {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000})
    own = membership(root, "4:memory:/docker\n2:cpu,cpuacct:/docker\n1:name=systemd:/x\n0::/\n")
    assert memory_left(root, own) == 3 * GIB
    assert core_quota(root, own) == 2.5


def test_version_1_in_a_container_names_a_path_outside_and_shows_its_group_at_the_top(root: Path) -> None:
    files = {"memory.limit_in_bytes": 2 * GIB, "memory.usage_in_bytes": GIB, "memory.stat": "total_cache 0"}
    write(root / "memory", files)
    assert memory_left(root, membership(root, "4:memory:/docker/0123\n")) == GIB


def test_a_group_may_have_any_name(root: Path) -> None:
    write(root / "caf\xe9", memory_v2(2 * GIB, GIB))
    (root.parent / "membership").write_bytes("0::/caf\xe9\n".encode())
    assert memory_left(root, root.parent / "membership") == GIB


def test_a_group_that_is_over_its_limit_has_nothing_left(root: Path) -> None:
    write(root, memory_v2(GIB, 2 * GIB))
    assert memory_left(root, membership(root, "0::/\n")) == 0
