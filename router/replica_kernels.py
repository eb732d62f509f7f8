"""The choice among replicas alone, as compiled plans make it (native/replicas.h): for replays, which have no rows."""

import ctypes
from ctypes import c_int32, c_void_p

import numpy as np

from router.compiled import native
from router.expert_map import Int64Array
from router.shard_queues import ExpectedQueues


class _ChoiceCall(ctypes.Structure):
    _fields_ = (
        ("units", c_void_p),
        ("unit_to_ep_ranks", c_void_p),  # this and the next three: struct Replicas
        ("waits", c_void_p),
        ("seconds_per_assignment", c_void_p),
        ("max_replicas", c_int32),
        ("padding", c_int32),
        ("ep_ranks", c_void_p),
        ("num_rows", c_int32),
        ("top_k", c_int32),
    )


def choose_for_rows(units: Int64Array, unit_to_ep_ranks: Int64Array, queues: ExpectedQueues) -> Int64Array:
    """The shards that plan_layer would ask: [num_rows, top_k], as units. Only where the library is built.

    units: [num_rows, top_k] int64, those of each row's experts; unit_to_ep_ranks: as in plan_layer, each unit named has
    a shard; queues: grow with what is chosen.
    """
    library = native()
    assert library is not None
    units, unit_to_ep_ranks = np.ascontiguousarray(units), np.ascontiguousarray(unit_to_ep_ranks)
    assert units.min(initial=0) >= 0
    assert units.max(initial=0) < len(unit_to_ep_ranks)
    ep_ranks = np.empty_like(units)
    call = _ChoiceCall(
        units.ctypes.data,
        unit_to_ep_ranks.ctypes.data,
        queues.waits_s.ctypes.data,
        queues.seconds_per_assignment.ctypes.data,
        unit_to_ep_ranks.shape[1],
        0,
        ep_ranks.ctypes.data,
        *units.shape,
    )
    library.mobula_choose_replicas(ctypes.addressof(call))
    return ep_ranks
