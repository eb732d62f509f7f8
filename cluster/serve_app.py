"""Mobula as a Ray Serve application, for what deploys those: KubeRay's RayService names this module.

    import_path: cluster.serve_app:app
    args: {config: /etc/mobula/cluster.yaml}

One Serve replica starts the whole system, or takes over one that runs, and ends it in order when Serve deletes the
application. It is up when the system serves, healthy while there is a controller, and shows the status over HTTP.
Tokens do not pass Serve: clients call the gateways, which listen themselves (ARCHITECTURE.md, Decisions). Serve ends a
replica that it finds unhealthy, and with it everything; so a lost shard, worker or controller, which come back, is no
reason.
"""

import asyncio
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ray import serve
from ray.serve import Application

from cluster.commands.message_fields import plain_fields
from cluster.config import read_config
from cluster.controller.admin_messages import status_message
from cluster.controller.process import ClusterStatus
from cluster.roles.launch import Deployment

logger = logging.getLogger(__name__)

HEALTH_PERIOD_S = 4.0  # each check also tells the controller that its owner is there; see cluster/controller/lease.py
NO_CONTROLLER = ClusterStatus(processes=(), is_serving=False, placement_version=0)  # Ray starts it again


class AppArgs(BaseModel, extra="forbid"):
    """What a Serve config may pass."""

    config: str  # path of the configuration file, on the node of the replica


@serve.deployment(name="system", num_replicas=1, max_ongoing_requests=16, health_check_period_s=HEALTH_PERIOD_S)
class System:
    """A running Mobula."""

    def __init__(self, config_path: str) -> None:
        """Returns when every process serves. Raises ConfigError, StartError and what else `mobula serve` ends with."""
        with ExitStack() as undo:
            self._deployment = undo.enter_context(Deployment(read_config(Path(config_path))))
            self._deployment.wait_until_serving(_LogChanges())
            self._running = undo.pop_all()

    async def __call__(self, request: Any) -> dict[str, Any]:
        """GET: the status, fields as in protos/admin.proto."""
        return plain_fields(status_message(await self._status() or NO_CONTROLLER))

    async def check_health(self) -> None:
        """Raises StartError when the controller is gone for good."""
        await self._status()

    def __del__(self) -> None:
        """Serve's way to end a replica: requests in flight may end first, for `drain_timeout_s`."""
        if hasattr(self, "_running"):  # else it did not come up
            self._running.close()

    async def _status(self) -> ClusterStatus | None:
        return await asyncio.to_thread(self._deployment.status)


def app(args: AppArgs) -> Application:
    """The application that Serve deploys."""
    return System.bind(args.config)  # type: ignore[no-any-return, attr-defined]


class _LogChanges:
    """Logs each process's state when it changes, for whoever reads the replica's log while it starts."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}

    def __call__(self, status: ClusterStatus | None) -> None:
        states = (
            {name: f"{health.state} {health.detail}".strip() for name, health in status.processes} if status else {}
        )
        for name, state in states.items():
            if self._shown.get(name) != state:
                logger.info("%s: %s", name, state)
        self._shown = states
