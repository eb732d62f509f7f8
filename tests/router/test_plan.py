import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.plan import DispatchPlan, plan_dispatch, plan_messages, sort_assignments, sum_partials
from router.replicas import choose_replicas
from tests.fake_experts import Rows, greedy_gate, grouped_gate, placed, random_placement, random_rows

gates = st.sampled_from([grouped_gate(), grouped_gate(n_group=4, topk_group=2), greedy_gate()])


def plan_of(rows: Rows, expert_map, turn: int = 0) -> DispatchPlan:
    assignments = sort_assignments(rows.topk_ids, rows.topk_weights, expert_map.expert_to_unit[0])
    ep_ranks = choose_replicas(expert_map.unit_to_ep_ranks[0], turn)
    return plan_dispatch(len(rows.topk_ids), assignments, ep_ranks)


def test_token_is_sent_once_to_a_shard_that_holds_two_of_its_experts():
    rows = Rows(torch.ones(1, 2), torch.tensor([[0.25, 0.75]]), torch.tensor([[4, 5]]))
    (message,) = plan_of(rows, placed(grouped_gate(), 8)).messages
    assert message.row_ids.tolist() == [0]
    assert message.assignments.expert_ids.tolist() == [4, 5]
    assert message.assignments.weights.tolist() == [0.25, 0.75]
    assert message.local_partial_sums.tolist() == [0, 0]
    assert message.partial_sums.tolist() == [0]


@given(gate=gates, num_tokens=st.integers(0, 12), ep_size=st.integers(1, 24), seed=st.integers(0, 1000))
def test_plan_is_what_loops_over_tokens_would_say(gate, num_tokens, ep_size, seed):
    expert_map = placed(gate, min(ep_size, 3 * placed(gate, 1).num_units))
    rows = random_rows(gate, num_tokens, hidden_size=2, seed=seed)
    plan = plan_of(rows, expert_map)
    expected: dict[int, list[tuple[int, int, int, float]]] = {}
    for row, (expert_ids, weights) in enumerate(zip(rows.topk_ids.tolist(), rows.topk_weights.tolist(), strict=True)):
        for expert_id, weight in zip(expert_ids, weights, strict=True):
            unit = int(expert_map.expert_to_unit[0, expert_id])
            rank = int(expert_map.unit_to_ep_ranks[0, unit, 0])
            expected.setdefault(rank, []).append((unit, row, expert_id, weight))
    assert [message.ep_rank for message in plan.messages] == sorted(expected)
    seen_partial_sums = []
    for message in plan.messages:
        work = sorted(expected[message.ep_rank])
        found = zip(
            message.assignments.units.tolist(), message.row_ids[message.local_rows].tolist(),
            message.assignments.expert_ids.tolist(), message.assignments.weights.tolist(), strict=True,
        )  # fmt: skip
        assert list(found) == work
        assert message.row_ids.tolist() == sorted({row for _, row, _, _ in work})  # each row once
        pairs = sorted({(unit, row) for unit, row, _, _ in work})
        assert [pairs[k] for k in message.local_partial_sums] == [(unit, row) for unit, row, _, _ in work]
        assert plan.partial_rows[message.partial_sums].tolist() == [row for _, row in pairs]
        seen_partial_sums += message.partial_sums.tolist()
    assert sorted(seen_partial_sums) == list(range(plan.num_partial_sums))


@given(num_tokens=st.integers(1, 16), ep_size=st.integers(1, 24), topk_group=st.integers(2, 8), seed=st.integers(0, 99))
def test_no_token_visits_more_than_topk_group_shards_for_any_number_of_shards(num_tokens, ep_size, topk_group, seed):
    gate = grouped_gate(topk_group=topk_group)
    rows = random_rows(gate, num_tokens, hidden_size=2, seed=seed)
    for expert_map in (placed(gate, ep_size), random_placement(gate, ep_size, seed)):
        plan = plan_of(rows, expert_map, turn=seed)
        assert len(plan.num_tokens_by_ranks) - 1 <= min(topk_group, expert_map.max_ranks_per_token(gate))
        assert sum(plan.num_tokens_by_ranks) == num_tokens
        visits = sum(n * count for n, count in enumerate(plan.num_tokens_by_ranks))
        assert visits == sum(message.num_rows for message in plan.messages)


@given(gate=gates, num_tokens=st.integers(1, 12), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=50)
def test_row_sums_have_one_value_to_the_bit_for_every_placement(gate, num_tokens, seed, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    rows = random_rows(gate, num_tokens, hidden_size=3, seed=seed)
    one_shard = plan_of(rows, placed(gate, 1))
    generator = torch.Generator().manual_seed(seed)
    partial_sums = torch.randn(one_shard.num_partial_sums + 1, 3, generator=generator).to(dtype)
    partial_sums[-1] = 0.0
    expected = sum_partials(one_shard, partial_sums.float().numpy())
    plan = plan_of(rows, random_placement(gate, data.draw(st.integers(1, 8)), seed), turn=seed)
    assert plan.partial_rows.tolist() == one_shard.partial_rows.tolist()
    assert torch.equal(sum_partials(plan, partial_sums.float().numpy()), expected)
    for row in range(num_tokens):  # and it is the sum in ascending order of units
        total = torch.zeros(3)
        for partial_sum in np.flatnonzero(one_shard.partial_rows == row):
            total += partial_sums[partial_sum].float()
        assert torch.equal(total, expected[row])


def test_a_row_of_negative_zeros_does_not_depend_on_its_neighbours():
    gate = grouped_gate()
    rows = Rows(torch.ones(2, 1), torch.ones(2, 2), torch.tensor([[0, 1], [0, 2]]))  # one unit; two units
    plan = plan_of(rows, placed(gate, 1))
    together = sum_partials(plan, np.array([[-0.0], [1.0], [2.0], [0.0]], dtype=np.float32))
    alone = sum_partials(
        plan_of(Rows(torch.ones(1, 1), torch.ones(1, 2), torch.tensor([[0, 1]])), placed(gate, 1)),
        np.array([[-0.0], [0.0]], dtype=np.float32),
    )
    assert together[0].signbit().tolist() == alone[0].signbit().tolist() == [False]
    assert together[1].tolist() == [3.0]


@given(num_tokens=st.integers(1, 8), seed=st.integers(0, 1000))
def test_a_message_planned_again_covers_its_own_partial_sums_and_no_others(num_tokens, seed):
    gate = grouped_gate()
    rows = random_rows(gate, num_tokens, hidden_size=2, seed=seed)
    for message in plan_of(rows, placed(gate, 2)).messages:
        elsewhere = choose_replicas(random_placement(gate, 5, seed).unit_to_ep_ranks[0], turn=seed)
        again = plan_messages(message.assignments, elsewhere)
        assert sorted(np.concatenate([part.partial_sums for part in again]).tolist()) == message.partial_sums.tolist()
        assert sum(len(part.assignments) for part in again) == len(message.assignments)


def test_no_rows_make_no_messages():
    gate = grouped_gate()
    plan = plan_of(random_rows(gate, 0, hidden_size=2), placed(gate, 4))
    assert plan.messages == ()
    assert sum_partials(plan, np.zeros((1, 2), dtype=np.float32)).shape == (0, 2)
