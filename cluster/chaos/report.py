"""What a fault cost, computed from what clients saw. Pure: knows neither processes nor clocks.

* A request failed when it ended with a status, and changed when its tokens are not those of the undisturbed answer.
* A request's stall is its longest wait for a token (its first one counted from the request) that overlaps the fault,
  beyond the undisturbed median of such waits. The fault lasts until redundancy is back.
* throughput_ratio is tokens/s from the injection until redundancy is back (MIN_WINDOW_S at least), over the undisturbed
  tokens/s times the share of the machine that was left: all its cores, but for the CPU time of processes that started
  meanwhile. All processes share one machine, so what the lost one no longer uses the others have.
"""

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.chaos.load import Answer, Case

MIN_WINDOW_S = 5.0  # a shorter one counts steps rather than a rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Moments of one run, of time.monotonic().

    Attributes:
        steady_s: since when every client streams, undisturbed.
        healed_s: when the fault ended; a kill ends at once.
        restored_s: when redundancy was back; None when it was not until the end.
        ended_s: when clients sent nothing new.
    """

    steady_s: float
    injected_s: float
    healed_s: float
    restored_s: float | None
    ended_s: float

    @property
    def fault_end_s(self) -> float:
        return self.restored_s if self.restored_s is not None else self.ended_s

    @property
    def window_end_s(self) -> float:
        """Until when tokens are counted."""
        return min(max(self.fault_end_s, self.injected_s + MIN_WINDOW_S), self.ended_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures of one run; times in seconds, None where there is nothing to measure."""

    requests: int
    failed: int
    changed: int
    stall_p50_s: float | None
    stall_p99_s: float | None
    stall_max_s: float | None
    throughput_ratio: float | None
    time_to_redundancy_s: float | None

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost."""
        return self.requests > 0 and not self.failed and not self.changed


@dataclass(frozen=True, slots=True)
class Waits:
    """Undisturbed medians, seconds: from a request to its first token, from a token to the next one."""

    first_s: float
    next_s: float


def make_report(
    answers: Sequence[Answer], timeline: Timeline, *, startup_cpu_s: float = 0.0, num_cores: int = 1
) -> Report:
    """startup_cpu_s: CPU time of processes that started after the injection, on `num_cores`."""
    expected = expected_tokens(answers, timeline.injected_s)
    waits = undisturbed_waits(answers, timeline)
    stalls = sorted(_stalls(answers, timeline, waits)) if waits else []
    return Report(
        requests=len(answers),
        failed=sum(bool(answer.error) for answer in answers),
        changed=sum(is_changed(answer, expected) for answer in answers),
        stall_p50_s=quantile(stalls, 0.5),
        stall_p99_s=quantile(stalls, 0.99),
        stall_max_s=quantile(stalls, 1.0),
        throughput_ratio=_throughput_ratio(answers, timeline, startup_cpu_s, num_cores),
        time_to_redundancy_s=None if timeline.restored_s is None else timeline.restored_s - timeline.healed_s,
    )


def expected_tokens(answers: Sequence[Answer], before_s: float) -> dict[Case, tuple[int, ...]]:
    """Of each case, what its first answer had that ended before the fault."""
    expected: dict[Case, tuple[int, ...]] = {}
    for answer in answers:
        if answer.ended_s is not None and answer.ended_s <= before_s and not answer.error:
            expected.setdefault(answer.case, tuple(answer.token_ids))
    return expected


def is_changed(answer: Answer, expected: Mapping[Case, tuple[int, ...]]) -> bool:
    """Whether its tokens differ from those expected: any of them; of one that failed, those that came before."""
    tokens, wanted = tuple(answer.token_ids), expected.get(answer.case)
    if wanted is None:
        return False
    return tokens != (wanted[: len(tokens)] if answer.error else wanted)


def undisturbed_waits(answers: Sequence[Answer], timeline: Timeline) -> Waits | None:
    """Of requests that ended before the fault; None without any."""
    calm = [a for a in answers if a.ended_s is not None and a.ended_s <= timeline.injected_s and a.times_s]
    gaps = [after - before for answer in calm for before, after in _pairs(answer.times_s)]
    if not gaps:
        return None
    return Waits(
        first_s=statistics.median(answer.times_s[0] - answer.sent_s for answer in calm), next_s=statistics.median(gaps)
    )


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` of them do not exceed; None of none."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def _stalls(answers: Sequence[Answer], timeline: Timeline, waits: Waits) -> Iterator[float]:
    begin_s, end_s = timeline.injected_s, timeline.fault_end_s
    for answer in answers:
        if answer.error or not answer.times_s:
            continue
        spans = [(answer.sent_s, answer.times_s[0], waits.first_s)]
        spans += [(before, after, waits.next_s) for before, after in _pairs(answer.times_s)]
        excess = [after - before - usual for before, after, usual in spans if before < end_s and after > begin_s]
        if excess:
            yield max(0.0, *excess)


def tokens_per_s(answers: Sequence[Answer], timeline: Timeline) -> tuple[float | None, float | None]:
    """Undisturbed, and from the injection until redundancy was back, MIN_WINDOW_S at least; None of no time."""
    return _rate(answers, timeline.steady_s, timeline.injected_s), _rate(
        answers, timeline.injected_s, timeline.window_end_s
    )


def _throughput_ratio(
    answers: Sequence[Answer], timeline: Timeline, startup_cpu_s: float, num_cores: int
) -> float | None:
    calm_rate, rate = tokens_per_s(answers, timeline)
    if not calm_rate or rate is None:
        return None
    left = 1.0 - startup_cpu_s / (num_cores * (timeline.window_end_s - timeline.injected_s))
    return rate / (calm_rate * left) if left > 0 else None


def _rate(answers: Sequence[Answer], begin_s: float, end_s: float) -> float | None:
    """Tokens/s."""
    if end_s <= begin_s:
        return None
    num_tokens = sum(begin_s < moment <= end_s for answer in answers for moment in answer.times_s)
    return num_tokens / (end_s - begin_s)


def _pairs(times_s: Sequence[float]) -> list[tuple[float, float]]:
    return list(itertools.pairwise(times_s))
