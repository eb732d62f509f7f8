"""What a ForwardRequest frame asks, checked against what the shard holds, and the frames that answer it.

Nothing in a frame is trusted: indices, order and sizes are checked before anything is computed. Values are not: a NaN
goes through, it is the sender's.
"""

import torch

from experts.batcher import ForwardOutput
from experts.grouped_ffn import ForwardInput
from experts.weight_store import ExpertModel, LayerWeights
from protos import expert_pb2
from protos.codec import PayloadReader, dtype_from_wire, dtype_to_wire, encode_frame
from protos.errors import InvalidRequest, MobulaError, StalePlacement, code_number


def read_forward(
    header: expert_pb2.ForwardHeader, payload: memoryview, model: ExpertModel, layer: LayerWeights
) -> ForwardInput:
    """The forward in a frame; its tensors are views of the frame.

    Raises InvalidRequest for what can never be computed, StalePlacement for experts that `layer` does not hold.
    """
    dtype = dtype_from_wire(header.dtype)
    if dtype != model.dtype:
        raise InvalidRequest(f"hidden states are {dtype}, this shard computes in {model.dtype}", field="header.dtype")
    reader = PayloadReader(payload)
    per_assignment = (header.num_assignments,)
    forward = ForwardInput(
        hidden_states=reader.take((header.num_rows, model.hidden_size), dtype),
        weights=reader.take(per_assignment, torch.float32),
        rows=reader.take(per_assignment, torch.int32),
        expert_ids=reader.take(per_assignment, torch.int32),
        partial_sums=reader.take(per_assignment, torch.int32),
        num_partial_sums=header.num_partial_sums,
    )
    reader.finish()
    _check(forward, model, layer)
    return forward


def _check(forward: ForwardInput, model: ExpertModel, layer: LayerWeights) -> None:
    """Assignments ascend by (unit, row, expert), partial sums number the (unit, row) pairs, every expert is held."""
    if forward.num_assignments == 0:
        if forward.num_partial_sums:
            raise InvalidRequest(f"{forward.num_partial_sums} partial sums have no assignments")
        return
    _check_range("row", forward.rows, forward.num_rows)
    _check_range("expert id", forward.expert_ids, model.n_routed_experts)
    units = layer.expert_to_unit[forward.expert_ids]
    if int(units.min()) < 0:
        missing = sorted(set(forward.expert_ids[units < 0].tolist()))
        raise StalePlacement(
            f"experts {missing} of layer {layer.layer_id} are not on this shard under placement version "
            f"{layer.placement_version}; use the newest expert map"
        )
    pairs = units * forward.num_rows + forward.rows  # (unit, row) as one number, int64
    keys = pairs * model.n_routed_experts + forward.expert_ids
    if not bool((keys[1:] > keys[:-1]).all()):
        raise InvalidRequest("assignments do not ascend by (unit, row, expert), or one occurs twice")
    expected = torch.zeros_like(pairs)
    expected[1:] = (pairs[1:] != pairs[:-1]).cumsum(0)
    if not torch.equal(forward.partial_sums.long(), expected):
        raise InvalidRequest("partial sums do not number the (unit, row) pairs of the assignments from 0")
    if int(expected[-1]) + 1 != forward.num_partial_sums:
        raise InvalidRequest(
            f"num_partial_sums is {forward.num_partial_sums}, the assignments have {int(expected[-1]) + 1}",
            field="header.num_partial_sums",
        )


def _check_range(name: str, values: torch.Tensor, limit: int) -> None:
    low, high = (int(bound) for bound in values.aminmax())
    if low < 0 or high >= limit:
        raise InvalidRequest(f"{name} {low if low < 0 else high} is out of range, must be 0 to {limit - 1}")


def answer_frame(sequence_number: int, output: ForwardOutput) -> bytes:
    """The ForwardResponse frame of a computed forward."""
    header = expert_pb2.ForwardResult(
        sequence_number=sequence_number,
        num_partial_sums=len(output.partial_sums),
        dtype=dtype_to_wire(output.partial_sums.dtype),
        timing=expert_pb2.ForwardTiming(queue_ns=output.queue_ns, compute_ns=output.compute_ns),
    )
    return encode_frame(header, (output.partial_sums,))


def error_frame(sequence_number: int, error: MobulaError) -> bytes:
    """The ForwardResponse frame of a forward that was refused or failed; the stream goes on."""
    header = expert_pb2.ForwardResult(
        sequence_number=sequence_number,
        error=expert_pb2.ForwardError(code=code_number(error), message=str(error)),
    )
    return encode_frame(header, ())
