import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.kernels.library import set_num_threads
from experts.kernels.linear import KernelHeads, KernelLinear
from experts.kernels.packed_matrix import pack, pack_plain
from experts.quantized_matrix import QuantizedMatrix
from tests.experts.kernels.instruction_sets import (
    best_afterwards,
    each_instruction_set,
    needs_kernels,
    use_instruction_set,
)

__all__ = ["each_instruction_set"]

DTYPES = [torch.float32, torch.bfloat16]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "num_inputs"),
    [(1, 96, 64), (7, 70, 34), (50, 33, 130), (200, 1, 2), (31, 70, 96), (300, 96, 192)],
)
def test_a_product_is_that_of_fp64_within_the_rounding_of_its_sums(
    each_instruction_set: str,
    weight_dtype: torch.dtype,
    x_dtype: torch.dtype,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
) -> None:
    weight = torch.randn(num_outputs, num_inputs).to(weight_dtype)
    x = torch.randn(num_rows, num_inputs).to(x_dtype)
    found = KernelLinear(pack([weight]))(x, out_dtype=torch.float32)
    # fp32 sums of n products; bf16 tiles of some processors round fp32 activations to bf16 first.
    rounding = 2**-8 if weight_dtype is torch.bfloat16 and x_dtype is torch.float32 else num_inputs * 2**-23
    assert relative_error(found, x.double() @ weight.double().T) < rounding


@pytest.mark.parametrize(("num_bits", "tolerance"), [(8, 0.02), (4, 0.02)])
@pytest.mark.parametrize("group_size", [16, 64, 128])
def test_a_quantised_product_is_that_of_its_dequantised_weight(
    each_instruction_set: str, num_bits: int, tolerance: float, group_size: int
) -> None:
    matrix = QuantizedMatrix.quantize(torch.randn(70, 256), num_bits, group_size)
    x = torch.randn(20, 256)
    found = KernelLinear(pack([matrix]))(x)
    # Activations are rounded to 8 bits a group; the weight is exact.
    assert relative_error(found, x.double() @ matrix.dequantize().double().T) < tolerance


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 6, 20, 50])
@pytest.mark.parametrize(("num_bits", "low", "high"), [(8, -128, 127), (4, -8, 7)])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
def test_no_sum_of_the_largest_integers_saturates(
    each_instruction_set: str, num_rows: int, num_bits: int, low: int, high: int, group_size: int
) -> None:
    values = torch.tensor([low, high], dtype=torch.int8)[torch.arange(64) // 2 % 2].unsqueeze(1).repeat(1, 256)
    values[::2, ::2] = values[::2, ::2].neg().clamp(low, high)
    matrix = QuantizedMatrix(
        values=values, scales=torch.ones(64, 256 // group_size), num_bits=num_bits, group_size=group_size
    )
    x = torch.full((num_rows, 256), -127.0)  # its own integers, with a scale of 1
    x[::2] = 127.0
    x[1::3, 1::2] *= -1
    found = KernelLinear(pack([matrix]))(x)
    assert torch.equal(found.double(), x.double() @ values.double().T)


@needs_kernels
@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("num_rows", [1, 12, 13, 40, 200])
def test_integers_have_the_same_bits_with_every_instruction_set_of_512_bits(num_bits: int, num_rows: int) -> None:
    project = KernelLinear(pack([QuantizedMatrix.quantize(torch.randn(70, 256), num_bits, 64)]))
    x = torch.randn(num_rows, 256)
    with best_afterwards():
        found = [project(x) for name in ("amx", "avx512bf16", "avx512vnni") if use_instruction_set(name)]
    assert all(torch.equal(each, found[0]) for each in found)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_rows=st.integers(1, 60),
    others=st.integers(0, 200),
    num_threads=st.sampled_from([1, 2, 5]),
    kind=st.sampled_from(["float32", "bfloat16", "compact", "int8", "int4"]),
)
def test_a_row_has_the_same_bits_beside_any_others_with_any_number_of_threads(
    each_instruction_set: str, num_rows: int, others: int, num_threads: int, kind: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(170, 128, generator=generator)
    x = torch.randn(num_rows + others, 128, generator=generator)
    matrix = {
        "float32": weight,
        "bfloat16": weight.bfloat16(),
        "compact": weight.bfloat16(),
        "int8": QuantizedMatrix.quantize(weight, 8, 64),
        "int4": QuantizedMatrix.quantize(weight, 4, 64),
    }[kind]
    project = KernelLinear(pack([matrix]) if kind == "compact" else pack_plain([matrix]))
    set_num_threads(1)
    alone = torch.cat([project(row.unsqueeze(0)) for row in x[others:]])
    set_num_threads(num_threads)
    together = project(x)[others:]
    set_num_threads(1)
    assert torch.equal(alone, together)


@pytest.mark.parametrize(("kind", "num_inputs"), [("compact", 8224), ("plain", 8224), ("int8", 13696), ("int4", 13696)])
@pytest.mark.parametrize(("num_outputs", "num_threads"), [(70, 2), (528, 1), (33, 5)])
def test_rows_that_fill_a_cache_meet_the_inputs_range_by_range_with_the_same_bits(
    each_instruction_set: str, kind: str, num_inputs: int, num_outputs: int, num_threads: int
) -> None:
    weight = torch.randn(num_outputs, num_inputs)
    matrix = QuantizedMatrix.quantize(weight, int(kind[3:]), 64) if kind.startswith("int") else weight.bfloat16()
    linear = KernelLinear(pack_plain([matrix]) if kind == "plain" else pack([matrix]))
    x = torch.randn(600, num_inputs).bfloat16()
    set_num_threads(num_threads)
    found = linear(x, out_dtype=torch.float32)
    exact = matrix.dequantize() if isinstance(matrix, QuantizedMatrix) else matrix
    few = torch.tensor([0, 191, 192, 239, 240, 599])
    tolerance = 0.03 if kind.startswith("int") else 0.001
    assert relative_error(found[few], x[few].double() @ exact.double().T) < tolerance
    for row in few.tolist():
        assert torch.equal(linear(x[row : row + 1], out_dtype=torch.float32)[0], found[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_is_added_before_rounding(each_instruction_set: str, dtype: torch.dtype) -> None:
    weight, x = torch.randn(45, 64).to(dtype), torch.randn(9, 64).to(dtype)
    residual = torch.randn(9, 45).to(dtype)
    project = KernelLinear(pack([weight]))
    expected = (project(x, out_dtype=torch.float32) + residual.float()).to(dtype)
    assert torch.equal(project(x, residual=residual), expected)


def test_matrices_one_above_the_other_start_at_whole_panels(each_instruction_set: str) -> None:
    first, second = torch.randn(40, 16), torch.randn(10, 16)
    product = KernelLinear(pack([first, second]))(torch.eye(16))
    assert torch.equal(product[:, :40], first.T)
    assert not product[:, 40:64].any()
    assert torch.equal(product[:, 64:], second.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 5, 130])
def test_each_head_has_its_own_matrix(each_instruction_set: str, dtype: torch.dtype, num_rows: int) -> None:
    weights = torch.randn(3, 20, 12).to(dtype)
    x = torch.randn(num_rows, 3, 30).to(dtype)[..., 4:16]  # a part of a wider row
    out = torch.zeros(num_rows, 3, 25, dtype=dtype)
    KernelHeads([pack_plain([weight]) for weight in weights])(x, out=out[..., :20])
    expected = torch.einsum("rhi,hoi->rho", x.double(), weights.double())
    assert relative_error(out[..., :20], expected) < (2**-7 if dtype is torch.bfloat16 else 1e-5)
    assert not out[..., 20:].any()


def test_nan_stays_in_its_own_row(each_instruction_set: str) -> None:
    for matrix in (torch.randn(40, 64), QuantizedMatrix.quantize(torch.randn(40, 64), 8, 32)):
        x = torch.randn(10, 64)
        x[3, 5] = float("nan")
        assert KernelLinear(pack([matrix]))(x).isnan().all(dim=1).tolist() == [i == 3 for i in range(10)]
