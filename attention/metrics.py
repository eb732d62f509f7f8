"""Prometheus series of an attention worker. The registry is the caller's; every series carries dp_rank.

Names follow vLLM's stems. Buckets begin at 1 ms: a small model answers faster than usual buckets can show.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from attention.sequence import FinishReason
from protos import errors

_SECONDS = (0.001, 0.003, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
_WHOLE_SECONDS = (0.01, 0.05, 0.25, 1.0, 2.5, 10.0, 30.0, 120.0, 600.0)  # of a whole request
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


class EngineMetrics:
    """One worker's series."""

    def __init__(self, registry: CollectorRegistry, dp_rank: int) -> None:
        rank = str(dp_rank)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["dp_rank"], registry=registry).labels(rank)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["dp_rank"], registry=registry).labels(rank)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["dp_rank"], registry=registry, buckets=buckets).labels(rank)

        self.num_requests_running = gauge("mobula_num_requests_running", "Sequences that hold cache blocks.")
        self.num_requests_waiting = gauge("mobula_num_requests_waiting", "Sequences that wait for cache blocks.")
        self.cache_usage_ratio = gauge("mobula_latent_cache_usage_ratio", "Used blocks of the latent cache, 0 to 1.")
        self.num_preemptions = counter("mobula_num_preemptions", "Sequences that gave their blocks to older ones.")
        self.prompt_tokens = counter("mobula_prompt_tokens", "Prompt tokens of requests that got their first token.")
        self.generation_tokens = counter("mobula_generation_tokens", "Sampled tokens.")
        self.time_to_first_token = histogram(
            "mobula_time_to_first_token_seconds", "From submission to the first token.", _SECONDS
        )
        self.inter_token_latency = histogram(
            "mobula_inter_token_latency_seconds", "Between two tokens of a request.", _SECONDS
        )
        self.e2e_request_latency = histogram(
            "mobula_e2e_request_latency_seconds", "From submission to the last token.", _WHOLE_SECONDS
        )
        self.request_queue_time = histogram(
            "mobula_request_queue_time_seconds", "From submission to the first step.", _WHOLE_SECONDS
        )
        self.iteration_tokens = histogram("mobula_iteration_tokens", "Tokens computed in one step.", _TOKENS)
        successes = Counter(
            "mobula_request_success", "Requests that ended well.", ["dp_rank", "finish_reason"], registry=registry
        )
        self._successes = {
            reason: successes.labels(rank, reason.value) for reason in (FinishReason.STOP, FinishReason.LENGTH)
        }
        self._errors = Counter(
            "mobula_request_errors",
            "Requests that ended badly, by gRPC status.",
            ["dp_rank", "code"],
            registry=registry,
        )
        self._rank = rank

    def count_success(self, reason: FinishReason) -> None:
        self._successes[reason].inc()

    @contextmanager
    def counted_errors(self) -> Iterator[None]:
        """Counts the exception that leaves the block by its gRPC status, and lets it pass."""
        try:
            yield
        except errors.MobulaError as error:
            self._count_error(error.code.name)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self._count_error("CANCELLED")
            raise
        except Exception:
            self._count_error("INTERNAL")
            raise

    def _count_error(self, code: str) -> None:
        self._errors.labels(self._rank, code).inc()


class RequestTimeline:
    """The moments of one request, observed as they pass. Times are seconds of one monotonic clock.

    One that another worker began has its first token behind it: its client waits for the next one.
    """

    __slots__ = ("_arrival_s", "_last_token_s", "_metrics", "_num_prompt_tokens", "has_started")

    def __init__(
        self, metrics: EngineMetrics, *, arrival_s: float, num_prompt_tokens: int, is_resumed: bool = False
    ) -> None:
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._num_prompt_tokens = num_prompt_tokens
        self._last_token_s = arrival_s if is_resumed else None
        self.has_started = False  # whether a step has computed some of it

    def start(self, now_s: float) -> None:
        """The first step that computes the request begins."""
        self.has_started = True
        self._metrics.request_queue_time.observe(now_s - self._arrival_s)

    def token(self, now_s: float) -> None:
        """A token was sampled."""
        self._metrics.generation_tokens.inc()
        if self._last_token_s is None:
            self._metrics.prompt_tokens.inc(self._num_prompt_tokens)
            self._metrics.time_to_first_token.observe(now_s - self._arrival_s)
        else:
            self._metrics.inter_token_latency.observe(now_s - self._last_token_s)
        self._last_token_s = now_s

    def finish(self, now_s: float, reason: FinishReason) -> None:
        """The request ended well."""
        self._metrics.e2e_request_latency.observe(now_s - self._arrival_s)
        self._metrics.count_success(reason)
