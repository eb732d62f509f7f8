"""Spans of requests: what a traced process calls, and the tracing that is off. Knows nothing of OpenTelemetry.

A request's context travels in gRPC metadata as W3C's `traceparent`. While tracing is off a request costs a few calls
that do nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Metadata = Sequence[tuple[str, str | bytes]]
Value = str | int | float


class Span(Protocol):
    """One process's part of a request. Any thread may call it."""

    @property
    def is_recorded(self) -> bool:
        """False: nobody looks at what is noted."""

    def note(self, name: str, value: Value) -> None:
        """An attribute."""

    def add(self, name: str, begin_s: float, end_s: float, values: dict[str, Value]) -> "Span":
        """A part that is over already, and its own parts can be added to. Times: of the monotonic clock."""

    def passed_on(self, metadata: Metadata) -> Metadata:
        """The metadata of a call that this span makes."""


class Tracing(Protocol):
    """Where spans come from."""

    def span(self, name: str, metadata: Metadata) -> AbstractContextManager[Span]:
        """The part of the request that came with this metadata, for as long as the `with` block lasts."""

    def close(self) -> None:
        """Sends what has not been sent; for the end of a process."""


class _NoSpan:
    is_recorded = False

    def note(self, name: str, value: Value) -> None:
        """Nothing."""

    def add(self, name: str, begin_s: float, end_s: float, values: dict[str, Value]) -> "Span":
        return self

    def passed_on(self, metadata: Metadata) -> Metadata:
        return metadata


class _NoTracing:
    @contextmanager
    def span(self, name: str, metadata: Metadata) -> Iterator[Span]:
        yield NO_SPAN

    def close(self) -> None:
        pass


NO_SPAN: Span = _NoSpan()
NO_TRACING: Tracing = _NoTracing()
