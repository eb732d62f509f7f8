from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from experts.kernels.expert_set import ExpertSet, PackedExpert
from experts.kernels.library import set_num_threads
from experts.kernels.packed_matrix import pack
from experts.quantized_matrix import QuantizedMatrix
from tests.experts.kernels.instruction_sets import each_instruction_set, needs_kernels
from tests.fake_experts import wire_assignments

__all__ = ["each_instruction_set"]

NUM_EXPERTS = 5
KINDS = ["float32", "bfloat16", "int8", "int4"]


@dataclass
class Assignments:
    weights: torch.Tensor
    rows: torch.Tensor
    expert_ids: torch.Tensor
    partial_sums: torch.Tensor
    num_partial_sums: int


def random_assignments(num_rows: int, seed: int = 0) -> Assignments:
    """Each row visits three experts; the first two share a partial sum."""
    generator = torch.Generator().manual_seed(seed)
    expert_ids = torch.rand(num_rows, NUM_EXPERTS, generator=generator).argsort(dim=-1)[:, :3].sort(dim=-1).values
    rows = torch.arange(num_rows, dtype=torch.int32)
    return Assignments(
        weights=torch.rand(3 * num_rows, generator=generator),
        rows=rows.repeat_interleave(3),
        expert_ids=expert_ids.flatten().int(),
        partial_sums=torch.stack((2 * rows, 2 * rows, 2 * rows + 1), dim=1).flatten(),
        num_partial_sums=2 * num_rows,
    )


class Experts:
    """The same experts packed and as fp64 matrices."""

    def __init__(self, kind: str, hidden_size: int = 96, intermediate_size: int = 64, group_size: int = 32) -> None:
        generator = torch.Generator().manual_seed(3)
        self.exact, packed = [], {}
        for expert_id in range(NUM_EXPERTS):
            shapes = (
                (intermediate_size, hidden_size),
                (intermediate_size, hidden_size),
                (hidden_size, intermediate_size),
            )
            matrices = [torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in shapes]
            kept = [
                QuantizedMatrix.quantize(matrix, int(kind[3:]), group_size)
                if kind.startswith("int")
                else matrix.to(getattr(torch, kind))
                for matrix in matrices
            ]
            packed[expert_id] = PackedExpert(w13=pack(kept[:2]), w2=pack(kept[2:]))
            self.exact.append([k.dequantize().double() if isinstance(k, QuantizedMatrix) else k.double() for k in kept])
        self.set = ExpertSet(packed, intermediate_size)

    def run(self, x: torch.Tensor, a: Assignments, out_dtype: torch.dtype) -> torch.Tensor:
        out = torch.full((a.num_partial_sums, x.shape[1]), float("nan"), dtype=out_dtype)
        return self.set.forward(x, wire_assignments(a.weights, a.rows, a.expert_ids, a.partial_sums), out)

    def expected(self, x: torch.Tensor, a: Assignments) -> torch.Tensor:
        sums = torch.zeros(a.num_partial_sums, x.shape[1], dtype=torch.float64)
        for i in range(len(a.weights)):
            gate, up, down = self.exact[int(a.expert_ids[i])]
            row = x[int(a.rows[i])].double()
            sums[int(a.partial_sums[i])] += a.weights[i] * (down @ (F.silu(gate @ row) * (up @ row)))
        return sums


# fp32: rounding of sums; bf16: inner activations rounded once; int8 and int4: activations rounded to 8 bits twice
@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.01), ("int8", 0.03), ("int4", 0.03)])
@pytest.mark.parametrize("num_rows", [1, 6, 50, 150])
def test_partial_sums_are_those_of_a_loop_in_fp64(
    each_instruction_set: str, kind: str, tolerance: float, num_rows: int
) -> None:
    experts, assignments = Experts(kind), random_assignments(num_rows)
    x = torch.randn(num_rows, 96).to(torch.float32 if kind == "float32" else torch.bfloat16)
    expected = experts.expected(x, assignments)
    found = experts.run(x, assignments, torch.float32)
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < tolerance
    if x.dtype is torch.bfloat16:
        assert torch.equal(experts.run(x, assignments, torch.bfloat16), found.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize(("hidden_size", "group_size", "num_rows"), [(96, 32, 120), (128, 64, 400)])
def test_a_rows_sums_have_the_same_bits_alone_and_among_many(
    each_instruction_set: str, kind: str, num_threads: int, hidden_size: int, group_size: int, num_rows: int
) -> None:
    experts = Experts(kind, hidden_size=hidden_size, group_size=group_size)
    x = torch.randn(num_rows, hidden_size).bfloat16()
    everything = random_assignments(num_rows)
    set_num_threads(num_threads)
    together = experts.run(x, everything, torch.float32)
    set_num_threads(1)
    for row in (0, 7, num_rows - 1):
        mine = everything.rows == row
        alone = Assignments(
            weights=everything.weights[mine],
            rows=torch.zeros(3, dtype=torch.int32),
            expert_ids=everything.expert_ids[mine],
            partial_sums=torch.tensor([0, 0, 1], dtype=torch.int32),
            num_partial_sums=2,
        )
        assert torch.equal(experts.run(x[row : row + 1], alone, torch.float32), together[2 * row : 2 * row + 2])


def test_many_rows_go_through_in_groups_of_experts_with_the_same_bits(each_instruction_set: str) -> None:
    experts = Experts("float32", hidden_size=32, intermediate_size=2048)  # 300 rows of 8 KiB: more than one group holds
    x, assignments = torch.randn(300, 32), random_assignments(300)
    found = experts.run(x, assignments, torch.float32)
    first = random_assignments(300)
    keep = first.rows < 10
    few = Assignments(first.weights[keep], first.rows[keep], first.expert_ids[keep], first.partial_sums[keep], 20)
    assert torch.equal(experts.run(x[:10], few, torch.float32), found[:20])


ROWS_OF_EXPERTS = (300, 40, 17, 16, 1)  # with AMX: two tiles, and one of each kind
WIDE = [("bfloat16", 8224, 96), ("bfloat16", 96, 4160), ("int8", 13696, 64), ("int4", 64, 13696)]  # ranges of inputs


@pytest.mark.parametrize(("kind", "hidden_size", "intermediate_size"), WIDE)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_rows_that_fill_a_cache_meet_the_inputs_range_by_range_with_the_same_bits(
    each_instruction_set: str, kind: str, hidden_size: int, intermediate_size: int, num_threads: int
) -> None:
    experts = Experts(kind, hidden_size, intermediate_size, group_size=64)
    expert_ids = torch.repeat_interleave(torch.arange(NUM_EXPERTS), torch.tensor(ROWS_OF_EXPERTS)).int()
    rows, weights = torch.arange(len(expert_ids), dtype=torch.int32), torch.rand(len(expert_ids))
    x = torch.randn(len(expert_ids), hidden_size).bfloat16()
    set_num_threads(num_threads)
    together = experts.run(x, Assignments(weights, rows, expert_ids, rows, len(rows)), torch.float32)
    set_num_threads(1)
    zero = torch.zeros(1, dtype=torch.int32)
    for row in (0, 191, 192, 299, 300, 339, 340, 356, 357, 372, 373):
        mine = Assignments(weights[row : row + 1], zero, expert_ids[row : row + 1], zero, 1)
        alone = experts.run(x[row : row + 1], mine, torch.float32)
        assert torch.equal(alone[0], together[row])
        expected = experts.expected(x[row : row + 1], mine)
        assert float((alone.double() - expected).abs().max() / expected.abs().max()) < 0.05


@pytest.mark.parametrize(("kind", "hidden_size", "intermediate_size"), WIDE)
def test_a_wide_dense_mlp_adds_its_residual_once(
    each_instruction_set: str, kind: str, hidden_size: int, intermediate_size: int
) -> None:
    experts = Experts(kind, hidden_size, intermediate_size, group_size=64)
    x, residual = torch.randn(2, 300, hidden_size).bfloat16()
    expected = experts.set.forward_dense(x, torch.float32) + residual.float()
    assert torch.equal(experts.set.forward_dense(x, torch.bfloat16, residual), expected.bfloat16())


@needs_kernels
def test_a_dense_mlp_is_one_expert_over_every_row() -> None:
    experts, x = Experts("float32"), torch.randn(20, 96)
    gate, up, down = experts.exact[0]
    expected = (F.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
    torch.testing.assert_close(experts.set.forward_dense(x, torch.float32).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "hidden_size"), [("float32", 33), ("bfloat16", 40), ("int4", 160)])
def test_a_residual_is_added_in_fp32_before_rounding(each_instruction_set: str, kind: str, hidden_size: int) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    experts = Experts(kind, hidden_size=hidden_size)
    x, residual = torch.randn(2, 7, hidden_size).to(dtype)
    expected = experts.set.forward_dense(x, torch.float32) + residual.float()
    assert torch.equal(experts.set.forward_dense(x, torch.float32, residual), expected)
    assert torch.equal(experts.set.forward_dense(x, dtype, residual), expected.to(dtype))


@needs_kernels
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(40, 24), (33, 7), (2, 2)])
def test_sizes_that_fill_no_panel(hidden_size: int, intermediate_size: int) -> None:
    experts, assignments = Experts("float32", hidden_size, intermediate_size), random_assignments(9)
    x = torch.randn(9, hidden_size)
    torch.testing.assert_close(
        experts.run(x, assignments, torch.float32).double(), experts.expected(x, assignments), rtol=1e-4, atol=1e-5
    )


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_the_sums_of_its_own_row(kind: str) -> None:
    experts, assignments = Experts(kind), random_assignments(5)
    x = torch.randn(5, 96)
    x[3, 0] = float("nan")
    is_nan = experts.run(x, assignments, torch.float32).isnan().any(dim=1)
    assert is_nan.tolist() == [row // 2 == 3 for row in range(10)]
