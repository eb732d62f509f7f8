"""Placement units and what they weigh: sizes, load, bytes on shards. Shared by the policies."""

import numpy as np

from router.expert_map import ExpertMap, Int64Array
from router.placement.request import (
    Float64Array,
    Placement,
    PlacementDoesNotFit,
    PlacementError,
    PlacementRequest,
)


def contiguous_units(request: PlacementRequest) -> Int64Array:
    """Contiguous sets, equal in size give or take one: [num_moe_layers, n_routed_experts]. Expert groups are such."""
    units = np.arange(request.gate.n_routed_experts) * request.num_units // request.gate.n_routed_experts
    return np.tile(units, (request.num_layers, 1))


def sum_by_unit(values: Float64Array, expert_to_unit: Int64Array, num_units: int) -> Float64Array:
    """values, expert_to_unit: [num_moe_layers, n_routed_experts]. Returns [num_moe_layers, num_units] float64."""
    layers = np.arange(len(values))[:, None]
    index = (layers * num_units + expert_to_unit).ravel()
    sums = np.bincount(index, weights=values.ravel(), minlength=len(values) * num_units).astype(np.float64)
    return sums.reshape(len(values), num_units)


def unit_sizes(expert_to_unit: Int64Array, num_units: int) -> Int64Array:
    """Experts of each unit: [num_moe_layers, num_units]."""
    return sum_by_unit(np.ones(expert_to_unit.shape), expert_to_unit, num_units).astype(np.int64)


def load_or_even(request: PlacementRequest) -> Float64Array:
    """[num_moe_layers, n_routed_experts]; a layer without any load counts as evenly loaded, like all when unset."""
    shape = (request.num_layers, request.gate.n_routed_experts)
    if request.load is None:
        return np.ones(shape)
    load = np.asarray(request.load, dtype=np.float64)
    idle = load.sum(axis=1, keepdims=True) == 0
    mean = load.sum() / load.size
    return np.where(idle, mean or 1.0, load)


def num_slots(request: PlacementRequest, units_per_layer: int) -> int:
    """Unit slots of all layers that the replicas and the redundancy ask for; a unit never fills more than ep_size."""
    num_units = request.num_layers * units_per_layer
    wanted = num_units * request.num_replicas + int(num_units * request.redundancy + 1e-9)
    return min(wanted, num_units * request.ep_size)


def check_shards_have_units(request: PlacementRequest) -> None:
    """Raises PlacementError where a shard would hold nothing."""
    slots = num_slots(request, request.num_units)
    if request.ep_size > slots:
        raise PlacementError(
            f"ep_size is {request.ep_size}, but there are only {slots} units to place "
            f"({request.num_layers} layers x {request.num_units} units x {request.num_replicas} replicas): "
            f"use at most {slots} shards, more replicas, or more units per layer"
        )


def weight_limits(request: PlacementRequest) -> Int64Array | None:
    """Bytes by shard, [ep_size]; None without a limit."""
    if request.max_weight_bytes is None:
        return None
    return np.broadcast_to(np.asarray(request.max_weight_bytes, dtype=np.int64), (request.ep_size,))


def experts_held(placement: Placement | ExpertMap, ep_size: int) -> Int64Array:
    """Experts of all layers, counting replicas, on each shard: [ep_size]."""
    ranks = placement.unit_to_ep_ranks
    sizes = unit_sizes(placement.expert_to_unit, ranks.shape[1])[:, :, None]
    placed = ranks >= 0
    held = np.bincount(ranks[placed], weights=np.broadcast_to(sizes, ranks.shape)[placed], minlength=ep_size)
    return held.astype(np.int64)


def check_weight_bytes(request: PlacementRequest, placement: Placement) -> None:
    """Raises PlacementDoesNotFit with the first shard that is too full."""
    limits = weight_limits(request)
    if limits is None:
        return
    needed = experts_held(placement, request.ep_size) * request.expert_bytes
    for ep_rank in np.flatnonzero(needed > limits)[:1].tolist():
        raise PlacementDoesNotFit(
            f"shard {ep_rank} needs {needed[ep_rank] / 2**30:.3f} GiB ({needed[ep_rank]} bytes) of expert weights, "
            f"its limit is {limits[ep_rank] / 2**30:.3f} GiB ({limits[ep_rank]} bytes); use more than "
            f"{request.ep_size} shards, fewer replicas, a smaller dtype or a higher limit"
        )
