from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import expert_pb2
from protos.codec import decode_frame
from protos.memory import Memory
from protos.poller import Poller
from router import plan_kernels
from router.compiled import native
from router.completions import Completions, ForwardCall
from router.plan import NO_EXPERT, DispatchPlan, PartialSums, plan_again, plan_layer, sum_partials
from router.replicas import choose_replicas
from tests.fake_experts import Rows, greedy_gate, grouped_gate, placed, random_placement, random_rows

gates = st.sampled_from([grouped_gate(), grouped_gate(n_group=4, topk_group=2), greedy_gate()])


def plan_of(rows: Rows, expert_map, turn: int = 0) -> DispatchPlan:
    """In numpy, and the same compiled where the library is built."""
    ep_ranks = choose_replicas(expert_map.unit_to_ep_ranks[0], turn)
    given_layer = (rows.topk_ids, rows.topk_weights, expert_map.expert_to_unit[0], ep_ranks)
    plan = plan_layer(*given_layer)
    compiled = plan_kernels.plan_layer(*given_layer[:3], ep_ranks[:, None], expert_map.ep_size)
    assert compiled.partial_rows.tolist() == plan.partial_rows.tolist()
    assert compiled.num_tokens_by_ranks == plan.num_tokens_by_ranks
    assert len(compiled.messages) == len(plan.messages)
    for ours, theirs in zip(compiled.messages, plan.messages, strict=True):
        assert ours.ep_rank == theirs.ep_rank
        assert ours.row_ids.tolist() == theirs.row_ids.tolist()
        assert ours.assignments.tolist() == theirs.assignments.tolist()
        assert ours.assignments.flags.c_contiguous
        assert ours.partial_sums.tolist() == theirs.partial_sums.tolist()
    return plan


def summed(plan: DispatchPlan, partial_sums: torch.Tensor) -> torch.Tensor:
    """partial_sums: [num_partial_sums, hidden_size], answered message by message; in numpy and compiled."""
    answers = [PartialSums(message.partial_sums, partial_sums[message.partial_sums]) for message in plan.messages]
    total = torch.from_numpy(sum_partials(plan, answers, partial_sums.shape[1]))
    compiled = plan_kernels.sum_partials(plan, answers, partial_sums.shape[1])
    assert compiled.view(torch.int32).tolist() == total.view(torch.int32).tolist()
    return total


def test_token_is_sent_once_to_a_shard_that_holds_two_of_its_experts():
    rows = Rows(torch.ones(1, 2), torch.tensor([[0.25, 0.75]]), torch.tensor([[4, 5]]))
    (message,) = plan_of(rows, placed(grouped_gate(), 8)).messages
    assert message.row_ids.tolist() == [0]
    assert message.assignments[0].view(np.float32).tolist() == [0.25, 0.75]
    assert message.assignments[1:].tolist() == [[0, 0], [4, 5], [0, 0]]  # rows, experts, partial sums
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
        weights, local_rows, expert_ids, local_partial_sums = message.assignments
        found = zip(
            expert_map.expert_to_unit[0, expert_ids].tolist(), message.row_ids[local_rows].tolist(),
            expert_ids.tolist(), weights.view(np.float32).tolist(), strict=True,
        )  # fmt: skip
        assert list(found) == work
        assert message.row_ids.tolist() == sorted({row for _, row, _, _ in work})  # each row once
        pairs = sorted({(unit, row) for unit, row, _, _ in work})
        assert [pairs[k] for k in local_partial_sums] == [(unit, row) for unit, row, _, _ in work]
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
    partial_sums = torch.randn(one_shard.num_partial_sums, 3, generator=generator).to(dtype)
    expected = summed(one_shard, partial_sums)
    plan = plan_of(rows, random_placement(gate, data.draw(st.integers(1, 8)), seed), turn=seed)
    assert plan.partial_rows.tolist() == one_shard.partial_rows.tolist()
    assert torch.equal(summed(plan, partial_sums), expected)
    for row in range(num_tokens):  # and it is the sum in ascending order of units
        total = torch.zeros(3)
        for partial_sum in np.flatnonzero(one_shard.partial_rows == row):
            total += partial_sums[partial_sum].float()
        assert torch.equal(total, expected[row])


def test_a_row_of_negative_zeros_does_not_depend_on_its_neighbours():
    gate = grouped_gate()
    rows = Rows(torch.ones(2, 1), torch.ones(2, 2), torch.tensor([[0, 1], [0, 2]]))  # one unit; two units
    plan = plan_of(rows, placed(gate, 1))
    together = summed(plan, torch.tensor([[-0.0], [1.0], [2.0]]))
    row_alone = plan_of(Rows(torch.ones(1, 1), torch.ones(1, 2), torch.tensor([[0, 1]])), placed(gate, 1))
    alone = summed(row_alone, torch.tensor([[-0.0]]))
    assert together[0].signbit().tolist() == alone[0].signbit().tolist() == [False]
    assert together[1].tolist() == [3.0]


@given(num_tokens=st.integers(1, 8), seed=st.integers(0, 1000))
def test_a_message_planned_again_covers_its_own_partial_sums_and_no_others(num_tokens, seed):
    gate = grouped_gate()
    rows = random_rows(gate, num_tokens, hidden_size=2, seed=seed)
    expert_map = placed(gate, 2)
    for message in plan_of(rows, expert_map).messages:
        elsewhere = choose_replicas(random_placement(gate, 5, seed).unit_to_ep_ranks[0], turn=seed)
        again = plan_again(message, expert_map.expert_to_unit[0], elsewhere)
        assert sorted(np.concatenate([part.partial_sums for part in again]).tolist()) == message.partial_sums.tolist()
        assert sum(part.num_assignments for part in again) == message.num_assignments
        same_place = np.full(8, message.ep_rank)
        (same,) = plan_again(message, expert_map.expert_to_unit[0], same_place)
        assert same.row_ids.tolist() == message.row_ids.tolist()
        assert same.assignments.tolist() == message.assignments.tolist()


@given(gate=gates, num_tokens=st.integers(0, 12), ep_size=st.integers(1, 8), seed=st.integers(0, 1000))
def test_what_is_left_out_is_nowhere_in_the_plan(gate, num_tokens, ep_size, seed):
    rows = random_rows(gate, num_tokens, hidden_size=2, seed=seed)
    is_left_out = torch.rand(rows.topk_ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    rows.topk_ids[is_left_out] = NO_EXPERT
    expert_map = random_placement(gate, ep_size, seed)
    plan = plan_of(rows, expert_map, turn=seed)
    found = set()
    for message in plan.messages:
        weights, local_rows, expert_ids, local_partial_sums = message.assignments
        row_ids = message.row_ids[local_rows]
        assert plan.partial_rows[message.partial_sums][local_partial_sums].tolist() == row_ids.tolist()
        pairs = set(zip(expert_map.expert_to_unit[0, expert_ids].tolist(), row_ids.tolist(), strict=True))
        assert (len(pairs), len(set(row_ids.tolist()))) == (message.num_partial_sums, message.num_rows)
        weights = weights.view(np.float32)
        found |= set(zip(row_ids.tolist(), expert_ids.tolist(), weights.tolist(), strict=True))
    expected = {
        (row, int(rows.topk_ids[row, column]), float(rows.topk_weights[row, column]))
        for row, column in (~is_left_out).nonzero().tolist()
    }
    assert found == expected
    assert sum(message.num_assignments for message in plan.messages) == len(expected)
    assert sum(plan.num_tokens_by_ranks) == num_tokens
    partial_sums = torch.ones(plan.num_partial_sums, 1)
    units_of_rows = {(row, int(expert_map.expert_to_unit[0, expert])) for row, expert, _ in expected}
    counts = [sum(row == found_row for found_row, _ in units_of_rows) for row in range(num_tokens)]
    assert summed(plan, partial_sums)[:, 0].tolist() == counts  # 0.0 for a row that asks for nothing


def test_no_rows_make_no_messages():
    gate = grouped_gate()
    plan = plan_of(random_rows(gate, 0, hidden_size=2), placed(gate, 4))
    assert plan.messages == ()
    assert summed(plan, torch.zeros(0, 2)).shape == (0, 2)


@pytest.mark.skipif(native() is None, reason="the library is not built")
@pytest.mark.parametrize("wrong", [-2, 16])
def test_an_expert_that_does_not_exist_is_refused(wrong):
    expert_map = placed(grouped_gate(), 2)
    with pytest.raises(ValueError, match="one does not exist"):
        plan_kernels.plan_layer(
            torch.tensor([[0, wrong]]), torch.ones(1, 2), expert_map.expert_to_unit[0],
            expert_map.unit_to_ep_ranks[0], 2,
        )  # fmt: skip


@pytest.mark.skipif(native() is None, reason="the library is not built")
def test_a_sum_without_one_of_its_parts_is_refused():
    plan = plan_of(Rows(torch.ones(1, 1), torch.ones(1, 2), torch.tensor([[0, 2]])), placed(grouped_gate(), 1))
    with pytest.raises(ValueError, match="1 partial sums were answered, the plan has 2"):
        plan_kernels.sum_partials(plan, [PartialSums(np.array([1]), torch.ones(1, 3))], 3)


@pytest.mark.skipif(native() is None, reason="the router's library is not built")
@given(num_tokens=st.integers(1, 9), ep_size=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_a_payload_is_written_as_a_frame_has_it(num_tokens, ep_size, seed):
    expert_map = random_placement(grouped_gate(), ep_size, seed)
    rows = random_rows(grouped_gate(), num_tokens, hidden_size=6, seed=seed, dtype=torch.bfloat16)
    plan = plan_kernels.plan_layer(
        rows.topk_ids, rows.topk_weights, expert_map.expert_to_unit[0], expert_map.unit_to_ep_ranks[0, :, :1], ep_size
    )
    for message in plan.messages:
        call = ForwardCall(
            sequence_number=1, header=b"", hidden_states=rows.hidden_states, message=message, answer_bytes=0,
            completions=Completions(Poller()), tell=lambda _: None,
        )  # fmt: skip
        memory = Memory.of(memoryview(bytearray(call.payload_bytes + 2))).part(1, call.payload_bytes)
        call.write_payload(memory.address)
        _, payload = decode_frame(expert_pb2.ForwardHeader, call.frame())
        assert memory.view == payload
        with mock.patch("router.plan_kernels.native", return_value=None):
            memory.view[:] = bytes(memory.num_bytes)
            call.write_payload(memory.address)
        assert memory.view == payload
        assert (memory.buffer[0], memory.buffer[-1]) == (0, 0)
