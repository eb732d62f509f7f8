"""A gateway's process: the front door, the Prometheus endpoint of the whole system, and the dashboard."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from wsgiref.types import WSGIApplication

from cluster.config import GatewayConfig, MobulaConfig
from cluster.controller.process import ProcessHealth, ProcessState
from cluster.dashboard.dashboard import Dashboard
from cluster.dashboard.web import GatewayApp
from cluster.gateway.gateway import Gateway
from cluster.gateway.http_server import Secure
from cluster.gateway.metrics import GatewayMetrics
from cluster.roles.role import CONTROL_TIMEOUT_S, Role
from cluster.security.http_key import KeyedApp
from cluster.security.http_tls import client_contexts, secured_connections
from cluster.security.key_guard import KeyCheck
from cluster.security.keys import KeyRing
from cluster.security.metrics import KeyMetrics
from cluster.security.process_tls import client_credentials, client_folder
from protos.credentials import PeerRole
from protos.guard import Guard
from router.expert_map import ExpertMap


class GatewayRole(Role):
    """The front door. Gateway 0 shows the series of every process, others only their own."""

    def __init__(self, config: MobulaConfig, host: str | None, rank: int = 0) -> None:
        listens_everywhere = config.gateway.host in ("0.0.0.0", "::")
        super().__init__(config, PeerRole.GATEWAY, rank, host if listens_everywhere else config.gateway.host)
        self._rank = rank
        self._bind_host = config.gateway.host
        self._metrics = GatewayMetrics()
        self._registry = self._metrics.registry
        self._gateway: Gateway | None = None
        self._dashboard: Dashboard | None = None
        self._keys: KeyCheck | None = None
        self._ring: KeyRing | None = None

    def _load(self, expert_map: ExpertMap) -> tuple[str, int]:
        settings, tls = self._config.gateway, self._config.tls
        shown = self._shown = client_folder(tls)
        if tls.metrics and self._folder:
            self._metrics.processes.make_context = client_contexts(self._folder)
        front = client_credentials(tls, shown)
        if shown:
            self._certificates.watch("public", shown)

        guards = []
        if settings.keys:
            self._ring = KeyRing(Path(settings.keys))
            self._keys = KeyCheck(self._ring, KeyMetrics(self._registry))
            guards.append(Guard(self._keys))

        async def start() -> tuple[Gateway, int]:
            gateway = Gateway(settings, self._metrics, self._credentials, front, guards, self._tracing)
            return gateway, await gateway.start(self._bind_host, settings.port)

        self._gateway, port = self._loop.run(start())
        self._serve_health(self._gateway.health)
        return f"{self._host}:{port}", 0

    def health(self) -> ProcessHealth:
        """With what is wrong with its file of keys, if anything."""
        health = super().health()
        if self._ring and health.state is ProcessState.READY:
            return replace(health, detail=self._ring.fault())
        return health

    def update_members(
        self, workers: Mapping[int, str], metrics_addresses: Mapping[str, str], admin_address: str = ""
    ) -> None:
        """The workers that serve, by dp_rank; every process's Prometheus endpoint, by name; the controller's server."""
        assert self._gateway
        self._metrics.processes.targets = dict(metrics_addresses) if self._rank == 0 else {}
        self._loop.run(self._gateway.update_admin(admin_address), CONTROL_TIMEOUT_S)
        self._loop.run(self._gateway.update_workers(dict(workers)), CONTROL_TIMEOUT_S)

    def num_waiting(self) -> int:
        """Requests that have no place yet."""
        return self._gateway.num_waiting if self._gateway else 0

    def _http_app(self) -> WSGIApplication:
        assert self._gateway
        if self._config.gateway.dashboard:
            self._dashboard = Dashboard(self._gateway.local_calls(), self._loop, self._metrics.processes.pages)
            self._dashboard.start()
        app = GatewayApp(self._metrics, self._dashboard)
        return KeyedApp(app, self._keys) if self._keys and self._config.gateway.http_key else app

    def _http_tls(self) -> Secure | None:
        """With the certificate that clients see, and asking for theirs as the gRPC port does."""
        tls = self._config.tls
        if not (tls.metrics and self._shown):
            return None
        return secured_connections(self._shown, is_mutual=tls.require_client_certificate)

    def _stop(self, drain_timeout_s: float) -> None:
        if self._dashboard:
            self._dashboard.stop()
        if self._gateway:
            self._loop.run(self._gateway.stop(drain_timeout_s))

    def _ports(self) -> GatewayConfig:
        return self._config.gateway

    def _candidates(self, port: int) -> Sequence[int]:
        """Of several gateways on a machine each has its own, the next that is free, but for the one they share.

        On the cluster that ends with the command all are on one machine: gateway 0, which shows every process, has the
        first.
        """
        if not port:
            return (0,)
        ports = range(port, port + self._config.gateway.count)
        first = self._rank if self._config.ray.address is None else 0
        return (*ports[first:], *ports[:first])
