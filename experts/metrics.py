"""The Prometheus series of an expert shard."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS_BUCKETS = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
_BATCHED_CALLS_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)


class ShardMetrics:
    """Counts for one shard. Written by its compute thread."""

    def __init__(self, registry: CollectorRegistry, ep_rank: int) -> None:
        labels, values = ("ep_rank",), (str(ep_rank),)
        self.rows = Counter(
            "mobula_ep_rank_tokens_total", "Rows of hidden states received and computed.", labels, registry=registry
        ).labels(*values)
        self.assignments = Counter(
            "mobula_ep_rank_assignments_total", "(row, expert) pairs computed.", labels, registry=registry
        ).labels(*values)
        self.forwards = Counter(
            "mobula_expert_forwards_total", "Forwards answered with partial sums.", labels, registry=registry
        ).labels(*values)
        self.queue_seconds = Histogram(
            "mobula_expert_queue_seconds",
            "From a forward's arrival until its computation began.",
            labels,
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        ).labels(*values)
        self.compute_seconds = Histogram(
            "mobula_expert_compute_seconds",
            "Time of one computation, which may answer several forwards.",
            labels,
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        ).labels(*values)
        self.batched_calls = Histogram(
            "mobula_expert_batched_calls",
            "Forwards that one computation answered.",
            labels,
            buckets=_BATCHED_CALLS_BUCKETS,
            registry=registry,
        ).labels(*values)
        self.weight_bytes = Gauge(
            "mobula_expert_weight_bytes", "Bytes of expert weights held.", labels, registry=registry
        ).labels(*values)
        self.units = Gauge("mobula_expert_units", "Placement units held.", labels, registry=registry).labels(*values)
