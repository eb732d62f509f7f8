"""Whether what shards answered are numbers, and whose fault it is if not. Pure.

A shard whose answer for a row of numbers is not finite may be damaged, or the model may be so; a replica tells.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from protos.memory import as_tensor
from router.expert_map import Int64Array
from router.plan import DispatchPlan, PartialSums, ShardMessage


def is_finite(sums: Tensor) -> bool:
    """Whether every element is a finite number. A sum over all of them tells, unless it overflows itself."""
    return math.isfinite(float(sums.sum())) or bool(torch.isfinite(sums).all())


def doubtful(plan: DispatchPlan, answer: PartialSums, hidden_states: Tensor) -> Int64Array:
    """Those of an answer's partial sums that are not finite, although their row of `hidden_states` is."""
    is_bad = ~torch.isfinite(as_tensor(answer.values)).all(dim=1).numpy()
    partial_sums: Int64Array = answer.partial_sums[is_bad]
    if not len(partial_sums):
        return partial_sums
    is_row_finite = torch.isfinite(hidden_states[torch.from_numpy(plan.partial_rows[partial_sums])]).all(dim=1)
    doubts: Int64Array = partial_sums[is_row_finite.numpy()]
    return doubts


def confirmed_wrong(doubts: Int64Array, others: Iterable[PartialSums]) -> Int64Array:
    """Those of the doubtful partial sums that other shards answered with numbers."""
    finite = [other.partial_sums[torch.isfinite(as_tensor(other.values)).all(dim=1).numpy()] for other in others]
    wrong: Int64Array = doubts[np.isin(doubts, np.concatenate([doubts[:0], *finite]))]
    return wrong


def units_of(message: ShardMessage, partial_sums: Int64Array, expert_to_unit: Int64Array) -> list[int]:
    """The units that a message's partial sums belong to."""
    _, _, expert_ids, local = message.assignments
    is_meant = np.isin(message.partial_sums[local], partial_sums)
    return sorted(set(expert_to_unit[expert_ids[is_meant]].tolist()))
