"""The weights a shard holds, by placement unit and version.

A version is staged (read), served, and released; units that two versions share are held once. Any thread may read while
one control thread changes: what is published is never written to again. Knows nothing of requests.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from experts.grouped_ffn import ExpertWeights
from protos.errors import StalePlacement


class WeightReader(Protocol):
    """Gives tensors of a checkpoint by their published names."""

    def read(self, name: str) -> Tensor:
        """One tensor, in the checkpoint's dtype."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""


class WeightShapeError(ValueError):
    """A tensor of the checkpoint does not have the shape that its configuration promises."""


class Unit(NamedTuple):
    """A placement unit to hold; `expert_ids` ascend. The same fields as router.expert_map.PlacementUnit."""

    layer_id: int
    unit_id: int
    expert_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertModel:
    """The model's facts that a shard needs."""

    moe_layer_ids: tuple[int, ...]
    n_routed_experts: int
    hidden_size: int
    moe_intermediate_size: int
    dtype: torch.dtype  # of weights and activations

    @property
    def expert_bytes(self) -> int:
        """Of one expert's three matrices."""
        return 3 * self.hidden_size * self.moe_intermediate_size * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitWeights:
    """One unit's weights, back to back.

    w13: [num_experts, 2 * moe_intermediate_size, hidden_size]; w2: [num_experts, hidden_size, moe_intermediate_size].
    """

    unit: Unit
    w13: Tensor
    w2: Tensor

    @property
    def weight_bytes(self) -> int:
        return self.w13.nbytes + self.w2.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """What a shard holds of one layer under one version.

    experts: by logical expert id. expert_to_unit: [n_routed_experts] int64, -1 for experts that are not held.
    """

    placement_version: int
    layer_id: int
    experts: Mapping[int, ExpertWeights]
    expert_to_unit: Tensor


class WeightStore:
    """Reads and keeps units. See the module's docstring for threads."""

    def __init__(self, model: ExpertModel, reader: WeightReader) -> None:
        self._model = model
        self._reader = reader
        self._units: dict[Unit, UnitWeights] = {}  # this and the next are the control thread's
        self._units_of_version: dict[int, tuple[Unit, ...]] = {}
        self._served: Mapping[int, Mapping[int, LayerWeights]] = MappingProxyType({})  # by version and layer

    @property
    def versions(self) -> tuple[int, ...]:
        """Placement versions served, ascending."""
        return tuple(sorted(self._served))

    @property
    def num_units(self) -> int:
        """Units held."""
        return len(self._units)

    @property
    def weight_bytes(self) -> int:
        """Of all units held."""
        return sum(unit.weight_bytes for unit in self._units.values())

    def stage(self, units: Iterable[Unit]) -> None:
        """Reads those units that are not held yet, one tensor at a time. Raises WeightShapeError."""
        for unit in units:
            if unit not in self._units:
                self._units[unit] = self._read(unit)

    def activate(self, placement_version: int, units: Iterable[Unit]) -> None:
        """Serves `units`, reading what is not staged, under `placement_version` beside the versions served before."""
        units = tuple(units)
        self.stage(units)
        layers = {
            layer_id: self._layer(placement_version, layer_id, [unit for unit in units if unit.layer_id == layer_id])
            for layer_id in self._model.moe_layer_ids
        }
        self._units_of_version[placement_version] = units
        self._served = MappingProxyType({**self._served, placement_version: MappingProxyType(layers)})

    def release(self, placement_version: int) -> None:
        """Serves `placement_version` no longer and drops the units that no other version has."""
        self._served = MappingProxyType(
            {version: layers for version, layers in self._served.items() if version != placement_version}
        )
        released = set(self._units_of_version.pop(placement_version, ()))
        for unit in released.difference(*self._units_of_version.values()):
            del self._units[unit]

    def layer(self, placement_version: int, layer_id: int) -> LayerWeights | None:
        """What is held of a layer; None for a layer that the model does not have or that has no routed experts.

        Raises StalePlacement for a version that is not served.
        """
        layers = self._served.get(placement_version)
        if layers is None:
            raise StalePlacement(
                f"placement version {placement_version} is not served here, only {list(self.versions)}; "
                "use the newest expert map"
            )
        return layers.get(layer_id)

    def _layer(self, placement_version: int, layer_id: int, units: list[Unit]) -> LayerWeights:
        experts = {}
        expert_to_unit = torch.full((self._model.n_routed_experts,), -1)
        for unit in units:
            weights = self._units[unit]
            expert_to_unit[list(unit.expert_ids)] = unit.unit_id
            for index, expert_id in enumerate(unit.expert_ids):
                experts[expert_id] = ExpertWeights(w13=weights.w13[index], w2=weights.w2[index])
        return LayerWeights(
            placement_version=placement_version,
            layer_id=layer_id,
            experts=MappingProxyType(experts),
            expert_to_unit=expert_to_unit,
        )

    def _read(self, unit: Unit) -> UnitWeights:
        model = self._model
        hidden_size, intermediate_size = model.hidden_size, model.moe_intermediate_size
        num_experts = len(unit.expert_ids)
        w13 = torch.empty(num_experts, 2 * intermediate_size, hidden_size, dtype=model.dtype)
        w2 = torch.empty(num_experts, hidden_size, intermediate_size, dtype=model.dtype)
        for index, expert_id in enumerate(unit.expert_ids):
            prefix = f"model.layers.{unit.layer_id}.mlp.experts.{expert_id}"
            self._copy(f"{prefix}.gate_proj.weight", w13[index, :intermediate_size])
            self._copy(f"{prefix}.up_proj.weight", w13[index, intermediate_size:])
            self._copy(f"{prefix}.down_proj.weight", w2[index])
        return UnitWeights(unit=unit, w13=w13, w2=w2)

    def _copy(self, name: str, target: Tensor) -> None:
        shape = tuple(self._reader.shape(name))
        if shape != tuple(target.shape):
            raise WeightShapeError(
                f"{name} is {list(shape)} in the checkpoint, its config.json says {list(target.shape)}; "
                "the two are not of one model"
            )
        target.copy_(self._reader.read(name))
