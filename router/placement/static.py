"""The policy `static`: every unit's shards from the model's shape alone. Knows nothing of load, speeds or the past."""

import math

import numpy as np

from router.expert_map import Int64Array
from router.placement.request import Placement, PlacementError, PlacementRequest
from router.placement.units import check_shards_have_units, contiguous_units


def place(request: PlacementRequest) -> Placement:
    """Shards take units in turn, starting one further in every layer.

    Every shard gets the same number of units over all layers, give or take one; every layer is spread over as many
    shards as it can be; no two replicas of a unit are on one shard. Reads only the model's shape, ep_size and
    num_replicas. Raises PlacementError for redundancy, which needs a policy that looks at load, and for more shards
    than units.
    """
    if request.redundancy:
        raise PlacementError(
            f"redundancy is {request.redundancy}, but the static placement replicates all units alike: "
            "raise num_replicas or choose another policy"
        )
    check_shards_have_units(request)
    return Placement(expert_to_unit=contiguous_units(request), unit_to_ep_ranks=_unit_to_ep_ranks(request))


def _unit_to_ep_ranks(request: PlacementRequest) -> Int64Array:
    """[num_moe_layers, num_units, num_replicas].

    Within a layer consecutive (unit, replica) pairs go to consecutive shards. Each layer starts where the one before
    ended, which evens out the totals; each time the totals are even, it starts one further, so that unit 0 is not
    always on the same shards.
    """
    pairs_per_layer = request.num_units * request.num_replicas
    even_after = request.ep_size // math.gcd(pairs_per_layer, request.ep_size)  # layers
    layers = np.arange(request.num_layers).reshape(-1, 1)
    first = layers * pairs_per_layer + layers // even_after  # [num_moe_layers, 1]
    ep_ranks = (first + np.arange(pairs_per_layer)) % request.ep_size  # [num_moe_layers, pairs_per_layer]
    return ep_ranks.reshape(-1, request.num_units, request.num_replicas)
