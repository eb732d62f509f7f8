"""One page with the series of every process."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest, make_wsgi_app
from prometheus_client.parser import text_string_to_metric_families

from cluster.gateway.http_server import serve_http
from cluster.gateway.metrics import GatewayMetrics
from protos import rpc
from protos.errors import QueueFull, Unavailable
from tests.virtual_time import run_virtually


@pytest.fixture
def endpoints() -> Iterator[dict[str, str]]:
    """Two processes that expose the same family under their own labels, and one that is gone."""
    servers, targets = [], {"worker-9": "127.0.0.1:1"}
    for rank in range(2):
        registry = CollectorRegistry()
        Counter("mobula_prompt_tokens", "Tokens.", ["dp_rank"], registry=registry).labels(str(rank)).inc(10 + rank)
        Gauge("mobula_placement_version", "Version.", ["dp_rank"], registry=registry).labels(str(rank)).set(1)
        server, port = serve_http("127.0.0.1", 0, make_wsgi_app(registry))
        servers.append(server)
        targets[f"worker-{rank}"] = f"127.0.0.1:{port}"
    yield targets
    for server in servers:
        server.shutdown()


def samples(metrics: GatewayMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(generate_latest(metrics.of_all).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_every_process_is_on_the_page_under_its_own_labels(endpoints: dict[str, str]) -> None:
    metrics = GatewayMetrics()
    metrics.processes.targets = endpoints
    found = samples(metrics)
    assert found["mobula_prompt_tokens_total", (("dp_rank", "0"),)] == 10
    assert found["mobula_prompt_tokens_total", (("dp_rank", "1"),)] == 11


def test_each_family_is_described_once(endpoints: dict[str, str]) -> None:
    metrics = GatewayMetrics()
    metrics.processes.targets = endpoints
    page = generate_latest(metrics.of_all).decode()
    assert page.count("# TYPE mobula_prompt_tokens_total counter") == 1


def test_a_process_that_is_gone_is_down_and_does_not_fail_the_scrape(endpoints: dict[str, str]) -> None:
    metrics = GatewayMetrics()
    metrics.processes.targets = endpoints
    found = samples(metrics)
    assert found["mobula_process_up", (("process", "worker-0"),)] == 1
    assert found["mobula_process_up", (("process", "worker-9"),)] == 0


@contextmanager
def one_page(page: bytes, num_bytes: int) -> Iterator[str]:
    """A process that answers with it, and says that it has so many bytes."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        start_response("200 OK", [("Content-Length", str(num_bytes))])
        return [page]

    server, port = serve_http("127.0.0.1", 0, answer)
    yield f"127.0.0.1:{port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("page", "num_missing"),
    [
        (b"mobula_rows_total 12", 3),  # of 12345
        (b'mobula_rows_total{ep_rank="0', 0),
        (b"mobula_rows_total no number\n", 0),
    ],
)
def test_a_page_that_is_cut_or_cannot_be_read_is_left_out_and_its_process_is_down(
    endpoints: dict[str, str], page: bytes, num_missing: int
) -> None:
    metrics = GatewayMetrics()
    with one_page(page, len(page) + num_missing) as address:
        metrics.processes.targets = endpoints | {"shard-0": address}
        found = samples(metrics)
    assert found["mobula_process_up", (("process", "shard-0"),)] == 0
    assert found["mobula_process_up", (("process", "worker-0"),)] == 1
    assert found["mobula_prompt_tokens_total", (("dp_rank", "0"),)] == 10
    assert ("mobula_rows_total", ()) not in found


def test_what_another_gateway_says_of_processes_stands_beside_it_in_one_family(endpoints: dict[str, str]) -> None:
    others = generate_latest(GatewayMetrics().of_all)
    metrics = GatewayMetrics()
    with one_page(others, len(others)) as address:
        metrics.processes.targets = endpoints | {"gateway-1": address}
        page = generate_latest(metrics.of_all).decode()
    assert page.count("# TYPE mobula_process_up ") == 1
    assert 'mobula_process_up{process="gateway-1"} 1.0' in page


def test_requests_are_counted_by_the_status_that_ended_them() -> None:
    metrics = GatewayMetrics()
    with metrics.request():
        assert metrics.registry.get_sample_value("mobula_gateway_requests_in_flight") == 1
    with pytest.raises(QueueFull), metrics.request():
        raise QueueFull("full")
    assert metrics.registry.get_sample_value("mobula_gateway_requests_total", {"code": "OK"}) == 1
    assert metrics.registry.get_sample_value("mobula_gateway_requests_total", {"code": "RESOURCE_EXHAUSTED"}) == 1
    assert metrics.registry.get_sample_value("mobula_gateway_requests_in_flight") == 0


def test_a_fault_of_our_own_is_counted_as_one_and_not_as_a_call_that_went_well() -> None:
    metrics = GatewayMetrics()
    with pytest.raises(ZeroDivisionError), metrics.request():
        raise ZeroDivisionError
    assert metrics.registry.get_sample_value("mobula_gateway_requests_total", {"code": "INTERNAL"}) == 1


def test_a_status_that_is_passed_on_is_counted_whatever_then_ends_the_handler() -> None:
    metrics = GatewayMetrics()
    with suppress(grpc.aio.AbortError), metrics.request() as outcome:
        outcome.code = "NOT_FOUND"
        raise grpc.aio.AbortError
    assert metrics.registry.get_sample_value("mobula_gateway_requests_total", {"code": "NOT_FOUND"}) == 1


def test_a_client_that_does_not_read_is_counted_as_cut_off_and_not_as_gone() -> None:
    metrics = GatewayMetrics()

    async def answer(request: bytes, context: grpc.aio.ServicerContext) -> rpc.Responses:
        with metrics.request():
            yield b"nobody reads this"

    class Unread:
        status: Any = None

        async def write(self, response: bytes) -> None:
            await asyncio.Event().wait()

        async def abort_with_status(self, status: Any) -> None:
            self.status = status

    context = Unread()
    handler = rpc.stream_handler(answer, read_timeout_s=30.0, on_cut_off=metrics.count_cut_off)
    run_virtually(handler.unary_stream(b"", context))
    assert context.status.code is grpc.StatusCode.ABORTED
    assert metrics.registry.get_sample_value("mobula_gateway_requests_total", {"code": "ABORTED"}) == 1
    assert metrics.registry.get_sample_value("mobula_gateway_requests_total", {"code": "CANCELLED"}) is None
    assert metrics.registry.get_sample_value("mobula_gateway_cut_offs_total") == 1


def test_a_taken_metrics_port_is_named() -> None:
    server, port = serve_http("127.0.0.1", 0, make_wsgi_app(CollectorRegistry()))
    with pytest.raises(Unavailable, match=rf"127\.0\.0\.1:{port}: .* set another metrics_port"):
        serve_http("127.0.0.1", port, make_wsgi_app(CollectorRegistry()))
    server.shutdown()
