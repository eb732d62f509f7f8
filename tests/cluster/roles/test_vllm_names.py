"""A worker's series under vLLM's names."""

from prometheus_client import CollectorRegistry, generate_latest

from attention.metrics import EngineMetrics
from attention.sequence import FinishReason
from cluster.roles.vllm_names import VllmNames

LABELS = {"model_name": "v2", "engine": "3"}


def worker() -> CollectorRegistry:
    """Rank 3, with a request done and 7 tokens."""
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry, 3)
    VllmNames(registry, "v2")
    metrics.generation_tokens.inc(7)
    metrics.num_requests_running.set(2)
    metrics.count_success(FinishReason.LENGTH)
    metrics.time_to_first_token.observe(0.2)
    return registry


def test_values_are_the_same_under_vllms_names_and_labels() -> None:
    registry = worker()
    assert registry.get_sample_value("vllm:generation_tokens_total", LABELS) == 7
    assert registry.get_sample_value("vllm:num_requests_running", LABELS) == 2
    assert registry.get_sample_value("vllm:request_success_total", LABELS | {"finished_reason": "length"}) == 1
    assert registry.get_sample_value("vllm:time_to_first_token_seconds_count", LABELS) == 1
    assert registry.get_sample_value("vllm:time_to_first_token_seconds_bucket", LABELS | {"le": "0.25"}) == 1
    assert registry.get_sample_value("vllm:iteration_tokens_total_count", LABELS) == 0


def test_our_own_stay_and_the_page_has_each_family_once() -> None:
    page = generate_latest(worker()).decode()
    assert 'mobula_generation_tokens_total{dp_rank="3"} 7.0' in page
    types = [line for line in page.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    assert page.count("# TYPE vllm:") == 12
