"""What a ForwardRequest frame asks, checked against what the shard holds, and the frames that answer it.

Nothing in a frame is trusted: indices, order and sizes are checked before anything is computed. Values are not: a NaN
goes through, it is the sender's.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experts.batcher import ForwardOutput
from experts.grouped_ffn import ForwardInput, Int32Array
from experts.kernels.assignments import kernel_accepts
from experts.weight_store import ExpertModel, LayerWeights
from protos import expert_pb2
from protos.codec import dtype_from_wire, dtype_to_wire, join_frame, write_frame
from protos.errors import InvalidRequest, MobulaError, StalePlacement, UnitQuarantined, code_number
from protos.memory import Memory, RawMatrix

MAX_UNIT_IDS = 64  # of an error; a forward that asks for more quarantined units learns of the others by asking again
MAX_COUNT = 2**31 - 1  # of rows, and of assignments: indices are int32
MAX_MESSAGE_CHARS = 800  # of an error; with four bytes a character it still fits a ring's doorbell


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardLimits:
    """What a forward's assignments must keep to.

    expert_to_unit: [n_routed_experts] int64, -1 for experts that are not held.
    """

    layer_id: int
    placement_version: int
    num_rows: int
    num_partial_sums: int
    expert_to_unit: npt.NDArray[np.int64]


def next_number(number: int, last: int) -> int:
    """`number`, if it may follow `last` on one stream or ring: numbers only rise, so a frame counts once, however often
    it comes.

    Raises InvalidRequest.
    """
    if number <= last:
        raise InvalidRequest(
            f"forward {number} comes after forward {last}: numbers only rise, this one came before or is out of order",
            field="header.sequence_number",
        )
    return number


def read_forward(
    header: expert_pb2.ForwardHeader, payload: Memory, model: ExpertModel, layer: LayerWeights
) -> ForwardInput:
    """The forward in a frame; its hidden states lie where the payload does.

    Raises InvalidRequest for what can never be computed, StalePlacement for experts that `layer` does not hold.
    """
    dtype = model.dtype
    if header.dtype != dtype_to_wire(dtype):
        sent = dtype_from_wire(header.dtype)
        raise InvalidRequest(f"hidden states are {sent}, this shard computes in {dtype}", field="header.dtype")
    num_rows, num_assignments = header.num_rows, header.num_assignments
    rows_bytes = num_rows * model.hidden_size * dtype.itemsize
    num_bytes = payload.num_bytes
    excess = num_bytes - rows_bytes - 16 * num_assignments
    if excess:
        raise InvalidRequest(
            f"payload has {num_bytes} bytes, {num_rows} rows of {model.hidden_size} {dtype} and {num_assignments} "
            f"assignments have {num_bytes - excess}: {abs(excess)} bytes too {'many' if excess > 0 else 'few'}"
        )
    if max(num_rows, num_assignments) > MAX_COUNT:
        raise InvalidRequest(f"{num_rows} rows and {num_assignments} assignments, limit is {MAX_COUNT} of either")
    # Copied before they are checked: whoever sent them may be able to write to them still.
    forward = ForwardInput(
        hidden_states=RawMatrix(payload.part(0, rows_bytes), (num_rows, model.hidden_size), dtype),
        assignment_bytes=bytes(payload.part(rows_bytes, 16 * num_assignments).view),
        num_partial_sums=header.num_partial_sums,
    )
    if not kernel_accepts(
        forward.assignment_bytes,
        layer.expert_to_unit_address,
        len(layer.expert_to_unit),
        num_rows,
        forward.num_partial_sums,
    ):
        limits = ForwardLimits(
            layer_id=layer.layer_id,
            placement_version=layer.placement_version,
            num_rows=num_rows,
            num_partial_sums=forward.num_partial_sums,
            expert_to_unit=layer.expert_to_unit,
        )
        check_assignments(forward.rows, forward.expert_ids, forward.partial_sums, limits)  # says what is wrong
    return forward


def check_assignments(
    rows: Int32Array, expert_ids: Int32Array, partial_sums: Int32Array, limits: ForwardLimits
) -> None:
    """Assignments ascend by (unit, row, expert), partial sums number the (unit, row) pairs, every expert is held.

    rows, expert_ids, partial_sums: [A] int32, not shared with anyone who could write to them. Raises InvalidRequest,
    and StalePlacement for experts that are not held.
    """
    if len(rows) == 0:
        if limits.num_partial_sums:
            raise InvalidRequest(f"{limits.num_partial_sums} partial sums have no assignments")
        return
    _check_range("row", rows, limits.num_rows)
    _check_range("expert id", expert_ids, len(limits.expert_to_unit))
    units = limits.expert_to_unit[expert_ids]  # [A] int64
    pairs = units * limits.num_rows + rows  # (unit, row) as one number
    keys = pairs * len(limits.expert_to_unit) + expert_ids
    if keys[0] < 0 or not (keys[1:] > keys[:-1]).all():  # unit -1 makes the first key negative, or the order wrong
        if units.min() < 0:
            raise StalePlacement(
                f"experts {sorted(set(expert_ids[units < 0].tolist()))} of layer {limits.layer_id} are not on this "
                f"shard under placement version {limits.placement_version}; use the newest expert map"
            )
        raise InvalidRequest("assignments do not ascend by (unit, row, expert), or one occurs twice")
    is_next = pairs[1:] != pairs[:-1]
    if partial_sums[0] != 0 or (partial_sums[1:] - partial_sums[:-1] != is_next).any():
        raise InvalidRequest("partial sums do not number the (unit, row) pairs of the assignments from 0")
    count = int(partial_sums[-1]) + 1
    if count != limits.num_partial_sums:
        raise InvalidRequest(
            f"num_partial_sums is {limits.num_partial_sums}, the assignments have {count}",
            field="header.num_partial_sums",
        )


def _check_range(name: str, values: Int32Array, limit: int) -> None:
    highest = values.view(np.uint32).max()  # a negative number is a very high one
    if highest >= limit:
        low = int(values.min())
        raise InvalidRequest(f"{name} {low if low < 0 else highest} is out of range, must be 0 to {limit - 1}")


def answer_matrix(memory: Memory, forward: ForwardInput, model: ExpertModel) -> RawMatrix:
    """The answer's memory as [num_partial_sums, hidden_size]. Raises InvalidRequest for another size."""
    num_bytes = forward.num_partial_sums * model.hidden_size * model.dtype.itemsize
    if memory.num_bytes != num_bytes:
        raise InvalidRequest(f"the answer's region has {memory.num_bytes} bytes, the partial sums have {num_bytes}")
    return RawMatrix(memory, (forward.num_partial_sums, model.hidden_size), model.dtype)


def answer_header(sequence_number: int, outcome: ForwardOutput | MobulaError) -> expert_pb2.ForwardResult:
    """Of a forward that was computed, or that was refused or failed; the connection goes on."""
    if isinstance(outcome, MobulaError):
        message = str(outcome)
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[:MAX_MESSAGE_CHARS]}..."
        unit_ids = outcome.unit_ids if isinstance(outcome, UnitQuarantined) else ()
        error = expert_pb2.ForwardError(
            code=code_number(outcome), message=message, quarantined_unit_ids=unit_ids[:MAX_UNIT_IDS]
        )
        return expert_pb2.ForwardResult(sequence_number=sequence_number, error=error)
    return expert_pb2.ForwardResult(
        sequence_number=sequence_number,
        num_partial_sums=outcome.partial_sums.shape[0],
        dtype=dtype_to_wire(outcome.partial_sums.dtype),
        timing=expert_pb2.ForwardTiming(queue_ns=outcome.queue_ns, compute_ns=outcome.compute_ns),
    )


def answer_frame(sequence_number: int, outcome: ForwardOutput | MobulaError) -> bytes:
    """The ForwardResponse frame of a forward."""
    header = answer_header(sequence_number, outcome).SerializeToString()
    if isinstance(outcome, MobulaError):
        return join_frame(header, ())
    sums = outcome.partial_sums
    assert sums.is_contiguous()
    num_bytes = sums.shape[0] * sums.shape[1] * sums.dtype.itemsize
    return write_frame(header, num_bytes, lambda address: ctypes.memmove(address, sums.data_ptr(), num_bytes))
