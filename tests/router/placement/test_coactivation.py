"""Planted structure is found, and tokens visit fewer shards for it."""

import numpy as np
import pytest

from router.expert_map import ExpertMap
from router.gate_config import GateConfig
from router.placement import PlacementRequest, place_units
from router.placement.partition import partition
from router.placement.scores import balancedness, balancedness_by_layer
from tests.router.placement.requests import v2_request

GATE = GateConfig(n_routed_experts=64, num_experts_per_tok=6)  # DeepSeek-V2-Lite's
NUM_LAYERS = 4


def planted_tokens(num_tokens: int = 8000, seed: int = 0) -> np.ndarray:
    """Each token's experts come mostly from one of eight hidden families: [num_layers, num_tokens, 6]."""
    rng = np.random.default_rng(seed)
    tokens = np.empty((NUM_LAYERS, num_tokens, 6), dtype=np.int64)
    for layer in range(NUM_LAYERS):
        families = rng.permutation(64) // 8
        popularity = rng.dirichlet(np.full(64, 2.0))
        is_of_family = rng.integers(0, 8, num_tokens)[:, None] == families
        logits = np.log(popularity * np.where(is_of_family, 40, 1)) + rng.gumbel(size=(num_tokens, 64))
        tokens[layer] = np.argpartition(-logits, 6, axis=1)[:, :6]  # six without replacement
    return tokens


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """What placements are made from; tests judge by the other half."""
    return planted_tokens()[:, :4000]


def statistics(tokens: np.ndarray) -> dict[str, np.ndarray]:
    chosen = np.zeros((*tokens.shape[:2], 64))
    np.put_along_axis(chosen, tokens, 1.0, axis=2)
    return {"load": chosen.sum(axis=1), "coactivation": np.einsum("lte,ltf->lef", chosen, chosen)}


def shards_per_token(expert_map: ExpertMap, tokens: np.ndarray) -> float:
    """Of maps with one replica of each unit."""
    layers = np.arange(len(tokens))[:, None, None]
    shards = expert_map.unit_to_ep_ranks[layers, expert_map.expert_to_unit[layers, tokens], 0]
    ordered = np.sort(shards, axis=2)
    return float(1 + (np.diff(ordered, axis=2) > 0).sum(axis=2).mean())


def request(tokens: np.ndarray, ep_size: int, **changes) -> PlacementRequest:
    layer_ids = tuple(range(1, NUM_LAYERS + 1))
    return PlacementRequest(moe_layer_ids=layer_ids, gate=GATE, ep_size=ep_size, **{**statistics(tokens), **changes})


@pytest.mark.parametrize("ep_size", [3, 4, 8, 16])
def test_a_fifth_fewer_shards_a_token_than_contiguous_units_at_no_worse_balance(tokens, ep_size) -> None:
    asked = request(tokens, ep_size)
    together, contiguous = (place_units(asked, policy=policy) for policy in ("coactivation", "device_limited"))
    unseen = planted_tokens()[:, 4000:]
    assert shards_per_token(together, unseen) <= 0.8 * shards_per_token(contiguous, unseen)
    assert balancedness(together, asked.load) >= balancedness(contiguous, asked.load) - 0.02
    static = place_units(asked)
    assert balancedness_by_layer(together, asked.load).min() >= balancedness_by_layer(static, asked.load).min()


def test_units_are_kept_while_they_serve_as_well(tokens) -> None:
    first = place_units(request(tokens, 8), policy="coactivation")
    again = request(planted_tokens()[:, 4000:], 8, current=first)
    assert np.array_equal(place_units(again, policy="coactivation").expert_to_unit, first.expert_to_unit)


def test_without_coactivation_units_are_contiguous(tokens) -> None:
    expert_map = place_units(request(tokens, 4, coactivation=None), policy="coactivation")
    assert (np.diff(expert_map.expert_to_unit, axis=1) >= 0).all()
    assert expert_map.num_units == 8


def test_expert_groups_stay_whole_where_the_model_has_them() -> None:
    asked = v2_request(8, coactivation=np.ones((59, 160, 160)))
    expert_map = place_units(asked, policy="coactivation")
    assert np.array_equal(expert_map.expert_to_unit, place_units(asked, policy="device_limited").expert_to_unit)


def test_a_partition_finds_two_families_that_are_mixed() -> None:
    family = np.array([0, 1] * 4)
    together = np.where(family[:, None] == family, 10.0, 1.0)
    parts = partition(together, np.ones(8), np.array([4, 4]), current=None)
    assert parts.tolist() == family.tolist()


def test_a_partition_has_the_sizes_it_was_asked_for_and_keeps_hot_experts_apart() -> None:
    together = np.zeros((7, 7))
    together[0, 1] = together[1, 0] = 100.0
    load = np.array([50.0, 50, 1, 1, 1, 1, 1])
    parts = partition(together, load, np.array([4, 3]), current=None)
    assert sorted(np.bincount(parts).tolist()) == [3, 4]
    assert parts[0] != parts[1], "together they would make one part twice as hot as the other"
