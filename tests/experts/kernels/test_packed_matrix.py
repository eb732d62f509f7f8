"""bfloat16 weights in 12 bits: the same products to the bit, whatever the numbers are."""

import math

import pytest
import torch

from experts.kernels.expert_set import ExpertSet, PackedExpert
from experts.kernels.library import Format, instruction_set
from experts.kernels.linear import KernelLinear
from experts.kernels.packed_matrix import PackedMatrix, pack, pack_compact, pack_plain
from tests.experts.kernels.instruction_sets import each_instruction_set, needs_kernels
from tests.fake_experts import wire_assignments

__all__ = ["each_instruction_set"]


def compact(parts: list[torch.Tensor]) -> PackedMatrix:
    """Also where it is not smaller."""
    packed = pack_compact(parts, at_most=math.inf)
    assert packed
    return packed


def weight_with_rare_numbers(num_outputs: int, num_inputs: int) -> torch.Tensor:
    """In the first and the last step, in neighbouring ones, and in one panel of two."""
    weight = torch.randn(num_outputs, num_inputs).bfloat16() / 64
    weight[0, 0] = 1e30
    weight[5, -1] = -1e-30
    weight[3, 8:16] = torch.tensor([0.0, -0.0, float("inf"), 3e-39, 1e-20, 2.0, -3e30, 1e5]).bfloat16()
    return weight


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 40, 60, 150])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(33, 64), (170, 128), (640, 32), (1100, 160)])
def test_a_compact_matrix_has_the_products_of_the_plain_one(
    each_instruction_set: str, num_rows: int, num_outputs: int, num_inputs: int
) -> None:
    weight = weight_with_rare_numbers(num_outputs, num_inputs)
    x = torch.randn(num_rows, num_inputs).bfloat16().abs()  # no sum of infinities of both signs
    expected = KernelLinear(pack_plain([weight]))(x, out_dtype=torch.float32)
    found = KernelLinear(compact([weight]))(x, out_dtype=torch.float32)
    assert torch.equal(found, expected)


@needs_kernels
def test_every_bfloat16_number_is_kept() -> None:
    numbers = torch.arange(2**16).to(torch.int16).view(torch.bfloat16).view(256, 256)
    found = KernelLinear(compact([numbers]))(torch.eye(256, dtype=torch.bfloat16), out_dtype=torch.bfloat16).T
    finite = numbers.isfinite().all(dim=1)  # NaN and infinity times 0 spoil their row
    is_subnormal = numbers.abs() < 2.0**-126  # 0 for the products of some processors
    assert torch.equal(found[finite & ~is_subnormal.any(dim=1)], numbers[finite & ~is_subnormal.any(dim=1)])
    plain = KernelLinear(pack_plain([numbers]))(torch.eye(256, dtype=torch.bfloat16), out_dtype=torch.bfloat16).T
    assert torch.equal(found[finite], plain[finite])


@pytest.mark.parametrize("num_rows", [1, 5, 12, 30])
def test_experts_may_be_compact_or_plain_one_by_one(each_instruction_set: str, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(5)
    plain, mixed = {}, {}
    for expert_id in range(4):
        gate_up = [torch.randn(64, 96, generator=generator).bfloat16() for _ in range(2)]
        down = [torch.randn(96, 64, generator=generator).bfloat16()]
        plain[expert_id] = PackedExpert(w13=pack_plain(gate_up), w2=pack_plain(down))
        mixed[expert_id] = PackedExpert(
            w13=(compact if expert_id % 2 else pack_plain)(gate_up), w2=(compact if expert_id < 2 else pack_plain)(down)
        )
    x = torch.randn(num_rows, 96, generator=generator).bfloat16()
    rows = torch.arange(num_rows, dtype=torch.int32).repeat_interleave(4)
    expert_ids = torch.arange(4, dtype=torch.int32).repeat(num_rows)
    assignments = wire_assignments(torch.rand(4 * num_rows, generator=generator), rows, expert_ids, rows)
    sums = [ExpertSet(experts, 64).forward(x, assignments, torch.empty(num_rows, 96)) for experts in (plain, mixed)]
    assert torch.equal(*sums)


@needs_kernels
def test_weights_of_a_model_take_12_bits_and_those_that_gain_nothing_stay_as_they_are() -> None:
    is_decoded_fast = instruction_set() != "portable"
    normal = torch.randn(256, 512).bfloat16()
    packed = pack([normal])
    assert packed.number_format is (Format.COMPACT if is_decoded_fast else Format.BFLOAT16)
    assert packed.nbytes < (0.78 if is_decoded_fast else 1.01) * normal.nbytes
    noise = torch.randint(-(2**15), 2**15, (256, 512), dtype=torch.int16).view(torch.bfloat16)
    for other in (noise, normal[:, :510].contiguous(), normal.float()):
        assert pack([other]).number_format is not Format.COMPACT


@needs_kernels
def test_the_dictionaries_of_a_packed_matrix_are_sound() -> None:
    matrix = compact([weight_with_rare_numbers(170, 128)])
    assert matrix.num_exceptions >= 4
    assert matrix.has_sound_dictionaries()
    assert compact([torch.ones(32, 4).bfloat16()]).has_sound_dictionaries()
