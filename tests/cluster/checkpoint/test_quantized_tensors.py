"""Layouts of quantised matrices, against numbers written out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint.quantization import Fp8Quantization, IntLayout, IntQuantization
from cluster.checkpoint.quantized_tensors import PACKED, SCALE, SHAPE, dequantize_blocks, pack, parts_of, unpack
from experts.quantized_matrix import MatrixFormat, QuantizedMatrix
from tests.quantized_checkpoints import multiplied_out


def matrix(values: list[list[int]], num_bits: int, group_size: int) -> QuantizedMatrix:
    scales = torch.ones(len(values), len(values[0]) // group_size)
    return QuantizedMatrix(
        values=torch.tensor(values, dtype=torch.int8), scales=scales, num_bits=num_bits, group_size=group_size
    )


def test_eight_numbers_of_four_bits_fill_a_word_the_first_in_its_lowest_bits() -> None:
    parts = pack(matrix([[-8, -7, 0, 1, 2, 3, 7, -1]], 4, 8))
    assert parts[PACKED].tolist() == [[0x7F_BA_98_10]]  # 15, 10 ... 0 is value + 8, from the last number to the first
    assert parts[SHAPE].tolist() == [1, 8]
    assert parts[SHAPE].dtype is torch.int64
    assert parts[SCALE].dtype is torch.bfloat16


def test_four_numbers_of_eight_bits_fill_a_word() -> None:
    assert pack(matrix([[-127, 0, 127, -1]], 8, 4))[PACKED].tolist() == [[0x7F_FF_80_01]]


@given(
    num_bits=st.sampled_from([4, 8]), num_rows=st.integers(1, 4), num_groups=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_what_is_packed_is_what_is_unpacked(num_bits: int, num_rows: int, num_groups: int, seed: int) -> None:
    weight = torch.randn(num_rows, 32 * num_groups, generator=torch.Generator().manual_seed(seed))
    quantized = QuantizedMatrix.quantize(weight, num_bits, 32)
    parts = pack(quantized)
    matrix_format = MatrixFormat(num_bits=num_bits, group_size=32)
    headers = parts_of(tuple(weight.shape), IntQuantization(matrix_format=matrix_format, layout=IntLayout.PACKED))
    assert {suffix: (tuple(part.shape), part.dtype) for suffix, part in parts.items()} == {
        suffix: (header.shape, parts[suffix].dtype) for suffix, header in headers.items()
    }
    assert all(parts[suffix].dtype in header.dtypes for suffix, header in headers.items())
    found = unpack(parts, matrix_format)
    assert torch.equal(found.values, quantized.values)
    assert torch.equal(found.scales, quantized.scales)


def test_one_scale_a_row_is_a_group_as_wide_as_the_matrix() -> None:
    parts = {"": torch.tensor([[1, -128], [3, 4]], dtype=torch.int8), SCALE: torch.tensor([[2.0], [0.5]])}
    found = unpack(parts, MatrixFormat(num_bits=8, group_size=None))
    assert found.group_size == 2
    assert found.dequantize().tolist() == [[2.0, -256.0], [1.5, 2.0]]


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (300, 64)])
def test_blocks_of_8_bit_floats_are_multiplied_by_their_scales(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * 100).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=generator)
    assert torch.equal(dequantize_blocks(weight, scales), multiplied_out(weight, scales))


@pytest.mark.parametrize(
    ("shape", "group_size", "message"),
    [
        ((4, 48), 32, "48 columns do not divide into groups of 32"),
        ((4, 12), 4, "12 columns do not fill whole words of 8"),
        ((4,), 4, "only matrices"),
    ],
)
def test_a_shape_that_a_layout_cannot_hold_is_refused(shape: tuple[int, ...], group_size: int, message: str) -> None:
    quantization = IntQuantization(
        matrix_format=MatrixFormat(num_bits=4, group_size=group_size), layout=IntLayout.PACKED
    )
    with pytest.raises(ValueError, match=message):
        parts_of(shape, quantization)


def test_a_partial_block_has_a_scale_of_its_own() -> None:
    assert parts_of((576, 7168), Fp8Quantization())["_scale_inv"].shape == (5, 56)
