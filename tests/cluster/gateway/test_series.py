"""How many series a system of DeepSeek-V2's size has, and what a scrape of all costs: 16 shards, 8 workers."""

import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest, make_wsgi_app

from attention.metrics import EngineMetrics
from attention.sequence import FinishReason
from cluster.controller.metrics import ControllerMetrics
from cluster.controller.rebalance import RebalanceCause
from cluster.gateway.http_server import serve_http
from cluster.gateway.metrics import GatewayMetrics
from cluster.roles.metrics import ProcessMetrics
from experts.metrics import ShardMetrics
from router.balance_terms import Traffic
from router.metrics import RouterMetrics
from router.placement import place_units
from tests.fake_controller import serving_status
from tests.router.placement.requests import v2_request

NUM_SHARDS, NUM_WORKERS = 16, 8
MAX_SERIES = 3_000
MAX_PAGE_BYTES = 512 * 1024
MAX_SCRAPE_S = 5.0  # half of Prometheus' default; measured: docs/measurements.md


def worker(dp_rank: int) -> CollectorRegistry:
    """One that has had to do with every shard, and whose requests ended in every way."""
    registry = CollectorRegistry()
    ProcessMetrics(registry, f"worker-{dp_rank}")
    engine, router = EngineMetrics(registry, dp_rank), RouterMetrics(registry, dp_rank)
    for reason in (FinishReason.STOP, FinishReason.LENGTH):
        engine.count_success(reason)
    router.set_placement(1, 3)
    router.count_dispatch([0, 1, 2, 3], 3)
    router.count_retry("unavailable")
    for ep_rank in range(NUM_SHARDS):
        router.count_sent(ep_rank, 1, 1, "grpc")
        router.count_received(ep_rank, 1, "grpc")
        router.count_times(ep_rank, 1.0, 0.1, 0.1)
    router.count_late(3)
    return registry


def shard(ep_rank: int) -> CollectorRegistry:
    registry = CollectorRegistry()
    ProcessMetrics(registry, f"shard-{ep_rank}")
    ShardMetrics(registry, ep_rank)
    return registry


def controller() -> CollectorRegistry:
    request = v2_request(NUM_SHARDS, redundancy=0.25)
    load = np.ones((59, 160))
    traffic = Traffic(
        expert_map=place_units(request, policy="device_limited"),
        num_tokens=dict.fromkeys(range(NUM_SHARDS), load),
        num_rows=dict.fromkeys(range(NUM_SHARDS), load.sum(axis=1)),
    )
    registry = CollectorRegistry()
    ControllerMetrics(
        registry,
        gate=request.gate,
        status=serving_status,
        traffic=lambda: traffic,
        num_rebalances=lambda: dict.fromkeys(RebalanceCause, 0),
        has_expert_series=False,
    )
    return registry


@contextmanager
def served_system() -> Iterator[GatewayMetrics]:
    """A gateway's, over processes that answer on ports of their own."""
    disable_created_metrics()  # as roles do
    registries = {f"worker-{rank}": worker(rank) for rank in range(NUM_WORKERS)}
    registries |= {f"shard-{rank}": shard(rank) for rank in range(NUM_SHARDS)}
    registries["controller"] = controller()
    metrics, servers = GatewayMetrics(), []
    ProcessMetrics(metrics.registry, "gateway-0")
    targets = {}
    for name, registry in registries.items():
        server, port = serve_http("127.0.0.1", 0, make_wsgi_app(registry))
        servers.append(server)
        targets[name] = f"127.0.0.1:{port}"
    metrics.processes.targets = targets
    yield metrics
    for server in servers:
        server.shutdown()


def test_prometheus_has_nothing_to_say_against_names_and_labels() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on this machine; Debian's package prometheus has it")
    for registry in (worker(0), shard(0), controller(), GatewayMetrics().registry):
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=generate_latest(registry), capture_output=True, check=False
        )
        assert (checked.returncode, checked.stderr.decode()) == (0, "")


def test_a_large_system_has_few_series_and_is_scraped_in_time() -> None:
    with served_system() as metrics:
        server, port = serve_http("127.0.0.1", 0, make_wsgi_app(metrics.of_all))
        begin_s = time.perf_counter()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30.0) as response:
            page = response.read()
        seconds = time.perf_counter() - begin_s
        server.shutdown()
    series = [line for line in page.decode().splitlines() if not line.startswith("#")]
    print(f"{len(series)} series, {len(page) / 1024:.0f} KiB, {1e3 * seconds:.0f} ms")  # pytest -s shows it
    assert sum(line.startswith("mobula_process_up{") and line.endswith(" 1.0") for line in series) == 25
    assert len(series) < MAX_SERIES
    assert len(page) < MAX_PAGE_BYTES
    assert seconds < MAX_SCRAPE_S
