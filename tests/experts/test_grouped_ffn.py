import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.grouped_ffn import ExpertWeights, ForwardInput, expert_ffn, grouped_ffn, merge
from experts.kernels.expert_set import ExpertSet, PackedExpert
from experts.kernels.library import native
from experts.kernels.packed_matrix import pack
from tests.fake_experts import wire_assignments

HIDDEN, INTERMEDIATE, NUM_EXPERTS = 40, 24, 6


def experts(dtype: torch.dtype = torch.float32) -> dict[int, ExpertWeights]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[1] ** 0.5).to(dtype)

    return {
        expert_id: ExpertWeights(w13=random(2 * INTERMEDIATE, HIDDEN), w2=random(HIDDEN, INTERMEDIATE))
        for expert_id in range(NUM_EXPERTS)
    }


def packed_experts(dtype: torch.dtype) -> list[ExpertSet]:
    """The same experts for the kernels; none where these are not built."""
    if native() is None:
        return []
    packed = {
        expert_id: PackedExpert(w13=pack(weights.w13.chunk(2)), w2=pack([weights.w2]))
        for expert_id, weights in experts(dtype).items()
    }
    return [ExpertSet(packed, INTERMEDIATE)]


def random_forward(num_rows: int, seed: int, dtype: torch.dtype = torch.float32) -> ForwardInput:
    """Every row visits a random half of the experts; a unit is all of them, so a row has one partial sum."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.rand(num_rows, NUM_EXPERTS, generator=generator).argsort(dim=-1)[:, : NUM_EXPERTS // 2]
    expert_ids = choice.sort(dim=-1).values
    rows = torch.arange(num_rows).repeat_interleave(expert_ids.shape[1])
    return ForwardInput(
        hidden_states=torch.randn(num_rows, HIDDEN, generator=generator).to(dtype),
        assignment_bytes=wire_assignments(torch.rand(len(rows), generator=generator), rows, expert_ids.flatten(), rows),
        num_partial_sums=num_rows,
    )


def test_swiglu_of_a_row_by_hand():
    weights = ExpertWeights(w13=torch.tensor([[2.0], [3.0]]), w2=torch.tensor([[5.0]]))
    x = torch.tensor([[1.0]])
    torch.testing.assert_close(expert_ffn(x, weights), 5.0 * torch.nn.functional.silu(2 * x) * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_sums_are_what_a_loop_over_assignments_gives(dtype):
    forward = random_forward(9, seed=0, dtype=dtype)
    expected = torch.zeros(forward.num_partial_sums, HIDDEN)
    for weight, row, expert_id, partial_sum in zip(
        forward.weights, forward.rows, forward.expert_ids.tolist(), forward.partial_sums, strict=True
    ):
        output = expert_ffn(forward.hidden_states[row].unsqueeze(0), experts(dtype)[expert_id])[0]
        expected[partial_sum] += output.float() * float(weight)
    tolerance = 0.02 if dtype is torch.bfloat16 else 1e-5
    for held in (experts(dtype), *packed_experts(dtype)):
        torch.testing.assert_close(grouped_ffn(forward, held), expected.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(native() is None, reason="the CPU kernels are not built; torch rounds rows otherwise beside others")
@given(num_rows=st.lists(st.integers(1, 40), min_size=1, max_size=4), bf16=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_merged_forwards_give_the_bits_of_forwards_computed_alone(num_rows, bf16, seed):
    dtype = torch.bfloat16 if bf16 else torch.float32
    forwards = [random_forward(count, seed + index, dtype) for index, count in enumerate(num_rows)]
    (held,) = packed_experts(dtype)
    together = grouped_ffn(merge(forwards), held)
    alone = torch.cat([grouped_ffn(forward, held) for forward in forwards])
    assert torch.equal(together, alone)


def test_nan_stays_in_its_own_partial_sum():
    forward = random_forward(5, seed=2)
    forward.hidden_states[3] = float("nan")
    assert grouped_ffn(forward, experts()).isnan().any(dim=-1).tolist() == [False, False, False, True, False]


def test_no_rows_give_no_partial_sums():
    assert grouped_ffn(random_forward(0, seed=0), experts()).shape == (0, HIDDEN)
