"""Who gets which rows, and how their answers are added: the arithmetic of dispatch and combine.

Pure mathematics in numpy; knows nothing of transports, health or weights. plan_kernels.py does the same compiled.

    assignment    one (row, expert) pair
    partial sum   one (row, unit) pair: the weighted sum of a row's experts within a unit, computed by one shard
    message       what one shard is sent: each of its rows once, its assignments, its partial sums

Partial sums are added in ascending order of their unit, whichever shard computed them, so a row's result has one value
to the bit for every placement.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from protos.memory import Matrix, as_tensor
from router.expert_map import Int64Array

NO_EXPERT = -1  # in topk_ids: an assignment that is left out; a row may have none at all, its sum is then 0
Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


class MessageAddresses(NamedTuple):
    """Where a message's arrays lie: asking numpy for it is slow where the caches are cold."""

    row_ids: int
    assignments: int
    partial_sums: int


class ShardMessage(NamedTuple):
    """What one shard is sent.

    row_ids: [num_rows] int64, rows of the layer's hidden states, ascending, each once.
    assignments: [4, num_assignments] int32, contiguous, as the payload has them: weights (the bits of fp32), indices
        into `row_ids`, expert ids, indices into the answer; in ascending order of (unit, row, expert).
    partial_sums: [num_partial_sums] int64, where the answer's rows belong in the layer's partial sums.
    All contiguous. known_addresses: of these three arrays, where who planned knows them.
    """

    ep_rank: int
    row_ids: Int64Array
    assignments: Int32Array
    partial_sums: Int64Array
    known_addresses: MessageAddresses | None = None

    @property
    def addresses(self) -> MessageAddresses:
        """Of the arrays."""
        return self.known_addresses or MessageAddresses(
            self.row_ids.ctypes.data, self.assignments.ctypes.data, self.partial_sums.ctypes.data
        )

    @property
    def num_rows(self) -> int:
        return len(self.row_ids)

    @property
    def num_assignments(self) -> int:
        return int(self.assignments.shape[1])

    @property
    def num_partial_sums(self) -> int:
        return len(self.partial_sums)


class DispatchPlan(NamedTuple):
    """One layer's messages and what combine needs.

    partial_rows: [num_partial_sums] int64, the row of each partial sum; they are in ascending order of (unit, row).
    messages: in ascending order of ep_rank; shards that get nothing have none.
    num_tokens_by_ranks: [n] is how many of the tokens visit exactly n shards.
    known_address: of this array of partial_rows, where who planned knows it.
    """

    num_tokens: int
    partial_rows: Int64Array
    messages: tuple[ShardMessage, ...]
    num_tokens_by_ranks: list[int]
    known_address: int | None = None

    @property
    def address(self) -> int:
        """Of partial_rows."""
        return self.known_address or int(self.partial_rows.ctypes.data)

    @property
    def num_partial_sums(self) -> int:
        return len(self.partial_rows)


class PartialSums(NamedTuple):
    """A shard's answer: partial_sums as in ShardMessage; values: [num_partial_sums, hidden_size] fp32 or bf16."""

    partial_sums: Int64Array
    values: Matrix
    known_address: int | None = None  # of partial_sums

    @property
    def address(self) -> int:
        """Of partial_sums."""
        return self.known_address or int(self.partial_sums.ctypes.data)


class _Assignments(NamedTuple):
    """In ascending order of (unit, row, expert); all [A] int64 but for the weights (fp32)."""

    rows: Int64Array
    expert_ids: Int64Array
    weights: Float32Array
    partial_sums: Int64Array
    units: Int64Array


def plan_layer(
    topk_ids: Tensor, topk_weights: Tensor, expert_to_unit: Int64Array, unit_ep_ranks: Int64Array
) -> DispatchPlan:
    """The messages that carry a layer's assignments to the shard chosen for each unit.

    topk_ids: [num_tokens, top_k] int64, no duplicates within a row but for NO_EXPERT; topk_weights: [num_tokens, top_k]
    fp32; expert_to_unit: [n_routed_experts] int64; unit_ep_ranks: [num_units] int64, the shard asked for each unit.
    """
    num_tokens, top_k = topk_ids.shape
    asked = np.flatnonzero(topk_ids.numpy() != NO_EXPERT)
    expert_ids = topk_ids.numpy().ravel()[asked]
    units = expert_to_unit[expert_ids]
    rows = np.arange(num_tokens).repeat(top_k)[asked]
    pairs = units * num_tokens + rows  # (unit, row) as one number
    order = (pairs * len(expert_to_unit) + expert_ids).argsort()
    starts = _run_starts(pairs[order])
    assignments = _Assignments(
        rows=rows[order],
        expert_ids=expert_ids[order],
        weights=topk_weights.numpy().ravel()[asked][order],
        partial_sums=starts.cumsum() - 1,
        units=units[order],
    )
    messages = _messages(assignments, unit_ep_ranks)
    ranks_per_token = np.zeros(num_tokens, dtype=np.int64)
    for message in messages:
        ranks_per_token[message.row_ids] += 1  # each row once, so nothing is lost
    return DispatchPlan(
        num_tokens=num_tokens,
        partial_rows=assignments.rows[starts],
        messages=messages,
        num_tokens_by_ranks=np.bincount(ranks_per_token).tolist(),
    )


def plan_again(
    message: ShardMessage, expert_to_unit: Int64Array, unit_ep_ranks: Int64Array
) -> tuple[ShardMessage, ...]:
    """The same work, and no other, as messages to other shards."""
    weights, local_rows, expert_ids, local_partial_sums = message.assignments
    return _messages(
        _Assignments(
            rows=message.row_ids[local_rows],
            expert_ids=expert_ids.astype(np.int64),
            weights=weights.view(np.float32),
            partial_sums=message.partial_sums[local_partial_sums],
            units=expert_to_unit[expert_ids],
        ),
        unit_ep_ranks,
    )


def copy_for(
    ep_rank: int, messages: Sequence[ShardMessage], expert_to_unit: Int64Array, holds: npt.NDArray[np.bool_]
) -> ShardMessage | None:
    """Some of the work of a message to another shard, as one to this; None where it has no unit of any.

    holds: [num_units], whether it has each.
    """
    unit_ep_ranks: Int64Array = np.where(holds, ep_rank, -1)
    for message in messages:
        if message.ep_rank != ep_rank:
            for part in plan_again(message, expert_to_unit, unit_ep_ranks):
                if part.ep_rank == ep_rank:
                    return part
    return None


def _messages(assignments: _Assignments, unit_ep_ranks: Int64Array) -> tuple[ShardMessage, ...]:
    ep_ranks = unit_ep_ranks[assignments.units]  # [A]
    messages = []
    for ep_rank in np.unique(ep_ranks).tolist():
        mine = _Assignments(*(column[ep_ranks == ep_rank] for column in assignments))
        row_ids, local_rows = np.unique(mine.rows, return_inverse=True)
        starts = _run_starts(mine.partial_sums)
        wire = np.empty((4, len(mine.rows)), dtype=np.int32)
        wire[0] = mine.weights.view(np.int32)
        wire[1] = local_rows
        wire[2] = mine.expert_ids
        wire[3] = starts.cumsum() - 1
        messages.append(
            ShardMessage(ep_rank=ep_rank, row_ids=row_ids, assignments=wire, partial_sums=mine.partial_sums[starts])
        )
    return tuple(messages)


def sum_partials(plan: DispatchPlan, answers: Sequence[PartialSums], hidden_size: int) -> Float32Array:
    """Adds each row's partial sums in ascending order of their unit, in fp32, from +0.0: [num_tokens, hidden_size].

    answers: have every partial sum of the plan once. The k-th addition takes the k-th unit of every row, or zeros for
    rows that have none, which changes no bit: a sum that starts at +0.0 is never -0.0.
    """
    sums = np.zeros((plan.num_partial_sums + 1, hidden_size), dtype=np.float32)  # zeros in the last row
    for answer in answers:
        sums[answer.partial_sums] = as_tensor(answer.values).float().numpy()
    total = np.zeros((plan.num_tokens, hidden_size), dtype=np.float32)
    for kth in _partial_sum_of_row(plan):
        total += sums.take(kth, axis=0)
    return total


def _partial_sum_of_row(plan: DispatchPlan) -> Int64Array:
    """[max units of a row, num_tokens]: each row's partial sums ascending; num_partial_sums pads at the end."""
    order = plan.partial_rows.argsort(kind="stable")  # by (row, unit), because partial sums are by (unit, row)
    rows = plan.partial_rows[order]
    num_units = np.bincount(rows, minlength=plan.num_tokens)  # [num_tokens]
    position = np.arange(len(rows)) - (num_units.cumsum() - num_units)[rows]
    table = np.full((num_units.max(initial=0), plan.num_tokens), plan.num_partial_sums)
    table[position, rows] = order
    return table


def _run_starts(values: Int64Array) -> npt.NDArray[np.bool_]:
    """Whether each element differs from the one before it: [n]."""
    starts: npt.NDArray[np.bool_] = np.diff(values, prepend=-1) != 0
    return starts
