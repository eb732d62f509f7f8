"""One role in a process of its own, whichever it is. Knows nothing of Ray."""

import sys
from typing import Any

from cluster.config import MobulaConfig
from cluster.process import RoleName
from cluster.role import Role

SWITCH_INTERVAL_S = 0.0005  # a thread that wakes for a forward waits so long at most for one that computes in Python


class RoleActor:
    """Creates its role where it runs: who creates actors and calls them does not import what roles compute with."""

    def __init__(self, role: RoleName, config: MobulaConfig, rank: int, host: str | None) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._role = _create_role(role, config, rank, host)

    def call(self, method: str, *args: Any) -> Any:
        """A method of the role."""
        return getattr(self._role, method)(*args)


def _create_role(name: RoleName, config: MobulaConfig, rank: int, host: str | None) -> Role:
    """Imports one role only: torch is most of the memory of a process without weights, and the gateway needs none."""
    match name:
        case RoleName.SHARD:
            from cluster.shard_role import ShardRole

            return ShardRole(config, rank, host)
        case RoleName.WORKER:
            from cluster.worker_role import WorkerRole

            return WorkerRole(config, rank, host)
        case RoleName.GATEWAY:
            from cluster.gateway_role import GatewayRole

            return GatewayRole(config, host)
