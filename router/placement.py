"""The placement a cluster starts with: every unit's shards, from the model's shape alone.

Pure; knows nothing of load (a rebalancer replaces the result later), addresses or processes.
"""

import math
from dataclasses import dataclass

import numpy as np

from router.expert_map import ExpertMap, Int64Array
from router.gate_config import GateConfig

DEFAULT_MAX_UNITS = 8  # per layer, for models without expert groups; DeepSeek-V2's number of groups


class PlacementError(ValueError):
    """No placement satisfies what was asked."""


class PlacementDoesNotFit(PlacementError):
    """A shard's units are larger than its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRequest:
    """What is to be placed, and on how many shards."""

    moe_layer_ids: tuple[int, ...]
    gate: GateConfig
    ep_size: int
    units_per_layer: int | None = None  # only without expert groups; unset: the largest divisor of the experts up to 8
    num_replicas: int = 1  # shards that hold each unit
    expert_bytes: int = 0  # of one expert's weights
    max_weight_bytes: int | None = None  # of each shard; unset: no limit

    def __post_init__(self) -> None:
        if not self.moe_layer_ids:
            raise PlacementError("moe_layer_ids is empty: the model has no routed experts to place")
        if self.units_per_layer is not None:
            if self.gate.is_group_limited and self.units_per_layer != self.gate.n_group:
                raise PlacementError(
                    f"units_per_layer is {self.units_per_layer}, but the gate is limited to expert groups, which are "
                    f"the units: leave it unset or say {self.gate.n_group}"
                )
            if not 1 <= self.units_per_layer <= self.gate.n_routed_experts:
                raise PlacementError(
                    f"units_per_layer is {self.units_per_layer}, must be 1 to the {self.gate.n_routed_experts} experts"
                )
        if not 1 <= self.num_replicas <= self.ep_size:
            raise PlacementError(
                f"num_replicas is {self.num_replicas}, must be 1 to ep_size ({self.ep_size}): a shard holds a unit once"
            )
        if self.ep_size > self.num_placed:
            raise PlacementError(
                f"ep_size is {self.ep_size}, but there are only {self.num_placed} units to place "
                f"({len(self.moe_layer_ids)} layers x {self.num_units} units x {self.num_replicas} replicas): "
                f"use at most {self.num_placed} shards, more replicas, or more units per layer"
            )

    @property
    def num_units(self) -> int:
        """Of each layer."""
        if self.units_per_layer is not None:
            return self.units_per_layer
        if self.gate.is_group_limited:
            return self.gate.n_group
        num_experts = self.gate.n_routed_experts
        return max(count for count in range(1, DEFAULT_MAX_UNITS + 1) if num_experts % count == 0)

    @property
    def num_placed(self) -> int:
        """Units of all layers, counting each replica."""
        return len(self.moe_layer_ids) * self.num_units * self.num_replicas


def place_units(request: PlacementRequest, placement_version: int = 1) -> ExpertMap:
    """The static placement: shards take units in turn, starting one further in every layer.

    Every shard gets the same number of units over all layers, give or take one; every layer is spread over as many
    shards as it can be; no two replicas of a unit are on one shard. Raises PlacementDoesNotFit.
    """
    expert_map = ExpertMap(
        placement_version=placement_version,
        ep_size=request.ep_size,
        moe_layer_ids=request.moe_layer_ids,
        expert_to_unit=_expert_to_unit(request),
        unit_to_ep_ranks=_unit_to_ep_ranks(request),
    )
    if request.max_weight_bytes is not None:
        _check_weight_bytes(expert_map, request.expert_bytes, request.max_weight_bytes)
    return expert_map


def _expert_to_unit(request: PlacementRequest) -> Int64Array:
    """Contiguous sets, equal in size give or take one: [num_moe_layers, n_routed_experts]."""
    units = np.arange(request.gate.n_routed_experts) * request.num_units // request.gate.n_routed_experts
    return np.tile(units, (len(request.moe_layer_ids), 1))


def _unit_to_ep_ranks(request: PlacementRequest) -> Int64Array:
    """[num_moe_layers, num_units, num_replicas].

    Within a layer consecutive (unit, replica) pairs go to consecutive shards. Each layer starts where the one before
    ended, which evens out the totals; each time the totals are even, it starts one further, so that unit 0 is not
    always on the same shards.
    """
    pairs_per_layer = request.num_units * request.num_replicas
    even_after = request.ep_size // math.gcd(pairs_per_layer, request.ep_size)  # layers
    layers = np.arange(len(request.moe_layer_ids)).reshape(-1, 1)
    first = layers * pairs_per_layer + layers // even_after  # [num_moe_layers, 1]
    ep_ranks = (first + np.arange(pairs_per_layer)) % request.ep_size  # [num_moe_layers, pairs_per_layer]
    return ep_ranks.reshape(-1, request.num_units, request.num_replicas)


def _check_weight_bytes(expert_map: ExpertMap, expert_bytes: int, max_weight_bytes: int) -> None:
    for ep_rank in range(expert_map.ep_size):
        needed = expert_bytes * sum(len(unit.expert_ids) for unit in expert_map.units_of(ep_rank))
        if needed > max_weight_bytes:
            raise PlacementDoesNotFit(
                f"shard {ep_rank} needs {needed / 2**30:.3f} GiB ({needed} bytes) of expert weights, its limit is "
                f"{max_weight_bytes / 2**30:.3f} GiB ({max_weight_bytes} bytes); use more than {expert_map.ep_size} "
                "shards, fewer replicas, a smaller dtype or a higher limit"
            )
