"""Cuts the experts of a layer into parts of given sizes so that experts that fire together are in one part.

What one token asks of one part is one visit, so each pair of its experts within a part saves about one. Greedy growth
or even loads to begin with, then exchanges of two experts, best first (Kernighan and Lin 1970), while no part's load
passes a limit. Knows one layer at a time, nothing of shards.
"""

import numpy as np

from router.expert_map import Int64Array
from router.placement.request import Float64Array

UNEVEN = 0.1  # how far the hottest part may be above what parts cut for even loads alone would have
SAME = 1e-9


def partition(together: Float64Array, load: Float64Array, sizes: Int64Array, current: Int64Array | None) -> Int64Array:
    """The part of each expert: [num_experts], parts in order of their first expert.

    together: [num_experts, num_experts], tokens that chose both; load: [num_experts]; sizes: [num_parts], experts of
    each part, descending; current: the parts now, kept where hardly anything better is found.
    """
    together = (together + together.T) / 2
    np.fill_diagonal(together, 0.0)
    even = _even_parts(load, sizes)
    limit = _part_load(even, load, len(sizes)).max() * (1 + UNEVEN)
    grown = _grown_parts(together, load, sizes, limit)
    starts = [even] if grown is None else [grown, even]
    found = [_improved(together, load, start, limit, len(sizes)) for start in starts]
    best = max(found, key=lambda parts: _within(together, parts))
    if current is not None and _is_as_good(together, load, current, best, limit, sizes):
        best = current
    _, first = np.unique(best, return_index=True)
    return np.argsort(np.argsort(first))[np.unique(best, return_inverse=True)[1]]


def _within(together: Float64Array, parts: Int64Array) -> float:
    """Pairs in one part, each counted twice."""
    return float(together[parts[:, None] == parts].sum())


def _part_load(parts: Int64Array, load: Float64Array, num_parts: int) -> Float64Array:
    return np.asarray(np.bincount(parts, weights=load, minlength=num_parts), dtype=np.float64)


def _is_as_good(
    together: Float64Array,
    load: Float64Array,
    current: Int64Array,
    best: Int64Array,
    limit: float,
    sizes: Int64Array,
) -> bool:
    """Whether the parts now have the right sizes, keep the limit and miss only a hundredth of what was found."""
    num_parts = len(sizes)
    if current.max() >= num_parts or sorted(np.bincount(current, minlength=num_parts)) != sorted(sizes.tolist()):
        return False
    if _part_load(current, load, num_parts).max() > limit * (1 + SAME):
        return False
    return _within(together, current) >= 0.99 * _within(together, best)


def _even_parts(load: Float64Array, sizes: Int64Array) -> Int64Array:
    """Hottest first, each into the least busy part with room."""
    parts, busy, room = np.zeros(len(load), dtype=np.int64), np.zeros(len(sizes)), sizes.copy()
    for expert in np.argsort(-load, kind="stable").tolist():
        part = int(np.where(room > 0, busy, np.inf).argmin())
        parts[expert] = part
        busy[part] += load[expert]
        room[part] -= 1
    return parts


def _grown_parts(together: Float64Array, load: Float64Array, sizes: Int64Array, limit: float) -> Int64Array | None:
    """Parts grow from experts that seldom fire together; None where an expert finds no part within the limit.

    Each time the expert that is bound most to one part, for its number of tokens, joins it.
    """
    num_experts, num_parts = len(load), len(sizes)
    own = together.sum(axis=1).clip(min=SAME)
    parts = np.full(num_experts, -1)
    bound = np.zeros((num_experts, num_parts))  # pairs of each expert with each part's
    busy, room = np.zeros(num_parts), sizes.copy()
    for step in range(num_experts):
        is_free = parts < 0
        if step < num_parts:
            stranger = np.where(is_free, bound.sum(axis=1) / own, np.inf)
            expert = int(np.lexsort((-own, stranger))[0])
            part = step
        else:
            fits = is_free[:, None] & (room > 0) & (busy + load[:, None] <= limit * (1 + SAME))
            score = np.where(fits, bound / own[:, None] / (sizes - room), -1.0)
            expert, part = divmod(int(score.argmax()), num_parts)
            if score[expert, part] < 0:
                return None
        parts[expert] = part
        bound[:, part] += together[:, expert]
        busy[part] += load[expert]
        room[part] -= 1
    return parts if busy.max() <= limit * (1 + SAME) else None


def _improved(
    together: Float64Array, load: Float64Array, parts: Int64Array, limit: float, num_parts: int
) -> Int64Array:
    """Exchanges until none gains; several at once where they concern different parts and so do not disturb."""
    parts, experts = parts.copy(), np.arange(len(parts))
    more = load - load[:, None]  # what part of `row` gains in load when the expert of `column` replaces it
    least = SAME * max(float(together.sum()), SAME)
    bound = together @ (parts[:, None] == np.arange(num_parts)).astype(np.float64)  # [num_experts, num_parts]
    for _ in range(len(parts)):
        to_other = (bound - bound[experts, parts][:, None])[:, parts]
        gain = to_other + to_other.T - 2 * together
        fits = more <= (limit * (1 + SAME) - _part_load(parts, load, num_parts))[parts][:, None]
        gain = np.where(fits & fits.T, gain, -np.inf)  # within a part nothing is gained anyway
        partner = gain.argmax(axis=1)
        gains = gain[experts, partner]
        is_busy = np.zeros(num_parts, dtype=np.bool_)
        gaining = np.flatnonzero(gains > least)
        for expert in gaining[np.argsort(-gains[gaining], kind="stable")].tolist():
            other = int(partner[expert])
            first, second = int(parts[expert]), int(parts[other])
            if not (is_busy[first] or is_busy[second]):
                change = together[:, other] - together[:, expert]
                bound[:, first] += change
                bound[:, second] -= change
                parts[expert], parts[other] = second, first
                is_busy[[first, second]] = True
        if not is_busy.any():
            break
    return parts
