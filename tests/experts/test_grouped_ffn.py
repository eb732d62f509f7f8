import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.grouped_ffn import ExpertWeights, ForwardInput, expert_ffn, grouped_ffn, merge

HIDDEN, INTERMEDIATE, NUM_EXPERTS = 40, 24, 6


def experts(dtype: torch.dtype = torch.float32) -> dict[int, ExpertWeights]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[1] ** 0.5).to(dtype)

    return {
        expert_id: ExpertWeights(w13=random(2 * INTERMEDIATE, HIDDEN), w2=random(HIDDEN, INTERMEDIATE))
        for expert_id in range(NUM_EXPERTS)
    }


def random_forward(num_rows: int, seed: int, dtype: torch.dtype = torch.float32) -> ForwardInput:
    """Every row visits a random half of the experts; a unit is all of them, so a row has one partial sum."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.rand(num_rows, NUM_EXPERTS, generator=generator).argsort(dim=-1)[:, : NUM_EXPERTS // 2]
    expert_ids = choice.sort(dim=-1).values
    rows = torch.arange(num_rows).repeat_interleave(expert_ids.shape[1])
    return ForwardInput(
        hidden_states=torch.randn(num_rows, HIDDEN, generator=generator).to(dtype),
        weights=torch.rand(len(rows), generator=generator),
        rows=rows.int(),
        expert_ids=expert_ids.flatten().int(),
        partial_sums=rows.int(),
        num_partial_sums=num_rows,
    )


def test_swiglu_of_a_row_by_hand():
    weights = ExpertWeights(w13=torch.tensor([[2.0], [3.0]]), w2=torch.tensor([[5.0]]))
    x = torch.tensor([[1.0]])
    torch.testing.assert_close(expert_ffn(x, weights), 5.0 * torch.nn.functional.silu(2 * x) * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_sums_are_what_a_loop_over_assignments_gives_to_the_bit(dtype):
    forward = random_forward(9, seed=0, dtype=dtype)
    expected = torch.zeros(forward.num_partial_sums, HIDDEN)
    for weight, row, expert_id, partial_sum in zip(
        forward.weights, forward.rows, forward.expert_ids.tolist(), forward.partial_sums, strict=True
    ):
        output = expert_ffn(forward.hidden_states[row].unsqueeze(0), experts(dtype)[expert_id])[0]
        expected[partial_sum] += output.float() * weight
    assert torch.equal(grouped_ffn(forward, experts(dtype)), expected.to(dtype))


@given(num_rows=st.lists(st.integers(1, 40), min_size=1, max_size=4), bf16=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_merged_forwards_give_the_bits_of_forwards_computed_alone(num_rows, bf16, seed):
    dtype = torch.bfloat16 if bf16 else torch.float32
    forwards = [random_forward(count, seed + index, dtype) for index, count in enumerate(num_rows)]
    together = grouped_ffn(merge(forwards), experts(dtype))
    alone = torch.cat([grouped_ffn(forward, experts(dtype)) for forward in forwards])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(64, 32), (512, 352), (2048, 1408)])
def test_a_rows_result_does_not_depend_on_the_number_of_rows_beside_it(
    dtype, hidden_size, intermediate_size, num_threads
):
    generator = torch.Generator().manual_seed(0)
    weights = ExpertWeights(
        w13=(torch.randn(2 * intermediate_size, hidden_size, generator=generator) * 0.05).to(dtype),
        w2=(torch.randn(hidden_size, intermediate_size, generator=generator) * 0.05).to(dtype),
    )
    rows = torch.randn(33, hidden_size, generator=generator).to(dtype)
    all_rows = expert_ffn(rows, weights)
    for start, count in ((0, 1), (7, 1), (5, 2), (30, 3), (1, 4), (2, 5), (3, 8), (4, 11), (9, 17), (2, 27)):
        assert torch.equal(expert_ffn(rows[start : start + count], weights), all_rows[start : start + count]), count


def test_nan_stays_in_its_own_partial_sum():
    forward = random_forward(5, seed=2)
    forward.hidden_states[3] = float("nan")
    assert grouped_ffn(forward, experts()).isnan().any(dim=-1).tolist() == [False, False, False, True, False]


def test_no_rows_give_no_partial_sums():
    assert grouped_ffn(random_forward(0, seed=0), experts()).shape == (0, HIDDEN)
