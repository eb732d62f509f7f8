"""Who gets which rows, and how their answers are added: the arithmetic of dispatch and combine.

Pure mathematics; knows nothing of transports, health or weights. Indices are numpy arrays: a decode step plans dozens
of layers of a few rows each, where the cost is the number of calls and a call of numpy costs a quarter of torch's.

    assignment    one (row, expert) pair
    partial sum   one (row, unit) pair: the weighted sum of a row's experts within a unit, computed by one shard
    message       what one shard is sent: each of its rows once, its assignments, its partial sums

Partial sums are added in ascending order of their unit, whichever shard computed them, so a row's result has one value
to the bit for every placement.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from router.expert_map import Int64Array

ONE = np.int32(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignments:
    """Routed work in ascending order of (unit, row, expert), without duplicates. A = number of assignments.

    rows: [A] int64, rows of the layer's hidden states.
    expert_ids: [A] int64, logical experts.
    weights: [A] fp32.
    partial_sums: [A] int64, the (unit, row) pair that the assignment adds to, ascending.
    units: [A] int64.
    """

    rows: Int64Array
    expert_ids: Int64Array
    weights: npt.NDArray[np.float32]
    partial_sums: Int64Array
    units: Int64Array

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, chosen: Int64Array) -> "Assignments":
        """Those at the ascending indices `chosen` ([n] int64)."""
        if len(chosen) == len(self):
            return self
        return Assignments(
            rows=self.rows.take(chosen),
            expert_ids=self.expert_ids.take(chosen),
            weights=self.weights.take(chosen),
            partial_sums=self.partial_sums.take(chosen),
            units=self.units.take(chosen),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardMessage:
    """What one shard is sent.

    row_ids: [num_rows] int64, rows of the layer's hidden states, ascending, each once.
    assignments: this message's; their partial sums are numbered over the layer.
    local_rows: [A] int32, index into `row_ids`.
    local_partial_sums: [A] int32, index into the answer.
    partial_sums: [num_partial_sums] int64, where the answer's rows belong in the layer's partial sums.
    """

    ep_rank: int
    row_ids: Int64Array
    assignments: Assignments
    local_rows: npt.NDArray[np.int32]
    local_partial_sums: npt.NDArray[np.int32]
    partial_sums: Int64Array

    @property
    def num_rows(self) -> int:
        return len(self.row_ids)

    @property
    def num_partial_sums(self) -> int:
        return len(self.partial_sums)

    def wire_assignments(self) -> npt.NDArray[np.int32]:
        """[4, A]: weights (the bits of fp32), rows, expert ids and partial sums as the payload has them."""
        wire = np.empty((4, len(self.assignments)), dtype=np.int32)
        wire[0] = self.assignments.weights.view(np.int32)
        wire[1] = self.local_rows
        wire[2] = self.assignments.expert_ids
        wire[3] = self.local_partial_sums
        return wire

    def sent_bytes(self, hidden_size: int, itemsize: int) -> int:
        """Of the payload: rows once, and four numbers of four bytes for each assignment."""
        return self.num_rows * hidden_size * itemsize + len(self.assignments) * 16

    def received_bytes(self, hidden_size: int, itemsize: int) -> int:
        """Of the answer's payload."""
        return self.num_partial_sums * hidden_size * itemsize


@dataclass(frozen=True)
class DispatchPlan:
    """One layer's messages and what combine needs.

    partial_rows: [num_partial_sums] int64, the row of each partial sum; they are in ascending order of (unit, row).
    messages: in ascending order of ep_rank; shards that get nothing have none.
    """

    num_tokens: int
    partial_rows: Int64Array
    messages: tuple[ShardMessage, ...]

    @property
    def num_partial_sums(self) -> int:
        return len(self.partial_rows)

    @cached_property
    def num_tokens_by_ranks(self) -> list[int]:
        """num_tokens_by_ranks[n]: how many of the tokens visit exactly n shards."""
        ranks_per_token = np.zeros(self.num_tokens, dtype=np.int64)
        for message in self.messages:
            ranks_per_token[message.row_ids] += 1  # each row once, so nothing is lost
        counts: list[int] = np.bincount(ranks_per_token).tolist()
        return counts

    @cached_property
    def partial_sum_of_row(self) -> Int64Array:
        """[max units of a row, num_tokens] int64: each row's partial sums in ascending order of their unit.

        Rows with fewer have num_partial_sums, the index of a row of zeros, at the end.
        """
        order = self.partial_rows.argsort(kind="stable")  # by (row, unit), because partial sums are by (unit, row)
        rows = self.partial_rows.take(order)
        num_units = np.bincount(rows, minlength=self.num_tokens)  # [num_tokens]
        position = np.arange(len(rows)) - (num_units.cumsum() - num_units).take(rows)
        table = np.full((num_units.max(initial=0), self.num_tokens), self.num_partial_sums)
        table[position, rows] = order
        return table


def sort_assignments(topk_ids: Tensor, topk_weights: Tensor, expert_to_unit: Int64Array) -> Assignments:
    """All of a layer's assignments.

    topk_ids: [num_tokens, top_k] int64, no duplicates within a row; topk_weights: [num_tokens, top_k] fp32;
    expert_to_unit: [n_routed_experts] int64.
    """
    num_tokens, top_k = topk_ids.shape
    expert_ids = topk_ids.numpy().ravel()
    units = expert_to_unit[expert_ids]
    rows = np.arange(num_tokens).repeat(top_k)
    pairs = units * num_tokens + rows  # (unit, row) as one number
    order = (pairs * len(expert_to_unit) + expert_ids).argsort()
    return Assignments(
        rows=rows[order],
        expert_ids=expert_ids[order],
        weights=topk_weights.numpy().ravel()[order],
        partial_sums=_run_starts(pairs[order]).cumsum() - 1,
        units=units[order],
    )


def plan_dispatch(num_tokens: int, assignments: Assignments, unit_ep_ranks: Int64Array) -> DispatchPlan:
    """The messages that carry `assignments` (all of a layer's) to the shard chosen for each unit.

    unit_ep_ranks: [num_units] int64, the shard asked for each unit.
    """
    return DispatchPlan(
        num_tokens=num_tokens,
        partial_rows=assignments.rows[_run_starts(assignments.partial_sums)],
        messages=plan_messages(assignments, unit_ep_ranks),
    )


def plan_messages(assignments: Assignments, unit_ep_ranks: Int64Array) -> tuple[ShardMessage, ...]:
    """One message for each shard that gets any of `assignments`; also re-plans a message that failed."""
    ep_ranks = unit_ep_ranks.take(assignments.units)  # [A]
    messages = []
    for ep_rank in sorted(set(ep_ranks.tolist())):
        mine = assignments.select((ep_ranks == ep_rank).nonzero()[0])
        is_sent = np.zeros(mine.rows.max() + 1, dtype=np.bool_)
        is_sent[mine.rows] = True
        starts = _run_starts(mine.partial_sums)
        messages.append(
            ShardMessage(
                ep_rank=ep_rank,
                row_ids=is_sent.nonzero()[0],
                assignments=mine,
                local_rows=(is_sent.cumsum(dtype=np.int32) - ONE).take(mine.rows),
                local_partial_sums=starts.cumsum(dtype=np.int32) - ONE,
                partial_sums=mine.partial_sums[starts],
            )
        )
    return tuple(messages)


def sum_partials(plan: DispatchPlan, partial_sums: npt.NDArray[np.float32]) -> Tensor:
    """Adds each row's partial sums in ascending order of their unit, in fp32.

    partial_sums: [num_partial_sums + 1, hidden_size], zeros in the last row. Returns [num_tokens, hidden_size] fp32.
    The k-th addition takes the k-th unit of every row, or the zeros for rows that have none, which changes no bit: a
    sum that starts at +0.0 is never -0.0.
    """
    total = np.zeros((plan.num_tokens, partial_sums.shape[1]), dtype=np.float32)
    for kth in plan.partial_sum_of_row:
        total += partial_sums.take(kth, axis=0)
    return torch.from_numpy(total)


def _run_starts(values: Int64Array) -> npt.NDArray[np.bool_]:
    """Whether each element differs from the one before it: [n]."""
    starts = np.empty(len(values), dtype=np.bool_)
    starts[:1] = True
    np.not_equal(values[1:], values[:-1], out=starts[1:])
    return starts
