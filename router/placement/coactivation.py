"""The policy `coactivation`: experts that fire together live together, for models without expert groups."""

from dataclasses import replace

import numpy as np

from router.expert_map import Int64Array
from router.placement.partition import partition
from router.placement.request import Float64Array, Placement, PlacementRequest
from router.placement.solver import solve
from router.placement.units import check_shards_have_units, contiguous_units, load_or_even


def place(request: PlacementRequest) -> Placement:
    """Units are cut by partition.partition, then placed like all others (solver.solve).

    A token visits as many shards as its experts lie in units of different shards, so there are no more units in a
    layer than shards, unless units_per_layer says so: more are placed for balance alone. Units are contiguous where
    no coactivation is known, and are the expert groups where the model has them: others would break the device limit.
    Units cut anew change the order of sums, so the last bits of logits change with them; units now are therefore kept
    while they serve about as well.
    Raises PlacementError, PlacementDoesNotFit.
    """
    coactivation = request.coactivation
    if coactivation is None or request.gate.is_group_limited:
        check_shards_have_units(request)
        expert_to_unit = contiguous_units(request)
    else:
        if request.units_per_layer is None:
            request = replace(request, units_per_layer=min(request.num_units, request.ep_size))
        check_shards_have_units(request)
        expert_to_unit = _units_that_fire_together(request, coactivation)
    return Placement(expert_to_unit=expert_to_unit, unit_to_ep_ranks=solve(request, expert_to_unit, request.num_units))


def _units_that_fire_together(request: PlacementRequest, coactivation: Float64Array) -> Int64Array:
    """[num_moe_layers, n_routed_experts]; units as large as contiguous ones."""
    load = load_or_even(request)
    sizes = -np.sort(-np.bincount(contiguous_units(request)[0]))
    units = []
    for row in range(request.num_layers):
        now = None if request.current is None else request.current.expert_to_unit[row]
        units.append(partition(coactivation[row], load[row], sizes, now))
    return np.stack(units)
