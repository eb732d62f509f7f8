"""A system under load while fault follows fault; at the end nothing may be lost and nothing left.

1. Clients stream until every case is known; then the system becomes idle and what it holds is counted.
2. They stream again; a fault every so often, each healed and recovered from before the next one.
3. When there were enough requests, they end; the system becomes idle, what it holds is counted again.
4. It is stopped in order: no process may be left.
"""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from cluster.chaos.deployment import LocalDeployment, Surroundings
from cluster.chaos.faults.link import through
from cluster.chaos.load import Answer, Load, cases
from cluster.chaos.proxy import LinkProxy
from cluster.chaos.report import expected_tokens, is_changed
from cluster.chaos.run import is_restored
from cluster.chaos.system import System
from tests.soak.holdings import Holdings, busy_series, holdings_of, leaks
from tests.soak.schedule import faults

NUM_CLIENTS = 8
MAX_TOKENS = 24
SETTINGS = {"attention_workers": {"engine": {"cache_gib": 0.06}}}  # all of it is used soon, and grows no more
RESTORE_S = 60.0
IDLE_S = 30.0
POLL_S = 0.1

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakConfig:
    """How long, at least: both must be reached."""

    seconds: float = 1200.0
    num_requests: int = 10_000
    fault_every_s: float = 20.0
    seed: int = 0


@dataclass(slots=True)
class SoakResult:
    """What came of it; `findings` are sentences, none when all is well."""

    num_requests: int = 0
    num_faults: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    before: dict[str, Holdings] = field(default_factory=dict)
    after: dict[str, Holdings] = field(default_factory=dict)


def soak(config: SoakConfig, say: Say) -> SoakResult:
    """Raises StartError when the system does not start, AssertionError when it does not recover."""
    result = SoakResult()
    proxy = LinkProxy(config.seed)
    with closing(proxy), LocalDeployment() as deployment:
        surroundings = Surroundings(environment=through(proxy).environment)  # rings too, whose lifeline is a link
        with deployment.start(surroundings, SETTINGS) as system:
            metrics = f"127.0.0.1:{deployment.config['gateway']['metrics_port']}"
            say("the system serves; undisturbed load")
            known = _load(system, config.seed, until=Load.has_answered_every_case)
            _wait_until(lambda: not busy_series(metrics), IDLE_S, "the system does not become idle")
            result.before = holdings_of(_members(system))
            answers = known + _disturbed_load(system, config, proxy, result, say)
            _judge(answers, known, result)
            try:
                _wait_until(lambda: not busy_series(metrics), IDLE_S, "the system does not become idle")
            except AssertionError as error:
                result.findings.append(f"{error}: {busy_series(metrics)}")
            result.after = holdings_of(_members(system))
            result.findings += leaks(result.before, result.after)
        say("stopping")
        killed = deployment.stop()
        if killed:
            result.findings.append(f"processes were left: {', '.join(sorted(killed))}")
    return result


def _load(system: System, seed: int, until: Callable[[Load], bool]) -> list[Answer]:
    with closing(Load(system.address, system.access, cases(MAX_TOKENS), NUM_CLIENTS, seed)) as load:
        load.start()
        _wait_until(lambda: until(load), RESTORE_S, "not every case is answered")
        load.drain(RESTORE_S)
    return load.answers


def _disturbed_load(system: System, config: SoakConfig, proxy: LinkProxy, result: SoakResult, say: Say) -> list[Answer]:
    with closing(Load(system.address, system.access, cases(MAX_TOKENS), NUM_CLIENTS, config.seed + 1)) as load:
        load.start()
        started_s = time.monotonic()
        for name, fault in faults(config.seed, proxy):
            begun_s = time.monotonic()
            if begun_s - started_s >= config.seconds and len(load.answers) >= config.num_requests:
                break
            lost = fault.inject(system)
            try:
                time.sleep(fault.hold_s)
            finally:
                fault.heal(system)
            healed_s = time.monotonic()
            _wait_until(lambda lost=lost: is_restored(system, lost), RESTORE_S, f"no redundancy after {name}")  # type: ignore[misc]
            result.num_faults[name] += 1
            num_failed = sum(bool(answer.error) for answer in load.answers)
            say(
                f"{healed_s - started_s:5.0f} s  {name:16} whole again after {time.monotonic() - healed_s:4.1f} s, "
                f"{len(load.answers)} requests, {num_failed} failed"
            )
            time.sleep(max(0.0, begun_s + config.fault_every_s - time.monotonic()))
        load.drain(RESTORE_S)
    return load.answers


def _judge(answers: list[Answer], known: list[Answer], result: SoakResult) -> None:
    expected = expected_tokens(known, time.monotonic())
    result.num_requests = len(answers)
    failed = Counter(answer.error for answer in answers if answer.error)
    result.findings += [f"{count} requests failed: {error}" for error, count in failed.most_common(5)]
    changed = sum(is_changed(answer, expected) for answer in answers)
    if changed:
        result.findings.append(f"{changed} requests had other tokens than undisturbed")


def _members(system: System) -> dict[str, int]:
    """Ours; what Ray keeps in store is Ray's."""
    return {name: pid for name, pid in system.pids().items() if not name.startswith("raylet")}


def _wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s, f"{what} within {timeout_s:.0f} s"
        time.sleep(POLL_S)
