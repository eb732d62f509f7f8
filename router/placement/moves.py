"""What it costs to go from one expert map to another."""

import numpy as np
import numpy.typing as npt

from router.expert_map import ExpertMap


def held_experts(expert_map: ExpertMap, ep_size: int) -> npt.NDArray[np.bool_]:
    """Which shard holds which expert: [num_moe_layers, n_routed_experts, ep_size]; shards beyond ep_size are left out.

    Does not depend on how experts are cut into units, so maps of different policies can be compared.
    """
    num_layers, num_units, _ = expert_map.unit_to_ep_ranks.shape
    by_unit = np.zeros((num_layers, num_units, ep_size + 1), dtype=np.bool_)
    ranks = np.where(expert_map.unit_to_ep_ranks < ep_size, expert_map.unit_to_ep_ranks, -1)
    np.put_along_axis(by_unit, ranks, values=True, axis=2)  # -1 writes to the last place, which is cut off
    return by_unit[np.arange(num_layers)[:, None], expert_map.expert_to_unit, :ep_size]


def moved_bytes(old: ExpertMap, new: ExpertMap, expert_bytes: int) -> int:
    """Weights that shards must fetch because they hold them in `new` and not in `old`.

    A shard that only one of the maps has holds nothing in the other. Both maps are of one model.
    """
    ep_size = max(old.ep_size, new.ep_size)
    return expert_bytes * int((held_experts(new, ep_size) & ~held_experts(old, ep_size)).sum())
