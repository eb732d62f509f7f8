"""What is to be placed, on how many shards, under which limits; and the form of the answer.

Knows no policy. Loads, addresses and processes are other parts' business: a request is a value.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.expert_map import ExpertMap, Int64Array
from router.gate_config import GateConfig

Float64Array = npt.NDArray[np.float64]

DEFAULT_MAX_UNITS = 8  # per layer, for models without expert groups; DeepSeek-V2's number of groups


class PlacementError(ValueError):
    """No placement satisfies what was asked."""


class PlacementDoesNotFit(PlacementError):
    """A shard's units are larger than its limit."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """A policy's answer: the two arrays of an ExpertMap.

    expert_to_unit: [num_moe_layers, n_routed_experts] int64.
    unit_to_ep_ranks: [num_moe_layers, num_units, max_replicas] int64, -1 pads at the end.
    """

    expert_to_unit: Int64Array
    unit_to_ep_ranks: Int64Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementRequest:
    """What is to be placed, and on how many shards. Values by shard stand in order of ep_rank."""

    moe_layer_ids: tuple[int, ...]
    gate: GateConfig
    ep_size: int
    units_per_layer: int | None = None  # only without expert groups; unset: the largest divisor of the experts up to 8
    num_replicas: int = 1  # the least number of shards that hold each unit
    redundancy: float = 0.0  # replicas beyond num_replicas, over all shards, as a share of the units
    expert_bytes: int = 0  # of one expert's weights
    max_weight_bytes: int | tuple[int, ...] | None = None  # of each shard; unset: no limit
    shard_speeds: tuple[float, ...] | None = None  # relative to each other; unset: all alike
    shard_domains: tuple[str, ...] | None = None  # failure domain (node or zone) of each shard; unset: not known
    load: Float64Array | None = None  # [num_moe_layers, n_routed_experts] assignments; unset: even
    coactivation: Float64Array | None = None  # [num_moe_layers, n_routed_experts, n_routed_experts] tokens with both
    current: ExpertMap | None = None  # what shards hold now: moves are counted from here

    def __post_init__(self) -> None:
        if not self.moe_layer_ids:
            raise PlacementError("moe_layer_ids is empty: the model has no routed experts to place")
        self._check_units()
        if not 1 <= self.num_replicas <= self.ep_size:
            raise PlacementError(
                f"num_replicas is {self.num_replicas}, must be 1 to ep_size ({self.ep_size}): a shard holds a unit once"
            )
        if not 0 <= self.redundancy < np.inf:
            raise PlacementError(f"redundancy is {self.redundancy}, must be 0 or more: a share of the units")
        self._check_shards()
        self._check_statistics()
        self._check_current()

    def _check_units(self) -> None:
        if self.units_per_layer is None:
            return
        if self.gate.is_group_limited and self.units_per_layer != self.gate.n_group:
            raise PlacementError(
                f"units_per_layer is {self.units_per_layer}, but the gate is limited to expert groups, which are "
                f"the units: leave it unset or say {self.gate.n_group}"
            )
        if not 1 <= self.units_per_layer <= self.gate.n_routed_experts:
            raise PlacementError(
                f"units_per_layer is {self.units_per_layer}, must be 1 to the {self.gate.n_routed_experts} experts"
            )

    def _check_shards(self) -> None:
        by_shard = {"shard_speeds": self.shard_speeds, "shard_domains": self.shard_domains}
        if isinstance(self.max_weight_bytes, tuple):
            by_shard["max_weight_bytes"] = self.max_weight_bytes
        for name, values in by_shard.items():
            if values is not None and len(values) != self.ep_size:
                raise PlacementError(
                    f"{name} has {len(values)} values, needs one for each of the {self.ep_size} shards"
                )
        if self.shard_speeds is not None and not all(0 < speed < np.inf for speed in self.shard_speeds):
            raise PlacementError(f"shard_speeds are {self.shard_speeds}, each must be above 0")

    def _check_statistics(self) -> None:
        num_layers, num_experts = len(self.moe_layer_ids), self.gate.n_routed_experts
        for name, values, shape in (
            ("load", self.load, (num_layers, num_experts)),
            ("coactivation", self.coactivation, (num_layers, num_experts, num_experts)),
        ):
            if values is None:
                continue
            if values.shape != shape:
                raise PlacementError(f"{name} is {list(values.shape)}, needs {list(shape)}: layers by experts")
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise PlacementError(f"{name} has negative or infinite values; it counts assignments")

    def _check_current(self) -> None:
        if self.current is None:
            return
        shape = (len(self.moe_layer_ids), self.gate.n_routed_experts)
        if self.current.moe_layer_ids != self.moe_layer_ids or self.current.expert_to_unit.shape != shape:
            raise PlacementError(
                f"current places {self.current.n_routed_experts} experts of layers {self.current.moe_layer_ids}, "
                f"the request {shape[1]} of layers {self.moe_layer_ids}: they are not of one model"
            )

    @property
    def num_layers(self) -> int:
        """With routed experts."""
        return len(self.moe_layer_ids)

    @property
    def num_units(self) -> int:
        """Of each layer, where units are expert groups or contiguous sets."""
        if self.units_per_layer is not None:
            return self.units_per_layer
        if self.gate.is_group_limited:
            return self.gate.n_group
        num_experts = self.gate.n_routed_experts
        return max(count for count in range(1, DEFAULT_MAX_UNITS + 1) if num_experts % count == 0)
