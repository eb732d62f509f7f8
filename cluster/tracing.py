"""Spans by OpenTelemetry, sent to a collector in the background. Only here is it imported, and only when asked for.

A request with a `traceparent` is traced as that says; of others a share is. The parts of one in all processes have one
trace id.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.config import ConfigError, TracingConfig
from cluster.version import VERSION
from protos.tracing import NO_TRACING, Metadata, Span, Tracing, Value

TRACE_KEYS = ("traceparent", "tracestate")
EXPORT_TIMEOUT_S = 5  # for a collector to take a batch


def tracing_of(config: TracingConfig, process: str) -> Tracing:
    """A process's. Raises ConfigError when the extra `tracing` is not installed."""
    if config.endpoint is None:
        return NO_TRACING
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint is set, but {error.name} is not installed: mobula-serve[tracing]"
        ) from error
    resource = Resource.create({"service.name": "mobula", "service.version": VERSION, "service.instance.id": process})
    provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)))
    provider.add_span_processor(BatchSpanProcessor(_exporter(config.endpoint)))
    return OtelTracing(provider)


def _exporter(endpoint: str) -> Any:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, insecure=True, timeout=EXPORT_TIMEOUT_S)


class OtelTracing:
    """Implements protos.tracing.Tracing with OpenTelemetry's provider of tracers."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("mobula", VERSION)
        self._propagator = TraceContextTextMapPropagator()
        self._epoch_ns = time.time_ns() - time.monotonic_ns()  # of the monotonic clock

    @contextmanager
    def span(self, name: str, metadata: Metadata) -> Iterator[Span]:
        """Ends with the block. An error that leaves it is recorded."""
        from opentelemetry.trace import Status, StatusCode

        parent = self._propagator.extract({key: value for key, value in metadata if key in TRACE_KEYS})
        span = self._tracer.start_span(name, context=parent)
        try:
            yield OtelSpan(span, self)
        except Exception as error:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise
        finally:
            span.end()

    def close(self) -> None:
        """Sends what has not been sent, as long as EXPORT_TIMEOUT_S allows."""
        self._provider.shutdown()

    def child(self, parent: Any, name: str, begin_s: float, end_s: float, values: dict[str, Value]) -> Span:
        """A span that is over."""
        from opentelemetry.trace import set_span_in_context

        begin_ns, end_ns = (self._epoch_ns + int(seconds * 1e9) for seconds in (begin_s, end_s))
        context = set_span_in_context(parent)
        span = self._tracer.start_span(name, context=context, start_time=begin_ns, attributes=values)
        span.end(end_ns)
        return OtelSpan(span, self)

    def inject(self, span: Any) -> dict[str, str]:
        """What a call made by the span carries."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier


class OtelSpan:
    """Implements protos.tracing.Span."""

    def __init__(self, span: Any, tracing: OtelTracing) -> None:
        self._span = span
        self._tracing = tracing

    @property
    def is_recorded(self) -> bool:
        return bool(self._span.get_span_context().trace_flags.sampled)

    def note(self, name: str, value: Value) -> None:
        self._span.set_attribute(name, value)

    def add(self, name: str, begin_s: float, end_s: float, values: dict[str, Value]) -> Span:
        return self._tracing.child(self._span, name, begin_s, end_s, values)

    def passed_on(self, metadata: Metadata) -> Metadata:
        others = [item for item in metadata if item[0] not in TRACE_KEYS]
        return (*others, *self._tracing.inject(self._span).items())
