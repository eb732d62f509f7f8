"""A layer without the experts that nobody can be asked for: what is left out, what the others' weights become. Pure.

Off unless the deployment's configuration and every request of a step allow it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from router.expert_map import Int64Array
from router.plan import NO_EXPERT, PartialSums, ShardMessage

BoolArray = npt.NDArray[np.bool_]


class LeftOut(NamedTuple):
    """What a layer does without.

    zeros: stand for the partial sums that are missing. weights: [num_tokens] fp32, of each row's assignments that were
    left out, together.
    """

    zeros: PartialSums
    num_assignments: int
    weights: Tensor


def leave_out(messages: Iterable[ShardMessage], is_missing: BoolArray, num_tokens: int, like: Tensor) -> LeftOut:
    """Everything that is missing still.

    messages: have every missing partial sum, some perhaps twice; like: [_, hidden_size].
    """
    is_counted = np.zeros_like(is_missing)
    weights, num_assignments = np.zeros(num_tokens, dtype=np.float32), 0
    for message in messages:
        is_new = is_missing[message.partial_sums] & ~is_counted[message.partial_sums]
        is_counted[message.partial_sums] = True
        bits, local_rows, _, local_sums = message.assignments
        chosen = is_new[local_sums]
        np.add.at(weights, message.row_ids[local_rows[chosen]], bits.view(np.float32)[chosen])
        num_assignments += int(chosen.sum())
    missing: Int64Array = np.flatnonzero(is_missing)
    zeros = PartialSums(missing, like.new_zeros(len(missing), like.shape[1]))
    return LeftOut(zeros, num_assignments, torch.from_numpy(weights))


def renormalised(sums: Tensor, left_out: LeftOut, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """Each row's sum as if the weights that are there had the whole weight: [num_tokens, hidden_size] fp32.

    A row that has nothing left stays 0.
    """
    whole = topk_weights.masked_fill(topk_ids == NO_EXPERT, 0.0).sum(dim=1)  # [num_tokens]
    present = whole - left_out.weights
    factor = torch.where((left_out.weights > 0) & (present > 1e-6 * whole), whole / present, 1.0)
    return sums * factor.unsqueeze(1)
