"""What the page shows of the processes' metrics: a few sums over their Prometheus pages.

Lines of other series are skipped before anything is parsed: parsing all of a large system's would take the process
tens of milliseconds each second.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

GAUGES_BY_WORKER = {
    "mobula_num_requests_running": "num_running",
    "mobula_num_requests_waiting": "num_waiting",
    "mobula_latent_cache_usage_ratio": "cache_usage_ratio",
}
COUNTERS = {
    "mobula_prompt_tokens_total": "prompt_tokens",
    "mobula_generation_tokens_total": "generation_tokens",
    "mobula_request_success_total": "requests_done",
    "mobula_request_errors_total": "requests_failed",
    "mobula_expert_retries_total": "retries",
    "mobula_device_limit_violations_total": "device_limit_violations",
    "mobula_num_preemptions_total": "preemptions",
}
HISTOGRAMS = {
    "mobula_time_to_first_token_seconds": "time_to_first_token",
    "mobula_inter_token_latency_seconds": "inter_token_latency",
    "mobula_dispatch_latency_seconds": "dispatch_latency",
    "mobula_expert_queue_seconds": "expert_queue",
}
_WANTED = tuple(GAUGES_BY_WORKER) + tuple(COUNTERS) + tuple(f"{name}_bucket" for name in HISTOGRAMS)


def summarize(pages: Iterable[str]) -> dict[str, Any]:
    """workers: dp_rank -> gauges; counters: sums over processes; histograms: {le: bounds, counts: cumulative sums}."""
    workers: defaultdict[str, dict[str, float]] = defaultdict(dict)
    counters = dict.fromkeys(COUNTERS.values(), 0.0)
    buckets: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for page in pages:
        lines = "\n".join(line for line in page.splitlines() if line.startswith(_WANTED))
        for family in text_string_to_metric_families(lines + "\n"):
            for sample in family.samples:
                if (name := GAUGES_BY_WORKER.get(sample.name)) is not None:
                    workers[sample.labels["dp_rank"]][name] = sample.value
                elif (name := COUNTERS.get(sample.name)) is not None:
                    counters[name] += sample.value
                elif (name := HISTOGRAMS.get(sample.name.removesuffix("_bucket"))) is not None:
                    buckets[name][sample.labels["le"]] += sample.value
    return {
        "workers": {rank: workers[rank] for rank in sorted(workers, key=int)},
        "counters": counters,
        "histograms": {name: _histogram(buckets[name]) for name in HISTOGRAMS.values()},
    }


def _histogram(by_bound: Mapping[str, float]) -> dict[str, list[float]]:
    """Without the bucket of all, +Inf, whose bound JSON cannot write: its count is the last of `counts`."""
    bounds = sorted((bound for bound in by_bound if bound != "+Inf"), key=float)
    counts = [by_bound[bound] for bound in (*bounds, "+Inf") if bound in by_bound]
    return {"bounds": [float(bound) for bound in bounds], "counts": counts}
