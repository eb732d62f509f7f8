"""What the router counts, and its Prometheus series.

Counting is adding plain integers, for a step makes dozens of dispatches; series are built when somebody scrapes.
The engine thread counts; a scrape may see a dispatch half counted, never a wrong total afterwards.
"""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from protos import errors
from protos.histogram import TallyHistogram
from router.completions import Carrier
from router.unit_trust import WrongUnit

_PARTS = ("queue", "compute", "wire")  # of a forward's time
# Why messages are sent again, as far as it is to be expected: shown as 0 from the start, for a counter that begins
# with 1 has no rate then.
RETRY_REASONS = (
    "late",
    "timeout",
    *(
        kind.reason.lower()
        for kind in (
            errors.Unavailable,
            errors.ShardUnavailable,
            errors.StalePlacement,
            errors.UnitQuarantined,
            errors.QueueFull,
            errors.DeadlineExceeded,
            errors.InternalError,
        )
    ),
)
_LATENCY_BUCKETS_S = (0.0001, 0.0003, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 10.0, 60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchStats:
    """How far tokens travelled since the worker started.

    num_tokens_by_ranks[n]: how many (token, layer) pairs visited exactly n shards.
    """

    num_tokens_by_ranks: tuple[int, ...]
    max_ranks_per_token: int
    num_device_limit_violations: int
    sent_bytes: int
    received_bytes: int
    num_dropped_assignments: int


class RouterMetrics(Collector):
    """Counts for one attention worker; registers itself."""

    def __init__(self, registry: CollectorRegistry, dp_rank: int) -> None:
        self._dp_rank = str(dp_rank)
        self._num_tokens_by_ranks: list[int] = [0]
        self._sent_bytes: Tally[tuple[int, Carrier]] = Tally()
        self._received_bytes: Tally[tuple[int, Carrier]] = Tally()
        self._rows: Tally[int] = Tally()
        self._retries: Tally[str] = Tally(dict.fromkeys(RETRY_REASONS, 0))
        self._late: Tally[int] = Tally()
        self._seconds: dict[int, list[float]] = {}  # by ep_rank, of each of _PARTS
        self._quarantined: Callable[[], list[int]] = list
        self._wrong_units: Callable[[], list[WrongUnit]] = list
        self._were_quarantined: set[int] = set()  # shards that a scrape has seen so
        self._had_wrong_units: set[int] = set()
        self._num_violations = 0
        self._num_dropped = 0
        self._num_missing = 0
        self._placement_version = 0
        self._max_ranks_per_token = 0
        self._latency = TallyHistogram(
            "mobula_dispatch_latency_seconds",
            "From the dispatch of a layer's rows until their sums were complete.",
            {"dp_rank": self._dp_rank},
            _LATENCY_BUCKETS_S,
        )
        registry.register(self)

    def watch(self, quarantined: Callable[[], list[int]], wrong_units: Callable[[], list[WrongUnit]]) -> None:
        """What scrapes ask. quarantined: shards that are late too often; wrong_units: replicas with wrong numbers."""
        self._quarantined = quarantined
        self._wrong_units = wrong_units

    def set_placement(self, placement_version: int, max_ranks_per_token: int) -> None:
        """The placement that the next dispatch uses, and its device limit."""
        self._placement_version = placement_version
        self._max_ranks_per_token = max_ranks_per_token

    def count_dispatch(self, num_tokens_by_ranks: list[int], max_ranks_per_token: int) -> None:
        """One layer's tokens by the number of shards that they visit; checks the device limit that it was planned by.

        The newest placement's may be lower already.
        """
        missing = len(num_tokens_by_ranks) - len(self._num_tokens_by_ranks)
        self._num_tokens_by_ranks.extend([0] * missing)
        for num_ranks, num_tokens in enumerate(num_tokens_by_ranks):
            self._num_tokens_by_ranks[num_ranks] += num_tokens
        self._num_violations += sum(num_tokens_by_ranks[max_ranks_per_token + 1 :])

    def count_dropped(self, num_assignments: int) -> None:
        """Assignments of one layer that the overload valve left out."""
        self._num_dropped += num_assignments

    def count_missing(self, num_assignments: int) -> None:
        """Assignments of one layer that nobody could be asked for, and that it does without."""
        self._num_missing += num_assignments

    def count_sent(self, ep_rank: int, num_rows: int, num_bytes: int, carrier: Carrier) -> None:
        """A forward that was sent, retries included."""
        self._rows[ep_rank] += num_rows
        self._sent_bytes[ep_rank, carrier] += num_bytes

    def count_received(self, ep_rank: int, num_bytes: int, carrier: Carrier) -> None:
        """An answer that was used."""
        self._received_bytes[ep_rank, carrier] += num_bytes

    def count_retry(self, reason: str) -> None:
        """A message that was sent again; `reason` is an error's, "late" or "timeout"."""
        self._retries[reason] += 1

    def count_late(self, ep_rank: int) -> None:
        """A forward whose answer did not come in the time that was to be expected."""
        self._late[ep_rank] += 1

    def count_times(self, ep_rank: int, seconds: float, queue_s: float, compute_s: float) -> None:
        """Where an answered forward's time went: all of it here, the parts on the shard's clock."""
        parts = self._seconds.get(ep_rank)
        if parts is None:
            parts = self._seconds[ep_rank] = [0.0, 0.0, 0.0]
        parts[0] += queue_s
        parts[1] += compute_s
        parts[2] += max(0.0, seconds - queue_s - compute_s)

    def observe_latency(self, seconds: float) -> None:
        """Of one layer."""
        self._latency.observe(seconds)

    def stats(self) -> DispatchStats:
        """The counts so far."""
        return DispatchStats(
            num_tokens_by_ranks=tuple(self._num_tokens_by_ranks),
            max_ranks_per_token=self._max_ranks_per_token,
            num_device_limit_violations=self._num_violations,
            sent_bytes=self._sent_bytes.total(),
            received_bytes=self._received_bytes.total(),
            num_dropped_assignments=self._num_dropped,
        )

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance, so that registering does not collect."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The series of the counts."""
        dp_rank = self._dp_rank
        sent = CounterMetricFamily(
            "mobula_dispatch_bytes",
            "Bytes of headers and payloads to and from shards.",
            labels=("dp_rank", "ep_rank", "direction", "transport"),
        )
        for direction, tally in (("sent", self._sent_bytes), ("received", self._received_bytes)):
            for (ep_rank, carrier), num_bytes in sorted(tally.copy().items()):
                sent.add_metric((dp_rank, str(ep_rank), direction, carrier), num_bytes)
        yield sent
        rows = CounterMetricFamily(
            "mobula_dispatch_rows", "Rows of hidden states sent to shards.", labels=("dp_rank", "ep_rank")
        )
        for ep_rank, num_rows in sorted(self._rows.copy().items()):
            rows.add_metric((dp_rank, str(ep_rank)), num_rows)
        yield rows
        yield self._latency.metric()
        yield self._ranks_per_token()
        violations = CounterMetricFamily(
            "mobula_device_limit_violations",
            "(token, layer) pairs that visited more shards than the device limit allows; always 0.",
            labels=("dp_rank",),
        )
        violations.add_metric((dp_rank,), self._num_violations)
        yield violations
        dropped = CounterMetricFamily(
            "mobula_dropped_assignments",
            "(token, layer, expert) computations that the overload valve left out; 0 where it is off.",
            labels=("dp_rank",),
        )
        dropped.add_metric((dp_rank,), self._num_dropped)
        yield dropped
        missing = CounterMetricFamily(
            "mobula_missing_assignments",
            "(token, layer, expert) computations left out because no shard with the expert could be reached.",
            labels=("dp_rank",),
        )
        missing.add_metric((dp_rank,), self._num_missing)
        yield missing
        retries = CounterMetricFamily(
            "mobula_expert_retries", "Messages to shards that were sent again.", labels=("dp_rank", "reason")
        )
        for reason, count in sorted(self._retries.copy().items()):
            retries.add_metric((dp_rank, reason), count)
        yield retries
        yield from self._of_shards()
        version = GaugeMetricFamily(
            "mobula_placement_version", "Version of the expert map in use.", labels=("dp_rank",)
        )
        version.add_metric((dp_rank,), self._placement_version)
        yield version

    def _of_shards(self) -> Iterator[Metric]:
        """How punctual each is."""
        dp_rank = self._dp_rank
        seconds = CounterMetricFamily(
            "mobula_forward_seconds",
            "Time of answered forwards: queue and compute as the shard says, wire is the rest that the worker saw.",
            labels=("dp_rank", "ep_rank", "part"),
        )
        for ep_rank, totals in sorted(self._seconds.copy().items()):
            for part, total in zip(_PARTS, totals, strict=True):
                seconds.add_metric((dp_rank, str(ep_rank), part), total)
        yield seconds
        late = CounterMetricFamily(
            "mobula_late_forwards",
            "Forwards whose answer took longer than measured times let expect; other replicas were asked too.",
            labels=("dp_rank", "ep_rank"),
        )
        for ep_rank, count in sorted(self._late.copy().items()):
            late.add_metric((dp_rank, str(ep_rank)), count)
        yield late
        quarantined = GaugeMetricFamily(
            "mobula_shard_is_quarantined",
            "1: answers are late so often that the worker asks others where it can; 0 afterwards, else no series.",
            labels=("dp_rank", "ep_rank"),
        )
        late_ranks = set(self._quarantined())
        self._were_quarantined |= late_ranks
        for ep_rank in sorted(self._were_quarantined):
            quarantined.add_metric((dp_rank, str(ep_rank)), float(ep_rank in late_ranks))
        yield quarantined
        wrong = GaugeMetricFamily(
            "mobula_quarantined_units",
            "Units whose sums by this shard were wrong; the worker asks others where it can; none before the first.",
            labels=("dp_rank", "ep_rank"),
        )
        num_wrong = Tally(unit.ep_rank for unit in self._wrong_units())
        self._had_wrong_units |= num_wrong.keys()
        for ep_rank in sorted(self._had_wrong_units):
            wrong.add_metric((dp_rank, str(ep_rank)), num_wrong[ep_rank])
        yield wrong

    def _ranks_per_token(self) -> Metric:
        """A histogram with a bucket for each number of shards."""
        family = HistogramMetricFamily(
            "mobula_ranks_per_token", "Shards that a token visited in a layer.", labels=("dp_rank",)
        )
        counts = list(self._num_tokens_by_ranks)
        counts.extend([0] * (self._max_ranks_per_token + 1 - len(counts)))
        buckets, total = [], 0
        for num_ranks, num_tokens in enumerate(counts):
            total += num_tokens
            buckets.append((f"{num_ranks}.0", float(total)))
        buckets.append(("+Inf", float(total)))
        family.add_metric((self._dp_rank,), buckets, sum_value=sum(n * count for n, count in enumerate(counts)))
        return family
