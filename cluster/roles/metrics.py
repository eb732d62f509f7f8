"""The series that every process has."""

from prometheus_client import CollectorRegistry, Gauge

from cluster.version import VERSION


def add_build_info(registry: CollectorRegistry, process: str) -> None:
    """Says which version a process runs: in a rolling restart there are two. process: "shard-0"."""
    info = Gauge("mobula_build_info", "1; the version is a label.", ["process", "version"], registry=registry)
    info.labels(process, VERSION).set(1)
