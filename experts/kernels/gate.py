"""The choice of experts from router logits by a kernel. What it computes is explained in router/gate.py."""

import struct

import torch
from torch import Tensor

from experts.kernels.library import require

MAX_EXPERTS = 4096  # of a layer; the kernel keeps a row's scores on its stack
_GATE_CALL = struct.Struct("4P8if0P")  # struct GateCall in native/gate.cpp


def kernel_select_experts(
    logits: Tensor,
    bias: Tensor | None,
    *,
    top_k: int,
    num_groups: int,
    top_groups: int,
    is_sigmoid: bool,
    ranks_groups_by_two: bool,
    is_normalised: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """logits: [num_tokens, n_routed_experts] fp32, contiguous; bias: [n_routed_experts] fp32. num_groups 0: no limit.

    Returns weights [num_tokens, top_k] fp32 and ids [num_tokens, top_k] int64, ascending; ties go to the lower expert.
    """
    num_tokens, num_experts = logits.shape
    assert logits.dtype is torch.float32
    assert logits.is_contiguous()
    assert num_experts <= MAX_EXPERTS
    weights = torch.empty(num_tokens, top_k)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64)
    call = _GATE_CALL.pack(
        logits.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        weights.data_ptr(),
        ids.data_ptr(),
        num_tokens,
        num_experts,
        top_k,
        num_groups,
        top_groups,
        is_sigmoid,
        ranks_groups_by_two,
        is_normalised,
        scaling_factor,
    )
    require().mobula_select_experts(call)
    return weights, ids
