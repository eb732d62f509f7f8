"""Which attention workers there are: they are added and drained while requests run. Belongs to the controller's thread.

A worker that is added starts, loads, is told where the experts are, and then gateways give it requests; until that
nobody waits for it. One that is drained leaves by departures.py. Others keep their dp_rank; the next worker takes a
number that is free. Knows nothing of load or Ray.
"""

import logging
from collections.abc import Callable

from cluster.controller.departures import Departures
from cluster.controller.membership import MemberChange, free_ranks
from cluster.controller.process import ManagedProcess, ProcessState, RoleName
from cluster.process_names import listed
from protos.errors import InvalidRequest, MobulaError, NotServing

logger = logging.getLogger(__name__)

MAX_ADDED = 16  # workers at a time: each is a process with weights of its own, and a slip of the finger is cheap so
JOIN_TIMEOUT_S = 600.0  # for a worker to begin to load; a cluster may have to get a node and its image first


class WorkerMembership:
    """Adds to the controller's records."""

    def __init__(
        self,
        processes: list[ManagedProcess],
        create: Callable[[int], ManagedProcess],
        departures: Departures,
        clock: Callable[[], float],
        room: Callable[[int], None],
    ) -> None:
        """create: starts the worker of a rank, without waiting; raises MobulaError when it cannot now.

        room: raises MobulaError where so many workers have none.
        """
        self._processes = processes
        self._create = create
        self._departures = departures
        self._clock = clock
        self._room = room

    @property
    def workers(self) -> list[ManagedProcess]:
        """All records, by rank."""
        return [process for process in self._processes if process.role is RoleName.WORKER]

    @property
    def is_changing(self) -> bool:
        """Whether a worker comes, leaves or is replaced."""
        return any(worker.is_ending or not worker.is_connected for worker in self.workers)

    @property
    def is_missing_one(self) -> bool:
        """Whether one that had joined leaves, is replaced or is away."""
        return any(worker.is_ending or not (worker.is_connected or worker.is_joining) for worker in self.workers)

    def scale(self, count: int) -> MemberChange:
        """From now on `count` workers: new ones take the lowest free ranks, the highest ranks leave.

        Raises InvalidRequest, NotServing, or what `create` raises; then nothing has changed but what was created.
        """
        if count < 1:
            raise InvalidRequest(f"count is {count}, at least 1 worker must compute requests", field="count")
        staying = [worker for worker in self.workers if not worker.is_leaving]
        if count < len(staying):
            return self._drain(staying[:count], staying[count:])
        num_added = count - len(staying)
        if num_added:
            self._room(count)
        if num_added > MAX_ADDED:
            raise InvalidRequest(
                f"count is {count}, {len(staying)} workers are there and at most {MAX_ADDED} are added at a time; "
                f"ask for at most {len(staying) + MAX_ADDED}, and again when they serve",
                field="count",
            )
        added = free_ranks(self.workers, num_added)
        for rank in added:
            worker = self._create(rank)
            worker.is_joining = True
            self._processes.insert(self._place_of(rank), worker)
            logger.info("worker-%d is added", rank)
        return MemberChange(added=tuple(added))

    def note_arrivals(self) -> None:
        """A worker that gives answers has joined: from then on it is missed when it is away.

        One that does not begin to load in time is drained: while it is awaited, load does not change their number.
        """
        for worker in [worker for worker in self.workers if worker.is_joining]:
            worker.is_joining = not worker.is_connected
            if worker.join_by_s is None or worker.health.state is ProcessState.LOADING:
                worker.join_by_s = self._clock() + JOIN_TIMEOUT_S
            elif worker.is_joining and not worker.is_leaving and self._clock() >= worker.join_by_s:
                self._give_up(worker)

    def _give_up(self, worker: ManagedProcess) -> None:
        try:
            self._departures.drain_worker(worker.rank)
        except MobulaError as error:
            logger.warning("%s has not started, and is awaited on: %s", worker.name, error)
            worker.join_by_s = self._clock() + JOIN_TIMEOUT_S
        else:
            logger.warning(
                "%s has not started in %.0f s, and is drained; add nodes, or lower num_cpus or num_gpus of "
                "attention_workers",
                worker.name,
                JOIN_TIMEOUT_S,
            )

    def _drain(self, staying: list[ManagedProcess], leaving: list[ManagedProcess]) -> MemberChange:
        if not any(worker.is_ready and not worker.is_replaced for worker in staying):
            names = listed("worker", [worker.rank for worker in staying])
            raise NotServing(f"no worker that would stay is ready ({names}); ask again when one is", retry_after_s=5.0)
        for worker in leaving:
            self._departures.drain_worker(worker.rank)
        return MemberChange(drained=tuple(worker.rank for worker in leaving))

    def _place_of(self, rank: int) -> int:
        """Where its record belongs: after the shards and the workers of lower ranks."""
        shards = [process for process in self._processes if process.role is RoleName.SHARD]
        return len(shards) + sum(worker.rank < rank for worker in self.workers)
