"""What whole expert groups reach at DeepSeek-V2's size under a Zipf load, and what moves cost."""

import numpy as np
import pytest

from router.placement import PlacementRequest, moved_bytes, place_units
from router.placement.scores import balancedness, expected_step_time, hottest_in_layer, shard_load
from tests.fake_experts import grouped_gate
from tests.router.placement.requests import experts_by_shard, num_replicas, v2_gate, v2_request, zipf_load


@pytest.mark.parametrize("ep_size", [8, 12, 16, 24, 64])
def test_rearranging_alone_balances_all_layers_and_keeps_the_device_limit(ep_size: int) -> None:
    request = v2_request(ep_size)
    expert_map = place_units(request, policy="device_limited")
    assert expert_map.max_ranks_per_token(v2_gate()) == 3
    assert balancedness(expert_map, request.load) >= 0.99
    assert balancedness(place_units(request), request.load) < 0.9, "in turn it would not be"
    sizes = experts_by_shard(expert_map)
    assert max(sizes) <= -(-472 // ep_size) * 20, "nor does a shard hold more than its share, rounded up"


@pytest.mark.parametrize("ep_size", [12, 16, 64])
@pytest.mark.parametrize(("redundancy", "hottest"), [(0.25, 1.4), (0.5, 1.0)])
def test_replicas_cool_the_hottest_shard_of_every_layer(ep_size: int, redundancy: float, hottest: float) -> None:
    request = v2_request(ep_size, redundancy)
    expert_map = place_units(request, policy="device_limited")
    assert num_replicas(expert_map).sum() == 472 + round(472 * redundancy)
    assert expert_map.max_ranks_per_token(v2_gate()) == 3
    assert balancedness(expert_map, request.load) >= 0.99
    assert np.percentile(hottest_in_layer(expert_map, request.load, 8), 99) <= hottest


def test_on_eight_shards_no_layer_can_be_cooler_than_even_and_half_more_memory_comes_near() -> None:
    request = v2_request(8, 0.5)
    hottest = hottest_in_layer(place_units(request, policy="device_limited"), request.load, 8)
    assert hottest.min() >= 1.0 - 1e-9, "eight shards share a layer that is worth eight"
    assert np.percentile(hottest, 99) <= 1.25


def test_more_shards_than_hot_groups_are_limited_by_the_hottest_group_alone() -> None:
    gate = grouped_gate()
    load = np.ones((1, 16))
    load[0, 0] = 50.0
    request = PlacementRequest(moe_layer_ids=(1,), gate=gate, ep_size=8, load=load)
    expert_map = place_units(request, policy="device_limited")
    assert balancedness(expert_map, load) == pytest.approx(load.sum() / 8 / 51.0)


def test_shards_of_different_speed_and_memory_are_busy_alike() -> None:
    speeds = (1.0, 2.0, 4.0)
    request = v2_request(3, shard_speeds=speeds)
    expert_map = place_units(request, policy="device_limited")
    assert balancedness(expert_map, request.load, speeds) >= 0.98
    held = np.array(experts_by_shard(expert_map))
    assert (np.abs(held / held.sum() - np.array([1, 2, 4]) / 7) < 0.01).all()
    limits = (3200, 3200, 3400)  # experts: the fast shard has no more memory than the others
    limited = place_units(
        v2_request(3, shard_speeds=speeds, expert_bytes=1, max_weight_bytes=limits), policy="device_limited"
    )
    assert (np.array(experts_by_shard(limited)) <= limits).all()
    assert shard_load(limited, request.load).sum(axis=0).argmax() == 2, "so it holds the hot ones"


def test_a_changed_load_moves_a_fraction_of_what_starting_over_would() -> None:
    before = v2_request(16, 0.25)
    first = place_units(before, policy="device_limited")
    load = 0.7 * before.load + 0.3 * zipf_load(59, 160, seed=5)
    fresh = place_units(v2_request(16, 0.25, load=load), policy="device_limited")
    kept = place_units(v2_request(16, 0.25, load=load, current=first), policy="device_limited")
    assert expected_step_time(kept, load) <= 1.0101 * expected_step_time(fresh, load)
    assert expected_step_time(kept, load) < expected_step_time(first, load)
    assert moved_bytes(first, kept, 1) < moved_bytes(first, fresh, 1) / 4


def test_a_new_shard_gets_its_share_and_the_others_send_no_more() -> None:
    before = v2_request(8)
    first = place_units(before, policy="device_limited")
    nine = place_units(v2_request(9, current=first), policy="device_limited")
    assert balancedness(nine, before.load) >= 0.98
    assert moved_bytes(first, nine, 1) <= 1.5 * 9440 / 9


def test_a_lost_shard_leaves_its_units_to_the_others_and_nothing_else_moves_much() -> None:
    before = v2_request(9)
    first = place_units(before, policy="device_limited")
    eight = place_units(v2_request(8, current=first), policy="device_limited")
    assert balancedness(eight, before.load) >= 0.98
    assert moved_bytes(first, eight, 1) <= 1.5 * 9440 / 9


def test_hot_units_are_the_ones_with_replicas() -> None:
    request = v2_request(16, 0.25)
    expert_map = place_units(request, policy="device_limited")
    unit_load = request.load.reshape(59, 8, 20).sum(axis=2)
    counts = num_replicas(expert_map)
    assert (counts[np.arange(59), unit_load.argmax(axis=1)] >= 2).mean() > 0.9
    assert (counts[np.arange(59), unit_load.argmin(axis=1)] == 1).all()
