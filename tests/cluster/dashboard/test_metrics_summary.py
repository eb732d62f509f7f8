"""Sums over the processes' pages."""

from prometheus_client import CollectorRegistry, generate_latest

from attention.metrics import EngineMetrics
from cluster.dashboard.metrics_summary import COUNTERS, GAUGES_BY_WORKER, HISTOGRAMS, summarize
from experts.metrics import ShardMetrics
from router.metrics import RouterMetrics


def worker_page(dp_rank: int) -> str:
    """A worker that generated 5 tokens, one request running."""
    registry = CollectorRegistry()
    engine = EngineMetrics(registry, dp_rank)
    RouterMetrics(registry, dp_rank).count_retry("timeout")
    engine.num_requests_running.set(1 + dp_rank)
    engine.generation_tokens.inc(5)
    engine.inter_token_latency.observe(0.004)
    return generate_latest(registry).decode()


def test_counters_are_added_and_gauges_stay_with_their_worker() -> None:
    summary = summarize([worker_page(0), worker_page(1)])
    assert summary["counters"]["generation_tokens"] == 10
    assert summary["counters"]["retries"] == 2
    assert {rank: worker["num_running"] for rank, worker in summary["workers"].items()} == {"0": 1, "1": 2}


def test_histograms_are_added_bucket_by_bucket() -> None:
    histogram = summarize([worker_page(0), worker_page(1)])["histograms"]["inter_token_latency"]
    by_bound = dict(zip(histogram["bounds"], histogram["counts"], strict=False))
    assert by_bound[0.003] == 0
    assert by_bound[0.01] == 2
    assert len(histogram["counts"]) == len(histogram["bounds"]) + 1
    assert histogram["counts"][-1] == 2


def test_every_series_that_is_wanted_exists() -> None:
    shards = CollectorRegistry()
    ShardMetrics(shards, 0)
    text = worker_page(0) + generate_latest(shards).decode()
    wanted = [*GAUGES_BY_WORKER, *COUNTERS, *(f"{name}_bucket" for name in HISTOGRAMS)]
    not_yet_counted = {"mobula_request_errors_total"}  # has no series before the first error
    assert [name for name in wanted if f"\n{name}{{" not in text and name not in not_yet_counted] == []


def test_no_process_gives_empty_sums() -> None:
    summary = summarize([])
    assert summary["workers"] == {}
    assert summary["counters"]["generation_tokens"] == 0
    assert summary["histograms"]["time_to_first_token"] == {"bounds": [], "counts": []}
