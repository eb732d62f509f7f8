import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.quantized_matrix import CannotQuantize, QuantizedMatrix


def random_weight(num_rows: int, num_columns: int, seed: int, spread: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator) * spread
    return weight * torch.randn(num_rows, 1, generator=generator).exp()  # rows of different sizes


@given(
    num_bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([2, 32, 64]),
    num_rows=st.integers(1, 5),
    num_groups=st.integers(1, 4),
    spread=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_every_number_is_met_to_within_half_a_step_of_its_group(
    num_bits, group_size, num_rows, num_groups, spread, dtype, seed
):
    weight = random_weight(num_rows, num_groups * group_size, seed, spread).to(dtype)
    matrix = QuantizedMatrix.quantize(weight, num_bits, group_size)
    step = matrix.scales.repeat_interleave(group_size, dim=1)
    assert bool(((matrix.dequantize() - weight.float()).abs() <= 0.5001 * step).all())
    assert matrix.scales.bfloat16().float().equal(matrix.scales), "a scale survives being stored in bfloat16"
    lowest, highest = (-8, 7) if num_bits == 4 else (-127, 127)
    assert int(matrix.values.min()) >= lowest
    assert int(matrix.values.max()) <= highest


@pytest.mark.parametrize("num_bits", [4, 8])
def test_zeros_stay_zeros(num_bits):
    matrix = QuantizedMatrix.quantize(torch.zeros(3, 64), num_bits, 32)
    assert torch.equal(matrix.dequantize(), torch.zeros(3, 64))
    assert bool((matrix.scales > 0).all()), "a kernel may divide by a scale"


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("outlier", [100.0, -100.0])
def test_an_outlier_coarsens_its_own_group_and_no_other(num_bits, outlier):
    weight = random_weight(2, 96, seed=1)
    plain = QuantizedMatrix.quantize(weight, num_bits, 32)
    weight[1, 40] = outlier
    matrix = QuantizedMatrix.quantize(weight, num_bits, 32)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 1] = False
    assert torch.equal(matrix.scales[others], plain.scales[others])
    assert matrix.dequantize()[1, 40].item() == pytest.approx(outlier, rel=0.5 / 7)


def test_a_matrix_by_hand():
    matrix = QuantizedMatrix(
        values=torch.tensor([[1, -2, 3, 4]], dtype=torch.int8),
        scales=torch.tensor([[0.5, 2.0]]),
        num_bits=4,
        group_size=2,
    )
    assert matrix.dequantize().tolist() == [[0.5, -1.0, 6.0, 8.0]]
    assert matrix.shape == (1, 4)
    assert matrix.nbytes == 2 + 8


def test_four_bits_are_closer_than_the_largest_number_divided_by_seven():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    groups = weight.view(64, 2, 128)
    scales = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scales).round() * scales - groups).square().mean()
    found = (QuantizedMatrix.quantize(weight, 4, 128).dequantize() - weight).square().mean()
    assert found < 0.85 * plain


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(broken):
    weight = torch.ones(2, 32)
    weight[1, 3] = broken
    with pytest.raises(CannotQuantize, match="some of its numbers are NaN or infinite"):
        QuantizedMatrix.quantize(weight, 8, 32)


@pytest.mark.parametrize(
    ("num_bits", "group_size", "message"),
    [
        (4, 48, "group_size is 48, must divide the 64 columns"),
        (8, 0, "group_size is 0"),
        (3, 32, r"num_bits is 3, supported are \[4, 8\]"),
    ],
)
def test_a_form_that_does_not_exist_is_refused(num_bits, group_size, message):
    with pytest.raises(CannotQuantize, match=message):
        QuantizedMatrix.quantize(torch.ones(2, 64), num_bits, group_size)


def test_scales_that_do_not_fit_the_values_are_refused():
    with pytest.raises(CannotQuantize, match=r"scales are \[2, 3\], expected \[2, 2\]: one for each 32 columns"):
        QuantizedMatrix(values=torch.zeros(2, 64, dtype=torch.int8), scales=torch.ones(2, 3), num_bits=8, group_size=32)
