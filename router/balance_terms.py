"""DeepSeek-V2's terms of balance, of the traffic as it is (arXiv 2405.04434, section 2.2.3). Pure.

The paper's losses are sums over f_i P_i, f'_i P'_i and f''_i P''_i. Here are the f of them, which serving can count: 1
means exactly its even share.

    f    of an expert: how much of its layer's assignments it gets (eq. 24)
    f'   of a shard: how much of a layer's computation it does (eq. 27)
    f''  of a shard: how many of a layer's tokens are sent to it (eq. 30)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.expert_map import ExpertMap
from router.gate_config import GateConfig

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Traffic:
    """What shards computed of late, each assignment weighted by its age; by ep_rank.

    num_tokens: [num_moe_layers, n_routed_experts], (token, expert) pairs. num_rows: [num_moe_layers], tokens received.
    """

    expert_map: ExpertMap
    num_tokens: Mapping[int, Float64Array]
    num_rows: Mapping[int, Float64Array]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BalanceTerms:
    """Of the shards that hold anything, in order of their ep_rank. A layer without traffic has zeros, balancedness 1.

    expert_terms: f, [num_moe_layers, n_routed_experts]. compute_terms: f', [num_moe_layers, num_shards].
    communication_terms: f'', the same shape. balancedness: mean over max of the shards' assignments, by layer;
    total_balancedness: of all layers together. replica_hit_share: of the assignments of units with replicas, those that
    did not go to the unit's first shard; None where no unit has any.
    """

    expert_terms: Float64Array
    compute_terms: Float64Array
    communication_terms: Float64Array
    balancedness: Float64Array
    total_balancedness: float
    replica_hit_share: float | None


def balance_terms(traffic: Traffic, gate: GateConfig) -> BalanceTerms:
    """The terms now."""
    expert_map = traffic.expert_map
    num_layers, num_experts = expert_map.expert_to_unit.shape
    zeros = np.zeros((num_layers, num_experts))
    by_shard = np.stack(
        [traffic.num_tokens.get(rank, zeros) for rank in expert_map.ep_ranks]
    )  # [shards, layers, experts]
    rows = np.stack([traffic.num_rows.get(rank, zeros[:, 0]) for rank in expert_map.ep_ranks], axis=1)
    by_expert, assignments = by_shard.sum(axis=0), by_shard.sum(axis=2).T
    total = by_expert.sum(axis=1, keepdims=True)  # [num_moe_layers, 1]
    num_sent = total / gate.num_experts_per_tok * expert_map.max_ranks_per_token(gate)  # M T
    return BalanceTerms(
        expert_terms=_of_even_share(by_expert, total),
        compute_terms=_of_even_share(assignments, total),
        communication_terms=_of_even_share(rows, num_sent),
        balancedness=_balancedness(assignments),
        total_balancedness=float(_balancedness(assignments.sum(axis=0, keepdims=True))[0]),
        replica_hit_share=_replica_hit_share(expert_map, by_shard),
    )


def _of_even_share(counts: Float64Array, total: Float64Array) -> Float64Array:
    """counts: [num_moe_layers, n]; total: [num_moe_layers, 1]."""
    return np.asarray(np.divide(counts * counts.shape[1], total, out=np.zeros(counts.shape), where=total > 0))


def _balancedness(assignments: Float64Array) -> Float64Array:
    most = assignments.max(axis=1)
    return np.asarray(np.divide(assignments.mean(axis=1), most, out=np.ones(len(most)), where=most > 0))


def _replica_hit_share(expert_map: ExpertMap, by_shard: Float64Array) -> float | None:
    ranks = np.take_along_axis(expert_map.unit_to_ep_ranks, expert_map.expert_to_unit[:, :, None], axis=1)
    has_replicas = (ranks >= 0).sum(axis=2) > 1  # [num_moe_layers, n_routed_experts]
    if not has_replicas.any():
        return None
    places = np.searchsorted(np.asarray(expert_map.ep_ranks), ranks[:, :, 0])
    first = np.take_along_axis(by_shard, places[None], axis=0)[0]
    total = float(by_shard.sum(axis=0)[has_replicas].sum())
    return 1 - float(first[has_replicas].sum()) / total if total else 0.0
