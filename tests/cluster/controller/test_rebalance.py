from dataclasses import replace

import numpy as np
import pytest

from cluster.controller.rebalance import Hysteresis, parts_to_stage, plan_rebalance, weight_bytes_while_moving
from router.expert_map import ExpertMap
from router.placement.moves import moved_bytes
from tests.fake_experts import grouped_gate, placed

ALWAYS = Hysteresis(min_gain=0.0, min_tokens=0)
OLD = placed(grouped_gate(), 2)  # eight units of two experts in each of three layers


def moved(*units: tuple[int, int, int]) -> ExpertMap:
    """OLD as version 2, with (row, unit) on another shard."""
    ranks = OLD.unit_to_ep_ranks.copy()
    for row, unit_id, ep_rank in units:
        ranks[row, unit_id] = ep_rank
    return replace(OLD, placement_version=2, unit_to_ep_ranks=ranks)


def hot(*units: tuple[int, int]) -> np.ndarray:
    """One assignment an expert, a hundred for those of the (row, unit)s."""
    load = np.ones((3, 16))
    for row, unit_id in units:
        load[row, 2 * unit_id : 2 * unit_id + 2] = 100
    return load


def test_a_unit_is_moved_where_a_shard_has_it_only_afterwards() -> None:
    assert OLD.unit_to_ep_ranks[0, :3, 0].tolist() == [0, 1, 0]
    plan = plan_rebalance(OLD, moved((0, 1, 1), (0, 2, 1)), hot(), expert_bytes=10, hysteresis=ALWAYS)
    assert plan.moves == ((1, OLD.moe_layer_ids[0], 2, 20),)
    assert plan.moved_bytes == moved_bytes(OLD, plan.new, 10) == 20


def test_bringing_two_hot_units_of_a_layer_apart_saves_time_and_evens_the_load() -> None:
    hot_units = [int(unit) for unit in np.flatnonzero(OLD.unit_to_ep_ranks[0, :, 0] == 0)[:2]]
    plan = plan_rebalance(OLD, moved((0, hot_units[0], 1)), hot(*((0, u) for u in hot_units)), 10, ALWAYS)
    assert plan.step_time_ratio < 0.7
    assert plan.balancedness_after > plan.balancedness_before
    assert plan.is_worth_it
    assert "expected to save" in plan.reason


def test_nothing_to_move_too_little_load_and_too_little_gain_are_no_reason_to_rebalance() -> None:
    same = plan_rebalance(OLD, moved(), hot(), 10, ALWAYS)
    assert (same.is_worth_it, same.moves, same.step_time_ratio) == (False, (), 1.0)
    new = moved((0, 0, 1))
    assert "at least 1000" in plan_rebalance(OLD, new, hot(), 10, Hysteresis(0.0, 1000)).reason
    assert "min_gain is 90.0%" in plan_rebalance(OLD, new, hot(), 10, Hysteresis(0.9, 0)).reason
    assert plan_rebalance(OLD, new, np.zeros((3, 16)), 10, Hysteresis(0.1, 0)).step_time_ratio == 1.0


def test_parts_have_every_unit_to_be_read_once_and_are_as_large_as_allowed() -> None:
    on_shard_1 = moved(*((row, unit, 1) for row in range(3) for unit in range(8)))
    plan = plan_rebalance(OLD, on_shard_1, hot(), 10, ALWAYS)
    (parts,) = parts_to_stage(plan, max_bytes=50).values()
    assert [part.num_bytes for part in parts] == [40] * 6
    units = [unit for part in parts for unit in part.units]
    assert sorted(units) == sorted(set(on_shard_1.units_of(1)) - set(OLD.units_of(1)))
    (tiny,) = parts_to_stage(plan, max_bytes=1).values()
    assert [len(part.units) for part in tiny] == [1] * 12


@pytest.mark.parametrize(("ep_rank", "num_units"), [(0, 24), (1, 24)])
def test_while_units_move_a_shard_holds_old_and_new_ones(ep_rank: int, num_units: int) -> None:
    everything = moved(*((row, unit, ep_rank) for row in range(3) for unit in range(8)))
    plan = plan_rebalance(OLD, everything, hot(), 10, ALWAYS)
    assert weight_bytes_while_moving(plan, expert_bytes=10)[ep_rank] == num_units * 2 * 10
