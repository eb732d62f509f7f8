"""What an expert shard counts, and its Prometheus series, which are built when somebody scrapes."""

import threading
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from protos.histogram import TallyHistogram

_SECONDS_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0)
_BATCHED_CALLS_BUCKETS = (1, 2, 4, 8, 16, 64)


class ShardMetrics(Collector):
    """Counts for one shard; registers itself. Its compute thread adds, its control thread sets what it holds."""

    def __init__(self, registry: CollectorRegistry, ep_rank: int) -> None:
        self.counting = threading.Lock()  # see Batcher
        self._labels = {"ep_rank": str(ep_rank)}
        self.num_rows = 0
        self.num_assignments = 0
        self.num_partial_sums = 0
        self.received_bytes = 0
        self.sent_bytes = 0
        self.num_forwards = 0
        self.weight_bytes = 0
        self.num_units = 0
        self.num_self_checks = 0
        self.num_wrong_units = 0
        self.num_repaired_units = 0
        self.queue_seconds = TallyHistogram(
            "mobula_expert_queue_seconds",
            "From a forward's arrival until its computation began.",
            self._labels,
            _SECONDS_BUCKETS,
        )
        self.compute_seconds = TallyHistogram(
            "mobula_expert_compute_seconds",
            "Time of one computation, which may answer several forwards.",
            self._labels,
            _SECONDS_BUCKETS,
        )
        self.batched_calls = TallyHistogram(
            "mobula_expert_batched_calls",
            "Forwards that one computation answered.",
            self._labels,
            _BATCHED_CALLS_BUCKETS,
        )
        registry.register(self)

    def wait_until_counted(self) -> None:
        """All that was answered is counted when this returns."""
        with self.counting:
            pass

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance, so that registering does not collect."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The series of the counts."""
        self.wait_until_counted()
        counters = (
            ("mobula_ep_rank_tokens", "Rows of hidden states received and computed.", self.num_rows),
            ("mobula_ep_rank_assignments", "(row, expert) pairs computed.", self.num_assignments),
            ("mobula_ep_rank_partial_sums", "Rows of partial sums sent back.", self.num_partial_sums),
            ("mobula_ep_rank_received_bytes", "Hidden states and assignments received.", self.received_bytes),
            ("mobula_ep_rank_sent_bytes", "Partial sums sent back.", self.sent_bytes),
            ("mobula_expert_forwards", "Forwards answered with partial sums.", self.num_forwards),
            ("mobula_expert_self_checks", "Experts asked again for their known answers.", self.num_self_checks),
            ("mobula_repaired_units", "Units that were wrong and right when read again.", self.num_repaired_units),
        )
        gauges = (
            ("mobula_expert_weight_bytes", "Bytes of expert weights held.", self.weight_bytes),
            ("mobula_expert_units", "Placement units held.", self.num_units),
            (
                "mobula_wrong_units",
                "Units whose experts do not give their known answers; refused.",
                self.num_wrong_units,
            ),
        )
        names, values = tuple(self._labels), tuple(self._labels.values())
        for name, documentation, count in counters:
            counter = CounterMetricFamily(name, documentation, labels=names)
            counter.add_metric(values, count)
            yield counter
        for name, documentation, value in gauges:
            gauge = GaugeMetricFamily(name, documentation, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        yield self.queue_seconds.metric()
        yield self.compute_seconds.metric()
        yield self.batched_calls.metric()
