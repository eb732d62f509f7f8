"""Where every routed expert lives: a value with a version, shared by workers, shards and the controller.

Knows nothing of addresses, health or weights.

Glossary
    logical expert   an expert as the model defines it, 0 to n_routed_experts - 1 within a layer
    placement unit   a set of logical experts of one layer that always lies whole on a shard: an expert group where the
                     gate is group limited, else a set that Mobula chose; a single expert is a unit too (EPLB)
    replica          a unit that lies on several shards has several replicas
    ep_rank          the number of a shard, 0 to ep_size - 1; a shard that left leaves its number free

Example: one layer (layer 1 of the model), four experts in two units, two shards; unit 1 has two replicas.

    moe_layer_ids    (1,)
    expert_to_unit   [[0, 0, 1, 1]]         experts 0 and 1 are unit 0, experts 2 and 3 are unit 1
    unit_to_ep_ranks [[[0, -1], [0, 1]]]    unit 0 lies on shard 0 only, unit 1 on shards 0 and 1; -1 pads

    units_of(1)      (PlacementUnit(layer_id=1, unit_id=1, expert_ids=(2, 3)),)
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from router.gate_config import GateConfig

Int64Array = npt.NDArray[np.int64]


class ExpertMapError(ValueError):
    """An expert map contradicts itself, or does not have what was asked of it."""


class PlacementUnit(NamedTuple):
    """A unit that a shard holds; `expert_ids` ascend."""

    layer_id: int
    unit_id: int
    expert_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertMap:
    """One version of the placement; its arrays become read-only.

    moe_layer_ids: the layers with routed experts, ascending; the first dimension of the arrays.
    expert_to_unit: [num_moe_layers, n_routed_experts] int64.
    unit_to_ep_ranks: [num_moe_layers, num_units, max_replicas] int64, -1 pads at the end. A layer with fewer units than
        another has rows of -1 that no expert names.
    ep_ranks: the shards that hold anything, ascending; follows from the arrays.
    """

    placement_version: int
    ep_size: int
    moe_layer_ids: tuple[int, ...]
    expert_to_unit: Int64Array
    unit_to_ep_ranks: Int64Array
    ep_ranks: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.placement_version < 1 or self.ep_size < 1:
            raise ExpertMapError(
                f"placement_version is {self.placement_version} and ep_size {self.ep_size}, both start at 1"
            )
        if list(self.moe_layer_ids) != sorted(set(self.moe_layer_ids)):
            raise ExpertMapError(f"moe_layer_ids {self.moe_layer_ids} do not ascend")
        for name, dimensions in (("expert_to_unit", 2), ("unit_to_ep_ranks", 3)):
            array = getattr(self, name)
            if array.dtype != np.int64 or array.ndim != dimensions or len(array) != len(self.moe_layer_ids):
                raise ExpertMapError(
                    f"{name} is {list(array.shape)} of {array.dtype}, needs int64, {dimensions} dimensions, "
                    f"{len(self.moe_layer_ids)} layers"
                )
            array.setflags(write=False)
        self._check_units()
        object.__setattr__(self, "ep_ranks", tuple(sorted(_values(self.unit_to_ep_ranks) - {-1})))

    def _check_units(self) -> None:
        ranks, units = self.unit_to_ep_ranks, self.expert_to_unit
        for (row,) in _first(((units < 0) | (units >= self.num_units)).any(axis=1)):
            raise ExpertMapError(
                f"layer {self.moe_layer_ids[row]} names units {sorted(_values(units[row]))}, there are {self.num_units}"
            )
        ordered = np.sort(ranks, axis=2)
        is_used = np.zeros((len(units), self.num_units), dtype=np.bool_)
        np.put_along_axis(is_used, units, values=True, axis=1)
        for fault, message in (
            ((ranks < -1).any(axis=2) | ((ranks[:, :, :-1] < 0) & (ranks[:, :, 1:] >= 0)).any(axis=2),
             "only -1 pads, at the end"),
            (((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any(axis=2),
             "two replicas on a shard"),
            ((ranks >= self.ep_size).any(axis=2), f"ep_size is {self.ep_size}"),
            (is_used & (ranks < 0).all(axis=2), "has experts but no shard"),
        ):  # fmt: skip
            for row, unit_id in _first(fault):
                raise ExpertMapError(
                    f"unit {unit_id} of layer {self.moe_layer_ids[row]} is on {ranks[row, unit_id].tolist()}: {message}"
                )

    @property
    def n_routed_experts(self) -> int:
        return int(self.expert_to_unit.shape[1])

    @property
    def num_units(self) -> int:
        return int(self.unit_to_ep_ranks.shape[1])

    @property
    def max_replicas(self) -> int:
        return int(self.unit_to_ep_ranks.shape[2])

    def row(self, layer_id: int) -> int:
        """The index of a layer in the arrays. Raises ExpertMapError for a layer without routed experts."""
        try:
            return self.moe_layer_ids.index(layer_id)
        except ValueError as error:
            raise ExpertMapError(
                f"layer {layer_id} has no routed experts, only layers {self.moe_layer_ids} do"
            ) from error

    def units_of(self, ep_rank: int) -> tuple[PlacementUnit, ...]:
        """What a shard holds, in order of layer and unit."""
        held = []
        for row, layer_id in enumerate(self.moe_layer_ids):
            for unit_id in np.flatnonzero((self.unit_to_ep_ranks[row] == ep_rank).any(axis=-1)).tolist():
                expert_ids = np.flatnonzero(self.expert_to_unit[row] == unit_id).tolist()
                held.append(PlacementUnit(layer_id, unit_id, tuple(expert_ids)))
        return tuple(held)

    def is_complete_on(self, ep_ranks: Collection[int]) -> bool:
        """Whether these shards together hold every expert."""
        has_shard = np.isin(self.unit_to_ep_ranks, list(ep_ranks)).any(axis=2)
        return bool(np.take_along_axis(has_shard, self.expert_to_unit, axis=1).all())

    def max_ranks_per_token(self, gate: GateConfig) -> int:
        """The most shards that a token can visit in a layer, whichever experts the gate chooses.

        A token's experts lie in `max_groups_per_token` expert groups; each group lies in some units, each unit a token
        needs is asked of one shard. With a unit per expert group this is topk_group (or less, on fewer shards).
        """
        bound = 0
        for row in range(len(self.moe_layer_ids)):
            groups = self.expert_to_unit[row].reshape(gate.n_group, -1)
            units_per_group = sorted((len(_values(group)) for group in groups), reverse=True)
            num_units = sum(units_per_group[: gate.max_groups_per_token])
            used_units = sorted(_values(self.expert_to_unit[row]))
            num_ranks = len(_values(self.unit_to_ep_ranks[row, used_units]) - {-1})
            bound = max(bound, min(num_units, len(used_units), gate.num_experts_per_tok, num_ranks))
        return bound


def _first(fault: npt.ArrayLike) -> list[list[int]]:
    """The index of the first true element, in a list; an empty list if there is none."""
    first: list[list[int]] = np.argwhere(fault)[:1].tolist()
    return first


def _values(array: Int64Array) -> set[int]:
    """The distinct elements."""
    return set(array.ravel().tolist())
