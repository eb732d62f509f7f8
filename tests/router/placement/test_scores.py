"""Scores that can be computed by hand."""

import numpy as np
import pytest

from router.expert_map import ExpertMap
from router.placement.scores import (
    balancedness,
    balancedness_by_layer,
    expected_step_time,
    hottest_in_layer,
    shard_load,
)

LOAD = np.array([[6.0, 2.0, 3.0, 1.0], [0.0, 0.0, 4.0, 4.0]])


@pytest.fixture
def expert_map() -> ExpertMap:
    """Units of two experts; in the first layer unit 0 has two replicas, in the second each has one."""
    return ExpertMap(
        placement_version=1,
        ep_size=2,
        moe_layer_ids=(1, 2),
        expert_to_unit=np.array([[0, 0, 1, 1], [0, 0, 1, 1]]),
        unit_to_ep_ranks=np.array([[[0, 1], [1, -1]], [[1, -1], [0, -1]]]),
    )


def test_a_replica_carries_an_equal_share(expert_map) -> None:
    assert shard_load(expert_map, LOAD).tolist() == [[4.0, 8.0], [8.0, 0.0]]


def test_layers_that_are_uneven_one_way_and_the_other_are_balanced_together(expert_map) -> None:
    assert balancedness(expert_map, LOAD) == pytest.approx(10 / 12)
    assert balancedness_by_layer(expert_map, LOAD) == pytest.approx([6 / 8, 4 / 8])


def test_a_slow_shard_is_busy_longer(expert_map) -> None:
    speeds = (3.0, 1.0)  # 1.5 and 0.5 with mean 1: busy 8 and 16
    assert balancedness(expert_map, LOAD, speeds) == pytest.approx(10 / 16)


def test_the_hottest_shard_is_measured_in_units_of_average_load(expert_map) -> None:
    assert hottest_in_layer(expert_map, LOAD, n_group=2) == pytest.approx([8 / 6, 8 / 4])


def test_a_step_waits_for_the_hottest_shard_of_each_layer_and_for_the_others_in_flight(expert_map) -> None:
    assert expected_step_time(expert_map, LOAD, num_in_flight=1) == 16.0
    assert expected_step_time(expert_map, LOAD, num_in_flight=3) == pytest.approx((16 + 2 * 12) / 3)
    assert expected_step_time(expert_map, LOAD) == pytest.approx((16 + 12) / 2)


def test_no_load_is_perfectly_balanced(expert_map) -> None:
    nothing = np.zeros((2, 4))
    assert balancedness(expert_map, nothing) == 1.0
    assert balancedness_by_layer(expert_map, nothing).tolist() == [1.0, 1.0]
    assert hottest_in_layer(expert_map, nothing, 2).tolist() == [0.0, 0.0]
