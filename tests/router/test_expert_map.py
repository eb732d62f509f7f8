import pickle

import numpy as np
import pytest

from router.expert_map import ExpertMap, ExpertMapError, PlacementUnit
from router.gate_config import GateConfig, TopkMethod
from tests.fake_experts import greedy_gate, grouped_gate, placed


def example(**changes) -> ExpertMap:
    """The one in the module's docstring."""
    fields = {
        "placement_version": 7,
        "ep_size": 2,
        "moe_layer_ids": (1,),
        "expert_to_unit": np.array([[0, 0, 1, 1]]),
        "unit_to_ep_ranks": np.array([[[0, -1], [0, 1]]]),
    }
    return ExpertMap(**{**fields, **changes})


def test_the_documented_example_says_what_its_docstring_says():
    expert_map = example()
    assert expert_map.units_of(1) == (PlacementUnit(1, 1, (2, 3)),)
    assert expert_map.units_of(0) == (PlacementUnit(1, 0, (0, 1)), PlacementUnit(1, 1, (2, 3)))
    assert (expert_map.n_routed_experts, expert_map.num_units, expert_map.max_replicas) == (4, 2, 2)


def test_shards_are_complete_when_every_expert_is_on_one_of_them():
    expert_map = example()
    assert [expert_map.is_complete_on(ranks) for ranks in ([0], [1], [0, 1], [])] == [True, False, True, False]
    other_layer = {
        "moe_layer_ids": (1, 2),
        "expert_to_unit": np.array([[0, 0, 1, 1], [0, 0, 0, 0]]),  # has no unit 1
        "unit_to_ep_ranks": np.array([[[0, -1], [0, 1]], [[0, 1], [-1, -1]]]),
    }
    assert example(**other_layer).is_complete_on([0])


def test_row_of_a_layer_without_routed_experts_is_refused_by_name():
    assert example().row(1) == 0
    with pytest.raises(ExpertMapError, match="layer 0 has no routed experts"):
        example().row(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement_version": 0}, "start at 1"),
        ({"ep_size": 0}, "start at 1"),
        ({"moe_layer_ids": (1, 1)}, "do not ascend"),
        ({"moe_layer_ids": (1, 2)}, "2 layers"),
        ({"expert_to_unit": np.array([0, 0, 1, 1])}, "2 dimensions"),
        ({"expert_to_unit": np.array([[0, 0, 1, 1]], dtype=np.int32)}, "int64"),
        ({"expert_to_unit": np.array([[0, 0, 1, 2]])}, "there are 2"),
        ({"expert_to_unit": np.array([[0, 0, 1, -1]])}, "there are 2"),
        ({"unit_to_ep_ranks": np.array([[[0, -1], [0, 0]]])}, "two replicas on a shard"),
        ({"unit_to_ep_ranks": np.array([[[0, -1], [0, 2]]])}, "ep_size is 2"),
        ({"unit_to_ep_ranks": np.array([[[-1, 0], [0, 1]]])}, "at the end"),
        ({"unit_to_ep_ranks": np.array([[[-1, -1], [0, 1]]])}, "has experts but no shard"),
    ],
)
def test_a_map_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ExpertMapError, match=message):
        example(**changes)


def test_a_layer_may_have_fewer_units_than_another():
    expert_map = example(
        moe_layer_ids=(1, 2),
        expert_to_unit=np.array([[0, 0, 1, 1], [0, 0, 0, 0]]),
        unit_to_ep_ranks=np.array([[[0], [1]], [[1], [-1]]]),
    )
    assert expert_map.units_of(1) == (PlacementUnit(1, 1, (2, 3)), PlacementUnit(2, 0, (0, 1, 2, 3)))


def test_nobody_can_write_to_a_map_and_it_survives_pickling():
    expert_map = example()
    with pytest.raises(ValueError, match="read-only"):
        expert_map.expert_to_unit[0, 0] = 1
    copy = pickle.loads(pickle.dumps(expert_map))
    assert copy.units_of(1) == expert_map.units_of(1)
    assert copy.placement_version == 7


@pytest.mark.parametrize(("ep_size", "bound"), [(1, 1), (2, 2), (3, 3), (8, 3), (24, 3)])
def test_with_a_unit_per_group_a_token_visits_at_most_topk_group_shards(ep_size, bound):
    gate = grouped_gate(topk_group=3)
    assert placed(gate, ep_size).max_ranks_per_token(gate) == bound


def test_without_groups_the_bound_is_what_the_units_allow():
    gate = greedy_gate()  # 4 experts a token, 8 units
    assert placed(gate, 8).max_ranks_per_token(gate) == 4
    assert placed(gate, 3).max_ranks_per_token(gate) == 3


def test_units_of_one_expert_break_the_limit_and_the_bound_says_so():
    gate = GateConfig(
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        topk_method=TopkMethod.GROUP_LIMITED_GREEDY,
    )
    expert_map = example(
        ep_size=4, expert_to_unit=np.array([[0, 1, 2, 3]]), unit_to_ep_ranks=np.array([[[0], [1], [2], [3]]])
    )
    assert expert_map.max_ranks_per_token(gate) == 2  # topk_group is 1
