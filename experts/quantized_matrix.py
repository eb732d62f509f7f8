"""A weight matrix as small integers with a scale for every group of neighbouring columns.

Pure tensor mathematics; knows nothing of files (cluster/checkpoint/quantization.py) nor of the kernels' layout.
Symmetric: weight = value * scale, no zero points.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

VALUE_RANGES = {8: (-127, 127), 4: (-8, 7)}  # what quantize writes, by num_bits
# Scales tried for int4, as multiples of the least one that clips nothing by more than half a step. Five of them take
# the mean squared error of normally distributed weights to 0.80 of that of amax / 7; a finer grid gains 1 % more.
INT4_TRIALS = (1.0, 1.025, 1.05, 1.075, 1.1)
BLOCK_NUMBERS = 2**18  # quantised at a time: what is made on the way stays in the processor's cache
MIN_SCALE = 2.0**-126  # the least normal float: processors may take a smaller one for zero


class CannotQuantize(ValueError):
    """A matrix holds numbers that have no quantised form, or does not divide into groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixFormat:
    """The form that all quantised matrices of a checkpoint have."""

    num_bits: int  # 8 or 4
    group_size: int | None  # columns that share a scale; None: a whole row does

    def __str__(self) -> str:
        return (
            f"int{self.num_bits} ({'one scale a row' if self.group_size is None else f'groups of {self.group_size}'})"
        )

    def nbytes(self, num_rows: int, num_columns: int) -> int:
        """What QuantizedMatrix.nbytes says of a matrix of this size."""
        return num_rows * (num_columns * self.num_bits // 8 + 4 * (num_columns // (self.group_size or num_columns)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedMatrix:
    """Rows are outputs, columns inputs, as in the weight of a linear layer.

    values: [num_rows, num_columns] int8, one number an element for 4 bits too. `quantize` writes -127 to 127 for 8 bits
        and -8 to 7 for 4; other writers' files may hold -128.
    scales: [num_rows, num_columns // group_size] fp32.
    """

    values: Tensor
    scales: Tensor
    num_bits: int  # 8 or 4
    group_size: int  # columns that share a scale

    def __post_init__(self) -> None:
        if self.num_bits not in VALUE_RANGES:
            raise CannotQuantize(f"num_bits is {self.num_bits}, supported are {sorted(VALUE_RANGES)}")
        if self.values.dtype is not torch.int8 or self.scales.dtype is not torch.float32 or self.values.ndim != 2:
            raise CannotQuantize(
                f"values are {self.values.dtype} {list(self.values.shape)} and scales {self.scales.dtype}, expected "
                "torch.int8 [rows, columns] and torch.float32"
            )
        num_groups = _num_groups(self.values.shape[1], self.group_size)
        if tuple(self.scales.shape) != (self.values.shape[0], num_groups):
            raise CannotQuantize(
                f"scales are {list(self.scales.shape)}, expected {[self.values.shape[0], num_groups]}: one for each "
                f"{self.group_size} columns"
            )

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Of num_bits a number and of the scales."""
        return self.values.numel() * self.num_bits // 8 + self.scales.nbytes

    def dequantize(self) -> Tensor:
        """[num_rows, num_columns] fp32."""
        groups = self.values.float().view(*self.scales.shape, self.group_size)  # [num_rows, num_groups, group_size]
        return groups.mul_(self.scales.unsqueeze(-1)).view(self.shape)

    @classmethod
    def quantize(cls, weight: Tensor, num_bits: int, group_size: int) -> "QuantizedMatrix":
        """The nearest values, under scales that bfloat16 can hold: what is read back from a file is what was made.

        Every number is met to within half a step (its group's scale), the largest ones included. weight: [num_rows,
        num_columns] of any floating dtype. Raises CannotQuantize.
        """
        if weight.ndim != 2:
            raise CannotQuantize(f"the weight is {list(weight.shape)}, expected a matrix")
        num_groups = _num_groups(weight.shape[1], group_size)
        if num_bits not in VALUE_RANGES:
            raise CannotQuantize(f"num_bits is {num_bits}, supported are {sorted(VALUE_RANGES)}")
        values = torch.empty(weight.shape, dtype=torch.int8)
        scales = torch.empty(weight.shape[0], num_groups)
        num_rows = max(1, BLOCK_NUMBERS // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            groups = weight[rows].float().view(-1, num_groups, group_size)
            scales[rows] = _scales(groups, num_bits)
            lowest, highest = VALUE_RANGES[num_bits]
            rounded = (groups / scales[rows].unsqueeze(-1)).round_().clamp_(lowest, highest)
            values[rows] = rounded.view(-1, weight.shape[1]).to(torch.int8)
        return cls(values=values, scales=scales, num_bits=num_bits, group_size=group_size)


def kind_of(matrix: Tensor | QuantizedMatrix) -> tuple[int, int]:
    """Bits and group size, which matrices that are computed together share; 0, 0 for plain numbers."""
    return (matrix.num_bits, matrix.group_size) if isinstance(matrix, QuantizedMatrix) else (0, 0)


def _num_groups(num_columns: int, group_size: int) -> int:
    if group_size < 1 or num_columns % group_size:
        raise CannotQuantize(f"group_size is {group_size}, must divide the {num_columns} columns")
    return num_columns // group_size


def _scales(groups: Tensor, num_bits: int) -> Tensor:
    """The scale of each group. groups: [num_rows, num_groups, group_size] fp32; returns [num_rows, num_groups]."""
    lowest, highest = VALUE_RANGES[num_bits]
    largest, smallest = groups.amax(dim=-1), groups.amin(dim=-1)
    if not bool((largest.isfinite() & smallest.isfinite()).all()):  # NaN is neither above nor below: it comes through
        raise CannotQuantize("some of its numbers are NaN or infinite; the weights are broken")
    least = torch.maximum(largest / (highest + 0.5), smallest / (lowest - 0.5)).clamp_(min=MIN_SCALE)
    if num_bits == 8:
        return _next_bfloat16(least)
    # In units of `least`: squares of very small or large weights would leave fp32's range.
    relative = groups / least.unsqueeze(-1)
    best_scales, best_errors = least, torch.full_like(least, torch.inf)
    for trial in INT4_TRIALS:
        scales = _next_bfloat16(least * trial)
        step = (scales / least).unsqueeze(-1)
        rounded = (relative / step).round_().clamp_(lowest, highest)
        errors = torch.linalg.vector_norm(rounded.mul_(step).sub_(relative), dim=-1)
        is_better = errors < best_errors
        best_scales, best_errors = scales.where(is_better, best_scales), errors.where(is_better, best_errors)
    return best_scales


def _next_bfloat16(scales: Tensor) -> Tensor:
    """Each rounded up to a number that bfloat16 holds; fp32. scales: positive."""
    bits = scales.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
