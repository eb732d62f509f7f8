"""The weights a shard holds, by placement unit and version.

A version is staged (read), served, and released; units that two versions share are held once. Any thread may read while
one control thread changes: what is published is never written to again. Knows nothing of requests.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts.grouped_ffn import ExpertWeights
from experts.kernels.expert_set import ExpertSet, PackedExpert
from experts.kernels.library import native
from experts.kernels.packed_matrix import can_pack, pack
from experts.quantized_matrix import QuantizedMatrix, kind_of
from protos.errors import StalePlacement


class WeightReader(Protocol):
    """Gives the matrices of a checkpoint by their published names."""

    def read_matrix(self, name: str) -> Tensor | QuantizedMatrix:
        """One matrix [outputs, inputs], in the checkpoint's dtype or as small integers."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""


class WeightShapeError(ValueError):
    """A tensor of the checkpoint does not have the shape that its configuration promises."""


class Unit(NamedTuple):
    """A placement unit to hold; `expert_ids` ascend. The same fields as router.expert_map.PlacementUnit."""

    layer_id: int
    unit_id: int
    expert_ids: tuple[int, ...]


Expert = ExpertWeights | PackedExpert
OnRead = Callable[[int], None]  # told of bytes that were read; may wait, so that the machine is left to others
CopyExpert = Callable[
    [Unit, int, OnRead | None], Expert | None
]  # a unit's expert by its id, from elsewhere if it is there


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
class LayerWeights:
    """What a shard holds of one layer under one version.

    experts: by logical expert id, as grouped_ffn takes them. expert_to_unit: [n_routed_experts] int64, -1 for experts
    that are not held.
    """

    placement_version: int
    layer_id: int
    experts: Mapping[int, ExpertWeights] | ExpertSet
    expert_to_unit: npt.NDArray[np.int64]
    expert_to_unit_address: int = field(init=False)  # asking numpy for it is slow where the caches are cold

    def __post_init__(self) -> None:
        object.__setattr__(self, "expert_to_unit_address", self.expert_to_unit.ctypes.data)


class WeightStore:
    """Reads and keeps units. See the module's docstring for threads."""

    def __init__(self, model: ExpertModel, reader: WeightReader, *, use_kernels: bool = True) -> None:
        """use_kernels: pack weights for the CPU kernels where these are built; otherwise torch computes."""
        self._model = model
        self._reader = reader
        self._use_kernels = use_kernels and native() is not None
        # In the order of their ids. The control thread's alone, as is _units_of_version.
        self._units: dict[Unit, tuple[Expert, ...]] = {}
        # Of all units, and of one that is being read; any thread reads.
        self._experts: dict[tuple[int, int], Expert] = {}
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
        """Of all experts held: one that is in several units counts once."""
        return sum(expert.nbytes for _, expert in self.held_experts())

    def stage(self, units: Iterable[Unit], on_read: OnRead | None = None, copy: CopyExpert = lambda *_: None) -> None:
        """Reads those units that are not held yet, one tensor at a time. Raises WeightShapeError.

        An expert that is held already, in another unit or by a call that failed after it, is not read again.
        copy: where an expert is looked for before the checkpoint.
        """
        for unit in units:
            if unit not in self._units:
                self._units[unit] = self._read(unit, on_read, copy)

    def expert(self, layer_id: int, expert_id: int) -> Expert | None:
        """One that is held, under whichever version."""
        return self._experts.get((layer_id, expert_id))

    def held_experts(self) -> list[tuple[tuple[int, int], Expert]]:
        """All that are held, by (layer_id, expert_id)."""
        return list(self._experts.items())

    def layers(self, placement_version: int) -> list[LayerWeights]:
        """What is held under a version; nothing under one that is not served."""
        return list(self._served.get(placement_version, {}).values())

    def newest_layer(self, layer_id: int) -> LayerWeights | None:
        """What is held of a layer under the newest version served; None without one."""
        served = self._served
        return served[max(served)].get(layer_id) if served else None

    def read_again(self, layer_id: int, unit_id: int) -> list[tuple[LayerWeights, tuple[int, ...]]]:
        """Replaces a unit's weights, under every version, by what the checkpoint has.

        The layers that have it, each with the unit's expert ids.
        """
        units = [unit for unit in self._units if (unit.layer_id, unit.unit_id) == (layer_id, unit_id)]
        for unit in units:
            for expert_id in unit.expert_ids:
                self._experts[layer_id, expert_id] = self._read_expert(layer_id, expert_id, None)
        for other in [unit for unit in self._units if unit.layer_id == layer_id]:  # may share experts
            self._units[other] = self._read(other, None, lambda *_: None)
        renewed = []
        for version, held in self._units_of_version.items():
            in_layer = [unit for unit in held if unit.layer_id == layer_id]
            layer = self._layer(version, layer_id, in_layer)
            layers = MappingProxyType({**self._served[version], layer_id: layer})
            self._served = MappingProxyType({**self._served, version: layers})
            renewed += [(layer, unit.expert_ids) for unit in in_layer if unit in units]
        return renewed

    def drop_staged(self) -> None:
        """Drops the units that no version has, and what was read of one."""
        for unit in set(self._units).difference(*self._units_of_version.values()):
            del self._units[unit]
        self._experts = {
            (unit.layer_id, expert_id): expert
            for unit, experts in self._units.items()
            for expert_id, expert in zip(unit.expert_ids, experts, strict=True)
        }

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
        """Serves `placement_version` no longer and drops the units that no other version has, staged ones too."""
        self._served = MappingProxyType(
            {version: layers for version, layers in self._served.items() if version != placement_version}
        )
        self._units_of_version.pop(placement_version, None)
        self.drop_staged()

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
        experts: dict[int, ExpertWeights | PackedExpert] = {}
        expert_to_unit = np.full(self._model.n_routed_experts, -1)
        for unit in units:
            expert_to_unit[list(unit.expert_ids)] = unit.unit_id
            experts.update(zip(unit.expert_ids, self._units[unit], strict=True))
        return LayerWeights(
            placement_version=placement_version,
            layer_id=layer_id,
            experts=_as_grouped_ffn_takes_them(experts, self._model.moe_intermediate_size, layer_id),
            expert_to_unit=expert_to_unit,
        )

    def _read(self, unit: Unit, on_read: OnRead | None, copy: CopyExpert) -> tuple[Expert, ...]:
        keys = [(unit.layer_id, expert_id) for expert_id in unit.expert_ids]
        for key in keys:
            if key not in self._experts:
                expert = copy(unit, key[1], on_read)
                self._experts[key] = self._read_expert(*key, on_read) if expert is None else expert
        return tuple(self._experts[key] for key in keys)

    def _read_expert(self, layer_id: int, expert_id: int, on_read: OnRead | None) -> Expert:
        """One matrix at a time, straight into its place."""
        hidden_size, inner = self._model.hidden_size, self._model.moe_intermediate_size
        prefix = f"model.layers.{layer_id}.mlp.experts.{expert_id}"
        gate = self._matrix(f"{prefix}.gate_proj.weight", (inner, hidden_size))
        up = self._matrix(f"{prefix}.up_proj.weight", (inner, hidden_size))
        down = self._matrix(f"{prefix}.down_proj.weight", (hidden_size, inner))
        if len({kind_of(matrix) for matrix in (gate, up, down)}) > 1:  # the kernels take an expert of one kind
            gate, up, down = (self._plain(matrix) for matrix in (gate, up, down))
        if self._use_kernels and all(can_pack(matrix) for matrix in (gate, up, down)):
            return PackedExpert(w13=pack([gate, up], on_read), w2=pack([down], on_read))
        gate, up, down = (self._plain(matrix) for matrix in (gate, up, down))
        expert = ExpertWeights(w13=torch.cat((gate, up)), w2=down)
        if on_read:
            on_read(expert.nbytes)
        return expert

    def _plain(self, matrix: Tensor | QuantizedMatrix) -> Tensor:
        """In the model's dtype."""
        return matrix.dequantize().to(self._model.dtype) if isinstance(matrix, QuantizedMatrix) else matrix

    def _matrix(self, name: str, expected: tuple[int, int]) -> Tensor | QuantizedMatrix:
        shape = tuple(self._reader.shape(name))
        if shape != expected:
            raise WeightShapeError(
                f"{name} is {list(shape)} in the checkpoint, its config.json says {list(expected)}; "
                "the two are not of one model"
            )
        matrix = self._reader.read_matrix(name)
        return matrix if isinstance(matrix, QuantizedMatrix) else matrix.to(self._model.dtype)


def _as_grouped_ffn_takes_them(
    experts: dict[int, ExpertWeights | PackedExpert], intermediate_size: int, layer_id: int
) -> Mapping[int, ExpertWeights] | ExpertSet:
    """Raises WeightShapeError for experts of several kinds: the kernels compute a layer's in one."""
    packed = {expert_id: expert for expert_id, expert in experts.items() if isinstance(expert, PackedExpert)}
    if packed:
        kinds = {expert.w13.kind for expert in packed.values()}
        if len(kinds) > 1 or len(packed) < len(experts):
            raise WeightShapeError(
                f"the routed experts of layer {layer_id} are stored in several formats; quantise all of them or none"
            )
        return ExpertSet(packed, intermediate_size)
    return MappingProxyType({i: expert for i, expert in experts.items() if isinstance(expert, ExpertWeights)})
