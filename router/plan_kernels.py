"""plan.py and the writing of payloads compiled, for a step makes dozens of plans of a few rows; without the
library numpy does it.

The same messages and the same bits, see tests/router/test_plan.py.
"""

import ctypes
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from router import plan
from router.compiled import native
from router.expert_map import Int64Array
from router.plan import DispatchPlan, MessageAddresses, PartialSums, ShardMessage
from router.shard_queues import ExpectedQueues

_PLAN_CALL = struct.Struct("6Pi0P7P5i0P")  # structs of native/plan.cpp; 0P: up to the next pointer's place
_SUM_CALL = struct.Struct("2P5i0P")
_SUM_ANSWER = struct.Struct("2Pq")
_PAYLOAD_CALL = struct.Struct("4P3q")


class UnitAddresses(NamedTuple):
    """Where the arrays of a layer's units lie, which plan_layer takes."""

    expert_to_unit: int
    unit_to_ep_ranks: int

    @classmethod
    def of(cls, expert_to_unit: Int64Array, unit_to_ep_ranks: Int64Array) -> "UnitAddresses":
        """Of contiguous arrays."""
        assert expert_to_unit.flags.c_contiguous
        assert unit_to_ep_ranks.flags.c_contiguous
        return cls(expert_to_unit.ctypes.data, unit_to_ep_ranks.ctypes.data)


def plan_layer(
    topk_ids: Tensor,
    topk_weights: Tensor,
    expert_to_unit: Int64Array,
    unit_to_ep_ranks: Int64Array,
    ep_size: int,
    queues: ExpectedQueues | None = None,
    addresses: UnitAddresses | None = None,
) -> DispatchPlan:
    """See plan.plan_layer; tensors contiguous. Raises ValueError for an expert, unit or shard that does not exist.

    unit_to_ep_ranks: [num_units, max_replicas] int64, the shards that may be asked for each unit; -1 for none. Of
    several each row asks where it visits fewest shards, and then where the queue is expected to be shortest.
    queues: needed only where there are several. addresses: of the two arrays, where they are known.
    """
    library = native()
    if library is None:
        assert unit_to_ep_ranks.shape[1] == 1, "choose_replicas chooses where the library is not built"
        return plan.plan_layer(topk_ids, topk_weights, expert_to_unit, unit_to_ep_ranks[:, 0])
    num_units, max_replicas = unit_to_ep_ranks.shape
    assert queues is not None or max_replicas == 1
    assert topk_ids.dtype is torch.int64
    assert topk_weights.dtype is torch.float32
    assert topk_weights.shape == topk_ids.shape
    assert topk_ids.is_contiguous()
    assert topk_weights.is_contiguous()
    if addresses is None:
        unit_to_ep_ranks = np.ascontiguousarray(unit_to_ep_ranks)
        addresses = UnitAddresses.of(expert_to_unit, unit_to_ep_ranks)
    num_tokens, top_k = topk_ids.shape
    arrays = _PlanArrays(num_tokens * top_k, ep_size)
    call = _PLAN_CALL.pack(
        topk_ids.data_ptr(),
        topk_weights.data_ptr(),
        *addresses,
        0 if queues is None else queues.waits_s.ctypes.data,
        0 if queues is None else queues.seconds_per_assignment.ctypes.data,
        max_replicas,
        *arrays.addresses(),
        num_tokens,
        top_k,
        len(expert_to_unit),
        num_units,
        ep_size,
    )
    if not library.mobula_plan(call):
        raise ValueError(
            f"experts {topk_ids.min()} to {topk_ids.max()} were chosen of {len(expert_to_unit)}, on shards "
            f"{unit_to_ep_ranks.min()} to {unit_to_ep_ranks.max()} of {ep_size}: one does not exist"
        )
    return arrays.plan(num_tokens)


class _PlanArrays:
    """What a plan is written to, in one piece of memory; no more of it than a plan can need.

    numbers: of each shard's message its assignments, rows and partial sums; how many tokens visit n shards, for n from
    0 on; the number of partial sums, and the most shards that a token visits.
    """

    def __init__(self, most: int, ep_size: int) -> None:
        """most: assignments, and so rows and partial sums."""
        self._ep_size = ep_size
        self._num_numbers = 4 * ep_size + 3
        self._row_ids = 8 * self._num_numbers  # where each array begins
        self._partial_sums = self._row_ids + 8 * most
        self._partial_rows = self._partial_sums + 8 * most
        self._wire = self._partial_rows + 8 * most
        self._memory = bytearray(self._wire + 16 * most)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def addresses(self) -> tuple[int, ...]:
        """As struct PlanCall has them."""
        start, tokens_by_ranks = self._address, 24 * self._ep_size
        return (
            start + self._wire,
            start + self._row_ids,
            start + self._partial_sums,
            start + self._partial_rows,
            start,
            start + tokens_by_ranks,
            start + tokens_by_ranks + 8 * (self._ep_size + 1),
        )

    def plan(self, num_tokens: int) -> DispatchPlan:
        """What was written."""
        numbers = self._int64(0, self._num_numbers).tolist()
        *_, num_partial_sums, max_ranks = numbers
        tokens_by_ranks = 3 * self._ep_size
        return DispatchPlan(
            num_tokens=num_tokens,
            partial_rows=self._int64(self._partial_rows, num_partial_sums),
            messages=self._messages(numbers),
            num_tokens_by_ranks=numbers[tokens_by_ranks : tokens_by_ranks + max_ranks + 1],
            known_address=self._address + self._partial_rows,
        )

    def _messages(self, sizes: list[int]) -> tuple[ShardMessage, ...]:
        messages = []
        wire, row_ids, partial_sums = self._wire, self._row_ids, self._partial_sums
        for ep_rank in range(self._ep_size):
            num_assignments, num_rows, num_partial_sums = sizes[3 * ep_rank : 3 * ep_rank + 3]
            if num_assignments == 0:
                continue
            assignments = np.frombuffer(self._memory, dtype=np.int32, count=4 * num_assignments, offset=wire)
            start = self._address
            messages.append(
                ShardMessage(
                    ep_rank=ep_rank,
                    row_ids=self._int64(row_ids, num_rows),
                    assignments=assignments.reshape(4, num_assignments),
                    partial_sums=self._int64(partial_sums, num_partial_sums),
                    known_addresses=MessageAddresses(start + row_ids, start + wire, start + partial_sums),
                )
            )
            wire, row_ids = wire + 16 * num_assignments, row_ids + 8 * num_rows
            partial_sums += 8 * num_partial_sums
        return tuple(messages)

    def _int64(self, offset: int, count: int) -> Int64Array:
        return np.frombuffer(self._memory, dtype=np.int64, count=count, offset=offset)


def write_payload(hidden_states: Tensor, message: ShardMessage, address: int) -> bool:
    """Puts a message's rows of `hidden_states` and its assignments to `address`; False where the library is not built.

    hidden_states: [num_tokens, hidden_size], contiguous.
    """
    library = native()
    if library is None:
        return False
    row_ids, assignments, _ = message.addresses
    row_bytes = hidden_states.shape[1] * hidden_states.itemsize
    num_rows, num_assignments = message.num_rows, message.num_assignments
    is_every_row = num_rows == len(hidden_states)  # ascending and distinct, so in place already
    library.mobula_write_payload(
        _PAYLOAD_CALL.pack(
            hidden_states.data_ptr(),
            0 if is_every_row else row_ids,
            assignments,
            address,
            num_rows,
            row_bytes,
            16 * num_assignments,
        )
    )
    return True


def sum_partials(dispatch_plan: DispatchPlan, answers: Sequence[PartialSums], hidden_size: int) -> Tensor:
    """See plan.sum_partials; the answers are read where they are: contiguous, all of one dtype."""
    library = native()
    if library is None:
        return torch.from_numpy(plan.sum_partials(dispatch_plan, answers, hidden_size))
    out = torch.empty(dispatch_plan.num_tokens, hidden_size)
    if not answers:
        return out.zero_()
    dtype, packed = answers[0].values.dtype, []
    for answer in answers:
        values, num_values = answer.values, len(answer.partial_sums)
        assert values.dtype is dtype
        assert values.is_contiguous()
        assert values.shape == (num_values, hidden_size)
        packed.append(_SUM_ANSWER.pack(values.data_ptr(), answer.address, num_values))
    call = _SUM_CALL.pack(
        dispatch_plan.address,
        out.data_ptr(),
        len(answers),
        dispatch_plan.num_partial_sums,
        dispatch_plan.num_tokens,
        hidden_size,
        dtype is torch.bfloat16,
    )
    if not library.mobula_sum_partials(call, b"".join(packed)):
        num_answered = sum(len(answer.partial_sums) for answer in answers)
        raise ValueError(f"{num_answered} partial sums were answered, the plan has {dispatch_plan.num_partial_sums}")
    return out
