import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.expert_map import ExpertMap
from router.gate_config import GateConfig
from router.placement import PlacementDoesNotFit, PlacementError, PlacementRequest, place_units
from tests.fake_experts import greedy_gate, grouped_gate


def request(**changes) -> PlacementRequest:
    return PlacementRequest(**{"moe_layer_ids": (1, 2, 3), "gate": grouped_gate(), "ep_size": 4, **changes})


def num_units_by_shard(expert_map: ExpertMap) -> list[int]:
    return [len(expert_map.units_of(ep_rank)) for ep_rank in range(expert_map.ep_size)]


def test_units_are_the_expert_groups_where_the_gate_is_limited_to_groups():
    expert_map = place_units(request())
    assert expert_map.expert_to_unit.tolist() == [[unit for unit in range(8) for _ in range(2)]] * 3


def test_each_layer_starts_one_shard_further():
    expert_map = place_units(request(ep_size=4))
    assert expert_map.unit_to_ep_ranks[:, :, 0].tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 3], [1, 2, 3, 0, 1, 2, 3, 0], [2, 3, 0, 1, 2, 3, 0, 1],
    ]  # fmt: skip


@given(
    num_layers=st.integers(1, 12),
    n_group=st.sampled_from([1, 2, 4, 8, 16]),
    num_replicas=st.integers(1, 4),
    data=st.data(),
)
def test_shards_and_layers_are_as_even_as_they_can_be(num_layers, n_group, num_replicas, data):
    gate = grouped_gate(n_group=n_group, topk_group=n_group)
    pairs_per_layer = n_group * num_replicas
    ep_size = data.draw(st.integers(num_replicas, max(num_replicas, num_layers * pairs_per_layer)))
    expert_map = place_units(
        PlacementRequest(
            moe_layer_ids=tuple(range(1, num_layers + 1)), gate=gate, ep_size=ep_size, num_replicas=num_replicas
        )
    )
    per_shard = num_units_by_shard(expert_map)
    assert sum(per_shard) == num_layers * pairs_per_layer  # no two replicas of a unit share a shard
    assert max(per_shard) - min(per_shard) <= 1
    for row in expert_map.unit_to_ep_ranks:
        counts = np.bincount(row.ravel(), minlength=ep_size)
        assert (counts > 0).sum() == min(ep_size, pairs_per_layer)
        assert counts.max() <= -(-pairs_per_layer // ep_size)


@pytest.mark.parametrize(("n_routed_experts", "num_units"), [(64, 8), (60, 6), (7, 7), (11, 1), (4, 4)])
def test_without_groups_units_are_the_largest_divisor_up_to_eight(n_routed_experts, num_units):
    gate = GateConfig(n_routed_experts=n_routed_experts, num_experts_per_tok=2)
    assert place_units(request(gate=gate, ep_size=1)).num_units == num_units


def test_units_that_do_not_divide_the_experts_differ_by_one_expert():
    expert_map = place_units(request(gate=greedy_gate(), units_per_layer=5, ep_size=5))
    sizes = np.bincount(expert_map.expert_to_unit[0])
    assert sorted(sizes.tolist()) == [3, 3, 3, 3, 4]
    assert (np.diff(expert_map.expert_to_unit[0]) >= 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_layer_ids": ()}, "no routed experts"),
        ({"ep_size": 25}, r"ep_size is 25, but there are only 24 units .*3 layers x 8 units x 1 replicas"),
        ({"ep_size": 2, "num_replicas": 3}, r"num_replicas is 3, must be 1 to ep_size \(2\)"),
        ({"num_replicas": 0}, "num_replicas is 0"),
        ({"units_per_layer": 4}, "limited to expert groups"),
        ({"gate": greedy_gate(), "units_per_layer": 17}, "must be 1 to the 16 experts"),
    ],
)
def test_what_cannot_be_placed_is_refused_with_the_numbers(changes, message):
    with pytest.raises(PlacementError, match=message):
        place_units(request(**changes))


def test_a_shard_that_would_be_too_full_is_named_with_bytes_limit_and_way_out():
    with pytest.raises(PlacementDoesNotFit, match=r"shard 0 needs .*\(1200 bytes\).*\(1199 bytes\).*more than 4"):
        place_units(request(expert_bytes=100, max_weight_bytes=1199))
    place_units(request(expert_bytes=100, max_weight_bytes=1200))
