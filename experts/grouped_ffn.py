"""The routed experts' mathematics: SwiGLU of each expert over its rows, weighted and summed within placement units.

Pure tensor mathematics; knows nothing of wires, batches or where weights come from. In torch, for every device, and the
oracle of the CPU kernels, which take over where they are built.

In the kernels a row's result depends on that row and its experts alone, to the bit: not on the other rows, not on which
units lie on the shard, not on what was merged into one computation. torch's products may round a row otherwise beside
other rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from experts.kernels.expert_set import ExpertSet
from protos.memory import Matrix, as_tensor

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One expert.

    w13: [2 * moe_intermediate_size, hidden_size], gate above up; w2: [hidden_size, moe_intermediate_size].
    """

    w13: Tensor
    w2: Tensor

    @property
    def nbytes(self) -> int:
        return self.w13.nbytes + self.w2.nbytes


class ForwardInput(NamedTuple):
    """What one forward, or several merged ones, ask of a layer. A = number of assignments.

    hidden_states: [num_rows, hidden_size] in the weights' dtype.
    assignment_bytes: of [4, A] int32: weights (the bits of fp32), rows, expert ids, partial sums. Ordered so that each
        partial sum's experts ascend; a (partial sum, expert) pair occurs once.
    """

    hidden_states: Matrix
    assignment_bytes: bytes
    num_partial_sums: int

    @property
    def assignments(self) -> Int32Array:
        """[4, A], read-only."""
        return assignment_array(self.assignment_bytes)

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        weights: npt.NDArray[np.float32] = self.assignments[0].view(np.float32)
        return weights

    @property
    def rows(self) -> Int32Array:
        rows: Int32Array = self.assignments[1]
        return rows

    @property
    def expert_ids(self) -> Int32Array:
        expert_ids: Int32Array = self.assignments[2]
        return expert_ids

    @property
    def partial_sums(self) -> Int32Array:
        partial_sums: Int32Array = self.assignments[3]
        return partial_sums

    @property
    def num_rows(self) -> int:
        return self.hidden_states.shape[0]

    @property
    def num_assignments(self) -> int:
        return len(self.assignment_bytes) // 16


def assignment_array(assignment_bytes: bytes) -> Int32Array:
    """[4, A], read-only, of a forward's bytes."""
    return np.frombuffer(assignment_bytes, dtype=np.int32).reshape(4, -1)


def grouped_ffn(
    forward: ForwardInput, experts: Mapping[int, ExpertWeights] | ExpertSet, out: Matrix | None = None
) -> Matrix:
    """The partial sums, [num_partial_sums, hidden_size] in the activations' dtype.

    Each is the sum over its assignments of weight * expert(row), in ascending order of the expert, in fp32.
    experts: has every logical expert that the forward names; an ExpertSet is computed by the CPU kernels. out: written
    and returned if given; contiguous.
    """
    if isinstance(experts, ExpertSet):
        if out is None:
            hidden_states = forward.hidden_states
            out = torch.empty(forward.num_partial_sums, hidden_states.shape[1], dtype=hidden_states.dtype)
        return experts.forward(forward.hidden_states, forward.assignment_bytes, out)
    sums = _torch_ffn(forward, experts)
    if out is None:
        return sums.to(forward.hidden_states.dtype)
    as_tensor(out).copy_(sums)
    return out


@torch.inference_mode()
def _torch_ffn(forward: ForwardInput, experts: Mapping[int, ExpertWeights]) -> Tensor:
    """The partial sums in fp32."""
    sums = torch.zeros(forward.num_partial_sums, forward.hidden_states.shape[1])
    assignments = torch.from_numpy(forward.assignments.copy())
    weights, (_, rows, expert_ids, partial_sums) = assignments[0].view(torch.float32), assignments
    hidden_states = as_tensor(forward.hidden_states)
    order = expert_ids.argsort(stable=True)
    end = 0
    for expert_id, num_rows in enumerate(expert_ids.bincount().tolist()):
        if num_rows == 0:
            continue
        start, end = end, end + num_rows
        mine = order[start:end]
        output = expert_ffn(hidden_states[rows[mine]], experts[expert_id])  # [num_rows, hidden_size]
        # An expert adds to a partial sum once, so the order within this addition does not matter.
        sums.index_add_(0, partial_sums[mine], output.float() * weights[mine].unsqueeze(-1))
    return sums


def expert_ffn(hidden_states: Tensor, weights: ExpertWeights) -> Tensor:
    """SwiGLU: w2(silu(gate(x)) * up(x)). [num_rows, hidden_size] -> the same."""
    gate, up = F.linear(hidden_states, weights.w13).chunk(2, dim=-1)  # [num_rows, moe_intermediate_size] each
    return F.linear(F.silu(gate) * up, weights.w2)


def merge(forwards: list[ForwardInput]) -> ForwardInput:
    """Several forwards as one; their rows and partial sums follow one another."""
    if len(forwards) == 1:
        return forwards[0]
    parts = []
    num_rows = num_partial_sums = 0
    for forward in forwards:
        parts.append(forward.assignments + np.array([[0], [num_rows], [0], [num_partial_sums]], dtype=np.int32))
        num_rows += forward.num_rows
        num_partial_sums += forward.num_partial_sums
    return ForwardInput(
        hidden_states=torch.cat([as_tensor(forward.hidden_states) for forward in forwards]),
        assignment_bytes=np.concatenate(parts, axis=1).tobytes(),
        num_partial_sums=num_partial_sums,
    )
