"""How well a placement balances a load: the figures that policies optimise and users read. Pure functions.

Loads are in assignments (a token's visit to an expert), times in assignments on a shard of mean speed. A unit with
replicas is taken to divide its load evenly between them: what taking replicas in turn does, and a bound from above on
what a choice by queue length makes of it. Speeds are relative; None: all alike.
Shards that hold nothing, such as those that have left, do not count.
"""

from collections.abc import Sequence

import numpy as np

from router.expert_map import ExpertMap
from router.placement.request import Float64Array
from router.placement.units import sum_by_unit


def relative_speeds(speeds: Sequence[float] | None, ep_size: int) -> Float64Array:
    """[ep_size], with mean 1."""
    if speeds is None:
        return np.ones(ep_size)
    values = np.asarray(speeds, dtype=np.float64)
    return np.asarray(values / values.mean())


def shard_load(expert_map: ExpertMap, load: Float64Array) -> Float64Array:
    """load: [num_moe_layers, n_routed_experts]. Returns [num_moe_layers, ep_size] assignments."""
    ranks = expert_map.unit_to_ep_ranks
    num_layers, num_units, _ = ranks.shape
    is_placed = ranks >= 0
    unit_load = sum_by_unit(load, expert_map.expert_to_unit, num_units)
    share = (unit_load / is_placed.sum(axis=2).clip(min=1))[:, :, None]  # of each replica
    index = np.arange(num_layers)[:, None, None] * expert_map.ep_size + ranks
    shares = np.broadcast_to(share, ranks.shape)
    sums = np.bincount(index[is_placed], weights=shares[is_placed], minlength=num_layers * expert_map.ep_size)
    return np.asarray(sums.reshape(num_layers, expert_map.ep_size))


def balancedness(expert_map: ExpertMap, load: Float64Array, speeds: Sequence[float] | None = None) -> float:
    """Over all layers: the busy time of a shard if all were equally busy over that of the busiest; 1 is perfect."""
    busy = shard_load(expert_map, load).sum(axis=0) / relative_speeds(speeds, expert_map.ep_size)
    return float(load.sum() / len(expert_map.ep_ranks) / busy.max()) if busy.max() > 0 else 1.0


def balancedness_by_layer(
    expert_map: ExpertMap, load: Float64Array, speeds: Sequence[float] | None = None
) -> Float64Array:
    """The same within each layer: [num_moe_layers]. A layer without load counts as 1."""
    busiest = (shard_load(expert_map, load) / relative_speeds(speeds, expert_map.ep_size)).max(axis=1)
    even = load.sum(axis=1) / len(expert_map.ep_ranks)
    return np.asarray(np.divide(even, busiest, out=np.ones(len(load)), where=busiest > 0))


def hottest_in_layer(
    expert_map: ExpertMap, load: Float64Array, n_group: int, speeds: Sequence[float] | None = None
) -> Float64Array:
    """The busiest shard of each layer as a multiple of layer load / n_group: [num_moe_layers].

    1 is a shard with a unit of average load; a layer without load counts as 0.
    """
    busiest = (shard_load(expert_map, load) / relative_speeds(speeds, expert_map.ep_size)).max(axis=1)
    even = load.sum(axis=1) / n_group
    return np.asarray(np.divide(busiest, even, out=np.zeros(len(load)), where=even > 0))


def expected_step_time(
    expert_map: ExpertMap,
    load: Float64Array,
    speeds: Sequence[float] | None = None,
    num_in_flight: int | None = None,
) -> float:
    """What the expert side costs a step, in assignments of the load on a shard of mean speed.

    A micro-batch goes through the layers one after another and waits in each for the layer's busiest shard; others, in
    other layers, want the same shards meanwhile. So `latency`, the sum over layers of the busiest shard, is a step
    alone; `bottleneck`, the busiest shard over all layers, is what each further micro-batch in flight adds. The sum
    latency + (n - 1) x bottleneck bounds the cycle of n (Zahorjan et al. 1982, balanced job bounds); divided by n.
    num_in_flight: unset, as many as shards, enough to keep all of them busy.
    """
    busy = shard_load(expert_map, load) / relative_speeds(speeds, expert_map.ep_size)
    count = num_in_flight or len(expert_map.ep_ranks)
    return float((busy.max(axis=1).sum() + (count - 1) * busy.sum(axis=0).max()) / count)
