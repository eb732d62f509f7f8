"""Products of rows with a packed matrix, and RMS norm. A row's result depends on that row alone, to the bit."""

import ctypes
import struct

import torch
from torch import Tensor

from experts.kernels.library import Format, format_of, require
from experts.kernels.packed_matrix import PackedMatrix

_LINEAR_CALL = struct.Struct("4P2q3i0P")  # structs of native/kernels.h
_HEADS_CALL = struct.Struct("3P4q4i")
_NORM_CALL = struct.Struct("3P2q3if")


class KernelLinear:
    """x @ weight.T with a packed weight."""

    def __init__(self, weight: PackedMatrix) -> None:
        self.weight = weight
        self._matrix = weight.c_matrix()
        self._matrix_address = ctypes.addressof(self._matrix)
        self._function = require().mobula_linear

    @property
    def nbytes(self) -> int:
        """Of the weight."""
        return self.weight.nbytes

    @property
    def address(self) -> int:
        """Of the struct Matrix."""
        return self._matrix_address

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        """x: [num_rows, num_inputs], rows contiguous; residual: like the result, added in fp32 before rounding.

        Returns [num_rows, num_outputs] in `out_dtype`, x's if unset.
        """
        num_rows = x.shape[0]
        assert x.shape[1] == self.weight.num_inputs
        assert x.stride(1) == 1
        out = torch.empty(num_rows, self.weight.num_outputs, dtype=out_dtype or x.dtype)
        if residual is not None:
            assert residual.shape == out.shape
            assert residual.dtype == out.dtype
            assert residual.is_contiguous()
        call = _LINEAR_CALL.pack(
            self._matrix_address,
            x.data_ptr(),
            out.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            x.stride(0),
            out.shape[1],
            num_rows,
            format_of(x.dtype),
            format_of(out.dtype),
        )
        self._function(call)
        return out


class KernelHeads:
    """x[:, h] @ weights[h].T for each head h."""

    def __init__(self, weights: list[PackedMatrix]) -> None:
        """All of one shape, float32 or bfloat16: what the attention kernels read."""
        assert {weight.number_format for weight in weights} < {Format.FLOAT32, Format.BFLOAT16}
        self.weights = weights
        self._matrices = (type(weights[0].c_matrix()) * len(weights))(*(weight.c_matrix() for weight in weights))
        self._address = ctypes.addressof(self._matrices)
        self._function = require().mobula_heads

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def address(self) -> int:
        """Of the array of struct Matrix, one a head."""
        return self._address

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x: [num_rows, num_heads, num_inputs], numbers of a head contiguous.

        Returns [num_rows, num_heads, num_outputs]. out: written in place when given; a view of this shape may be.
        """
        first = self.weights[0]
        if out is None:
            out = torch.empty(x.shape[0], len(self.weights), first.num_outputs, dtype=x.dtype)
        assert x.shape[1:] == (len(self.weights), first.num_inputs)
        assert out.shape == (x.shape[0], len(self.weights), first.num_outputs)
        assert x.stride(2) == out.stride(2) == 1
        call = _HEADS_CALL.pack(
            self._address,
            x.data_ptr(),
            out.data_ptr(),
            x.stride(0),
            x.stride(1),
            out.stride(0),
            out.stride(1),
            len(self.weights),
            x.shape[0],
            format_of(x.dtype),
            format_of(out.dtype),
        )
        self._function(call)
        return out


def kernel_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As attention.layers.rms_norm. x: [num_rows, n], rows contiguous; weight: [n] in x's dtype."""
    assert x.stride(1) == 1
    assert weight.dtype == x.dtype
    assert weight.is_contiguous()
    assert weight.shape == x.shape[1:]
    out = torch.empty(x.shape, dtype=x.dtype)
    number_format = format_of(x.dtype)
    call = _NORM_CALL.pack(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.stride(0), out.stride(0), *x.shape, number_format, eps
    )  # fmt: skip
    require().mobula_rms_norm(call)
    return out
