"""Experts whose feed-forward the kernels compute: all routed experts of a layer on a shard, or one dense MLP."""

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.kernels.library import CMatrix, format_of, require
from experts.kernels.packed_matrix import PackedMatrix
from protos.memory import Matrix


class _CExpert(ctypes.Structure):
    _fields_ = (("w13", CMatrix), ("w2", CMatrix))


_EXPERTS_CALL = struct.Struct("5P8i")  # struct ExpertsCall in native/kernels.h


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedExpert:
    """w13: gate, then up, packed as two parts; w2: down."""

    w13: PackedMatrix
    w2: PackedMatrix

    @property
    def nbytes(self) -> int:
        return self.w13.nbytes + self.w2.nbytes


class ExpertSet:
    """Experts by logical id, as one table for the kernel."""

    def __init__(self, experts: Mapping[int, PackedExpert], intermediate_size: int) -> None:
        self._experts = experts  # keeps their memory
        self._hidden_size = next((expert.w13.num_inputs for expert in experts.values()), 0)
        self._intermediate_size = intermediate_size
        self._table = (_CExpert * (max(experts, default=-1) + 1))()
        for expert_id, expert in experts.items():
            self._table[expert_id] = _CExpert(expert.w13.c_matrix(), expert.w2.c_matrix())
        self._address = ctypes.addressof(self._table)
        self._function = require().mobula_experts

    def forward(self, hidden_states: Matrix, assignments: bytes, out: Matrix) -> Matrix:
        """Writes the partial sums to `out`, [num_partial_sums, hidden_size], and returns it.

        hidden_states: [num_rows, hidden_size]; assignments: of [4, A] int32, see experts.grouped_ffn.ForwardInput; all
        contiguous. Every expert named must be in the set.
        """
        self._compute(hidden_states, assignments, len(assignments) // 16, out)
        return out

    def forward_dense(self, x: Tensor, out_dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
        """Every row through expert 0 with weight 1: a dense MLP. x: [num_rows, hidden_size]; returns the same shape.

        residual: like x; added in fp32 before rounding.
        """
        out = torch.empty(x.shape, dtype=out_dtype)
        if residual is not None:
            assert residual.shape == x.shape
            assert residual.dtype is x.dtype
            assert residual.is_contiguous()
        self._compute(x, None, len(x), out, 0 if residual is None else residual.data_ptr())
        return out

    def _compute(
        self, x: Matrix, assignments: bytes | None, num_assignments: int, out: Matrix, residual: int = 0
    ) -> None:
        (num_rows, hidden_size), (num_partial_sums, out_size) = x.shape, out.shape
        assert hidden_size == out_size == self._hidden_size
        assert x.is_contiguous()
        assert out.is_contiguous()
        call = _EXPERTS_CALL.pack(
            self._address,
            x.data_ptr(),
            0,
            residual,
            out.data_ptr(),
            len(self._table),
            num_rows,
            num_assignments,
            num_partial_sums,
            self._hidden_size,
            self._intermediate_size,
            format_of(x.dtype),
            format_of(out.dtype),
        )
        self._function(call, assignments)
