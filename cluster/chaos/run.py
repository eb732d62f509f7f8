"""One chaos run: load, a fault in the middle of it, and what it cost.

1. Clients stream until every case was answered undisturbed and a rate is known.
2. The fault is injected, held, healed; clients go on.
3. They go on until every process serves again, lost ones are replaced and no quarantine is left, and MIN_TAIL_S longer.
4. Nothing new is sent, what is under way may end, the figures are computed.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.chaos.fault import Fault
from cluster.chaos.load import Load, cases
from cluster.chaos.report import Report, Timeline, make_report, tokens_per_s
from cluster.chaos.system import ChaosRefused, System

MAX_WHOLE_S = 15.0  # for every process to serve; on busy cores one may miss a question just after the start
MIN_CALM_S = 4.0
MAX_CALM_S = 30.0  # for every case to be answered once
MIN_TAIL_S = 1.0
MAX_RESTORE_S = 25.0  # after healing; then it is said that redundancy did not come back
DRAIN_S = 15.0
POLL_S = 0.1

Show = Callable[[str, float], None]  # what is being done, the share of the run that is over


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run's size.

    Attributes:
        seconds: of load after the injection, at least.
    """

    seconds: float = 10.0
    num_clients: int = 8
    max_tokens: int = 96
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """The figures, and what is to be said beside them."""

    report: Report
    notes: tuple[str, ...]


def run_fault(fault: Fault, system: System, config: RunConfig, show: Show = lambda what, share: None) -> RunResult:
    """Raises ChaosRefused when the fault cannot be made, or the system does not serve well before it."""
    if not _serves_soon(system):
        raise ChaosRefused(
            f"{system.address} does not serve all of its processes in {MAX_WHOLE_S:g} s; `mobula status` shows which"
        )
    load = Load(system.address, system.access, cases(config.max_tokens), config.num_clients, config.seed)
    try:
        return _Run(fault, system, load, config, show).result()
    finally:
        load.close()


def _serves_soon(system: System) -> bool:
    give_up_s = time.monotonic() + MAX_WHOLE_S
    while time.monotonic() < give_up_s:
        status = system.status()
        if status is not None and status.is_serving:
            return True
        time.sleep(POLL_S)
    return False


class _Run:
    """A run in progress."""

    def __init__(self, fault: Fault, system: System, load: Load, config: RunConfig, show: Show) -> None:
        self._fault = fault
        self._system = system
        self._load = load
        self._config = config
        self._show = show
        self._begun_s = time.monotonic()
        self._expected_s = MIN_CALM_S + max(config.seconds, fault.hold_s + MIN_TAIL_S)

    def result(self) -> RunResult:
        steady_s = self._calm()
        members = set(self._system.pids().values())
        other_cpu_s = self._system.cpu_seconds_beside(members)
        injected_s = time.monotonic()
        lost = self._fault.inject(self._system)
        try:
            self._wait_until(injected_s + self._fault.hold_s, "fault")
        finally:
            self._fault.heal(self._system)
        healed_s = time.monotonic() if self._fault.hold_s else injected_s
        restored_s = self._restored(lost, healed_s + MAX_RESTORE_S)
        startup_cpu_s = max(0.0, self._system.cpu_seconds_beside(members) - other_cpu_s)
        self._wait_until(max(injected_s + self._config.seconds, (restored_s or 0.0) + MIN_TAIL_S), "load goes on")
        ended_s = time.monotonic()
        self._tell("waiting for the last answers")
        self._load.drain(DRAIN_S)
        timeline = Timeline(
            steady_s=steady_s, injected_s=injected_s, healed_s=healed_s, restored_s=restored_s, ended_s=ended_s
        )
        cores = len(os.sched_getaffinity(0))
        report = make_report(self._load.answers, timeline, startup_cpu_s=startup_cpu_s, num_cores=cores)
        return RunResult(report=report, notes=self._notes(timeline, startup_cpu_s))

    def _calm(self) -> float:
        """Since when the load was steady; returns when enough was seen."""
        self._load.start()
        give_up_s = self._begun_s + MAX_CALM_S
        steady_s = None
        while time.monotonic() < give_up_s:
            if steady_s is None and self._load.is_streaming():
                steady_s = time.monotonic()
            is_long_enough = steady_s is not None and time.monotonic() >= steady_s + MIN_CALM_S
            if steady_s is not None and is_long_enough and self._load.has_answered_every_case():
                return steady_s
            self._tell("undisturbed load")
            time.sleep(POLL_S)
        errors = {answer.error for answer in self._load.answers if answer.error}
        raise ChaosRefused(
            f"not every case was answered within {MAX_CALM_S:.0f} s of undisturbed load"
            + (f": {'; '.join(sorted(errors)[:3])}" if errors else "; lower --clients or --tokens")
        )

    def _restored(self, lost: Mapping[str, int], give_up_s: float) -> float | None:
        """When every process served again and the lost ones were replaced."""
        while time.monotonic() < give_up_s:
            if is_restored(self._system, lost):
                return time.monotonic()
            self._tell("until redundancy is back")
            time.sleep(POLL_S)
        return None

    def _wait_until(self, moment_s: float, what: str) -> None:
        while (left_s := moment_s - time.monotonic()) > 0:
            self._tell(what)
            time.sleep(min(POLL_S, left_s))

    def _tell(self, what: str) -> None:
        self._show(what, min(1.0, (time.monotonic() - self._begun_s) / self._expected_s))

    def _notes(self, timeline: Timeline, startup_cpu_s: float) -> tuple[str, ...]:
        notes = [*self._fault.notes]
        calm, during = tokens_per_s(self._load.answers, timeline)
        notes.append(f"{calm or 0.0:.0f} tokens/s undisturbed, {during or 0.0:.0f} until redundancy was back")
        if timeline.restored_s is None:
            notes.append(f"redundancy was not back {MAX_RESTORE_S:.0f} s after the fault")
        if startup_cpu_s >= 0.1:
            notes.append(f"processes that started meanwhile took {startup_cpu_s:.1f} s of CPU")
        repeated = sum(bool(answer.num_repeats) for answer in self._load.answers)
        if repeated:
            notes.append(f"{repeated} requests lost their connection to the gateway and were asked again")
        errors = sorted({answer.error for answer in self._load.answers if answer.error})
        return (*notes, *errors[:3])


def is_restored(system: System, lost: Mapping[str, int]) -> bool:
    """Whether every process serves, none is under quarantine and none of the lost ones is the one that was lost."""
    status = system.status()
    if status is None or not status.is_serving or any(health.quarantines for _, health in status.processes):
        return False
    pids = system.pids()
    return all(name in pids and pids[name] != pid for name, pid in lost.items())
