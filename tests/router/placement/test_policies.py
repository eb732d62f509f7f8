"""What every policy keeps, whatever it is asked."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from router.expert_map import ExpertMap
from router.placement import POLICIES, PlacementDoesNotFit, PlacementError, PlacementRequest, moved_bytes, place_units
from router.placement.moves import held_experts
from tests.fake_experts import grouped_gate
from tests.router.placement.requests import EXPERT_BYTES, experts_by_shard, num_replicas, requests

BALANCING = sorted(set(POLICIES) - {"static"})


def assert_is_what_was_asked(expert_map: ExpertMap, request: PlacementRequest) -> None:
    """An ExpertMap itself refuses units without shards and two replicas on one shard."""
    held = held_experts(expert_map, request.ep_size)  # [num_moe_layers, n_routed_experts, ep_size]
    assert (held.sum(axis=2) >= request.num_replicas).all()
    domains = np.array([int(name.removeprefix("node")) for name in request.shard_domains])
    if request.num_replicas >= 2 and domains.max() > 0:
        for lost in range(domains.max() + 1):
            assert held[:, :, domains != lost].any(axis=2).all(), f"an expert was only in domain {lost}"


def test_every_policy_has_its_name() -> None:
    assert list(POLICIES) == ["static", "device_limited", "coactivation", "eplb"]
    with pytest.raises(PlacementError, match="no placement policy 'best'; policies are static, device_limited"):
        place_units(PlacementRequest(moe_layer_ids=(1,), gate=grouped_gate(), ep_size=1), policy="best")


def skip_what_eplb_cannot(policy: str, request: PlacementRequest) -> None:
    """It fills all shards alike, so domains of different sizes cannot stand in for each other."""
    sizes = {request.shard_domains.count(name) for name in request.shard_domains}
    assume(policy != "eplb" or request.num_replicas == 1 or len(sizes) == 1)


@pytest.mark.parametrize("policy", BALANCING)
@settings(max_examples=30, deadline=None)
@given(request=requests())
def test_every_expert_is_placed_with_its_replicas_and_survives_any_domain(policy: str, request) -> None:
    skip_what_eplb_cannot(policy, request)
    expert_map = place_units(request, placement_version=3, policy=policy)
    assert expert_map.placement_version == 3
    assert_is_what_was_asked(expert_map, request)


@pytest.mark.parametrize("policy", BALANCING)
@settings(max_examples=15, deadline=None)
@given(request=requests())
def test_the_same_request_gives_the_same_placement(policy: str, request) -> None:
    skip_what_eplb_cannot(policy, request)
    first, second = (place_units(request, policy=policy) for _ in range(2))
    assert np.array_equal(first.expert_to_unit, second.expert_to_unit)
    assert np.array_equal(first.unit_to_ep_ranks, second.unit_to_ep_ranks)


@pytest.mark.parametrize("policy", ["device_limited", "coactivation"])
@settings(max_examples=30, deadline=None)
@given(request=requests(), spare=st.lists(st.integers(0, 12), min_size=7, max_size=7))
def test_shards_of_different_memory_are_never_filled_beyond_their_limit(policy: str, request, spare) -> None:
    request = replace(request, num_replicas=1, redundancy=0.0)
    per_shard = -(-3 * 16 // request.ep_size)
    limits = tuple((per_shard + 4 + extra) * EXPERT_BYTES for extra in spare[: request.ep_size])
    expert_map = place_units(replace(request, max_weight_bytes=limits), policy=policy)
    held = np.array(experts_by_shard(expert_map)) * EXPERT_BYTES
    assert (held <= limits).all()


@pytest.mark.parametrize("policy", BALANCING)
@given(request=requests())
@settings(max_examples=20, deadline=None)
def test_too_little_memory_is_an_error_that_says_how_much_is_needed(policy: str, request) -> None:
    limit = 3 * 16 * EXPERT_BYTES // request.ep_size - EXPERT_BYTES
    with pytest.raises(PlacementDoesNotFit, match=r"bytes.*(more than|higher limit)"):
        place_units(replace(request, max_weight_bytes=max(limit, 0)), policy=policy)


@pytest.mark.parametrize("policy", ["device_limited", "coactivation"])
@settings(max_examples=15, deadline=None)
@given(request=requests(), seed=st.integers(0, 2**32))
def test_a_current_map_costs_no_rule_and_no_more_bytes_than_starting_over(policy: str, request, seed) -> None:
    request = replace(request, load=np.random.default_rng(seed).pareto(1.0, (3, 16)))
    first = place_units(request, policy=policy)
    assert moved_bytes(first, place_units(replace(request, current=first), policy=policy), EXPERT_BYTES) == 0
    changed = replace(request, load=np.random.default_rng(seed + 1).pareto(1.0, (3, 16)))
    kept = place_units(replace(changed, current=first), policy=policy)
    assert_is_what_was_asked(kept, changed)
    if policy == "device_limited":
        fresh = place_units(changed, policy=policy)
        assert moved_bytes(first, kept, 1) <= moved_bytes(first, fresh, 1)


@settings(max_examples=15, deadline=None)
@given(request=requests())
def test_redundancy_adds_at_most_its_share_of_the_units(request) -> None:
    counts = num_replicas(place_units(request, policy="device_limited"))
    wanted = counts.size * request.num_replicas
    assert wanted <= counts.sum() <= wanted + int(counts.size * request.redundancy)
