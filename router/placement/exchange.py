"""Makes an assignment faster by exchanging two replicas between shards, or moving one, again and again.

Steepest descent on Assignment.time; each step looks at all replicas of one busy shard against all replicas and all
free places elsewhere, in a few array operations. Deterministic: ties go to the lower shard, layer and unit.
"""

from dataclasses import dataclass

import numpy as np

from router.expert_map import Int64Array
from router.placement.assignment import Assignment, BoolArray
from router.placement.request import Float64Array

MAX_PAIRS = 400_000  # that a step looks at in its first, rough pass
MAX_EXACT_PAIRS = 2048  # that it looks at closely
MAX_ROUNDS = 4  # of relieving totals and layers by turns; further ones gain next to nothing
EVEN = 1e-3  # total busy times nearer than this share to what no placement can beat are even


@dataclass(frozen=True, slots=True)
class _Places:
    """Replicas, and a free place on each shard: a replica of nothing. All [num_places]."""

    layer: Int64Array
    unit: Int64Array  # -1: a free place
    shard: Int64Array
    share: Float64Array
    size: Int64Array


@dataclass(frozen=True, slots=True)
class _Exchange:
    gain: float  # of Assignment.time, above 0
    first: tuple[int, int, int]  # layer, unit, shard
    second: tuple[int, int, int]


def improve(assignment: Assignment, *, enough: float = 0.0, max_steps: int = 1000) -> None:
    """Exchanges until nothing is gained, `max_steps` are done or Assignment.time is at most `enough`."""
    steps = 0
    for _ in range(MAX_ROUNDS):
        before = steps
        steps = _even_totals(assignment, enough, steps, max_steps)
        steps = _cool_layers(assignment, enough, steps, max_steps)
        assignment.recount()
        if steps == before or assignment.time() <= enough:
            return


def _even_totals(assignment: Assignment, enough: float, steps: int, max_steps: int) -> int:
    """Relieves the busiest shard over all layers."""
    speeds = assignment.shards.speeds
    best_possible = float((assignment.total * speeds).sum() / speeds.sum())
    while steps < max_steps and assignment.time() > enough:
        shard = int(assignment.total.argmax())
        if assignment.total[shard] <= best_possible * (1 + EVEN):
            break
        exchange = _best(assignment, shard, layer=None)
        if exchange is None:
            break
        _apply(assignment, exchange)
        steps += 1
    return steps


def _cool_layers(assignment: Assignment, enough: float, steps: int, max_steps: int) -> int:
    """Relieves the busiest shard of each layer."""
    for layer in range(len(assignment.busy)):
        while steps < max_steps and assignment.time() > enough:
            exchange = _best(assignment, int(assignment.busy[layer].argmax()), layer)
            if exchange is None:
                break
            _apply(assignment, exchange)
            steps += 1
    return steps


def _apply(assignment: Assignment, exchange: _Exchange) -> None:
    (layer, unit, shard), (other_layer, other_unit, other_shard) = exchange.first, exchange.second
    assignment.take(layer, unit, shard)
    if other_unit >= 0:
        assignment.take(other_layer, other_unit, other_shard)
        assignment.put(other_layer, other_unit, shard)
    assignment.put(layer, unit, other_shard)


def _best(assignment: Assignment, shard: int, layer: int | None) -> _Exchange | None:
    """The exchange that gains most, of replicas on `shard`: of one layer, or of all to relieve its total."""
    places = _places(assignment)
    mine = np.flatnonzero((places.shard == shard) & (places.unit >= 0))
    if layer is not None:
        mine = mine[places.layer[mine] == layer]
    theirs = np.flatnonzero(places.shard != shard)
    if layer is not None and len(theirs) > MAX_EXACT_PAIRS:
        theirs = theirs[(places.layer[theirs] == layer) | (places.unit[theirs] < 0)]
    most = max(1, MAX_PAIRS // max(len(theirs), 1))
    if len(mine) > most:  # evenly over their loads
        by_load = mine[np.argsort(places.share[mine], kind="stable")]
        mine = by_load[np.linspace(0, len(mine) - 1, most).astype(np.int64)]
    if not len(mine) or not len(theirs):
        return None
    first, second = _promising(assignment, places, shard, mine, theirs)
    if not len(first):
        return None
    gain = _gains(assignment, places, shard, first, second, relieves_total=layer is None)
    best = int(gain.argmax())
    if gain[best] <= 1e-9 * assignment.time():
        return None
    one, other = int(first[best]), int(second[best])
    return _Exchange(
        float(gain[best]),
        (int(places.layer[one]), int(places.unit[one]), shard),
        (int(places.layer[other]), int(places.unit[other]), int(places.shard[other])),
    )


def _places(assignment: Assignment) -> _Places:
    layer, unit, shard = np.nonzero(assignment.holds)
    ep_size = assignment.shards.ep_size
    none = np.zeros(ep_size, dtype=np.int64)
    return _Places(
        layer=np.concatenate([layer, none]),
        unit=np.concatenate([unit, none - 1]),
        shard=np.concatenate([shard, np.arange(ep_size)]),
        share=np.concatenate([assignment.share[layer, unit], np.zeros(ep_size)]),
        size=np.concatenate([assignment.units.sizes[layer, unit], none]),
    )


def _promising(
    assignment: Assignment, places: _Places, shard: int, mine: Int64Array, theirs: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """Pairs that fit, those that even out the two shards' totals best: [num_pairs] each."""
    other = places.shard[theirs]
    speeds, total, room = assignment.shards.speeds, assignment.total, assignment.room
    moved = places.share[mine][:, None] - places.share[theirs]  # [mine, theirs]
    larger = places.size[mine][:, None] - places.size[theirs]
    later = np.maximum(total[shard] - moved / speeds[shard], total[other] + moved / speeds[other])
    later[(larger > room[other]) | (-larger > room[shard])] = np.inf
    flat = later.ravel()
    if len(flat) > MAX_EXACT_PAIRS:
        kept = np.sort(np.argpartition(flat, MAX_EXACT_PAIRS)[:MAX_EXACT_PAIRS])
    else:
        kept = np.arange(len(flat))
    kept = kept[np.isfinite(flat[kept])]
    first, second = mine[kept // len(theirs)], theirs[kept % len(theirs)]
    allowed = _allowed(assignment, places, first, places.shard[second]) & (
        (places.unit[second] < 0) | _allowed(assignment, places, second, np.full(len(second), shard))
    )
    return first[allowed], second[allowed]


def _allowed(assignment: Assignment, places: _Places, moving: Int64Array, to: Int64Array) -> BoolArray:
    """Whether each replica may lie on the shard `to` instead: no second replica there, and domains enough."""
    layer, unit = places.layer[moving], places.unit[moving]
    domains = assignment.shards.domains
    left, entered = domains[places.shard[moving]], domains[to]
    counts = assignment.domain_counts[layer, unit]  # [num_pairs, num_domains]
    pair = np.arange(len(moving))
    num_domains = (counts > 0).sum(axis=1)
    after = num_domains - (counts[pair, left] == 1) + (counts[pair, entered] == 0)
    after = np.where(left == entered, num_domains, after)
    is_spread = after >= np.minimum(assignment.units.min_domains[layer, unit], num_domains)
    return np.asarray(~assignment.holds[layer, unit, to] & is_spread)


def _gains(
    assignment: Assignment, places: _Places, shard: int, first: Int64Array, second: Int64Array, *, relieves_total: bool
) -> Float64Array:
    """What each exchange takes off Assignment.time: [num_pairs].

    relieves_total: counts the larger total of the two shards as if it were the largest of all, so that several
    shards that are equally the busiest are relieved one after another.
    """
    speeds, busy, total = assignment.shards.speeds, assignment.busy, assignment.total
    other = places.shard[second]
    here, there = places.share[first], places.share[second]
    moved = here - there
    pair_total = np.maximum(total[shard] - moved / speeds[shard], total[other] + moved / speeds[other])
    if relieves_total:
        totals_gain = total[shard] - pair_total
    else:
        totals_gain = total.max() - np.maximum(pair_total, _largest_without(total[None], first * 0, shard, other))
    layer, other_layer = places.layer[first], places.layer[second]
    same = layer == other_layer
    back = np.where(same, there, 0.0)  # what comes back in the same layer
    after = np.maximum(
        busy[layer, shard] - (here - back) / speeds[shard], busy[layer, other] + (here - back) / speeds[other]
    )
    hottest = busy.max(axis=1)
    layers_gain = hottest[layer] - np.maximum(after, _largest_without(busy, layer, shard, other))
    after = np.maximum(
        busy[other_layer, shard] + there / speeds[shard], busy[other_layer, other] - there / speeds[other]
    )
    second_gain = hottest[other_layer] - np.maximum(after, _largest_without(busy, other_layer, shard, other))
    layers_gain += np.where(same | (places.unit[second] < 0), 0.0, second_gain)
    return np.asarray(layers_gain + (assignment.shards.ep_size - 1) * totals_gain)


def _largest_without(values: Float64Array, row: Int64Array, shard: int, other: Int64Array) -> Float64Array:
    """The largest of values[row] but for two shards: [num_pairs]; 0 where no third shard is."""
    count = min(3, values.shape[1])
    order = np.argpartition(-values, count - 1, axis=1)[:, :count][row]  # [num_pairs, up to 3], in any order
    left_out = (order == shard) | (order == other[:, None])
    return np.asarray(np.where(left_out, 0.0, values[row[:, None], order]).max(axis=1))
