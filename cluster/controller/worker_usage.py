"""How loaded the attention workers are: what of their latent caches and of their steps' places is taken, and how many
requests wait at them and at the gateways.
"""

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

from cluster.config import WorkerScalingConfig
from cluster.controller.memory_budget import MemoryRoom
from cluster.controller.process import ManagedProcess, RoleName
from cluster.controller.scaling import ANSWER_TIMEOUT_S, Scaling, Usage
from cluster.controller.worker_membership import WorkerMembership


class WorkerWork(NamedTuple):
    """What a worker is doing now."""

    usage_ratio: float  # of its latent cache or of the sequences that a step takes, whichever is fuller
    num_running: int
    num_waiting: int


class WorkerUsage:
    """Of one system. Implements scaling.UsageMeter."""

    def __init__(self, processes: list[ManagedProcess], config: WorkerScalingConfig) -> None:
        """processes: the controller's records."""
        self._processes = processes
        self._config = config

    def forget(self) -> None:
        """A look is of a moment: nothing is kept."""

    def look(self, seconds: float) -> Usage | None:
        """None when a worker or a gateway does not answer."""
        workers = self._ask(RoleName.WORKER, "work")
        gateways = self._ask(RoleName.GATEWAY, "num_waiting")
        wait([*workers, *gateways], timeout=ANSWER_TIMEOUT_S)
        if any(not answer.done() or answer.exception() for answer in (*workers, *gateways)):
            return None
        work: list[WorkerWork] = [answer.result() for answer in workers]
        mean_usage = sum(one.usage_ratio for one in work) / len(work)
        num_waiting = sum(one.num_waiting for one in work) + sum(answer.result() for answer in gateways)
        queue = num_waiting / max(1, sum(one.num_running for one in work))
        ratios = {
            "usage": mean_usage / self._config.target_usage_ratio,
            "queue": queue / self._config.target_queue_ratio,
        }
        return Usage(len(work), ratios)

    def _ask(self, role: RoleName, method: str) -> list[Future[Any]]:
        return [process.handle.call(method) for process in self._processes if process.role is role]


def workers_by_load(
    processes: list[ManagedProcess],
    membership: WorkerMembership,
    config: WorkerScalingConfig,
    clock: Callable[[], float],
    room: MemoryRoom,
) -> Scaling:
    """The number of workers follows their load."""
    return Scaling(RoleName.WORKER, config, WorkerUsage(processes, config), membership.scale, clock, room)
