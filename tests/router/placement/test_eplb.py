"""DeepSeek's published example, and what an independent port of the algorithm gives for it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.placement import PlacementDoesNotFit, PlacementError, PlacementRequest, place_units
from router.placement.eplb import Rebalanced, pack_evenly, rebalance_experts, replicate
from router.placement.scores import balancedness_by_layer, shard_load
from router.placement.slots import spread_replicas
from tests.fake_experts import greedy_gate
from tests.router.placement.requests import experts_by_shard, num_replicas, v2_request

LOAD = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]],
    dtype=np.float64,
)
COUNTS = [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]


def loads(result: Rebalanced) -> np.ndarray:
    """Of 8 shards with 2 experts each."""
    share = LOAD / result.logical_counts
    return np.take_along_axis(share, result.physical_to_logical, axis=1).reshape(2, 8, 2).sum(axis=2)


def test_the_hierarchical_form_is_the_published_one_to_the_bit() -> None:
    result = rebalance_experts(LOAD, 16, num_groups=4, num_nodes=2, num_shards=8)
    assert result.physical_to_logical.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert result.logical_counts.tolist() == COUNTS
    assert result.logical_to_physical.tolist() == [
        [[12, -1], [15, 13], [11, -1], [6, -1], [7, 5], [0, 2], [1, -1], [3, -1], [4, -1], [9, -1], [8, 10], [14, -1]],
        [[13, -1], [15, 11], [8, -1], [14, -1], [9, -1], [10, 12], [2, 4], [0, -1], [6, 3], [7, -1], [1, -1], [5, -1]],
    ]  # fmt: skip
    shards = loads(result)
    assert shards.tolist() == [
        [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152],
        [173, 179.5, 120.5, 172, 123, 152, 118.5, 117.5],
    ]
    assert (shards.mean(axis=1) / shards.max(axis=1)).round(4).tolist() == [0.8277, 0.8050]


def test_the_global_form_is_the_published_one_to_the_bit() -> None:
    result = rebalance_experts(LOAD, 16, num_groups=1, num_nodes=1, num_shards=8)
    assert result.physical_to_logical.tolist() == [
        [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
        [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7],
    ]
    shards = loads(result)
    assert (shards.mean(axis=1) / shards.max(axis=1)).round(4).tolist() == [0.9323, 0.8401]


def test_two_replicas_that_the_algorithm_puts_on_one_shard_are_parted() -> None:
    raw = rebalance_experts(LOAD, 16, num_groups=1, num_nodes=1, num_shards=8).physical_to_logical.reshape(2, 8, 2)
    assert raw[0, 7].tolist() == [1, 1], "the published algorithm does that here"
    request = PlacementRequest(moe_layer_ids=(1, 2), gate=greedy_gate_of(12), ep_size=8, redundancy=1 / 3, load=LOAD)
    expert_map = place_units(request, policy="eplb")
    assert num_replicas(expert_map).sum(axis=1).tolist() == [16, 16]
    assert experts_by_shard(expert_map) == [4] * 8
    assert (balancedness_by_layer(expert_map, LOAD) >= [0.92, 0.84]).all(), "little is lost"


def greedy_gate_of(n_routed_experts: int):
    return greedy_gate().__class__(n_routed_experts=n_routed_experts, num_experts_per_tok=2)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), num_nodes=st.sampled_from([1, 2, 4]), extra=st.integers(0, 3))
def test_every_physical_expert_is_some_logical_one_and_each_has_its_count(seed, num_nodes, extra) -> None:
    load = np.random.default_rng(seed).pareto(1.0, (3, 16))
    result = rebalance_experts(load, 16 + 8 * extra, num_groups=4, num_nodes=num_nodes, num_shards=8)
    for row, counts, places in zip(*result[:1], result.logical_counts, result.logical_to_physical, strict=True):
        assert np.bincount(row, minlength=16).tolist() == counts.tolist()
        for expert, physical in enumerate(places):
            assert sorted(physical[physical >= 0].tolist()) == np.flatnonzero(row == expert).tolist()


def test_packs_hold_equally_many_and_ties_go_to_the_lower_pack() -> None:
    pack, place = pack_evenly(np.ones((1, 6), dtype=np.float32), 3)
    assert pack.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert place.tolist() == [[0, 0, 0, 1, 1, 1]]


def test_the_expert_whose_replicas_carry_most_gets_the_next() -> None:
    replica_of, rank, counts = replicate(np.array([[9, 4, 1]], dtype=np.float32), 6)
    assert replica_of.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert rank.tolist() == [[0, 0, 0, 1, 2, 1]]
    assert counts.tolist() == [[3, 2, 1]]


def test_experts_that_do_not_divide_the_shards_are_filled_up_with_replicas() -> None:
    request = v2_request(24)
    expert_map = place_units(request, policy="eplb")
    assert num_replicas(expert_map).sum(axis=1).tolist() == [168] * 59  # 160 is no multiple of 24
    assert experts_by_shard(expert_map) == [7 * 59] * 24
    limited = v2_request(24, redundancy=0.25, expert_bytes=1, max_weight_bytes=8 * 59)
    assert experts_by_shard(place_units(limited, policy="eplb")) == [8 * 59] * 24, "what fits, where 9 do not"


def test_groups_are_packed_on_failure_domains_of_one_size() -> None:
    domains = tuple(f"node{shard % 2}" for shard in range(8))
    expert_map = place_units(v2_request(8, shard_domains=domains), policy="eplb")
    on_node = expert_map.unit_to_ep_ranks[:, :, 0].reshape(59, 8, 20) % 2
    assert (on_node == on_node[:, :, :1]).all(), "each group lies whole on one node"
    totals = np.stack([shard_load(expert_map, v2_request(8).load)[:, node::2].sum(axis=1) for node in (0, 1)])
    assert (np.abs(totals[0] - totals[1]) / totals.sum(axis=0)).mean() < 0.25


def test_units_of_several_experts_are_refused() -> None:
    request = PlacementRequest(moe_layer_ids=(1,), gate=greedy_gate(), ep_size=2, units_per_layer=8)
    with pytest.raises(PlacementError, match="units of eplb are single experts"):
        place_units(request, policy="eplb")


def test_memory_for_less_than_the_experts_is_refused_with_the_bytes() -> None:
    with pytest.raises(PlacementDoesNotFit, match=r"eplb gives each shard 20 experts .* smallest limit is 1000 bytes"):
        place_units(v2_request(8, expert_bytes=1, max_weight_bytes=1000), policy="eplb")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), ep_size=st.integers(2, 6), per_shard=st.integers(1, 5), num_domains=st.integers(1, 3)
)
def test_any_slots_can_be_repaired_and_shards_keep_their_number(seed, ep_size, per_shard, num_domains) -> None:
    rng = np.random.default_rng(seed)
    num_experts = per_shard * ep_size // 2
    if not num_experts or num_domains > ep_size:
        return
    experts = np.repeat(np.arange(num_experts), 2)
    filler = np.arange(per_shard * ep_size - len(experts)) + num_experts  # experts with one replica
    slots = rng.permutation(np.concatenate([experts, filler])).reshape(1, ep_size, per_shard)
    num_filler = num_experts + len(filler)
    domains = np.arange(ep_size) % num_domains
    mended = spread_replicas(slots, rng.random((1, num_filler)), domains, 1)
    assert sorted(mended.ravel().tolist()) == sorted(slots.ravel().tolist())
    assert all(len(set(shard)) == per_shard for shard in mended[0].tolist())
