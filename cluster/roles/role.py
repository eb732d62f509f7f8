"""The life that every process has. Plain classes: Ray wraps them in actors.py, tests do not.

A role is NEW until the controller tells it to load; then it reads its weights, opens its ports and is READY.
"""

import logging
import os
import resource
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from wsgiref.simple_server import WSGIServer
from wsgiref.types import WSGIApplication

import grpc.aio
import psutil
from grpc_health.v1.health import aio as health_aio
from prometheus_client import CollectorRegistry, disable_created_metrics, make_wsgi_app

from cluster.config import ActorConfig, GatewayConfig, MobulaConfig
from cluster.controller.process import ProcessHealth, ProcessState, new_generation
from cluster.gateway.http_server import Secure, close_http, serve_http
from cluster.roles.metrics import ProcessMetrics
from cluster.roles.thread_watch import STALLED_S, ThreadWatch
from cluster.security.http_tls import PROCESS_READERS, secured_connections
from cluster.security.metrics import CertificateMetrics
from cluster.security.process_tls import process_credentials, process_folder
from cluster.tracing import tracing_of
from protos.credentials import PLAINTEXT, PeerRole
from protos.errors import Unavailable
from protos.health_server import serve_health
from protos.loop_thread import LoopThread
from router.expert_map import ExpertMap

logger = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_DIED = 70  # "internal software error" in sysexits.h
CONTROL_TIMEOUT_S = 10.0  # for what the control thread asks of the event loop


class Role(ABC):
    """The life every process has. Methods are called from the controller, each in a thread of its own."""

    def __init__(self, config: MobulaConfig, role: PeerRole, rank: int, host: str | None) -> None:
        """host: where to listen; None for this node's address in the cluster."""
        self._config = config
        self._peer_role = role
        self._name = f"{role.value}-{rank}"
        self._host = host or node_address()  # where others find this process
        self._bind_host = self._host  # where it listens
        self._lock = threading.Lock()
        self._health = ProcessHealth(generation=new_generation(), state=ProcessState.NEW, pid=os.getpid())
        self._credentials = PLAINTEXT
        self._loop = LoopThread("loop")
        self._registry = CollectorRegistry()
        self._tracing = tracing_of(config.tracing, self._name)
        disable_created_metrics()  # a series more for each counter and histogram, for when it was made
        self._must_leave = False  # once said, not taken back
        self._is_leaving = False  # the same
        self._node_started_s = _node_start_s()  # a leave file that is older is of a container before this one
        self._watch: ThreadWatch | None = None  # of the thread that computes
        self._health_server: grpc.aio.Server | None = None
        self._http_server: WSGIServer | None = None
        self._ending = threading.Lock()  # taken once

    @property
    def name(self) -> str:
        """As the controller calls it: "shard-0"."""
        return self._name

    @property
    def placement_version(self) -> int | None:
        """The newest that it serves or is told of; None for a process without, or before it has loaded."""
        return None

    def health(self) -> ProcessHealth:
        """This process about itself; one whose thread hangs ends, and Ray starts it again."""
        if self._watch and self._watch.is_stalled():
            self._end_process(f"the {self._watch.name} thread has given no sign of life for {STALLED_S:.0f} s")
        self._must_leave = self._must_leave or self._is_node_ending()
        health = replace(
            self._health,
            peak_rss_bytes=_peak_rss_bytes(),
            must_leave=self._must_leave,
            is_leaving=self._is_leaving,
            is_stopping=self._ending.locked(),
        )
        if self._must_leave and health.state is ProcessState.NEW:
            return replace(health, detail=f"loads nothing: {self._config.leave_file} says that its node ends")
        return health

    def _end_process(self, why: str) -> None:
        """Others go on with what it had."""
        logger.critical("%s; the process ends", why)
        os._exit(EXIT_DIED)

    def leave(self) -> None:
        """It is drained, and ends when a controller says so: this one, or the next one, which sees it in `health`."""
        self._is_leaving = True

    def load(self, expert_map: ExpertMap) -> None:
        """From NEW to READY. What goes wrong is not raised but shown by `health`, as FAILED.

        Then only a new process helps: what a half-loaded one holds (ports, threads, series) ends with it.
        """
        with self._lock:
            if self._health.state is not ProcessState.NEW:
                return
            self._health = replace(self._health, state=ProcessState.LOADING, detail="reading weights")
        before = psutil.Process().memory_info().rss
        try:
            self._use_certificates()
            ProcessMetrics(self._registry, self._name)
            address, weight_bytes = self._load(expert_map)
            app, tls = self._http_app(), self._http_tls()
            self._http_server, metrics_port = self._on_free_port(
                self._ports().metrics_port, lambda port: serve_http(self._bind_host, port, app, tls)
            )
        except Exception as error:  # the top of the process's start: the controller shows it
            if self._ending.locked():  # it was told to end meanwhile
                logger.info("not loaded, the process ends: %s: %s", type(error).__name__, error)
                return
            logger.exception("could not load")
            self._health = replace(self._health, state=ProcessState.FAILED, detail=f"{type(error).__name__}: {error}")
            return
        self._health = replace(
            self._health,
            state=ProcessState.READY,
            detail="",
            address=address,
            weight_bytes=weight_bytes,
            metrics_address=f"{self._host}:{metrics_port}",
            load_rss_bytes=max(0, _peak_rss_bytes() - before),
        )

    def _is_node_ending(self) -> bool:
        if self._config.leave_file is None:
            return False
        try:
            written_s = Path(self._config.leave_file).stat().st_mtime
        except OSError:  # there is none, or it cannot be seen
            return False
        return written_s >= self._node_started_s

    def _use_certificates(self) -> None:
        """Raises CertificateError."""
        folder = process_folder(self._config.tls, self._peer_role)
        self._folder = folder
        self._credentials = process_credentials(folder)
        self._certificates = CertificateMetrics(self._registry, self._name)
        if folder:
            self._certificates.watch(self._peer_role.value, folder)

    def stop(self, drain_timeout_s: float) -> None:
        """Lets what is in flight end, then ends every thread and port of the process. Another call does nothing."""
        if not self._ending.acquire(blocking=False):
            return
        try:
            self._stop(drain_timeout_s)
            if self._health_server:
                self._loop.run(self._health_server.stop(None), CONTROL_TIMEOUT_S)
        finally:
            if self._http_server:
                close_http(self._http_server)
            self._tracing.close()
            self._loop.stop()

    @abstractmethod
    def _stop(self, drain_timeout_s: float) -> None:
        """As `stop`, of what the role itself has started."""

    @abstractmethod
    def _load(self, expert_map: ExpertMap) -> tuple[str, int]:
        """Returns the server's address and the bytes of weights kept."""

    def _http_app(self) -> WSGIApplication:
        """What the process's HTTP port serves, once loaded."""
        app: WSGIApplication = make_wsgi_app(self._registry)
        return app

    def _http_tls(self) -> Secure | None:
        """Of the HTTP port, if it is wanted: whoever reads shows a certificate that says so."""
        if not (self._config.tls.metrics and self._folder):
            return None
        return secured_connections(self._folder, is_mutual=True, readers=PROCESS_READERS)

    @abstractmethod
    def _ports(self) -> ActorConfig | GatewayConfig:
        """The settings that name this role's ports."""

    def _candidates(self, port: int) -> Sequence[int]:
        """The ports of which the first free one is taken where `port` is configured."""
        return (port,)

    def _on_free_port(self, port: int, listen: Callable[[int], T]) -> T:
        """Listens there, on the first of the candidates. Tried, not looked up: others may start at this moment.

        Raises Unavailable when none is free.
        """
        *first, last = self._candidates(port)
        for candidate in first:
            with suppress(Unavailable):
                return listen(candidate)
        return listen(last)

    def _serve_health(self, health: health_aio.HealthServicer) -> None:
        """On a port of its own too, if one is configured. Raises Unavailable."""
        if wanted := self._ports().health_port:

            def serve(port: int) -> grpc.aio.Server:
                return self._loop.run(serve_health(health, self._bind_host, port), CONTROL_TIMEOUT_S)

            self._health_server = self._on_free_port(wanted, serve)


def _node_start_s() -> float:
    """Seconds of the epoch at which this one's parent was started: Ray's process, which a container begins with."""
    parent = psutil.Process().parent()
    return parent.create_time() if parent else 0.0


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def failure_domain(label: str | None) -> str:
    """What this process shares its fate with: the value of a label of its Ray node, or the node itself."""
    import ray  # only in an actor: tests assemble roles without Ray

    if not ray.is_initialized():
        return ""  # one process on its own
    context = ray.get_runtime_context()
    return str(context.get_node_labels().get(label, "") if label else context.get_node_id())


def node_address() -> str:
    """This machine's address as other nodes of the cluster see it: on Kubernetes the Pod's."""
    if pod_ip := os.environ.get("POD_IP"):
        return pod_ip
    import ray.util  # only in an actor: tests assemble roles without Ray

    return str(ray.util.get_node_ip_address())
