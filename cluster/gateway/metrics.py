"""One Prometheus endpoint for the whole system: scrapes the processes' own endpoints when it is scraped.

Every process exposes its series under its own labels (dp_rank, ep_rank), so merging is joining families by name.
A process that does not answer in time with a page that can be read is missing and has mobula_process_up 0.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum, unique
from http.client import HTTPException

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from cluster.gateway.http_server import get
from protos.credentials import PeerRole
from protos.errors import MobulaError
from protos.mutual_tls import role_name

logger = logging.getLogger(__name__)

SCRAPE_TIMEOUT_S = 2.0  # below Prometheus' default of 10 s, so that one dead process does not fail the whole scrape
MAX_PAGE_BYTES = 64 * 1024 * 1024
_PAUSE_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ProcessCollector(Collector):
    """Collects the series of every process of the system.

    Attributes:
        targets: process name ("worker-0") -> "host:port" of its endpoint; replaced as a whole.
        make_context: of TLS, asked for each scrape; None where the endpoints speak plaintext.
    """

    def __init__(self, own: CollectorRegistry) -> None:
        """own: of this process, whose series are on the page too."""
        self.targets: dict[str, str] = {}
        self._own = own
        self.make_context: Callable[[], ssl.SSLContext] | None = None
        self._pool = ThreadPoolExecutor(max_workers=16, thread_name_prefix="scrape")

    def describe(self) -> Iterable[Metric]:
        return []

    def pages(self) -> list[str]:
        """The pages of the processes that answer, as they are."""
        return [page for page in self._scrape_all(self._collected()) if page]

    def collect(self) -> Iterable[Metric]:
        targets = self._collected()
        pages = self._scrape_all(targets)
        is_up = GaugeMetricFamily(
            "mobula_process_up", "Whether the process answered the last scrape.", labels=["process"]
        )
        families: dict[str, Metric] = {is_up.name: is_up}  # another gateway's page has it too
        for family in self._own.collect():
            families[family.name] = Metric(family.name, family.documentation, family.type)
            families[family.name].samples.extend(family.samples)
        for process, page in zip(targets, pages, strict=True):
            found = _families_on(process, page)
            is_up.add_metric([process], 0.0 if found is None else 1.0)
            for family in found or ():
                families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                families[family.name].samples.extend(_told_apart(process, family.samples))
        yield from families.values()

    def _collected(self) -> dict[str, str]:
        """Over TLS without other gateways, which show clients' certificate and may want a key: whoever scrapes this one
        scrapes them too."""
        is_tls = self.make_context is not None
        return {name: at for name, at in self.targets.items() if not (is_tls and name.startswith("gateway-"))}

    def _scrape_all(self, targets: dict[str, str]) -> list[str | None]:
        return list(self._pool.map(self._scrape, targets, targets.values()))

    def _scrape(self, process: str, address: str) -> str | None:
        try:
            tls = None
            if self.make_context is not None:
                tls = self.make_context(), role_name(PeerRole(process.partition("-")[0]))
            return get(address, "/metrics", SCRAPE_TIMEOUT_S, MAX_PAGE_BYTES, tls).decode("utf-8")
        except (OSError, HTTPException, UnicodeDecodeError) as error:
            logger.debug("no metrics from %s: %s", address, error)
            return None


def _families_on(process: str, page: str | None) -> list[Metric] | None:
    """Those of a process's page, if there is one that can be read."""
    if page is None:
        return None
    try:
        return list(text_string_to_metric_families(page))
    except (ValueError, IndexError) as error:  # what the parser raises
        logger.warning("the metrics of %s cannot be read: %r", process, error)
        return None


def _told_apart(process: str, samples: list[Sample]) -> list[Sample]:
    """Another gateway's series have the names of this one's: they get its rank. The others' labels differ already."""
    role, _, rank = process.rpartition("-")
    if role != "gateway":
        return samples
    return [sample._replace(labels={**sample.labels, "gateway": rank}) for sample in samples]


@unique
class ResumeReason(StrEnum):
    """Why a worker did not end an answer that it, or one before it, had begun."""

    LOST = "lost"  # the connection broke
    SILENT = "silent"  # the connection stands, and nothing came through it
    STOPPING = "stopping"  # it was told to end
    REFUSED = "refused"  # it has no place


@unique
class ShedReason(StrEnum):
    """Why a request was refused at once."""

    FULL = "full"  # too many requests, or bytes of them
    WAIT = "wait"  # it would wait for too long
    CLIENT = "client"  # its client has too many, or used too many tokens


class GatewayMetrics:
    """The gateway's own series, and the collector of everybody else's.

    Attributes:
        registry: of the gateway's own series.
        of_all: of these and every other process's.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.processes = ProcessCollector(self.registry)
        self.of_all = CollectorRegistry()
        self.of_all.register(self.processes)
        self._requests = Counter(
            "mobula_gateway_requests", "Generate calls by final gRPC status.", ["code"], registry=self.registry
        )
        self._in_flight = Gauge(
            "mobula_gateway_requests_in_flight", "Generate calls in flight.", registry=self.registry
        )
        self._resumes = Counter(
            "mobula_gateway_resumes",
            "Answers that had begun and had to go on with another worker, by why the one before was left.",
            ["reason"],
            registry=self.registry,
        )
        for reason in ResumeReason:
            self._resumes.labels(reason.value)
        self._sheds = Counter(
            "mobula_gateway_sheds", "Requests refused at once, by why.", ["reason"], registry=self.registry
        )
        for shed_reason in ShedReason:
            self._sheds.labels(shed_reason.value)
        self._waiting = Gauge(
            "mobula_gateway_requests_waiting", "Requests that wait for a place at a worker.", registry=self.registry
        )
        self._cut_offs = Counter(
            "mobula_gateway_cut_offs", "Clients that did not read their answer in time.", registry=self.registry
        )
        self._pauses = Histogram(
            "mobula_gateway_resume_pause_seconds",
            "From the loss of a worker to the next answer, from another one.",
            registry=self.registry,
            buckets=_PAUSE_SECONDS,
        )

    def count_shed(self, reason: ShedReason) -> None:
        """A request was refused."""
        self._sheds.labels(reason.value).inc()

    def set_waiting(self, num_requests: int) -> None:
        """So many wait now."""
        self._waiting.set(num_requests)

    def count_cut_off(self) -> None:
        """A client did not read its answer."""
        self._cut_offs.inc()

    def count_resume(self, reason: ResumeReason) -> None:
        """A worker was left for another one."""
        self._resumes.labels(reason.value).inc()

    def observe_pause(self, seconds: float) -> None:
        """What a client had to wait because its worker was lost."""
        self._pauses.observe(seconds)

    @contextmanager
    def request(self) -> Iterator["RequestOutcome"]:
        """Around one Generate call: counts it, in flight and by the status it ends with."""
        outcome = RequestOutcome()
        self._in_flight.inc()
        try:
            yield outcome
        except MobulaError as error:
            outcome.code = error.code.name
            raise
        except (GeneratorExit, asyncio.CancelledError):
            outcome.code = "CANCELLED"
            raise
        except Exception:
            if outcome.code == "OK":  # else it is known how the call ended, and this ends the handler
                outcome.code = "INTERNAL"
            raise
        finally:
            self._in_flight.dec()
            self._requests.labels(outcome.code).inc()


@dataclass(slots=True)
class RequestOutcome:
    """How a call ended, filled in by whoever ends it otherwise than well."""

    code: str = "OK"
