"""What a rebalance would do and how far one is: values, and the plan from one expert map to another.

Pure; knows nothing of processes.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from router.expert_map import ExpertMap, PlacementUnit
from router.placement.scores import balancedness, expected_step_time, shard_load

Float64Array = npt.NDArray[np.float64]


class UnitMove(NamedTuple):
    """A unit that a shard must read."""

    ep_rank: int
    layer_id: int
    unit_id: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancePlan:
    """From the placement in use to a better one.

    balancedness_before, _after: mean over maximum of the shards' load, all layers together; 1 is perfect.
    step_time_ratio: expected time of the experts' part of a step, after over before.
    num_tokens: assignments that the load was counted from; the newest count most.
    shard_load: of `old`'s shards, by ep_rank, in such assignments.
    is_worth_it: whether it would be done without being asked; `reason` says why in words.
    """

    old: ExpertMap
    new: ExpertMap
    moves: tuple[UnitMove, ...]
    balancedness_before: float
    balancedness_after: float
    step_time_ratio: float
    num_tokens: int
    shard_load: tuple[float, ...]
    is_worth_it: bool
    reason: str

    @property
    def changes_anything(self) -> bool:
        """Units move, or shards are rid of some."""
        return bool(self.moves) or not np.array_equal(self.old.unit_to_ep_ranks, self.new.unit_to_ep_ranks)

    @property
    def moved_bytes(self) -> int:
        return sum(move.num_bytes for move in self.moves)


class RebalanceState(StrEnum):
    """Where a rebalance stands."""

    IDLE = "idle"
    STAGING = "staging"  # shards read the units that they lack; the old version is served
    ACTIVATING = "activating"  # shards begin to serve the new version beside the old one
    PUBLISHING = "publishing"  # workers are told
    DRAINING = "draining"  # forwards under the old version come to their end
    RELEASING = "releasing"  # shards drop what only the old version needed


class RebalanceCause(StrEnum):
    """Why a rebalance was begun."""

    BY_HAND = "by_hand"  # an operator asked
    GAIN = "gain"  # it is expected to save enough of the experts' time
    ADDED = "added"  # a shard is given units: a new one, or one that is back
    DRAINED = "drained"  # a shard is to end
    LOST = "lost"  # the others take over a shard's units


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceStatus:
    """The rebalance under way, and those before it.

    last_result: how the latest that ended did, in words; it stays while the next one is under way.
    reason: why it was begun, in words; of the latest when idle.
    seconds_since_success: None before the first.
    """

    state: RebalanceState = RebalanceState.IDLE
    target_version: int | None = None
    moved_bytes: int = 0
    planned_bytes: int = 0
    num_done: int = 0
    num_aborted: int = 0
    last_result: str = ""
    reason: str = ""
    seconds_since_success: float | None = None


class Hysteresis(NamedTuple):
    """When a rebalance pays."""

    min_gain: float  # of the expected expert time of a step
    min_tokens: int  # assignments, for the load to mean anything


def plan_rebalance(
    old: ExpertMap,
    new: ExpertMap,
    load: Float64Array,
    expert_bytes: int,
    hysteresis: Hysteresis,
    speeds: Mapping[int, float] | None = None,
) -> RebalancePlan:
    """load: [num_moe_layers, n_routed_experts] assignments. speeds: of shards relative to each other; others have 1."""
    moves = unit_moves(old, new, expert_bytes)
    num_in_flight = max(len(old.ep_ranks), len(new.ep_ranks))
    before, after = (expected_step_time(m, load, _speeds(m, speeds), num_in_flight) for m in (old, new))
    ratio = after / before if before else 1.0
    num_tokens = int(load.sum())
    is_worth_it, reason = _judge(moves, ratio, num_tokens, hysteresis)
    return RebalancePlan(
        old=old,
        new=new,
        moves=moves,
        balancedness_before=balancedness(old, load, _speeds(old, speeds)),
        balancedness_after=balancedness(new, load, _speeds(new, speeds)),
        step_time_ratio=ratio,
        num_tokens=num_tokens,
        shard_load=tuple(shard_load(old, load).sum(axis=0).tolist()),
        is_worth_it=is_worth_it,
        reason=reason,
    )


def _speeds(expert_map: ExpertMap, speeds: Mapping[int, float] | None) -> list[float] | None:
    """By ep_rank; a shard that holds nothing is of mean speed, so that it changes nothing."""
    if not speeds:
        return None
    known = {rank: speeds.get(rank, 1.0) for rank in expert_map.ep_ranks}
    mean = sum(known.values()) / len(known)
    return [known.get(rank, mean) for rank in range(expert_map.ep_size)]


def unit_moves(old: ExpertMap, new: ExpertMap, expert_bytes: int) -> tuple[UnitMove, ...]:
    """What each shard has in `new` and not in `old`, by ep_rank, layer and unit; a unit of other experts is another."""
    moves = []
    for ep_rank in new.ep_ranks:
        held = set(old.units_of(ep_rank)) if ep_rank < old.ep_size else set()
        for unit in new.units_of(ep_rank):
            if unit not in held:
                moves.append(UnitMove(ep_rank, unit.layer_id, unit.unit_id, expert_bytes * len(unit.expert_ids)))
    return tuple(moves)


def weight_bytes_while_moving(plan: RebalancePlan, expert_bytes: int) -> dict[int, int]:
    """What each shard of the new placement holds while it serves both, by ep_rank."""
    maps = (plan.old, plan.new)
    return {
        rank: expert_bytes
        * len({(unit.layer_id, expert_id) for m in maps for unit in m.units_of(rank) for expert_id in unit.expert_ids})
        for rank in plan.new.ep_ranks
    }


class StagePart(NamedTuple):
    """What a shard reads in one call."""

    units: tuple[PlacementUnit, ...]
    num_bytes: int


def parts_to_stage(plan: RebalancePlan, max_bytes: int) -> dict[int, list[StagePart]]:
    """What each shard lacks, by ep_rank, in parts of at most `max_bytes` or one unit."""
    parts: dict[int, list[StagePart]] = defaultdict(list)
    for ep_rank in {move.ep_rank for move in plan.moves}:
        units = {(unit.layer_id, unit.unit_id): unit for unit in plan.new.units_of(ep_rank)}
        for move in plan.moves:
            if move.ep_rank != ep_rank:
                continue
            unit = units[move.layer_id, move.unit_id]
            mine = parts[ep_rank]
            if mine and mine[-1].num_bytes + move.num_bytes <= max_bytes:
                mine[-1] = StagePart((*mine[-1].units, unit), mine[-1].num_bytes + move.num_bytes)
            else:
                mine.append(StagePart((unit,), move.num_bytes))
    return dict(parts)


def _judge(moves: tuple[UnitMove, ...], ratio: float, num_tokens: int, hysteresis: Hysteresis) -> tuple[bool, str]:
    if not num_tokens:
        return False, "no load was counted yet"
    if not moves:
        return False, "the placement is already the one that the load asks for"
    if num_tokens < hysteresis.min_tokens:
        return False, (
            f"the load was counted from {num_tokens} assignments of late, at least {hysteresis.min_tokens} are needed"
        )
    gain = 1 - ratio
    if gain < hysteresis.min_gain:
        return False, f"expected to save {gain:.1%} of the experts' time, min_gain is {hysteresis.min_gain:.1%}"
    return True, f"expected to save {gain:.1%} of the experts' time"
