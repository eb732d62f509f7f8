"""How many workers and shards one machine's memory takes. On a cluster, Ray and Kubernetes know which node has room."""

from collections.abc import Sequence
from typing import NamedTuple

from cluster.byte_count import format_bytes
from cluster.controller.process import ManagedProcess, RoleName
from protos.errors import InvalidRequest


def other_role(role: RoleName) -> RoleName:
    """Of workers and shards."""
    return RoleName.SHARD if role is RoleName.WORKER else RoleName.WORKER


class MemoryBudget(NamedTuple):
    """As the machine was before Mobula started: later, memory is free that running workers' caches will yet take.

    num_bytes: for workers, and for shards beside the experts' weights, which any number of them shares out.
    """

    num_bytes: int
    worker_bytes: int  # of one: its weights, its latent cache when it is full, its libraries
    shard_bytes: int  # of one: its libraries

    def max_count(self, role: RoleName, num_others: int) -> int:
        """Processes of a role, worker or shard, beside so many of the other one."""
        own, other = self._sizes(role)
        return max(1, (self.num_bytes - num_others * other) // own)

    def check(self, role: RoleName, count: int, num_others: int) -> None:
        """Raises InvalidRequest for more than that."""
        most = self.max_count(role, num_others)
        if count > most:
            own, others = self._sizes(role)[0], f"{num_others} {other_role(role)}s"
            raise InvalidRequest(
                f"count is {count}: when Mobula started, this machine had memory for {most} {role}s of about "
                f"{format_bytes(own)} beside {others}; ask for at most {most}, or serve with a smaller latent cache "
                "(attention_workers.engine) or on a Ray cluster",
                field="count",
            )

    def _sizes(self, role: RoleName) -> tuple[int, int]:
        """Of one process of this role, and of one of the other."""
        sizes = self.worker_bytes, self.shard_bytes
        return sizes if role is RoleName.WORKER else sizes[::-1]


class MemoryRoom:
    """For more processes beside those of the other role that stay."""

    def __init__(self, budget: MemoryBudget | None, processes: Sequence[ManagedProcess]) -> None:
        """budget: None where others decide. processes: the controller's records."""
        self._budget = budget
        self._processes = processes

    def check(self, role: RoleName, count: int) -> None:
        """Raises InvalidRequest where so many have none."""
        if self._budget:
            self._budget.check(role, count, self._num_others(role))

    def at_most(self, role: RoleName, count: int) -> int:
        """`count`, or how many there is room for."""
        return min(count, self._budget.max_count(role, self._num_others(role))) if self._budget else count

    def _num_others(self, role: RoleName) -> int:
        other = other_role(role)
        return sum(process.role is other and not process.is_leaving for process in self._processes)
