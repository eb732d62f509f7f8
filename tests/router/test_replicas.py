import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router import plan_kernels
from router.compiled import native
from router.plan import DispatchPlan
from router.replicas import choose_replicas, usable_replicas
from router.shard_queues import HALF_LIFE_S, ExpectedQueues, ShardQueues
from tests.fake_experts import grouped_gate, random_placement, random_rows

UNITS = np.array([[0, 1, 2], [1, -1, -1], [2, 0, -1]])


def test_replicas_take_turns():
    assert {choose_replicas(UNITS, turn)[0] for turn in range(3)} == {0, 1, 2}
    assert {choose_replicas(UNITS, turn)[2] for turn in range(2)} == {0, 2}


def test_a_shard_to_avoid_is_asked_only_when_nobody_else_has_the_unit():
    for turn in range(6):
        chosen = choose_replicas(UNITS, turn, avoid={1, 2}).tolist()
        assert chosen == [0, 1, 0]


@given(turn=st.integers(0, 100), avoid=st.sets(st.integers(0, 2)))
def test_a_unit_is_asked_of_a_shard_that_holds_it(turn, avoid):
    for chosen, ranks in zip(choose_replicas(UNITS, turn, avoid), UNITS, strict=True):
        assert chosen in ranks[ranks >= 0]


needs_library = pytest.mark.skipif(native() is None, reason="the library is not built")


def queues(waits: list[float], seconds_per_assignment: float = 1.0) -> ExpectedQueues:
    return ExpectedQueues(np.array(waits), np.full(len(waits), seconds_per_assignment))


def visits(plan: DispatchPlan) -> dict[int, set[int]]:
    """The shards that each row visits."""
    shards: dict[int, set[int]] = {}
    for message in plan.messages:
        for row in message.row_ids.tolist():
            shards.setdefault(row, set()).add(message.ep_rank)
    return shards


@needs_library
@given(num_tokens=st.integers(1, 12), ep_size=st.integers(1, 9), topk_group=st.integers(2, 3), seed=st.integers(0, 999))
@settings(max_examples=200)
def test_no_row_visits_more_shards_than_it_must_and_each_unit_is_asked_of_a_shard_that_has_it(
    num_tokens, ep_size, topk_group, seed
):
    gate = grouped_gate(topk_group=topk_group)
    rows = random_rows(gate, num_tokens, hidden_size=2, seed=seed)
    expert_map = random_placement(gate, ep_size, seed)
    expert_to_unit, unit_to_ep_ranks = expert_map.expert_to_unit[0], expert_map.unit_to_ep_ranks[0]
    waits = np.random.default_rng(seed).random(ep_size).tolist()
    plan = plan_kernels.plan_layer(
        rows.topk_ids, rows.topk_weights, expert_to_unit, unit_to_ep_ranks, ep_size, queues(waits)
    )
    visited = visits(plan)
    for message in plan.messages:
        assert all(message.ep_rank in unit_to_ep_ranks[expert_to_unit[expert]] for expert in message.assignments[2])
    for row, experts in enumerate(rows.topk_ids.numpy()):
        replicas = [
            set(unit_to_ep_ranks[unit].tolist()) - {-1} for unit in sorted(set(expert_to_unit[experts].tolist()))
        ]
        fewest = min(
            len(shards)
            for count in range(1, len(replicas) + 1)
            for shards in itertools.combinations(range(ep_size), count)
            if all(replica & set(shards) for replica in replicas)
        )
        assert len(visited[row]) == fewest


@needs_library
def test_rows_that_may_go_anywhere_are_spread_evenly_and_fill_the_shortest_queue_first():
    ids = torch.zeros(90, 1, dtype=torch.int64)
    units, anywhere = np.zeros(1, dtype=np.int64), np.array([[0, 1, 2]])

    def rows_by_shard(waits: list[float]) -> list[int]:
        plan = plan_kernels.plan_layer(ids, torch.ones(90, 1), units, anywhere, 3, queues(waits))
        return [sum(m.num_rows for m in plan.messages if m.ep_rank == rank) for rank in range(3)]

    assert rows_by_shard([0.0, 0.0, 0.0]) == [30, 30, 30]
    assert rows_by_shard([30.0, 0.0, 0.0]) == [10, 40, 40]
    assert rows_by_shard([1000.0, 0.0, 1000.0]) == [0, 90, 0]


def test_a_queue_is_what_waits_and_what_was_sent_at_the_speed_of_the_answers():
    shards = ShardQueues(lambda: 1000.0)
    assert shards.expected(2).waits_s.tolist() == [0.0, 0.0]
    shards.sent(0, 10)
    shards.answered(1, 4, queue_s=0.5, compute_s=2.0)
    expected = shards.expected(3)
    assert expected.seconds_per_assignment.tolist() == [0.5, 0.5, 0.5]  # unknown shards are average ones
    assert expected.waits_s.tolist() == [5.0, 0.5, 0.0]
    shards.ended(0, 10)
    assert shards.expected(3).waits_s.tolist() == [0.0, 0.5, 0.0]


def test_a_wait_that_no_newer_answer_speaks_of_counts_half_after_a_half_life() -> None:
    now_s = 1000.0
    shards = ShardQueues(lambda: now_s)
    shards.answered(0, 4, queue_s=0.8, compute_s=2.0)
    for _ in range(20):  # however often it is asked for
        now_s += HALF_LIFE_S / 20
        expected = shards.expected(2)
    assert expected.waits_s.tolist() == pytest.approx([0.4, 0.0], rel=0.1)
    now_s += 2 * HALF_LIFE_S
    expected = shards.expected(2)
    assert expected.waits_s.tolist() == pytest.approx([0.1, 0.0])
    assert expected.seconds_per_assignment.tolist() == [0.5, 0.5]  # speed is no matter of the moment


@pytest.mark.parametrize("layer_s", [0.001, 0.2, 1.0, 5.0])
def test_a_wait_that_every_answer_speaks_of_is_expected_in_full_however_long_layers_take(layer_s: float) -> None:
    now_s = 1000.0
    shards = ShardQueues(lambda: now_s)
    for _ in range(20):
        now_s += layer_s
        shards.answered(0, 1, queue_s=0.9, compute_s=0.0)
    assert shards.expected(1).waits_s.tolist() == pytest.approx([0.9])


def test_an_answer_after_a_long_time_counts_for_more_than_what_was_before() -> None:
    now_s = 1000.0
    shards = ShardQueues(lambda: now_s)
    shards.answered(0, 1, queue_s=0.9, compute_s=0.0)
    now_s += 10 * HALF_LIFE_S
    shards.answered(0, 1, queue_s=0.0, compute_s=0.0)
    assert shards.expected(1).waits_s[0] < 0.001


def test_a_unit_keeps_its_only_shard_though_it_is_avoided():
    units = np.array([[0, 1], [1, -1], [2, 1]])
    assert usable_replicas(units, {1}).tolist() == [[0, -1], [1, -1], [2, -1]]
    assert usable_replicas(units, {0, 1, 2}).tolist() == units.tolist()
