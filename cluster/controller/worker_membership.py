"""Which attention workers there are: they are added and drained while requests run. Belongs to the controller's thread.

A worker that is added starts, loads, is told where the experts are, and then gateways give it requests; until that
nobody waits for it. One that is drained leaves by departures.py. Others keep their dp_rank; the next worker takes a
number that is free. Knows nothing of load or Ray.
"""

import logging
from collections.abc import Callable

from cluster.controller.departures import Departures
from cluster.controller.membership import MemberChange
from cluster.controller.process import ManagedProcess, RoleName
from protos.errors import InvalidRequest, NotServing

logger = logging.getLogger(__name__)

MAX_ADDED = 16  # workers at a time: each is a process with weights of its own, and a slip of the finger is cheap so


class WorkerMembership:
    """Adds to the controller's records."""

    def __init__(
        self, processes: list[ManagedProcess], create: Callable[[int], ManagedProcess], departures: Departures
    ) -> None:
        """create: starts the worker of a rank, without waiting; raises MobulaError when it cannot now."""
        self._processes = processes
        self._create = create
        self._departures = departures

    @property
    def workers(self) -> list[ManagedProcess]:
        """All records, by rank."""
        return [process for process in self._processes if process.role is RoleName.WORKER]

    @property
    def is_changing(self) -> bool:
        """Whether a worker comes, leaves or is replaced."""
        return any(worker.is_ending or not worker.is_connected for worker in self.workers)

    def scale(self, count: int) -> MemberChange:
        """From now on `count` workers: new ones take the lowest free ranks, the highest ranks leave.

        Raises InvalidRequest, NotServing, or what `create` raises; then nothing has changed but what was created.
        """
        if count < 1:
            raise InvalidRequest(f"count is {count}, at least 1 worker must compute requests", field="count")
        staying = [worker for worker in self.workers if not worker.is_leaving]
        if count < len(staying):
            return self._drain(staying[:count], staying[count:])
        taken = {worker.rank for worker in self.workers}
        free = [rank for rank in range(count + len(taken)) if rank not in taken]
        added = free[: count - len(staying)]
        if len(added) > MAX_ADDED:
            raise InvalidRequest(
                f"count is {count}, {len(staying)} workers are there and at most {MAX_ADDED} are added at a time; "
                f"ask for at most {len(staying) + MAX_ADDED}, and again when they serve",
                field="count",
            )
        for rank in added:
            worker = self._create(rank)
            worker.is_joining = True
            self._processes.insert(self._place_of(rank), worker)
            logger.info("worker-%d is added", rank)
        return MemberChange(added=tuple(added))

    def note_arrivals(self) -> None:
        """A worker that gives answers has joined: from then on it is missed when it is away."""
        for worker in self.workers:
            worker.is_joining = worker.is_joining and not worker.is_connected

    def _drain(self, staying: list[ManagedProcess], leaving: list[ManagedProcess]) -> MemberChange:
        if not any(worker.is_ready and not worker.is_replaced for worker in staying):
            ranks = [worker.rank for worker in staying]
            raise NotServing(
                f"none of the workers {ranks} that would stay is ready; ask again when one is", retry_after_s=5.0
            )
        for worker in leaving:
            self._departures.drain_worker(worker.rank)
        return MemberChange(drained=tuple(worker.rank for worker in leaving))

    def _place_of(self, rank: int) -> int:
        """Where its record belongs: after the shards and the workers of lower ranks."""
        shards = [process for process in self._processes if process.role is RoleName.SHARD]
        return len(shards) + sum(worker.rank < rank for worker in self.workers)
