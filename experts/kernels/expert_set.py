"""Experts whose feed-forward the kernels compute: all routed experts of a layer on a shard, or one dense MLP."""

import ctypes
from collections.abc import Mapping
from ctypes import c_int32, c_void_p
from dataclasses import dataclass

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

    def forward(
        self,
        hidden_states: Tensor,
        weights: Tensor,
        rows: Tensor,
        expert_ids: Tensor,
        partial_sums: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Writes the partial sums to `out`, [num_partial_sums, hidden_size], and returns it.

        hidden_states: [num_rows, hidden_size]; weights: [A] fp32; rows, expert_ids, partial_sums: [A] int32; all
        contiguous. Every expert named must be in the set. See experts.grouped_ffn.ForwardInput.
        """
        assert hidden_states.shape[1] == out.shape[1] == self._hidden_size
        assert weights.dtype is torch.float32
        for indices in (rows, expert_ids, partial_sums):
            assert indices.dtype is torch.int32
            assert len(indices) == len(weights)
        for tensor in (hidden_states, weights, rows, expert_ids, partial_sums, out):
            assert tensor.is_contiguous()
        call = _ExpertsCall(
            self._address,
            hidden_states.data_ptr(),
            weights.data_ptr(),
            rows.data_ptr(),
            expert_ids.data_ptr(),
            partial_sums.data_ptr(),
            out.data_ptr(),
            len(self._table),
            hidden_states.shape[0],
            weights.shape[0],
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
