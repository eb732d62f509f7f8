"""Experts whose feed-forward the kernels compute: all routed experts of a layer on a shard, or one dense MLP."""

import ctypes
from collections.abc import Mapping
from ctypes import c_int32, c_void_p
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts.kernels.library import CMatrix, format_of, require
from experts.kernels.packed_matrix import PackedMatrix


class _CExpert(ctypes.Structure):
    _fields_ = (("w13", CMatrix), ("w2", CMatrix))


class _ExpertsCall(ctypes.Structure):
    _fields_ = (
        ("experts", c_void_p),
        ("x", c_void_p),
        ("weights", c_void_p),
        ("rows", c_void_p),
        ("expert_ids", c_void_p),
        ("partial_sums", c_void_p),
        ("out", c_void_p),
        ("num_experts", c_int32),
        ("num_rows", c_int32),
        ("num_assignments", c_int32),
        ("num_partial_sums", c_int32),
        ("hidden_size", c_int32),
        ("intermediate_size", c_int32),
        ("x_format", c_int32),
        ("out_format", c_int32),
    )


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

    def forward(self, hidden_states: Tensor, assignments: npt.NDArray[np.int32], out: Tensor) -> Tensor:
        """Writes the partial sums to `out`, [num_partial_sums, hidden_size], and returns it.

        hidden_states: [num_rows, hidden_size]; assignments: [4, A], see experts.grouped_ffn.ForwardInput; all
        contiguous. Every expert named must be in the set.
        """
        assert hidden_states.shape[1] == out.shape[1] == self._hidden_size
        assert assignments.dtype == np.int32
        assert assignments.flags.c_contiguous
        assert hidden_states.is_contiguous()
        assert out.is_contiguous()
        num_assignments = assignments.shape[1]
        start, column_bytes = assignments.ctypes.data, 4 * num_assignments
        call = _ExpertsCall(
            self._address,
            hidden_states.data_ptr(),
            start,
            start + column_bytes,
            start + 2 * column_bytes,
            start + 3 * column_bytes,
            out.data_ptr(),
            len(self._table),
            hidden_states.shape[0],
            num_assignments,
            out.shape[0],
            self._hidden_size,
            self._intermediate_size,
            format_of(hidden_states.dtype),
            format_of(out.dtype),
        )
        self._function(ctypes.addressof(call))
        return out

    def forward_dense(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        """Every row through expert 0 with weight 1: a dense MLP. x: [num_rows, hidden_size]; returns the same shape."""
        num_rows = x.shape[0]
        assert x.shape[1] == self._hidden_size
        assert x.is_contiguous()
        out = torch.empty(x.shape, dtype=out_dtype)
        call = _ExpertsCall(
            self._address,
            x.data_ptr(),
            None,
            None,
            None,
            None,
            out.data_ptr(),
            1,
            num_rows,
            num_rows,
            num_rows,
            self._hidden_size,
            self._intermediate_size,
            format_of(x.dtype),
            format_of(out_dtype),
        )
        self._function(ctypes.addressof(call))
        return out
