import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.expert_map import ExpertMap
from router.placement import PlacementError, PlacementRequest, moved_bytes, place_units
from router.placement.matching import cheapest_matching
from tests.fake_experts import greedy_gate, grouped_gate


def one_layer(units: list[int], ranks: list[list[int]], ep_size: int = 2) -> ExpertMap:
    return ExpertMap(
        placement_version=1,
        ep_size=ep_size,
        moe_layer_ids=(1,),
        expert_to_unit=np.array([units]),
        unit_to_ep_ranks=np.array([ranks]),
    )


def test_only_experts_that_a_shard_did_not_hold_are_moved() -> None:
    old = one_layer([0, 0, 1, 1], [[0, -1], [0, 1]])
    assert moved_bytes(old, old, 10) == 0
    assert moved_bytes(old, one_layer([0, 0, 1, 1], [[0], [1]]), 10) == 0, "dropping a replica moves nothing"
    assert moved_bytes(old, one_layer([0, 0, 1, 1], [[1], [0]]), 10) == 20
    assert moved_bytes(old, one_layer([0, 0, 1, 1], [[2], [0]], ep_size=3), 10) == 20, "to a shard that is new"


def test_units_may_be_cut_anew() -> None:
    old = one_layer([0, 0, 1, 1], [[0], [1]])
    assert moved_bytes(old, one_layer([0, 1, 2, 3], [[0], [0], [1], [0]]), 10) == 10


def test_a_current_map_of_another_model_is_refused() -> None:
    current = place_units(PlacementRequest(moe_layer_ids=(1, 2), gate=grouped_gate(), ep_size=2))
    with pytest.raises(PlacementError, match="not of one model"):
        PlacementRequest(moe_layer_ids=(1,), gate=grouped_gate(), ep_size=2, current=current)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"redundancy": -0.5}, "redundancy is -0.5"),
        ({"shard_speeds": (1.0,)}, "shard_speeds has 1 values, needs one for each of the 2 shards"),
        ({"shard_speeds": (1.0, 0.0)}, "each must be above 0"),
        ({"shard_domains": ("a", "b", "c")}, "shard_domains has 3 values"),
        ({"max_weight_bytes": (1, 2, 3)}, "max_weight_bytes has 3 values"),
        ({"load": np.ones((2, 16))}, r"load is \[2, 16\], needs \[1, 16\]"),
        ({"load": -np.ones((1, 16))}, "load has negative"),
        ({"coactivation": np.ones((1, 16))}, r"coactivation is \[1, 16\]"),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(changes, message) -> None:
    with pytest.raises(PlacementError, match=message):
        PlacementRequest(moe_layer_ids=(1,), gate=greedy_gate(), ep_size=2, **changes)


@given(num_rows=st.integers(1, 5), more=st.integers(0, 2), seed=st.integers(0, 2**32))
def test_the_matching_is_the_cheapest_of_all(num_rows, more, seed) -> None:
    cost = np.random.default_rng(seed).integers(-5, 6, (num_rows, num_rows + more)).astype(float)
    columns = cheapest_matching(cost)
    assert len(set(columns.tolist())) == num_rows
    choices = itertools.permutations(range(num_rows + more), num_rows)
    assert cost[np.arange(num_rows), columns].sum() == min(cost[np.arange(num_rows), list(c)].sum() for c in choices)
