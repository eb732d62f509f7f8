"""A thing that is fed hostile input, and how often it is fed.

A case passes when the target takes it or refuses it with an error of its own; what else it raises is a finding, shrunk
by hypothesis to the smallest such case. A case that takes longer than MAX_CASE_S, or makes the process grow beyond
MAX_GROWTH_BYTES for good, is a finding too.
"""

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

MAX_CASE_S = 5.0
MAX_GROWTH_BYTES = 256 * 2**20  # hypothesis itself keeps some; a leak of a case's input would be more


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is fed.

    Attributes:
        share: of all cases, relative to other targets.
        open: around a run of cases; gives what takes one.
    """

    name: str
    share: int
    cases: SearchStrategy[Any]
    open: Callable[[], AbstractContextManager[Callable[[Any], None]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run of a target took."""

    num_cases: int
    seconds: float
    grown_bytes: int


def feed(target: Target, num_cases: int, seed_number: int) -> Outcome:
    """Raises what a case raised, or AssertionError for a slow or greedy one."""
    num_fed = 0
    with target.open() as take:

        def feed_one(case: Any) -> None:
            nonlocal num_fed
            num_fed += 1
            started_s = time.monotonic()
            take(case)
            seconds = time.monotonic() - started_s
            assert seconds < MAX_CASE_S, f"a case took {seconds:.1f} s"

        run = settings(
            max_examples=num_cases,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )(seed(seed_number)(given(target.cases)(feed_one)))
        before_bytes, started_s = _resident_bytes(), time.monotonic()
        run()
        grown_bytes = _resident_bytes() - before_bytes
    assert grown_bytes < MAX_GROWTH_BYTES, f"{num_fed} cases left {grown_bytes >> 20} MiB behind"
    return Outcome(num_cases=num_fed, seconds=time.monotonic() - started_s, grown_bytes=grown_bytes)


def _resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)
