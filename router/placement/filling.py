"""Ways to give every unit of an assignment the replicas it still lacks."""

import numpy as np

from router.placement.assignment import Assignment, BoolArray
from router.placement.matching import cheapest_matching
from router.placement.packing import pack
from router.placement.request import PlacementDoesNotFit

TINY = 1e-300
SAME = 1e-9  # times that differ by less are equal


def fill_greedily(assignment: Assignment) -> bool:
    """Layers with the hottest replicas first; False where the way it went leaves a replica without a place.

    A layer of which nothing is placed yet is packed, and the packets are matched to shards so that no shard gets ahead
    of the others, neither in what it has to do over all layers nor in what it holds. Of other layers, and where a
    packet does not fit its shard, each replica looks for a place by itself.
    """
    units, shards = assignment.units, assignment.shards
    missing = units.num_replicas - assignment.holds.sum(axis=2)
    packed, busy = pack(units.load, units.num_replicas, shards.speeds)
    promised = busy.max(axis=1) * (1 + SAME)
    for layer in np.argsort(-assignment.share.max(axis=1), kind="stable").tolist():
        alone = []
        if (missing[layer] == units.num_replicas[layer]).all():
            alone = _match(assignment, layer, packed[layer], float(promised[layer]))
        else:
            for unit in np.argsort(-assignment.share[layer], kind="stable").tolist():
                alone += [unit] * int(missing[layer, unit])
        for unit in alone:
            can = assignment.can_take(layer, unit)
            if not can.any():
                return False
            assignment.put(layer, unit, _best_shard(assignment, layer, unit, can, float(promised[layer])))
    return True


def _match(assignment: Assignment, layer: int, packed: BoolArray, promised: float) -> list[int]:
    """Puts packets, columns of `packed` [num_units, ep_size], on shards; returns the units that found no place."""
    shards, share, sizes = assignment.shards, assignment.share[layer], assignment.units.sizes[layer]
    packets = packed.T[packed.any(axis=0)]  # [num_packets, num_units]
    load, size = packets @ share, packets @ sizes
    total = assignment.total - assignment.total.mean()
    held = assignment.room.sum() * shards.capacity / max(shards.capacity.sum(), 1) - assignment.room
    cost = np.outer(load, total) / max(share.mean(), TINY) ** 2 + np.outer(size, held) / sizes.mean() ** 2
    worst = 1 + np.abs(cost).sum()
    time = load[:, None] / shards.speeds
    cost += worst * np.maximum(time / max(promised, TINY) - 1, 0)  # as slow as it must be, but not slower
    cost[size[:, None] > assignment.room] = worst * (1 + len(packets) * (time.max() / max(promised, TINY)))
    alone = []
    for packet, shard in zip(packets, cheapest_matching(cost).tolist(), strict=True):
        for unit in np.flatnonzero(packet).tolist():
            if assignment.can_take(layer, unit)[shard]:
                assignment.put(layer, unit, shard)
            else:
                alone.append(unit)
    return sorted(alone, key=lambda unit: -share[unit])


def _best_shard(assignment: Assignment, layer: int, unit: int, can: BoolArray, promised: float) -> int:
    """The least slowdown of the layer, then the least to do over all layers."""
    added = assignment.share[layer, unit] / assignment.shards.speeds
    slowdown = np.where(can, np.maximum(assignment.busy[layer] + added - promised, 0.0), np.inf)
    total = np.where(slowdown <= slowdown.min(), assignment.total + added, np.inf)
    return int(total.argmin())


def fill_by_room(assignment: Assignment) -> None:
    """The same without an eye on load: to the shards with the most room, units that lack most replicas first.

    The replicas that must lie in different failure domains come before all others. For units of one size that finds a
    place for all wherever there is one (as in Gale and Ryser's theorem); where domains count too, or sizes differ,
    nearly always. Raises PlacementDoesNotFit.
    """
    units = assignment.units
    for wanted in (np.minimum(units.min_domains, units.num_replicas), units.num_replicas):
        missing = wanted - assignment.holds.sum(axis=2)
        order = np.lexsort((-units.sizes.ravel(), -missing.ravel()))
        for place in order.tolist():
            layer, unit = divmod(place, units.load.shape[1])
            for _ in range(int(missing[layer, unit])):
                _put_where_most_room_is(assignment, layer, unit)


def _put_where_most_room_is(assignment: Assignment, layer: int, unit: int) -> None:
    units, shards = assignment.units, assignment.shards
    can = assignment.can_take(layer, unit)
    counts = assignment.domain_counts[layer, unit]
    score = assignment.room.astype(np.float64)
    if units.min_domains[layer, unit] > max(1, int((counts > 0).sum())):
        can &= (counts == 0)[shards.domains]
        room = np.bincount(shards.domains, weights=assignment.room, minlength=shards.num_domains)
        score += room[shards.domains] * (assignment.room.max() + 1)  # the domain's room counts first
    if not can.any():
        raise PlacementDoesNotFit(
            f"no shard has room for unit {unit} of MoE layer number {layer} in {units.num_replicas[layer, unit]} "
            f"replicas on different shards and in {units.min_domains[layer, unit]} failure domains; "
            f"{assignment.room.sum()} experts would fit in all: use more shards, fewer replicas, less redundancy, or "
            "failure domains more alike in size"
        )
    assignment.put(layer, unit, int(np.where(can, score, -1).argmax()))
