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

MAX_MESSAGE_CHARS = 800  # of an error; with four bytes a character it still fits a ring's doorbell


def read_forward(
    header: expert_pb2.ForwardHeader, payload: memoryview, model: ExpertModel, layer: LayerWeights
) -> ForwardInput:
    """The forward in a frame; its hidden states are a view of the payload.

    Raises InvalidRequest for what can never be computed, StalePlacement for experts that `layer` does not hold.
    """
    dtype = dtype_from_wire(header.dtype)
    if dtype != model.dtype:
        raise InvalidRequest(f"hidden states are {dtype}, this shard computes in {model.dtype}", field="header.dtype")
    reader = PayloadReader(payload)
    hidden_states = reader.take((header.num_rows, model.hidden_size), dtype)
    # Copied before they are checked: whoever sent them may be able to write to them still.
    weights, rows, expert_ids, partial_sums = reader.take((4, header.num_assignments), torch.int32).clone()
    reader.finish()
    forward = ForwardInput(
        hidden_states=hidden_states,
        weights=weights.view(torch.float32),
        rows=rows,
        expert_ids=expert_ids,
        partial_sums=partial_sums,
        num_partial_sums=header.num_partial_sums,
    )
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


def answer_tensor(memory: memoryview, forward: ForwardInput, model: ExpertModel) -> torch.Tensor:
    """The answer's memory as [num_partial_sums, hidden_size]. Raises InvalidRequest for another size."""
    num_bytes = forward.num_partial_sums * model.hidden_size * model.dtype.itemsize
    if len(memory) != num_bytes:
        raise InvalidRequest(f"the answer's region has {len(memory)} bytes, the partial sums have {num_bytes}")
    if num_bytes == 0:
        return torch.empty(forward.num_partial_sums, model.hidden_size, dtype=model.dtype)
    return torch.frombuffer(memory, dtype=model.dtype).view(forward.num_partial_sums, model.hidden_size)


def answer_header(sequence_number: int, outcome: ForwardOutput | MobulaError) -> expert_pb2.ForwardResult:
    """Of a forward that was computed, or that was refused or failed; the connection goes on."""
    if isinstance(outcome, MobulaError):
        message = str(outcome)
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[:MAX_MESSAGE_CHARS]}..."
        error = expert_pb2.ForwardError(code=code_number(outcome), message=message)
        return expert_pb2.ForwardResult(sequence_number=sequence_number, error=error)
    return expert_pb2.ForwardResult(
        sequence_number=sequence_number,
        num_partial_sums=len(outcome.partial_sums),
        dtype=dtype_to_wire(outcome.partial_sums.dtype),
        timing=expert_pb2.ForwardTiming(queue_ns=outcome.queue_ns, compute_ns=outcome.compute_ns),
    )


def answer_frame(sequence_number: int, outcome: ForwardOutput | MobulaError) -> bytes:
    """The ForwardResponse frame of a forward."""
    payload = () if isinstance(outcome, MobulaError) else (outcome.partial_sums,)
    return encode_frame(answer_header(sequence_number, outcome), payload)
