"""Cuts the experts of a layer into parts of given sizes so that experts that fire together are in one part.

What one token asks of one part is one visit, so each pair of its experts within a part saves about one. Greedy growth
or even loads to begin with, then exchanges of two experts, best first (Kernighan and Lin 1970), while no part's load
passes a limit. Knows one layer at a time, nothing of shards.
"""

import numpy as np

from router.expert_map import Int64Array
from router.placement.request import Float64Array

UNEVEN = 0.1  # how far the hottest part may be above what parts cut for even loads alone would have
KEPT = 0.05  # what parts may be worse and still be kept: measured pairs are no surer
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
    best = _improved(together, load, even if grown is None else grown, limit, len(sizes))
    if current is not None:
        fewer_moves = [current, _improved(together, load, current, limit, len(sizes))] if _has(current, sizes) else []
        for parts in reversed(fewer_moves):
            best = parts if _is_as_good(together, load, parts, best, limit) else best
    _, first = np.unique(best, return_index=True)
    return np.argsort(np.argsort(first))[np.unique(best, return_inverse=True)[1]]


def _within(together: Float64Array, parts: Int64Array) -> float:
    """Pairs in one part, each counted twice."""
    return float(together[parts[:, None] == parts].sum())


def _part_load(parts: Int64Array, load: Float64Array, num_parts: int) -> Float64Array:
    return np.asarray(np.bincount(parts, weights=load, minlength=num_parts), dtype=np.float64)


def _has(parts: Int64Array, sizes: Int64Array) -> bool:
    """Whether parts are as large as they should be."""
    return bool(parts.max() < len(sizes)) and sorted(np.bincount(parts, minlength=len(sizes))) == sorted(sizes)


def _is_as_good(together: Float64Array, load: Float64Array, parts: Int64Array, best: Int64Array, limit: float) -> bool:
    """Whether parts miss only KEPT, in load and pairs, of the best found."""
    hottest = _part_load(parts, load, int(parts.max()) + 1).max()
    return bool(hottest <= limit * (1 + KEPT) and _within(together, parts) >= (1 - KEPT) * _within(together, best))


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
    bound = np.zeros((num_experts, num_parts))  # the share of each expert's pairs that is with each part's
    share = together / own[:, None]
    busy, room = np.zeros(num_parts), sizes.copy()
    for step in range(num_experts):
        is_free = parts < 0
        if step < num_parts:
            stranger = np.where(is_free, bound.sum(axis=1), np.inf)
            expert = int(np.lexsort((-own, stranger))[0])
            part = step
        else:
            fits = is_free[:, None] & (room > 0) & (busy + load[:, None] <= limit * (1 + SAME))
            score = np.where(fits, bound / (sizes - room), -1.0)
            expert, part = divmod(int(score.argmax()), num_parts)
            if score[expert, part] < 0:
                return None
        parts[expert] = part
        bound[:, part] += share[:, expert]
        busy[part] += load[expert]
        room[part] -= 1
    return parts if busy.max() <= limit * (1 + SAME) else None


def _improved(
    together: Float64Array, load: Float64Array, parts: Int64Array, limit: float, num_parts: int
) -> Int64Array:
    """Exchanges until none gains; several at once where they concern different parts and so do not disturb."""
    parts, experts = parts.copy(), np.arange(len(parts))
    together, load = together.astype(np.float32), load.astype(np.float32)  # half the time, and counts no surer
    more = load - load[:, None]  # what part of `row` gains in load when the expert of `column` replaces it
    least, twice = 1e-6 * max(float(together.sum()), SAME), 2 * together
    bound = together @ (parts[:, None] == np.arange(num_parts)).astype(np.float32)  # [num_experts, num_parts]
    for _ in range(len(parts)):
        to_other = (bound - bound[experts, parts][:, None])[:, parts]
        gain = to_other + to_other.T - twice
        spare = (limit - _part_load(parts, load, num_parts)).astype(np.float32)
        fits = more <= spare[parts][:, None]
        gain = np.where(fits & fits.T, gain, np.float32(-np.inf))  # within a part nothing is gained anyway
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
