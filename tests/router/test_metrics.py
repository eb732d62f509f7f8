from prometheus_client import CollectorRegistry

from router.completions import Carrier
from router.metrics import RouterMetrics
from router.unit_trust import WrongUnit


def counted() -> tuple[RouterMetrics, CollectorRegistry]:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry, dp_rank=3)
    metrics.set_placement(placement_version=7, max_ranks_per_token=3)
    return metrics, registry


def test_ranks_per_token_has_a_bucket_for_each_number_of_shards():
    metrics, registry = counted()
    metrics.count_dispatch([0, 5], max_ranks_per_token=3)
    metrics.count_dispatch([0, 1, 2], max_ranks_per_token=3)

    def bucket(le: str) -> float | None:
        return registry.get_sample_value("mobula_ranks_per_token_bucket", {"dp_rank": "3", "le": le})

    assert [bucket(le) for le in ("0.0", "1.0", "2.0", "3.0", "+Inf")] == [0, 6, 8, 8, 8]
    assert registry.get_sample_value("mobula_ranks_per_token_sum", {"dp_rank": "3"}) == 10
    assert registry.get_sample_value("mobula_ranks_per_token_count", {"dp_rank": "3"}) == 8
    assert metrics.stats().num_tokens_by_ranks == (0, 6, 2)


def test_a_token_beyond_the_device_limit_is_counted_not_raised():
    metrics, registry = counted()
    violations = "mobula_device_limit_violations_total"
    metrics.count_dispatch([0, 5, 0, 1], max_ranks_per_token=3)
    assert registry.get_sample_value(violations, {"dp_rank": "3"}) == 0
    metrics.count_dispatch([0, 5, 0, 1, 2, 4], max_ranks_per_token=3)
    assert registry.get_sample_value(violations, {"dp_rank": "3"}) == 6


def test_retries_are_0_by_each_reason_that_is_to_be_expected_so_that_a_rate_sees_the_first_one():
    _, registry = counted()
    for reason in ("late", "timeout", "unavailable", "shard_unavailable", "unit_quarantined"):
        assert registry.get_sample_value("mobula_expert_retries_total", {"dp_rank": "3", "reason": reason}) == 0


def test_a_quarantine_that_ended_is_0_and_not_gone():
    metrics, registry = counted()
    late, wrong = [1], [WrongUnit(2, 0, 0, "not finite"), WrongUnit(2, 0, 1, "not finite")]
    metrics.watch(lambda: late, lambda: wrong)

    def shown() -> list[float | None]:
        return [
            registry.get_sample_value(name, {"dp_rank": "3", "ep_rank": ep_rank})
            for name, ep_rank in (("mobula_shard_is_quarantined", "1"), ("mobula_quarantined_units", "2"))
        ]

    assert shown() == [1, 2]
    late.clear()
    wrong.clear()
    assert shown() == [0, 0]


def test_bytes_rows_retries_and_version_are_shown_by_label():
    metrics, registry = counted()
    metrics.count_sent(ep_rank=1, num_rows=4, num_bytes=100, carrier=Carrier.RING)
    metrics.count_sent(ep_rank=1, num_rows=1, num_bytes=11, carrier=Carrier.RING)
    metrics.count_received(ep_rank=0, num_bytes=50, carrier=Carrier.GRPC)
    metrics.count_retry("timeout")
    metrics.count_dropped(9)
    metrics.count_dropped(1)
    metrics.observe_latency(0.25)
    sample = registry.get_sample_value
    sent = {"dp_rank": "3", "ep_rank": "1", "direction": "sent", "transport": "ring"}
    received = {"dp_rank": "3", "ep_rank": "0", "direction": "received", "transport": "grpc"}
    assert sample("mobula_dispatch_bytes_total", sent) == 111
    assert sample("mobula_dispatch_bytes_total", received) == 50
    assert sample("mobula_dispatch_rows_total", {"dp_rank": "3", "ep_rank": "1"}) == 5
    assert sample("mobula_expert_retries_total", {"dp_rank": "3", "reason": "timeout"}) == 1
    assert sample("mobula_dropped_assignments_total", {"dp_rank": "3"}) == 10
    assert metrics.stats().num_dropped_assignments == 10
    assert sample("mobula_placement_version", {"dp_rank": "3"}) == 7
    assert sample("mobula_dispatch_latency_seconds_sum", {"dp_rank": "3"}) == 0.25
    assert (metrics.stats().sent_bytes, metrics.stats().received_bytes) == (111, 50)
