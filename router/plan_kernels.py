"""plan.py compiled, for a step makes dozens of plans of a few rows; without the library numpy plans and adds.

The same messages and the same bits, see tests/router/test_plan.py.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_void_p

import numpy as np
import torch
from torch import Tensor

from router import plan
from router.compiled import native
from router.expert_map import Int64Array
from router.plan import DispatchPlan, PartialSums, ShardMessage
from router.shard_queues import ExpectedQueues


class _PlanCall(ctypes.Structure):
    _fields_ = (
        ("topk_ids", c_void_p),
        ("topk_weights", c_void_p),
        ("expert_to_unit", c_void_p),
        ("unit_to_ep_ranks", c_void_p),  # this and the next three: struct Replicas
        ("waits", c_void_p),
        ("seconds_per_assignment", c_void_p),
        ("max_replicas", c_int32),
        ("padding", c_int32),
        ("wire", c_void_p),
        ("row_ids", c_void_p),
        ("partial_sums", c_void_p),
        ("partial_rows", c_void_p),
        ("message_sizes", c_void_p),
        ("tokens_by_ranks", c_void_p),
        ("num_tokens", c_int32),
        ("top_k", c_int32),
        ("num_experts", c_int32),
        ("num_units", c_int32),
        ("ep_size", c_int32),
        ("num_partial_sums", c_int32),
        ("max_ranks", c_int32),
    )


class _SumCall(ctypes.Structure):
    _fields_ = (
        ("answers", c_void_p),
        ("partial_sums", c_void_p),
        ("answer_sizes", c_void_p),
        ("partial_rows", c_void_p),
        ("out", c_void_p),
        ("num_answers", c_int32),
        ("num_partial_sums", c_int32),
        ("num_tokens", c_int32),
        ("hidden_size", c_int32),
        ("is_bfloat16", c_int32),
    )


def plan_layer(
    topk_ids: Tensor,
    topk_weights: Tensor,
    expert_to_unit: Int64Array,
    unit_to_ep_ranks: Int64Array,
    ep_size: int,
    queues: ExpectedQueues | None = None,
) -> DispatchPlan:
    """See plan.plan_layer; tensors contiguous. Raises ValueError for an expert, unit or shard that does not exist.

    unit_to_ep_ranks: [num_units, max_replicas] int64, the shards that may be asked for each unit; -1 for none. Of
    several each row asks where it visits fewest shards, and then where the queue is expected to be shortest.
    queues: needed only where there are several.
    """
    library = native()
    if library is None:
        assert unit_to_ep_ranks.shape[1] == 1, "choose_replicas chooses where the library is not built"
        return plan.plan_layer(topk_ids, topk_weights, expert_to_unit, unit_to_ep_ranks[:, 0])
    max_replicas = unit_to_ep_ranks.shape[1]
    assert queues is not None or max_replicas == 1
    assert topk_ids.dtype is torch.int64
    assert topk_weights.dtype is torch.float32
    assert topk_weights.shape == topk_ids.shape
    assert topk_ids.is_contiguous()
    assert topk_weights.is_contiguous()
    unit_to_ep_ranks = np.ascontiguousarray(unit_to_ep_ranks)
    num_tokens, top_k = topk_ids.shape
    most = num_tokens * top_k  # rows, partial sums
    wire = np.empty(4 * most, dtype=np.int32)
    numbers = np.zeros(3 * most + 4 * ep_size + 1, dtype=np.int64)
    row_ids, partial_sums, partial_rows = numbers[:most], numbers[most : 2 * most], numbers[2 * most : 3 * most]
    sizes, tokens_by_ranks = numbers[3 * most : 3 * most + 3 * ep_size], numbers[3 * most + 3 * ep_size :]
    start = numbers.ctypes.data
    call = _PlanCall(
        topk_ids.data_ptr(),
        topk_weights.data_ptr(),
        expert_to_unit.ctypes.data,
        unit_to_ep_ranks.ctypes.data,
        None if queues is None else queues.waits_s.ctypes.data,
        None if queues is None else queues.seconds_per_assignment.ctypes.data,
        max_replicas,
        0,
        wire.ctypes.data,
        start,
        start + 8 * most,
        start + 16 * most,
        start + 24 * most,
        start + 24 * (most + ep_size),
        num_tokens,
        top_k,
        len(expert_to_unit),
        len(unit_to_ep_ranks),
        ep_size,
    )
    if not library.mobula_plan(ctypes.addressof(call)):
        raise ValueError(
            f"experts {topk_ids.min()} to {topk_ids.max()} were chosen of {len(expert_to_unit)}, on shards "
            f"{unit_to_ep_ranks.min()} to {unit_to_ep_ranks.max()} of {ep_size}: one does not exist"
        )
    return DispatchPlan(
        num_tokens=num_tokens,
        partial_rows=partial_rows[: call.num_partial_sums],
        messages=_messages(wire, row_ids, partial_sums, sizes.tolist()),
        num_tokens_by_ranks=tokens_by_ranks[: call.max_ranks + 1].tolist(),
    )


def _messages(
    wire: plan.Int32Array, row_ids: Int64Array, partial_sums: Int64Array, sizes: list[int]
) -> tuple[ShardMessage, ...]:
    """sizes: of each shard's message, three numbers each: assignments, rows, partial sums."""
    messages = []
    assignment = row = partial_sum = 0
    for ep_rank in range(len(sizes) // 3):
        num_assignments, num_rows, num_partial_sums = sizes[3 * ep_rank : 3 * ep_rank + 3]
        if num_assignments == 0:
            continue
        messages.append(
            ShardMessage(
                ep_rank=ep_rank,
                row_ids=row_ids[row : row + num_rows],
                assignments=wire[4 * assignment : 4 * (assignment + num_assignments)].reshape(4, num_assignments),
                partial_sums=partial_sums[partial_sum : partial_sum + num_partial_sums],
            )
        )
        assignment, row, partial_sum = assignment + num_assignments, row + num_rows, partial_sum + num_partial_sums
    return tuple(messages)


def sum_partials(dispatch_plan: DispatchPlan, answers: Sequence[PartialSums], hidden_size: int) -> Tensor:
    """See plan.sum_partials; the answers are read where they are: contiguous, all of one dtype."""
    library = native()
    if library is None:
        return torch.from_numpy(plan.sum_partials(dispatch_plan, answers, hidden_size))
    out = torch.empty(dispatch_plan.num_tokens, hidden_size)
    if not answers:
        return out.zero_()
    dtype = answers[0].values.dtype
    for answer in answers:
        assert answer.values.dtype is dtype
        assert answer.values.is_contiguous()
        assert answer.values.shape == (len(answer.partial_sums), hidden_size)
    pointers = c_void_p * len(answers)
    values = pointers(*(answer.values.data_ptr() for answer in answers))
    places = pointers(*(answer.partial_sums.ctypes.data for answer in answers))
    sizes = (ctypes.c_int64 * len(answers))(*(len(answer.partial_sums) for answer in answers))
    call = _SumCall(
        ctypes.addressof(values),
        ctypes.addressof(places),
        ctypes.addressof(sizes),
        dispatch_plan.partial_rows.ctypes.data,
        out.data_ptr(),
        len(answers),
        dispatch_plan.num_partial_sums,
        dispatch_plan.num_tokens,
        hidden_size,
        dtype is torch.bfloat16,
    )
    if not library.mobula_sum_partials(ctypes.addressof(call)):
        raise ValueError(f"{sum(sizes)} partial sums were answered, the plan has {dispatch_plan.num_partial_sums}")
    return out
