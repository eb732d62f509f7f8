"""Which replica is asked, as replay has it: the router's own choice, or a hash of token and unit."""

from collections.abc import Callable

import numpy as np

from router.compiled import native
from router.expert_map import ExpertMap, Int64Array
from router.replica_kernels import choose_for_rows
from router.replicas import choose_replicas
from router.shard_queues import ExpectedQueues

# (expert map, units [num_moe_layers, num_tokens, top_k], step number) -> ep_ranks of the same shape
ReplicaChoice = Callable[[ExpertMap, Int64Array, int], Int64Array]

_MULTIPLIERS = np.array((0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9), dtype=np.uint64)


def router_choice(expert_map: ExpertMap, units: Int64Array, step: int) -> Int64Array:
    """As the router chooses for a step of tokens in every layer, from queues that are empty and shards alike.

    Without the compiled library: one replica of a unit for all of a step's tokens, in turn (router/replicas.py).
    """
    if expert_map.max_replicas == 1:
        return np.take_along_axis(expert_map.unit_to_ep_ranks[:, :, 0], units.reshape(len(units), -1), 1).reshape(
            units.shape
        )
    if native() is not None:
        alike = np.ones(expert_map.ep_size)
        return np.stack(
            [
                choose_for_rows(mine, ranks, ExpectedQueues(np.zeros(expert_map.ep_size), alike))
                for mine, ranks in zip(units.astype(np.int64), expert_map.unit_to_ep_ranks, strict=True)
            ]
        )
    chosen = np.stack([choose_replicas(ranks, turn=step) for ranks in expert_map.unit_to_ep_ranks])
    return np.take_along_axis(chosen, units.reshape(len(units), -1), 1).reshape(units.shape)


def hashed_choice(expert_map: ExpertMap, units: Int64Array, step: int) -> Int64Array:
    """Any replica of each (token, unit) on its own, evenly: how engines that know no better spread a hot expert."""
    num_layers, num_tokens, _ = units.shape
    layers = np.arange(num_layers)[:, None, None]
    num_replicas = (expert_map.unit_to_ep_ranks >= 0).sum(axis=-1)  # [num_moe_layers, num_units]
    tokens = np.arange(num_tokens, dtype=np.uint64)[None, :, None] + np.uint64(step << 32)
    mixed = tokens * _MULTIPLIERS[0] + units.astype(np.uint64) * _MULTIPLIERS[1]
    mixed += layers.astype(np.uint64) * _MULTIPLIERS[2]
    mixed = (mixed ^ (mixed >> np.uint64(31))) * _MULTIPLIERS[1]  # the high bits depend on everything now
    replica = (mixed >> np.uint64(33)).astype(np.int64) % num_replicas[layers, units].clip(min=1)
    ep_ranks: Int64Array = expert_map.unit_to_ep_ranks[layers, units, replica]
    return ep_ranks
