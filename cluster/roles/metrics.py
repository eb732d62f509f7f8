"""The series that every process has: its version, its memory and its time on the processor."""

from collections.abc import Iterable, Iterator

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cluster.version import VERSION


class ProcessMetrics(Collector):
    """Registers itself. process: as the controller names it, "shard-0"."""

    def __init__(self, registry: CollectorRegistry, process: str) -> None:
        self._process = process
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance, so that registering does not collect."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """In a rolling restart there are two versions."""
        info = GaugeMetricFamily("mobula_build_info", "1; the version is a label.", labels=["process", "version"])
        info.add_metric([self._process, VERSION], 1)
        yield info
        process = psutil.Process()
        memory = GaugeMetricFamily("mobula_process_memory_bytes", "Resident set.", labels=["process"])
        memory.add_metric([self._process], process.memory_info().rss)
        yield memory
        times = process.cpu_times()
        seconds = CounterMetricFamily("mobula_process_cpu_seconds", "On processors, all threads.", labels=["process"])
        seconds.add_metric([self._process], times.user + times.system)
        yield seconds
