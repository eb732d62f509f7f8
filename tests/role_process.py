"""Roles of this very process as the controller's processes: they can die and be replaced, without Ray."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from cluster.controller.process import ProcessDied
from cluster.roles.role import Role


class RoleProcess:
    """Implements cluster.controller.process.ProcessHandle. `role` is the newest."""

    def __init__(self, create: Callable[[], Role], role: Role) -> None:
        self.role = role
        self._create = create
        self.is_alive = True
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="role")

    def call(self, method: str, *args: Any) -> Future[Any]:
        if not self.is_alive:
            died: Future[Any] = Future()
            died.set_exception(ProcessDied(method))
            return died
        return self._pool.submit(getattr(self.role, method), *args)

    def die(self) -> None:
        """As a crash does: connections break, calls fail."""
        self.is_alive = False
        self.role.stop(0.0)

    def come_back(self) -> None:
        """As Ray starts an actor again."""
        self.role = self._create()
        self.is_alive = True

    def restart(self) -> None:
        self.die()
        self.come_back()

    def kill(self) -> None:
        self.die()

    def close(self) -> None:
        self._pool.shutdown()
