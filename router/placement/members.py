"""Placement on the shards that there are: they differ, come and go, and keep their numbers.

Policies number shards from 0 without gaps; here is how a system whose shard 1 has left asks them. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from router.expert_map import ExpertMap
from router.placement import place_units
from router.placement.request import PlacementRequest

UNLIMITED_BYTES = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTraits:
    """What is known of a shard.

    max_weight_bytes: None without a limit. speed: relative to the others; None where it is not known: as 1.
    domain: its failure domain, "" where it is not known.
    """

    max_weight_bytes: int | None = None
    speed: float | None = None
    domain: str = ""


def place_on(
    request: PlacementRequest, shards: Mapping[int, ShardTraits], placement_version: int, policy: str
) -> ExpertMap:
    """The policy's placement on `shards`, by ep_rank; every other shard holds nothing, whatever it holds now.

    request: what it says of shards and their number is replaced. Raises PlacementError, PlacementDoesNotFit.
    """
    ep_ranks = sorted(shards)
    traits = [shards[ep_rank] for ep_rank in ep_ranks]
    limits = [UNLIMITED_BYTES if known.max_weight_bytes is None else known.max_weight_bytes for known in traits]
    placed = place_units(
        replace(
            request,
            ep_size=len(ep_ranks),
            max_weight_bytes=None if min(limits) == UNLIMITED_BYTES else tuple(limits),
            shard_speeds=tuple(1.0 if known.speed is None else known.speed for known in traits),
            shard_domains=tuple(known.domain for known in traits),
            current=None if request.current is None else _renumbered(request.current, _without_gaps(request, ep_ranks)),
        ),
        placement_version,
        policy,
    )
    return _renumbered(placed, ep_ranks)


def _without_gaps(request: PlacementRequest, ep_ranks: Sequence[int]) -> list[int]:
    """The number of each rank of the current map: members from 0, those that leave after them."""
    assert request.current is not None
    leaving = [ep_rank for ep_rank in range(request.current.ep_size) if ep_rank not in ep_ranks]
    numbers = {ep_rank: number for number, ep_rank in enumerate([*ep_ranks, *leaving])}
    return [numbers[ep_rank] for ep_rank in range(request.current.ep_size)]


def _renumbered(expert_map: ExpertMap, numbers: Sequence[int]) -> ExpertMap:
    """The same map with shard i called numbers[i]."""
    names = np.asarray([*numbers, -1], dtype=np.int64)  # -1 stays -1
    return replace(
        expert_map,
        ep_size=max(numbers) + 1,
        expert_to_unit=expert_map.expert_to_unit.copy(),
        unit_to_ep_ranks=names[expert_map.unit_to_ep_ranks],
    )
