"""Where each placement unit lives and which units get replicas. Pure and deterministic.

A policy is a function of a PlacementRequest; a new one is one file and one line in POLICIES.
"""

from collections.abc import Callable, Mapping

from router.expert_map import ExpertMap
from router.placement import coactivation, device_limited, eplb, static
from router.placement.moves import moved_bytes
from router.placement.request import Placement, PlacementDoesNotFit, PlacementError, PlacementRequest
from router.placement.units import check_weight_bytes

Policy = Callable[[PlacementRequest], Placement]

POLICIES: Mapping[str, Policy] = {
    "static": static.place,
    "device_limited": device_limited.place,
    "coactivation": coactivation.place,
    "eplb": eplb.place,
}

__all__ = [
    "POLICIES",
    "Placement",
    "PlacementDoesNotFit",
    "PlacementError",
    "PlacementRequest",
    "Policy",
    "moved_bytes",
    "place_units",
]


def place_units(request: PlacementRequest, placement_version: int = 1, policy: str = "static") -> ExpertMap:
    """The policy's placement as an expert map. Raises PlacementError, PlacementDoesNotFit."""
    if policy not in POLICIES:
        raise PlacementError(f"no placement policy {policy!r}; policies are {', '.join(POLICIES)}")
    placement = POLICIES[policy](request)
    check_weight_bytes(request, placement)
    return ExpertMap(
        placement_version=placement_version,
        ep_size=request.ep_size,
        moe_layer_ids=request.moe_layer_ids,
        expert_to_unit=placement.expert_to_unit,
        unit_to_ep_ranks=placement.unit_to_ep_ranks,
    )
