"""Which shards may be asked for each unit when several hold it.

Any choice gives the same bits (see plan.py), so this may follow load and health freely. Compiled plans choose for each
row (native/replicas.h); without the library units take their replicas in turn. Knows nothing of transports.
"""

from collections.abc import Collection

import numpy as np

from router.expert_map import Int64Array


def choose_replicas(unit_to_ep_ranks: Int64Array, turn: int, avoid: Collection[int] = ()) -> Int64Array:
    """One shard for each unit: its replicas in turn, leaving out shards in `avoid` while another replica is left.

    unit_to_ep_ranks: [num_units, max_replicas] int64, -1 pads. Returns [num_units] int64; -1 for a unit without shards.
    """
    if unit_to_ep_ranks.shape[1] == 1:
        return unit_to_ep_ranks[:, 0]
    usable = usable_replicas(unit_to_ep_ranks, avoid) >= 0  # [num_units, max_replicas]
    num_usable = usable.sum(axis=-1).clip(min=1)
    wanted = (np.arange(len(usable)) + turn) % num_usable  # [num_units], the how-manieth usable replica
    index = ((usable.cumsum(axis=-1) - 1 == wanted[:, None]) & usable).argmax(axis=-1)
    ep_ranks: Int64Array = unit_to_ep_ranks[np.arange(len(usable)), index]
    return ep_ranks


def usable_replicas(unit_to_ep_ranks: Int64Array, avoid: Collection[int]) -> Int64Array:
    """The same with -1 for shards in `avoid`, but for units that no other shard has."""
    if not avoid:
        return unit_to_ep_ranks
    usable = (unit_to_ep_ranks >= 0) & ~np.isin(unit_to_ep_ranks, list(avoid))
    return np.where(usable | ~usable.any(axis=-1, keepdims=True), unit_to_ep_ranks, -1)


def others_only(unit_to_ep_ranks: Int64Array, avoid: Collection[int]) -> Int64Array:
    """The same with -1 for shards in `avoid`, and nothing but -1 for units that no other shard has."""
    return np.where(np.isin(unit_to_ep_ranks, list(avoid)), -1, unit_to_ep_ranks)
