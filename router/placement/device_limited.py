"""The policy `device_limited`: whole expert groups, so that a token visits at most `topk_group` shards in a layer."""

from router.placement.request import Placement, PlacementRequest
from router.placement.solver import solve
from router.placement.units import check_shards_have_units, contiguous_units


def place(request: PlacementRequest) -> Placement:
    """Units are the (layer, expert group)s; solver.solve says where they live and which have replicas.

    A token's experts lie in at most `topk_group` groups, each of which is asked of one shard whole, for any number of
    shards and replicas (DeepSeek-V2, arXiv 2405.04434, section 2.2.2). A model without groups has contiguous sets as
    units, and no such bound. Raises PlacementError, PlacementDoesNotFit.
    """
    check_shards_have_units(request)
    expert_to_unit = contiguous_units(request)
    return Placement(expert_to_unit=expert_to_unit, unit_to_ep_ranks=solve(request, expert_to_unit, request.num_units))
