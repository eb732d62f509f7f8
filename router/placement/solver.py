"""Places given units for the smallest expected step time, then for the fewest bytes moved.

The objective in order: it fits (memory, replicas on different shards and in different failure domains); the expected
step time (scores.expected_step_time) is smallest; the fewest bytes move from the current map, among placements whose
times differ by no more than EQUAL_TIME. Candidates: one from scratch, its shards then renamed so that they keep most;
where there is a current map also that map with the least changed, its replicas as they are or as the load asks.
"""

from dataclasses import replace

import numpy as np

from router.expert_map import Int64Array
from router.placement.assignment import Assignment, Shards, Units
from router.placement.exchange import improve
from router.placement.filling import fill_by_room, fill_greedily
from router.placement.matching import cheapest_matching
from router.placement.moves import held_experts
from router.placement.replication import fewer_replicas, replica_counts
from router.placement.request import Float64Array, PlacementDoesNotFit, PlacementRequest
from router.placement.scores import relative_speeds
from router.placement.units import load_or_even, num_slots, sum_by_unit, unit_sizes, weight_limits

EQUAL_TIME = 0.01  # of a step time: measured loads are no surer


def solve(request: PlacementRequest, expert_to_unit: Int64Array, num_units: int) -> Int64Array:
    """expert_to_unit: [num_moe_layers, n_routed_experts] of `num_units`. Returns [num_moe_layers, num_units, replicas].

    Raises PlacementDoesNotFit.
    """
    load = sum_by_unit(load_or_even(request), expert_to_unit, num_units)
    sizes = unit_sizes(expert_to_unit, num_units)
    slots = num_slots(request, num_units)
    shards = _shards(request, sizes, slots)
    least = np.full(load.shape, request.num_replicas)
    counts = replica_counts(load, slots, least, shards.speeds)
    units = _units(load, sizes, counts, request, shards)
    try:
        fresh = _from_scratch(units, shards)
    except PlacementDoesNotFit:  # in a fair share of the memory each; then in all there is
        shards = replace(shards, capacity=_limits(request, sizes))
        fresh = _from_scratch(units, shards)
    if request.current is None:
        return fresh.unit_to_ep_ranks()
    held = _held_units(request, expert_to_unit, num_units)
    fresh = _renamed(fresh, held)
    enough = fresh.time() * (1 + EQUAL_TIME)
    candidates = [fresh]
    as_they_are = np.clip(held.sum(axis=2), request.num_replicas, request.ep_size)
    as_they_are = fewer_replicas(load, slots, as_they_are, request.num_replicas)
    as_they_are = replica_counts(load, slots, as_they_are, shards.speeds)
    for wanted in (as_they_are, counts):
        kept = _from_current(_units(load, sizes, wanted, request, shards), shards, held, enough)
        if kept is not None:
            candidates.append(kept)
    limit = min(candidate.time() for candidate in candidates) * (1 + EQUAL_TIME)
    equal = [candidate for candidate in candidates if candidate.time() <= limit]
    return min(equal, key=lambda candidate: _moved_experts(candidate, held)).unit_to_ep_ranks()


def _units(
    load: Float64Array, sizes: Int64Array, counts: Int64Array, request: PlacementRequest, shards: Shards
) -> Units:
    min_domains = min(2, request.num_replicas, shards.num_domains)
    return Units(load=load, sizes=sizes, num_replicas=counts, min_domains=np.full(load.shape, min_domains))


def _shards(request: PlacementRequest, sizes: Int64Array, slots: int) -> Shards:
    """Capacity is each shard's share of all experts by speed, cut where memory ends; others then take more."""
    speeds = relative_speeds(request.shard_speeds, request.ep_size)
    names = request.shard_domains or ("",) * request.ep_size
    _, domains = np.unique(np.asarray(names), return_inverse=True)
    wanted = slots / sizes.size * float(sizes.sum())  # experts, counting replicas
    limit = _limits(request, sizes)
    if limit.sum() < wanted:
        raise PlacementDoesNotFit(
            f"{slots} units with {wanted:.0f} experts need {int(wanted) * request.expert_bytes} bytes, the limits of "
            f"the {request.ep_size} shards are {int(limit.sum()) * request.expert_bytes} bytes together; use more than "
            f"{request.ep_size} shards, fewer replicas, less redundancy, a smaller dtype or a higher limit"
        )
    capacity = _capacity(wanted, limit, speeds, sizes)
    if request.num_replicas > 1 and domains.max() > 0:
        _make_room_outside_domains(capacity, limit, speeds, sizes, domains)
    return Shards(speeds=speeds, capacity=capacity, domains=domains)


def _limits(request: PlacementRequest, sizes: Int64Array) -> Int64Array:
    """Experts that each shard has memory for, at most all: [ep_size]."""
    limits = weight_limits(request)
    if limits is None or not request.expert_bytes:
        return np.full(request.ep_size, sizes.sum())
    return np.asarray(np.minimum(limits // request.expert_bytes, sizes.sum()))


def _make_room_outside_domains(
    capacity: Int64Array, limit: Int64Array, speeds: Float64Array, sizes: Int64Array, domains: Int64Array
) -> None:
    """Raises `capacity` so that all units fit outside any one domain: each must survive its loss."""
    for domain in range(int(domains.max()) + 1):
        outside = domains != domain
        if limit[outside].sum() < sizes.sum():
            raise PlacementDoesNotFit(
                f"shards outside failure domain number {domain} have memory for {limit[outside].sum()} experts, the "
                f"model has {sizes.sum()}, each of which must survive the loss of the domain's {(~outside).sum()} "
                "shards: use more shards elsewhere, higher limits, or one replica"
            )
        if capacity[outside].sum() < sizes.sum():
            needed = _capacity(float(sizes.sum()), limit[outside], speeds[outside], sizes)
            capacity[outside] = np.maximum(capacity[outside], needed)


def _capacity(wanted: float, limit: Int64Array, speeds: Float64Array, sizes: Int64Array) -> Int64Array:
    """Experts by shard, rounded up to whole units, in proportion to speeds but for those that reach their limit."""
    largest = int(sizes.max())
    low, high = 0.0, float(limit.sum() / speeds.min() + largest)
    for _ in range(60):  # bisection for the share of a shard of mean speed
        middle = (low + high) / 2
        low, high = (low, middle) if np.minimum(limit, middle * speeds).sum() >= wanted else (middle, high)
    whole = np.ceil(high * speeds / largest - 1e-6).astype(np.int64)
    whole += int(sizes.min()) < largest  # units of different sizes leave gaps
    return np.asarray(np.minimum(limit, whole * largest))


def _from_scratch(units: Units, shards: Shards) -> Assignment:
    assignment = Assignment(units, shards)
    if not fill_greedily(assignment):
        assignment = Assignment(units, shards)
        fill_by_room(assignment)
    improve(assignment)
    return assignment


def _held_units(request: PlacementRequest, expert_to_unit: Int64Array, num_units: int) -> Int64Array:
    """Shards that hold all experts of a unit now: [num_moe_layers, num_units, ep_size] of 0 and 1."""
    assert request.current is not None
    experts = held_experts(request.current, request.ep_size)
    lacks = np.zeros((len(experts), num_units, request.ep_size), dtype=np.int64)
    np.add.at(lacks, (np.arange(len(experts))[:, None], expert_to_unit), ~experts)
    return np.asarray(lacks == 0, dtype=np.int64)


def _renamed(assignment: Assignment, held: Int64Array) -> Assignment:
    """The same with shards renamed among those of equal speed, capacity and domain, so that fewest experts move."""
    shards = assignment.shards
    kinds = np.stack([shards.speeds, shards.capacity, shards.domains], axis=1)
    _, kind = np.unique(kinds, axis=0, return_inverse=True)
    weights = assignment.units.sizes[:, :, None] * held
    kept = np.einsum("lus,lut->st", assignment.holds.astype(np.float64), weights.astype(np.float64))
    lost = np.where(kind.reshape(-1, 1) == kind.reshape(1, -1), -kept, kept.sum() + 1)
    names = cheapest_matching(lost)
    renamed = Assignment(assignment.units, shards)
    for layer, unit, shard in np.argwhere(assignment.holds).tolist():
        renamed.put(layer, unit, int(names[shard]))
    renamed.recount()
    return renamed


def _from_current(units: Units, shards: Shards, held: Int64Array, enough: float) -> Assignment | None:
    """What shards hold now, with as little changed as makes a step `enough`; None where that finds no way."""
    assignment = Assignment(units, shards)
    for layer, unit in np.ndindex(units.load.shape):
        holders = np.flatnonzero(held[layer, unit])
        for shard in holders.tolist():
            if assignment.room[shard] >= units.sizes[layer, unit]:
                assignment.put(layer, unit, shard)
    surplus = assignment.holds.sum(axis=2) - units.num_replicas
    for layer, unit in np.argwhere(surplus > 0).tolist():
        for _ in range(int(surplus[layer, unit])):
            _drop_one(assignment, layer, unit)
    for layer, unit in np.argwhere(_lacks_domains(assignment)).tolist():
        _drop_one(assignment, layer, unit)
    if not fill_greedily(assignment):
        return None
    assignment.recount()
    improve(assignment, enough=enough)
    return assignment


def _drop_one(assignment: Assignment, layer: int, unit: int) -> None:
    """Takes a replica from the busiest shard whose domain holds another of the unit, if there is such a one."""
    holds, domains = assignment.holds[layer, unit], assignment.shards.domains
    is_alone = assignment.domain_counts[layer, unit][domains] == 1
    order = np.where(holds, assignment.total - is_alone * (assignment.total.max() + 1), -np.inf)
    assignment.take(layer, unit, int(order.argmax()))


def _lacks_domains(assignment: Assignment) -> Int64Array:
    """Units whose replicas are all there but in too few failure domains."""
    counts, units = assignment.domain_counts, assignment.units
    too_few = (counts > 0).sum(axis=2) < units.min_domains
    return np.asarray(too_few & (counts.sum(axis=2) >= units.num_replicas), dtype=np.int64)


def _moved_experts(assignment: Assignment, held: Int64Array) -> int:
    return int((assignment.units.sizes[:, :, None] * (assignment.holds & (held == 0))).sum())
