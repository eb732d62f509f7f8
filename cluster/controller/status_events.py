"""What happened to the system between one status and the next, in words for operators: processes that are lost, come
back, join, drain and leave, replicas that are not trusted, rebalances with their reasons, and how long each took.

Knows neither who asks for the status nor where the words go.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import NamedTuple

from cluster.byte_count import format_bytes
from cluster.controller.process import DRAINS, RESTARTS, ClusterStatus, ProcessHealth, ProcessState


class Level(StrEnum):
    """How an operator should take it."""

    GOOD = "good"
    INFO = "info"
    BAD = "bad"


class StatusEvent(NamedTuple):
    """subject: a process's name, "system", "placement" or "rebalance"."""

    level: Level
    subject: str
    text: str


class StatusEvents:
    """Belongs to one thread. What begins and ends between two looks is told as far as the later status shows it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: ClusterStatus | None = None
        self._began_s: dict[tuple[str, str], float] = {}  # what lasts, by subject and kind
        self._generations: dict[str, str] = {}  # the latest that was ready, by process
        self._told_to_end: dict[str, str] = {}  # in which words; until another process is ready or it has left

    def observe(self, status: ClusterStatus) -> list[StatusEvent]:
        """The first status is one event; each later one gives an event for each difference."""
        last, self._last = self._last, status
        events = list(self._changes(last, status)) if last else [_first(status)]
        for name, health in status.processes:
            if not last and health.state is not ProcessState.READY:
                self._begin(name, "away")
            if health.state is ProcessState.READY:
                self._generations[name] = health.generation
        return events

    def _changes(self, last: ClusterStatus, now: ClusterStatus) -> Iterator[StatusEvent]:
        before, after = dict(last.processes), dict(now.processes)
        for name in before.keys() - after.keys():
            yield StatusEvent(Level.INFO, name, f"has left{self._after(name, 'leaving')}")
            self._forget(name)
            self._generations.pop(name, None)
        for name, health in after.items():
            if name in before:
                yield from self._process_changes(name, before[name], health)
            else:
                self._begin(name, "away")
                yield StatusEvent(Level.INFO, name, f"joins, is {health.state}")
            yield from self._quarantine_changes(name, before.get(name), health)
        yield from _placement_changes(last, now)
        if last.is_serving and not now.is_serving:
            self._begin("system", "away")
            yield self._stops_serving(now)
        elif now.is_serving and not last.is_serving:
            yield StatusEvent(Level.GOOD, "system", f"serves{self._after('system', 'away')}")

    def _stops_serving(self, now: ClusterStatus) -> StatusEvent:
        after = dict(now.processes)
        away = [name for name, health in after.items() if health.state is not ProcessState.READY]
        if not away:
            return StatusEvent(Level.INFO, "system", "not every process knows the others yet")
        joining = [
            name for name in away if name not in self._generations and after[name].state is not ProcessState.FAILED
        ]
        if self._told_to_end.keys() | set(joining) >= set(away):
            return StatusEvent(Level.INFO, "system", f"not every process is ready, as planned: {', '.join(away)}")
        return StatusEvent(Level.BAD, "system", "not every process is ready")

    def _process_changes(self, name: str, old: ProcessHealth, now: ProcessHealth) -> Iterator[StatusEvent]:
        is_ready, was_ready = now.state is ProcessState.READY, old.state is ProcessState.READY
        known = self._generations.get(name, now.generation)
        is_another = known != now.generation
        # Other looks than this one saw that it was told to end: rounds of the controller may be faster than looks.
        is_planned = now.generation not in ("", known) and now.replaced_generation == known
        away = self._after(name, "away") if is_ready and not was_ready else ""
        if is_ready and is_another:
            self._forget(name)  # what the one before it was told, and what was wrong with it
        if is_ready and not was_ready:
            who = f", as another process, pid {now.pid}" if is_another else ""
            yield StatusEvent(Level.GOOD, name, f"is ready{away}{who}")
        elif is_ready and is_another:
            level = Level.INFO if is_planned or _is_told_to_end(old) else Level.BAD
            yield StatusEvent(level, name, f"was replaced by another process, pid {now.pid}")
        order = now.detail if _is_told_to_end(now) else RESTARTS if is_planned and not is_ready else ""
        if order and self._told_to_end.get(name) != order:
            self._told_to_end[name] = order
            self._begin(name, "leaving")
            yield StatusEvent(Level.INFO, name, order)
        elif is_ready and not _is_told_to_end(now):  # it goes on: a controller that was lost took its word with it
            self._told_to_end.pop(name, None)
            self._began_s.pop((name, "leaving"), None)
        if is_ready and was_ready and not _is_told_to_end(now) and now.detail != old.detail:
            yield from self._fault_changes(name, now.detail, had_fault=not is_another and not _is_told_to_end(old))
        if now.state is not old.state and not is_ready:
            yield from self._loss(name, now, was_ready=was_ready)

    def _loss(self, name: str, now: ProcessHealth, *, was_ready: bool) -> Iterator[StatusEvent]:
        """Of a process that was ready, or that cannot be. One that was told to end does what it was told."""
        is_planned = name in self._told_to_end and (was_ready or _is_told_to_end(now))
        has_failed = now.state is ProcessState.FAILED
        if was_ready or has_failed or now.state is ProcessState.DOWN:
            self._begin(name, "away")
            if has_failed or not is_planned:
                detail = f": {now.detail}" if now.detail else ""
                yield StatusEvent(Level.BAD, name, f"is {now.state}{detail}")

    def _fault_changes(self, name: str, detail: str, *, had_fault: bool) -> Iterator[StatusEvent]:
        """Of a process that is ready: something is wrong with it, or no longer."""
        if detail:
            self._begin(name, "fault")
            yield StatusEvent(Level.BAD, name, detail)
        elif had_fault:
            yield StatusEvent(Level.GOOD, name, f"is well again{self._after(name, 'fault')}")

    def _quarantine_changes(self, name: str, old: ProcessHealth | None, now: ProcessHealth) -> Iterator[StatusEvent]:
        before, after = _quarantined(old), _quarantined(now)
        for what in after.keys() - before.keys():
            self._begin(name, what)
            yield StatusEvent(Level.BAD, name, f"quarantines {what}: {after[what]}")
        if now.state is ProcessState.READY:  # one that is away says nothing of what it trusts
            for what in before.keys() - after.keys():
                yield StatusEvent(Level.GOOD, name, f"trusts {what} again{self._after(name, what)}")

    def _begin(self, subject: str, kind: str) -> None:
        self._began_s.setdefault((subject, kind), self._clock())

    def _forget(self, name: str) -> None:
        """Another process may have the name from now on."""
        self._told_to_end.pop(name, None)
        self._began_s = {key: began_s for key, began_s in self._began_s.items() if key[0] != name}

    def _after(self, subject: str, kind: str) -> str:
        began_s = self._began_s.pop((subject, kind), None)
        return "" if began_s is None else f" after {self._clock() - began_s:.1f} s"


def _first(status: ClusterStatus) -> StatusEvent:
    serves = "serves" if status.is_serving else "does not serve yet"
    return StatusEvent(Level.INFO, "system", f"{serves}; placement version {status.placement_version}")


def _is_told_to_end(health: ProcessHealth) -> bool:
    return health.detail.startswith((RESTARTS, DRAINS))


def _quarantined(health: ProcessHealth | None) -> dict[str, str]:
    """Reasons by what is not trusted; of the many units that a shard may have, one line with the first one's."""
    units: dict[str, list[str]] = defaultdict(list)
    shards = {}
    for quarantine in health.quarantines if health else ():
        shard = f"shard-{quarantine.ep_rank}"
        if quarantine.unit_id is None:
            shards[shard] = quarantine.reason
        else:
            unit = f"unit {quarantine.unit_id} of layer {quarantine.layer_id}: {quarantine.reason}"
            units[f"units of {shard}"].append(unit)
    more = {what: f" (and {len(them) - 1} more)" if len(them) > 1 else "" for what, them in units.items()}
    return shards | {what: f"{them[0]}{more[what]}" for what, them in units.items()}


def _placement_changes(last: ClusterStatus, now: ClusterStatus) -> Iterator[StatusEvent]:
    """In the order in which they happened, also where one rebalance ended and the next began between the two looks."""
    before, after = last.rebalance, now.rebalance
    told = StatusEvent(Level.INFO, "placement", f"workers are told version {now.placement_version}")
    is_told = last.placement_version != now.placement_version
    if is_told and now.placement_version != after.target_version:
        yield told
    num_done, num_aborted = after.num_done - before.num_done, after.num_aborted - before.num_aborted
    if num_done > 0 or num_aborted > 0:
        yield StatusEvent(Level.BAD if num_aborted > 0 else Level.GOOD, "rebalance", after.last_result)
    elif before.target_version not in (None, after.target_version):  # the counts are those of another controller
        text = f"to version {before.target_version} ended with its controller; version {now.placement_version} goes on"
        yield StatusEvent(Level.BAD, "rebalance", text)
    if after.target_version not in (None, before.target_version):
        why = f" ({after.reason})" if after.reason else ""
        size = format_bytes(after.planned_bytes)
        yield StatusEvent(Level.INFO, "rebalance", f"to version {after.target_version} began{why}: {size} to read")
    if is_told and now.placement_version == after.target_version:
        yield told
