"""Requests for tests: any that a policy may get, and DeepSeek-V2's size under a skewed load."""

import numpy as np
from hypothesis import strategies as st

from router.expert_map import ExpertMap
from router.gate_config import GateConfig, TopkMethod
from router.placement import PlacementRequest
from tests.fake_experts import greedy_gate, grouped_gate

EXPERT_BYTES = 100


def v2_gate() -> GateConfig:
    return GateConfig(
        n_routed_experts=160,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=3,
        topk_method=TopkMethod.GROUP_LIMITED_GREEDY,
    )


def zipf_load(num_layers: int, num_experts: int, exponent: float = 1.1, seed: int = 0) -> np.ndarray:
    """Each layer's experts in a random order of popularity: [num_layers, num_experts]."""
    rng = np.random.default_rng(seed)
    popularity = np.arange(1, num_experts + 1) ** -exponent
    return np.stack([rng.permutation(1e6 * popularity / popularity.sum()) for _ in range(num_layers)])


def v2_request(ep_size: int, redundancy: float = 0.0, seed: int = 0, **changes) -> PlacementRequest:
    fields = {"moe_layer_ids": tuple(range(1, 60)), "gate": v2_gate(), "load": zipf_load(59, 160, seed=seed)}
    return PlacementRequest(**{**fields, "ep_size": ep_size, "redundancy": redundancy, **changes})


@st.composite
def requests(draw, with_groups=None, max_shards=7) -> PlacementRequest:
    """Small: three layers of 16 experts; what is drawn is always possible to place."""
    is_grouped = draw(st.booleans()) if with_groups is None else with_groups
    ep_size = draw(st.integers(1, max_shards))
    num_domains = draw(st.integers(1, ep_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    load = rng.pareto(1.0, (3, 16)) * draw(st.sampled_from([0.0, 1.0, 1e6]))
    coactivation = rng.random((3, 16, 16)) if draw(st.booleans()) else None
    return PlacementRequest(
        moe_layer_ids=(1, 2, 4),
        gate=grouped_gate() if is_grouped else greedy_gate(),
        ep_size=ep_size,
        num_replicas=draw(st.integers(1, min(ep_size, 3))),
        redundancy=draw(st.sampled_from([0.0, 0.25, 0.5, 2.0])),
        expert_bytes=EXPERT_BYTES,
        shard_speeds=tuple(rng.choice([0.5, 1.0, 2.0], ep_size).tolist()) if draw(st.booleans()) else None,
        shard_domains=tuple(f"node{shard % num_domains}" for shard in range(ep_size)),
        load=load if draw(st.booleans()) else None,
        coactivation=coactivation + coactivation.transpose(0, 2, 1) if coactivation is not None else None,
    )


def experts_by_shard(expert_map: ExpertMap) -> list[int]:
    return [sum(len(unit.expert_ids) for unit in expert_map.units_of(ep_rank)) for ep_rank in range(expert_map.ep_size)]


def num_replicas(expert_map: ExpertMap) -> np.ndarray:
    """Of each unit: [num_moe_layers, num_units]."""
    return (expert_map.unit_to_ep_ranks >= 0).sum(axis=2)
