"""What a container's limits, the control groups of this process, leave it: versions 2 and 1 of Linux' interface."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")  # a line for each hierarchy: "number:controllers:path", none named by version 2


def core_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """Cores that may be busy at once, by the strictest group; None without a quota."""
    quotas = []
    for group in _groups("cpu", root, membership):
        words = _words(group / "cpu.max") or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))  # both in microseconds
    return min(quotas, default=None)


def memory_left(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes until the first group is full, without pages of files, which give way; None without a limit."""
    left = []
    for group in _groups("memory", root, membership):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes")
        if limit and used and limit != ["max"]:
            left.append(max(0, int(limit[0]) - int(used[0]) + _file_pages(group)))
    return min(left, default=None)


def _groups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """The folders of the process's groups and of those around them, as far as a container sees them."""
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / controller if controllers else root
        group = mount / path.lstrip("/")
        yield group
        yield from (parent for parent in group.parents if parent.is_relative_to(mount))


def _file_pages(group: Path) -> int:
    """Bytes of files that the group keeps in memory, those of the groups in it too."""
    counts = dict(line.split() for line in _lines(group / "memory.stat"))
    in_all = "total_" if "total_cache" in counts else ""  # version 1 counts the group alone without
    return sum(int(counts.get(f"{in_all}{state}_file", 0)) for state in ("active", "inactive"))


def _words(file: Path) -> list[str]:
    return [word for line in _lines(file) for word in line.split()]


def _lines(file: Path) -> list[str]:
    """None of a file that is not there."""
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()  # groups may have any name
    except OSError:
        return []
