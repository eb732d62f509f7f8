"""Packs the replicas of a layer on shards so that the busiest has least to do. Knows only one layer at a time.

Hottest first, each on the shard that then is least busy (Graham 1969, longest processing time first); the replicas of a
unit on as many shards. Many layers, or many numbers of replicas for one layer, are packed at once.
"""

import numpy as np
import numpy.typing as npt

from router.expert_map import Int64Array
from router.placement.request import Float64Array


def pack(
    unit_load: Float64Array, counts: Int64Array, speeds: Float64Array
) -> tuple[npt.NDArray[np.bool_], Float64Array]:
    """unit_load, counts (replicas): [num_rows, num_units], a row is a layer; speeds: [ep_size], at least counts.

    Returns who holds what, [num_rows, num_units, ep_size], and how busy shards are, [num_rows, ep_size].
    """
    share = unit_load / counts
    rows = np.arange(len(share))
    holds = np.zeros((*share.shape, len(speeds)), dtype=np.bool_)
    busy = np.zeros((len(share), len(speeds)))
    for unit in np.argsort(-share, axis=1, kind="stable").T:  # [num_rows], another in each row
        after = busy + share[rows, unit][:, None] / speeds
        rank = np.argsort(np.argsort(after, axis=1, kind="stable"), axis=1, kind="stable")
        taken = rank < counts[rows, unit][:, None]
        busy = np.where(taken, after, busy)
        holds[rows, unit] = taken
    return holds, busy


def busiest_when_packed(unit_load: Float64Array, counts: Int64Array, speeds: Float64Array) -> Float64Array:
    """How long the busiest shard of each row takes: [num_rows]."""
    return np.asarray(pack(unit_load, counts, speeds)[1].max(axis=1))
