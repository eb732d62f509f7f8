"""How many replicas each unit gets, so that a given number of them cools the layers most. Knows no limits of shards."""

import heapq

import numpy as np

from router.expert_map import Int64Array
from router.placement.packing import busiest_when_packed
from router.placement.request import Float64Array

MAX_PACKED_UNITS = 32  # per layer; with more, units are so small that their hottest replica says enough
SAME = 1e-9  # times that differ by less are equal


def replica_counts(unit_load: Float64Array, num_slots: int, start: Int64Array, speeds: Float64Array) -> Int64Array:
    """Replicas until `num_slots` are given away, each where it makes the slowest layer faster.

    All units are of about one size, so the slowest layer is also where a byte pays most. How fast a layer can be is
    found by packing its replicas on shards, so that fewer are given away where more would no longer fit side by side.
    unit_load: [num_moe_layers, num_units]; start: the same shape, replicas that are given; speeds: [ep_size].
    Returns the counts, [num_moe_layers, num_units], each at most ep_size.
    """
    ep_size = len(speeds)
    extra = num_slots - int(start.sum())
    if extra <= 0:
        return start
    if unit_load.shape[1] > MAX_PACKED_UNITS:
        return _by_hottest_replica(unit_load, extra, start, ep_size)
    paths, times = _paths(unit_load, start, speeds, longest=4 + 2 * -(-extra // len(unit_load)))
    num_taken = _share_out(times, extra)
    return np.asarray(paths[num_taken, np.arange(len(unit_load))])


def _by_hottest_replica(unit_load: Float64Array, extra: int, start: Int64Array, ep_size: int) -> Int64Array:
    """Each to the unit whose replicas are hottest then; ties go to the lower layer and unit."""
    counts, load = start.ravel().copy(), unit_load.ravel()
    heap = [(-load[unit] / counts[unit], unit) for unit in range(len(load)) if counts[unit] < ep_size]
    heapq.heapify(heap)
    for _ in range(extra):
        if not heap:
            break
        _, unit = heapq.heappop(heap)
        counts[unit] += 1
        if counts[unit] < ep_size:
            heapq.heappush(heap, (-load[unit] / counts[unit], unit))
    return counts.reshape(unit_load.shape)


def _paths(
    unit_load: Float64Array, start: Int64Array, speeds: Float64Array, longest: int
) -> tuple[Int64Array, Float64Array]:
    """Each layer's counts with 0, 1, 2 ... extra replicas, and its time with them.

    Returns [num_steps, num_moe_layers, num_units] and [num_steps, num_moe_layers]; inf where all units are everywhere.
    """
    num_layers, num_units = unit_load.shape
    layers = np.arange(num_layers)
    paths, times = [start], [busiest_when_packed(unit_load, start, speeds)]
    for _ in range(longest):
        candidates = np.repeat(paths[-1][:, None], num_units, axis=1)  # [num_moe_layers, candidate, num_units]
        candidates[:, np.arange(num_units), np.arange(num_units)] += 1
        load = np.broadcast_to(unit_load[:, None], candidates.shape)
        time = busiest_when_packed(
            load.reshape(-1, num_units), candidates.reshape(-1, num_units).clip(max=len(speeds)), speeds
        ).reshape(num_layers, num_units)
        time[(candidates > len(speeds)).any(axis=2)] = np.inf
        hottest = (load / candidates).max(axis=2)
        is_best = time <= time.min(axis=1, keepdims=True) * (1 + SAME)
        # Among equals the one that leaves the coolest replicas, then the one whose replicas were hottest.
        order = np.lexsort((-unit_load / paths[-1], hottest, ~is_best), axis=1)[:, 0]
        paths.append(candidates[layers, order])
        times.append(time[layers, order])
    return np.stack(paths), np.stack(times)


def _share_out(times: Float64Array, extra: int) -> Int64Array:
    """How many extra replicas each layer takes: [num_moe_layers].

    The slowest layer takes as many as make it faster, again and again. What nobody is faster with goes where it does
    no harm, so that it can help when loads change. times: [num_steps, num_moe_layers].
    """
    num_steps, num_layers = times.shape
    taken = np.zeros(num_layers, dtype=np.int64)
    heap = [(-times[0, layer], layer) for layer in range(num_layers)]
    heapq.heapify(heap)
    while heap and extra > 0:
        _, layer = heapq.heappop(heap)
        now = taken[layer]
        faster = np.flatnonzero(times[now + 1 :, layer] < times[now, layer] * (1 - SAME))
        if len(faster) and faster[0] + 1 <= extra:
            taken[layer] += faster[0] + 1
            extra -= int(faster[0]) + 1
            heapq.heappush(heap, (-times[taken[layer], layer], layer))
    while extra > 0:
        rest = np.flatnonzero(taken + 1 < num_steps)
        rest = rest[times[taken[rest] + 1, rest] <= times[taken[rest], rest] * (1 + SAME)]
        rest = rest[np.argsort(taken[rest], kind="stable")][:extra]
        if not len(rest):
            break
        taken[rest] += 1
        extra -= len(rest)
    return taken


def fewer_replicas(unit_load: Float64Array, num_slots: int, counts: Int64Array, least: int) -> Int64Array:
    """Takes replicas from where it heats the others least, until `num_slots` are left; never below `least`."""
    left = counts.ravel().copy()
    load = unit_load.ravel()
    while left.sum() > num_slots and (left > least).any():
        heated = np.where(left > least, load / np.maximum(left - 1, 1), np.inf)
        left[int(heated.argmin())] -= 1
    return left.reshape(counts.shape)
