"""Which shards there are: shards are added and drained while requests run. Belongs to the controller's thread.

A shard that is added starts, loads the placement in use, in which it has nothing, and is given units by a rebalance.
One that is drained gives its units to the others by a rebalance, and ends. Other shards keep their ep_rank; the next
shard takes a number that is free. Knows nothing of load, policies or Ray.
"""

import itertools
import logging
from collections.abc import Callable, Collection
from typing import NamedTuple

from cluster.config import MAX_COUNT
from cluster.controller.process import ManagedProcess, ProcessState, RoleName
from cluster.controller.rebalance import RebalanceCause
from cluster.process_names import listed
from protos.errors import InvalidRequest
from router.expert_map import ExpertMap

logger = logging.getLogger(__name__)

COMING = (ProcessState.NEW, ProcessState.LOADING)


class MemberChange(NamedTuple):
    """What was asked for, by rank within the role."""

    added: tuple[int, ...] = ()
    drained: tuple[int, ...] = ()


def free_ranks(members: Collection[ManagedProcess], num_added: int) -> list[int]:
    """So many, the lowest that none of a role's processes has."""
    taken = {member.rank for member in members}
    return list(itertools.islice((rank for rank in itertools.count() if rank not in taken), max(0, num_added)))


class ShardMembership:
    """Adds to and removes from the controller's records."""

    def __init__(
        self,
        processes: list[ManagedProcess],
        placed_on: Collection[int],
        create: Callable[[int], ManagedProcess],
        check: Callable[[Collection[int]], None],
        room: Callable[[int], None],
    ) -> None:
        """placed_on: the shards of the placement in use.

        create: starts the shard of a rank, without waiting; raises MobulaError when it cannot now.
        check: raises MobulaError where no placement on those ranks satisfies the configuration. room: where so many
            shards have none.
        """
        self._processes = processes
        self._placed_on = frozenset(placed_on)
        self._create = create
        self._check = check
        self._room = room

    @property
    def shards(self) -> list[ManagedProcess]:
        """All records, by rank."""
        return [process for process in self._processes if process.role is RoleName.SHARD]

    @property
    def staying(self) -> list[ManagedProcess]:
        """Those that are not to leave."""
        return [shard for shard in self.shards if not shard.is_leaving]

    def scale(self, count: int) -> MemberChange:
        """From now on `count` shards: new ones take the lowest free ranks, the highest ranks leave.

        Raises InvalidRequest, or what `check` and `create` raise; then nothing has changed but what was created.
        """
        if count < 1:
            raise InvalidRequest(f"count is {count}, at least 1 shard must hold the experts", field="count")
        if count > MAX_COUNT:
            raise InvalidRequest(f"count is {count}, limit is {MAX_COUNT} shards", field="count")
        staying = [shard.rank for shard in self.staying]
        if count < len(staying):
            drained = staying[count:]
            self._check(staying[:count])
            self._leave(drained)
            return MemberChange(drained=tuple(drained))
        added = free_ranks(self.shards, count - len(staying))
        if not added:
            return MemberChange()
        self._check([*staying, *added])
        self._room(count)
        for rank in added:
            self._processes.insert(self._place_of(rank), self._create(rank))
            logger.info("shard-%d is added", rank)
        return MemberChange(added=tuple(added))

    def drain(self, rank: int) -> MemberChange:
        """That shard gives up its units and ends. Asking again changes nothing. Raises InvalidRequest, as `scale`."""
        shard = next((shard for shard in self.shards if shard.rank == rank), None)
        if shard is None:
            ranks = [shard.rank for shard in self.shards]
            raise InvalidRequest(f"there is no shard {rank}, only {ranks}", field="rank")
        if not shard.is_leaving:
            others = [other.rank for other in self.staying if other is not shard]
            if not others:
                raise InvalidRequest(
                    f"shard {rank} is the last one that stays, and no other could take its units; "
                    "add shards first: mobula scale shards COUNT",
                    field="rank",
                )
            self._check(others)
            self._leave([rank])
        return MemberChange(drained=(rank,))

    def replace(self, rank: int) -> MemberChange:
        """That shard gives up its units and ends, and another one is added. Raises as `drain` and `scale`.

        Then it keeps its units: a shard that could not be added now would be missed by nobody later.
        """
        staying = [shard.rank for shard in self.staying]
        if rank not in staying:
            return self.drain(rank)
        self._check([other for other in staying if other != rank])
        added = self.scale(len(staying) + 1).added
        return MemberChange(added=added, drained=self.drain(rank).drained)

    def members(self) -> frozenset[int]:
        """The shards that the next placement uses: all that stay and are not lost, new ones once they are ready."""
        return frozenset(
            shard.rank
            for shard in self.staying
            if shard.is_ready or (shard.rank in self._placed_on and not shard.is_lost)
        )

    def note_absences(self, now_s: float, lost_after_s: float | None) -> None:
        """A shard that was ready and has been gone for `lost_after_s` is lost until it is ready again.

        One that loads is not gone: what it reads the others would have to read as well. One that a controller before
        this one lost is gone since this one started.
        """
        is_adopted = any(shard.is_ready and shard.loading is None for shard in self.shards)
        for shard in self.shards:
            if is_adopted and shard.ready_at_s is None and shard.rank in self._placed_on:
                shard.ready_at_s = now_s
            if shard.is_ready:
                shard.ready_at_s, shard.is_lost = now_s, False
            elif shard.ready_at_s is None or lost_after_s is None or shard.is_lost or shard.health.state in COMING:
                continue
            elif now_s - shard.ready_at_s > lost_after_s:
                shard.is_lost = True
                logger.warning("%s is gone for %.0f s: the others take over its units", shard.name, lost_after_s)

    def are_placed_on(self, members: Collection[int]) -> None:
        """The placement in use was computed for these shards."""
        self._placed_on = frozenset(members)

    @property
    def is_changing(self) -> bool:
        """Whether a shard comes or leaves."""
        return self.is_due() or any(shard.is_leaving or not shard.is_ready for shard in self.shards)

    def is_due(self) -> bool:
        """Whether units must move because shards came or are to leave, and no further one is about to be ready."""
        is_coming = any(s.health.state in COMING for s in self.staying if s.rank not in self._placed_on)
        return not is_coming and self.members() != self._placed_on

    def change(self) -> tuple[RebalanceCause, str]:
        """Which shards came, leave and are lost since the placement in use was made: the worst of it, and in words."""
        came = sorted(self.members() - self._placed_on)
        lost = [shard.rank for shard in self.staying if shard.is_lost and shard.rank in self._placed_on]
        leave = sorted(self._placed_on - self.members() - set(lost))
        changes = (("came", "came", came), ("leaves", "leave", leave), ("is lost", "are lost", lost))
        cause = RebalanceCause.LOST if lost else RebalanceCause.DRAINED if leave else RebalanceCause.ADDED
        words = (
            f"{listed('shard', ranks)} {one if len(ranks) == 1 else many}" for one, many, ranks in changes if ranks
        )
        return cause, ", ".join(words)

    def remove_drained(self, expert_map: ExpertMap, drain_timeout_s: float, now_s: float) -> None:
        """Ends the shards that leave and hold nothing; call it while no rebalance is under way."""
        for shard in [shard for shard in self.shards if shard.is_leaving]:
            if shard.rank in expert_map.ep_ranks:
                continue
            if shard.has_stopped(drain_timeout_s, now_s):
                shard.handle.kill()
                self._processes.remove(shard)
                logger.info("%s has left", shard.name)

    def _leave(self, ranks: Collection[int]) -> None:
        for shard in self.shards:
            if shard.rank in ranks:
                shard.leave()
                logger.info("%s is drained", shard.name)

    def _place_of(self, rank: int) -> int:
        """Where its record belongs: shards come first, by rank."""
        return sum(shard.rank < rank for shard in self.shards)
