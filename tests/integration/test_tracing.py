"""A request's spans through gateway, worker, a layer and the shards that it asked, under one trace id."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import tracing
from protos import generation_pb2 as pb
from protos.tracing import NO_SPAN, NO_TRACING
from tests.checkpoints import write_checkpoint
from tests.system import System

memory = pytest.importorskip(
    "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="the extra `tracing` is not installed"
)
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[System, Any]]:
    """A system, and where its spans go instead of to a collector; none of its own accord."""
    exporter = memory.InMemorySpanExporter()
    monkeypatch.setattr(tracing, "_exporter", lambda endpoint: exporter)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    folder = write_checkpoint(tmp_path / "model", "v2", seed=3)
    settings = {"endpoint": "127.0.0.1:1", "sample_ratio": 0.0}
    with System(folder, num_workers=1, num_shards=2, tracing=settings) as system:
        yield system, exporter


def generate(system: System, metadata: tuple[tuple[str, str], ...] = ()) -> None:
    params = pb.SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]), sampling_params=params)
    assert len(list(system.stub.Generate(request, timeout=60.0, metadata=metadata))) == 6
    assert system.becomes_idle()


def spans_of(exporter: Any) -> dict[str, Any]:
    """By name, once both processes have handed theirs over."""
    give_up_s = time.monotonic() + 20.0
    while True:
        spans = {span.name: span for span in exporter.get_finished_spans()}
        if {"gateway.Generate", "worker.Generate"} <= spans.keys():
            return spans
        assert time.monotonic() < give_up_s, list(spans)
        time.sleep(0.02)


def test_a_traced_request_has_a_span_in_every_process_that_it_visits(traced: tuple[System, Any]) -> None:
    system, exporter = traced
    generate(system, (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"),))
    spans = spans_of(exporter)
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE_ID}
    gateway, worker, layer = spans["gateway.Generate"], spans["worker.Generate"], spans["layer"]
    assert f"{gateway.parent.span_id:016x}" == PARENT_ID
    assert worker.parent.span_id == gateway.context.span_id
    assert layer.parent.span_id == spans["first token"].parent.span_id == worker.context.span_id
    assert worker.attributes["mobula.num_completion_tokens"] == 6
    shards = [span for name, span in spans.items() if name.startswith("shard ")]
    assert shards
    for shard in shards:
        assert shard.parent.span_id == layer.context.span_id
        assert layer.start_time <= shard.start_time <= shard.end_time <= layer.end_time
    assert gateway.start_time <= worker.start_time <= layer.start_time <= layer.end_time <= worker.end_time


def test_a_request_that_is_not_sampled_has_no_spans(traced: tuple[System, Any]) -> None:
    system, exporter = traced
    generate(system)
    generate(system, (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"),))
    spans_of(exporter)
    assert {f"{span.context.trace_id:032x}" for span in exporter.get_finished_spans()} == {TRACE_ID}


def test_tracing_that_is_off_passes_metadata_on_as_it_is() -> None:
    metadata = (("traceparent", "x"), ("other", "y"))
    with NO_TRACING.span("gateway.Generate", metadata) as span:
        assert span is NO_SPAN
        assert span.passed_on(metadata) is metadata
        assert not span.is_recorded
