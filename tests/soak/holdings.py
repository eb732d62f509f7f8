"""What a system's processes hold: memory, descriptors, threads, shared memory, cache blocks, requests.

Read from outside, by /proc and the metrics page, so that it is true of processes that were replaced meanwhile as well.
"""

import re
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import psutil

MIB = 2**20
SCRAPE_S = 10.0
IDLE_SERIES = ("mobula_num_requests_running", "mobula_num_requests_waiting", "mobula_latent_cache_usage_ratio")


@dataclass(frozen=True, slots=True)
class Holdings:
    """Of one process. rings: mappings of shared memory between a worker and a shard."""

    memory_mib: float
    descriptors: int
    threads: int
    rings: int


# What a process may have more of at the end: pools and caches of libraries that had not been filled before.
SPARE = Holdings(memory_mib=96.0, descriptors=16, threads=12, rings=1)


def holdings_of(pids: Mapping[str, int]) -> dict[str, Holdings]:
    """By name, of those that run."""
    found = {}
    for name, pid in pids.items():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found[name] = Holdings(
                memory_mib=process.memory_info().rss / MIB,
                descriptors=process.num_fds(),
                threads=process.num_threads(),
                rings=Path(f"/proc/{pid}/maps").read_text().count("memfd:mobula-ring"),
            )
    return found


def leaks(before: Mapping[str, Holdings], after: Mapping[str, Holdings]) -> list[str]:
    """What processes of the same name hold more of than they may, in words."""
    return [
        f"{name}: {field.name} was {getattr(before[name], field.name):.0f}, is {getattr(now, field.name):.0f}"
        for name, now in after.items()
        if name in before
        for field in fields(Holdings)
        if getattr(now, field.name) > getattr(before[name], field.name) + getattr(SPARE, field.name)
    ]


def busy_series(metrics_address: str) -> dict[str, float]:
    """Series that are 0 in an idle system, and are not."""
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=SCRAPE_S) as response:
        return not_idle(response.read().decode())


def not_idle(page: str) -> dict[str, float]:
    """The same, of a metrics page."""
    samples = re.findall(rf"^((?:{'|'.join(IDLE_SERIES)})(?:{{[^}}]*}})?) (\S+)$", page, re.MULTILINE)
    return {name: float(value) for name, value in samples if float(value)}
