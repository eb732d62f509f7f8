"""One role in a process of its own. Knows nothing of Ray.

Each imports its role only where it runs: who creates actors and calls them need not import what roles compute with.
torch is most of a process's start and of its memory without weights; controller and gateway need none. A class a role
gives its process a name to be seen in lists of processes.
"""

import sys
from abc import ABC, abstractmethod
from typing import Any

from cluster.config import MobulaConfig
from cluster.logs import log_to_stderr
from cluster.roles.role import Role

SWITCH_INTERVAL_S = 0.0005  # a thread that wakes for a forward waits so long at most for one that computes in Python


class RoleActor(ABC):
    """Creates its role and passes calls on to it."""

    def __init__(self, config: MobulaConfig, rank: int, host: str | None) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        role = self._role = self._create_role(config, rank, host)
        log_to_stderr(config.logging, role.name, lambda: role.placement_version)

    def call(self, method: str, *args: Any) -> Any:
        """A method of the role."""
        return getattr(self._role, method)(*args)

    @abstractmethod
    def _create_role(self, config: MobulaConfig, rank: int, host: str | None) -> Role: ...


class ShardActor(RoleActor):
    """A shard."""

    def _create_role(self, config: MobulaConfig, rank: int, host: str | None) -> Role:
        from cluster.roles.shard_role import ShardRole

        return ShardRole(config, rank, host)


class WorkerActor(RoleActor):
    """A worker."""

    def _create_role(self, config: MobulaConfig, rank: int, host: str | None) -> Role:
        from cluster.roles.worker_role import WorkerRole

        return WorkerRole(config, rank, host)


class GatewayActor(RoleActor):
    """The gateway."""

    def _create_role(self, config: MobulaConfig, rank: int, host: str | None) -> Role:
        from cluster.roles.gateway_role import GatewayRole

        return GatewayRole(config, host, rank)
