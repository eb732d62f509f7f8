"""An attention worker's series once more under the names that vLLM gives them, for boards and pickers made for vLLM.

Values are the same; `engine` is the dp_rank. Names with a colon are against Prometheus' customs, hence a switch.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_SAMPLES = {  # our family -> vLLM's
    "mobula_num_requests_running": "vllm:num_requests_running",
    "mobula_num_requests_waiting": "vllm:num_requests_waiting",
    "mobula_latent_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "mobula_num_preemptions": "vllm:num_preemptions",
    "mobula_prompt_tokens": "vllm:prompt_tokens",
    "mobula_generation_tokens": "vllm:generation_tokens",
    "mobula_request_success": "vllm:request_success",
    "mobula_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "mobula_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "mobula_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "mobula_request_queue_time_seconds": "vllm:request_queue_time_seconds",
    "mobula_iteration_tokens": "vllm:iteration_tokens_total",
}
_SUFFIXES = ("", "_total", "_bucket", "_sum", "_count")
_LABELS = {"dp_rank": "engine", "finish_reason": "finished_reason"}


class VllmNames(Collector):
    """Over a worker's registry, where it registers itself."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._ours = registry.restricted_registry([name + suffix for name in _SAMPLES for suffix in _SUFFIXES])
        self._model_name = model_name
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance, so that registering does not collect."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The renamed series."""
        for ours in self._ours.collect():
            theirs = Metric(_SAMPLES[ours.name], ours.documentation, ours.type)
            for sample in ours.samples:
                labels = {_LABELS.get(label, label): value for label, value in sample.labels.items()}
                name = theirs.name + sample.name.removeprefix(ours.name)
                theirs.add_sample(name, labels | {"model_name": self._model_name}, sample.value)
            yield theirs
