"""Compares what the replicas of an expert make of the fixed row, and has those read their units again that differ.

A shard that read a unit wrongly is sure of itself, for it knows no other answer; another shard that has the unit tells.
Where most agree the others read again, else all of them. Belongs to the controller's thread.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from cluster.controller.process import ManagedProcess

logger = logging.getLogger(__name__)

INTERVAL_S = 60.0  # between two comparisons
MAX_DIFFERENT_SHARE = 0.5  # of the experts that shards have in common; beyond, their processors compute other bits

ExpertKey = tuple[int, int]  # layer_id, expert_id
Answers = Mapping[ExpertKey, int]


class Difference(NamedTuple):
    """Experts whose answers on a shard are not those of its peers."""

    ep_rank: int
    experts: tuple[ExpertKey, ...]


def differences(answers: Mapping[int, Answers]) -> list[Difference]:
    """Who must read which experts again. answers: by ep_rank."""
    by_expert: dict[ExpertKey, dict[int, int]] = defaultdict(dict)
    for ep_rank, mine in answers.items():
        for key, answer in mine.items():
            by_expert[key][ep_rank] = answer
    shared = {key: found for key, found in by_expert.items() if len(found) > 1}
    differing = {key: found for key, found in shared.items() if len(set(found.values())) > 1}
    if len(differing) > MAX_DIFFERENT_SHARE * len(shared):
        logger.warning(
            "%d of %d experts have replicas that compute other bits: shards on different processors do; not compared",
            len(differing),
            len(shared),
        )
        return []
    suspects: dict[int, list[ExpertKey]] = defaultdict(list)
    for key, found in sorted(differing.items()):
        (answer, count), *_ = Counter(found.values()).most_common(1)
        is_majority = 2 * count > len(found)
        for ep_rank, given in found.items():
            if not is_majority or given != answer:
                suspects[ep_rank].append(key)
    return [Difference(ep_rank, tuple(keys)) for ep_rank, keys in sorted(suspects.items())]


class ReplicaCheck:
    """Of all shards of a system."""

    def __init__(self, shards: Callable[[], Sequence[ManagedProcess]], clock: Callable[[], float]) -> None:
        """shards: the controller's records."""
        self._shards = shards
        self._clock = clock
        self._looked_s = clock()
        self._asked: dict[int, Future[Any]] = {}  # by ep_rank
        self._told: set[tuple[str, ExpertKey]] = set()  # by generation: to read again, once

    def round(self) -> None:
        """One round; compares when all have answered."""
        if not self._asked and self._clock() - self._looked_s >= INTERVAL_S:
            self._looked_s = self._clock()
            self._asked = {shard.rank: shard.handle.call("known_answers") for shard in self._shards() if shard.is_ready}
        if not self._asked or not all(call.done() for call in self._asked.values()):
            return
        answers = {ep_rank: call.result() for ep_rank, call in self._asked.items() if call.exception() is None}
        self._asked = {}
        shards = {shard.rank: shard for shard in self._shards() if shard.is_ready}
        for ep_rank, experts in differences(answers):
            if ep_rank in shards:
                self._read_again(shards[ep_rank], experts)

    def _read_again(self, shard: ManagedProcess, experts: tuple[ExpertKey, ...]) -> None:
        new = [key for key in experts if (shard.health.generation, key) not in self._told]
        if not new:
            return  # it has; others must be wrong, or it cannot be helped
        self._told.update((shard.health.generation, key) for key in new)
        logger.warning(
            "%s answers unlike its peers for experts (layer, expert) %s: it reads them again", shard.name, new
        )
        shard.handle.call("read_again", new)
