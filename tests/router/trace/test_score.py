"""Figures of a placement, on cases small enough to count by hand, and against counting token by token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.compiled import native
from router.expert_map import ExpertMap
from router.trace.cost_model import CostModel
from router.trace.model_shape import ModelShape
from router.trace.replica_choice import ReplicaChoice, hashed_choice, router_choice
from router.trace.score import Score, Scorer, balancedness
from router.trace.trace import ExpertIds, TraceError
from tests.router.trace.traces import random_ids, tiny_model

COST = CostModel(flops_per_s=384.0, message_s=10.0, bytes_per_s=1.0)  # an assignment: 2 * 3 * 16 * 4 / 384 = 1 s
LAYER = tiny_model(layers=1)  # experts 0 to 7 in groups of two, 2 a token; a row has 32 bytes


def two_shards(model: ModelShape = LAYER) -> ExpertMap:
    """Groups 0 and 1 on shard 0, groups 2 and 3 on shard 1."""
    return ExpertMap(
        placement_version=1,
        ep_size=2,
        moe_layer_ids=model.moe_layer_ids,
        expert_to_unit=np.tile([0, 0, 1, 1, 2, 2, 3, 3], (model.num_moe_layers, 1)),
        unit_to_ep_ranks=np.tile([[0], [0], [1], [1]], (model.num_moe_layers, 1, 1)),
    )


def ids(*tokens: tuple[int, int]) -> ExpertIds:
    return np.array([tokens], dtype=np.uint8)


def score(expert_map: ExpertMap, *steps: ExpertIds, model: ModelShape = LAYER, cost: CostModel = COST) -> Score:
    scorer = Scorer(model, expert_map, router_choice, cost)
    for number, topk_ids in enumerate(steps):
        scorer.add(topk_ids, number)
    return scorer.score()


def test_three_tokens_on_two_shards() -> None:
    # shard 0: tokens 0 and 1, three assignments; shard 1: tokens 1 and 2, three assignments
    figures = score(two_shards(), ids((0, 1), (2, 5), (4, 6)))
    assert figures.balancedness_total == 1.0
    assert figures.ranks_per_token_mean == pytest.approx(4 / 3)
    assert figures.ranks_per_token_max == 2
    assert figures.hottest_mean == figures.hottest_p99 == 3 / (6 / 4)  # as a multiple of a group's share
    sent, received, assignments = 4 * 32, 5 * 32, 6 * 16  # units of the tokens: 0; 1, 2; 2, 3
    assert figures.bytes_per_token == (sent + received + assignments) / 3
    assert figures.step_time_s == 3 + 2 * 10 + (sent + received + assignments)


def test_a_shard_hot_in_one_layer_and_cold_in_another_is_balanced_in_total_only() -> None:
    model = tiny_model(layers=2)
    hot_and_cold = np.array([[(0, 1), (0, 2)], [(4, 5), (6, 7)]], dtype=np.uint8)
    figures = score(two_shards(model), hot_and_cold, model=model)
    assert figures.balancedness_total == 1.0
    assert figures.balancedness_layer_p01 == 0.5  # one of two shards does everything
    assert figures.hottest_mean == 4.0
    assert figures.ranks_per_token_max == 1


def test_steps_add_up_and_each_has_its_own_balance() -> None:
    figures = score(two_shards(), ids((0, 1)), ids((0, 1)), ids((4, 5)))
    assert figures.balancedness_by_step == (0.5, 0.5, 0.5)
    assert figures.balancedness_total == (6 / 2) / 4


def test_a_shard_of_twice_the_speed_is_even_with_twice_the_load() -> None:
    scorer = Scorer(LAYER, two_shards(), router_choice, COST, speeds=np.array([2.0, 1.0]))
    scorer.add(ids((0, 1), (0, 4), (2, 3), (5, 6)), 0)  # five and three assignments
    scorer.add(ids((0, 3)), 1)
    assert scorer.score().balancedness_total == pytest.approx((7 / 2 + 3) / 2 / (7 / 2))


def test_without_groups_the_hottest_shard_is_a_multiple_of_an_even_share_of_shards() -> None:
    model = tiny_model(layers=1, is_limited=False)
    assert score(two_shards(), ids((0, 1), (0, 4)), model=model).hottest_mean == 3 / (4 / 2)


@given(
    seed=st.integers(0, 10**6),
    ep_size=st.integers(1, 5),
    num_tokens=st.integers(1, 20),
    choice=st.sampled_from([router_choice, hashed_choice]),
)
def test_the_figures_are_those_of_counting_token_by_token(
    seed: int, ep_size: int, num_tokens: int, choice: ReplicaChoice
) -> None:
    model = tiny_model(layers=3)
    rng = np.random.default_rng(seed)
    expert_to_unit = rng.integers(5, size=(3, 8))
    unit_to_ep_ranks = np.full((3, 5, ep_size), -1)
    for layer, unit in np.ndindex(3, 5):
        holders = rng.permutation(ep_size)[: rng.integers(1, ep_size + 1)]
        unit_to_ep_ranks[layer, unit, : len(holders)] = holders
    expert_map = ExpertMap(
        placement_version=1,
        ep_size=ep_size,
        moe_layer_ids=model.moe_layer_ids,
        expert_to_unit=expert_to_unit,
        unit_to_ep_ranks=unit_to_ep_ranks,
    )
    topk_ids = random_ids(model, num_tokens, seed)
    ep_ranks = choice(expert_map, expert_to_unit[np.arange(3)[:, None, None], topk_ids], 0)

    load, num_visits, num_sums, most, step_s = np.zeros((3, ep_size)), 0, 0, 0, 0.0
    for layer in range(3):
        asked, layer_bytes = set(), 0
        for token in range(num_tokens):
            pairs = set()
            for expert, rank in zip(topk_ids[layer, token].tolist(), ep_ranks[layer, token].tolist(), strict=True):
                unit = int(expert_to_unit[layer, expert])
                assert rank in unit_to_ep_ranks[layer, unit]
                pairs.add((unit, rank))
                load[layer, rank] += 1
            visited = {rank for _, rank in pairs}
            assert len(pairs) == len({unit for unit, _ in pairs}), "a unit of a token is asked of one shard"
            num_visits, num_sums, most = num_visits + len(visited), num_sums + len(pairs), max(most, len(visited))
            asked |= visited
            layer_bytes += (len(visited) + len(pairs)) * 32 + 2 * 16
        step_s += load[layer].max() + 10 * len(asked) + layer_bytes

    scorer = Scorer(model, expert_map, choice, COST)
    scorer.add(topk_ids, 0)
    figures = scorer.score()
    assert figures.balancedness_total == pytest.approx(load.sum(0).mean() / load.sum(0).max())
    assert figures.ranks_per_token_mean == pytest.approx(num_visits / num_tokens / 3)
    assert figures.ranks_per_token_max == most
    assert figures.bytes_per_token == pytest.approx(((num_visits + num_sums) * 32 + 6 * 16 * num_tokens) / num_tokens)
    assert figures.step_time_s == pytest.approx(step_s)


def test_replicas_by_hash_are_used_alike_and_differ_between_steps() -> None:
    expert_map = ExpertMap(
        placement_version=1,
        ep_size=3,
        moe_layer_ids=(1,),
        expert_to_unit=np.arange(8).reshape(1, 8),
        unit_to_ep_ranks=np.tile([0, 1, 2], (1, 8, 1)),
    )
    units = np.tile(np.arange(8), (1, 3000, 1))
    first, second = (hashed_choice(expert_map, units, step) for step in (0, 1))
    for unit in range(8):
        np.testing.assert_allclose(np.bincount(first[0, :, unit]) / 3000, 1 / 3, atol=0.03)
    assert (first != second).mean() == pytest.approx(2 / 3, abs=0.03)
    assert len({tuple(row) for row in first[0, :200].tolist()}) > 100, "the units of a token are spread on their own"


@pytest.mark.parametrize("is_compiled", [True, False])
def test_the_router_spreads_a_unit_over_its_replicas(is_compiled: bool, request: pytest.FixtureRequest) -> None:
    if not is_compiled:
        request.getfixturevalue("without_kernels")
    elif native() is None:
        pytest.skip("the library is not built")
    expert_map = ExpertMap(
        placement_version=1,
        ep_size=2,
        moe_layer_ids=(1, 2),
        expert_to_unit=np.zeros((2, 8), dtype=np.int64),
        unit_to_ep_ranks=np.tile([0, 1], (2, 1, 1)),
    )
    units = np.zeros((2, 5, 2), dtype=np.int64)
    for step in range(4):
        ep_ranks = router_choice(expert_map, units, step)
        if is_compiled:  # row by row, each row whole
            assert ep_ranks.tolist() == [[[0, 0], [1, 1], [0, 0], [1, 1], [0, 0]]] * 2
        else:  # step by step
            assert (ep_ranks == step % 2).all()


def test_balancedness_is_mean_over_max_and_nothing_is_even() -> None:
    np.testing.assert_allclose(balancedness(np.array([[1.0, 3.0], [2.0, 2.0], [0.0, 0.0]])), [2 / 3, 1.0, 1.0])


def test_many_steps_in_flight_wait_for_the_shard_that_is_busiest_over_all_layers() -> None:
    model = tiny_model(layers=2)
    load = np.array([[5, 1], [5, 1]])
    free, few = np.zeros(2, dtype=np.int64), CostModel(flops_per_s=384.0, message_s=0.0, bytes_per_s=1.0)
    many = CostModel(flops_per_s=384.0, message_s=0.0, bytes_per_s=1.0, steps_in_flight=4)
    assert few.step_s(model, load, free, free) == 10
    assert many.step_s(model, load, free, free) == 40
    assert many.step_s(model, np.array([[5, 1], [1, 5]]), free, free) == 24, "even over all layers pays"
    assert few.step_s(model, load, free, free, speeds=np.array([5.0, 1.0])) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flops_per_s": 0.0}, "flops_per_s is 0.0"),
        ({"bytes_per_s": float("inf")}, "bytes_per_s is inf"),
        ({"message_s": -1.0}, "message_s is -1.0"),
        ({"steps_in_flight": 0}, "steps_in_flight is 0, must be 1 to 65536"),
    ],
)
def test_costs_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        CostModel(**settings)  # type: ignore[arg-type]
