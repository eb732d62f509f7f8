"""Workers that leave for good, and processes of any role that are replaced, without a request noticing. Belongs to the
controller's thread. Knows nothing of experts: a shard that leaves for good is membership.py's.

1. It is marked, and gateways are told of the workers without it, so that it gets no new requests.
2. It is told to stop: what it computes may end for `drain_timeout_s`; then gateways go on with the rest elsewhere
   (cluster/gateway/generation.py), and forwards of a shard wait for the next one.
3. It is killed, also if it does not stop in that time; the one that is to be replaced is started again, and loads as
   after a crash.
"""

import logging
from collections.abc import Callable

from cluster.controller.process import ManagedProcess, RoleName
from protos.errors import InvalidRequest, NotServing

logger = logging.getLogger(__name__)


class Departures:
    """Changes the controller's records."""

    def __init__(self, processes: list[ManagedProcess], drain_timeout_s: float, clock: Callable[[], float]) -> None:
        """drain_timeout_s: for requests that a process is computing."""
        self._clock = clock
        self._processes = processes
        self._drain_timeout_s = drain_timeout_s

    def drain_worker(self, dp_rank: int) -> None:
        """It ends and does not come back. Asking again changes nothing. Raises InvalidRequest, NotServing."""
        worker = self._find(RoleName.WORKER, dp_rank)
        others = [p for p in self._processes if p.role is RoleName.WORKER and p is not worker and not p.is_leaving]
        if not others:
            raise InvalidRequest(f"worker {dp_rank} is the last one; nothing could go on with its requests")
        if not any(other.is_ready and not other.is_replaced for other in others):
            raise NotServing(
                f"no other worker is ready to go on with the requests of worker {dp_rank}; ask again when one is",
                retry_after_s=5.0,
            )
        worker.leave()

    def restart(self, role: RoleName, rank: int, *, is_serving: bool) -> None:
        """It ends, and another generation takes its place. Raises InvalidRequest, and NotServing: one at a time."""
        process = self._find(role, rank)
        if process.is_leaving:
            raise InvalidRequest(f"{process.name} is leaving; nothing takes its place", field="rank")
        if process.is_replaced:
            return
        waited_for = [other for other in self._processes if not other.is_joining]
        if not is_serving or any(other.is_replaced or not other.is_ready for other in waited_for):
            raise NotServing(
                f"not every process is ready, so {process.name} stays; ask again when the system serves",
                retry_after_s=5.0,
            )
        process.is_replaced = True

    def round(self) -> None:
        """Moves every departure on as far as it gets without waiting. Called when gateways have been told."""
        for process in [p for p in self._processes if p.is_replaced or _leaves(p)]:
            if process.is_next_awaited:
                if process.health.generation not in ("", process.replaced_generation):
                    process.is_replaced = process.is_next_awaited = False
            elif process.has_stopped(self._drain_timeout_s, self._clock()):
                self._end(process)

    def _end(self, process: ManagedProcess) -> None:
        process.stopping = None
        if process.is_replaced:
            process.is_next_awaited = True
            process.replaced_generation = process.health.generation
            process.handle.restart()
        else:
            process.handle.kill()
            self._processes.remove(process)
        logger.info("%s has ended", process.name)

    def _find(self, role: RoleName, rank: int) -> ManagedProcess:
        ranks = {process.rank: process for process in self._processes if process.role is role}
        if rank not in ranks:
            raise InvalidRequest(f"there is no {role} {rank}, only {sorted(ranks)}", field="rank")
        return ranks[rank]


def _leaves(process: ManagedProcess) -> bool:
    return process.is_leaving and process.role is RoleName.WORKER
