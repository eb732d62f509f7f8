"""How many threads a process computes with, and telling the libraries so."""

import math
import os

import torch

from cluster.roles import cgroup
from experts.kernels.library import native, set_num_threads

MAX_THREADS = 32  # by default; more are slower to wake than a decode step's products are to compute
MIN_THREADS = 2  # by default, where there are as many cores: one busy process uses the cores of idle ones


def share_of_cores(num_processes: int) -> int:
    """Threads for each of `num_processes` of one kind on this machine.

    Workers and shards take turns more than they run at once, so each kind shares out all the cores. The kernels'
    threads sleep when they have nothing to do and take their work in small pieces: more threads than cores cost little.
    """
    return share_of(usable_cores(), num_processes)


def share_of(num_cores: int, num_processes: int) -> int:
    """The same of so many cores."""
    return min(MAX_THREADS, max(min(MIN_THREADS, num_cores), num_cores // num_processes))


def usable_cores() -> int:
    """Cores that this process may use at once: its affinity, and the quota of its container."""
    cores, quota = len(os.sched_getaffinity(0)), cgroup.core_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def compute_with(num_threads: int) -> None:
    """The kernels get the threads; torch, which then computes little, gets one. Without the kernels torch gets all."""
    set_num_threads(num_threads)
    torch.set_num_threads(num_threads if native() is None else 1)
