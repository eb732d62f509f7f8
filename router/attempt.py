"""One message on its way to one shard: the call that carries it, and what its answer says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from protos import expert_pb2
from protos.codec import dtype_to_wire
from protos.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MobulaError,
    ShardUnavailable,
    UnitQuarantined,
    from_code,
)
from protos.memory import RawMatrix
from router.completions import Completions, ForwardAnswer, ForwardCall, Outcome
from router.plan import PartialSums, ShardMessage
from router.router_config import RouterConfig
from router.step_limit import StepLimit
from router.transport import ShardTransport

MAX_TIMEOUT_MS = 2**32 - 1  # the field's


class LayerInput(NamedTuple):
    """What a layer's routed experts are given, on the CPU; see Router.dispatch."""

    layer_id: int
    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


class ShardTiming(NamedTuple):
    """When a message was sent and answered, and what of it the shard says it took; seconds."""

    ep_rank: int
    sent_s: float
    answered_s: float
    queue_s: float
    compute_s: float


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt:
    """A message on its way as `call`, or waiting to be sent again at `resend_at_s`. Times are the worker's clock.

    late_at_s: when to look whether the answer is late; never again once it `is_late`.
    is_probe: a copy of rows for a shard that is not trusted; nobody waits for it. is_check: a copy of rows whose sums
        another shard answered already.
    refused_by: shards that found fault with this work, and are not to be asked for it again.
    """

    message: ShardMessage
    number: int
    transport: ShardTransport | None
    sent_s: float
    late_at_s: float
    give_up_at_s: float
    is_probe: bool = False
    is_check: bool = False
    is_late: bool = False
    call: ForwardCall | None = None
    refused_by: frozenset[int] = frozenset()
    resend_at_s: float = 0.0
    reason: str = ""
    failure: str = ""

    @property
    def ep_rank(self) -> int:
        return self.message.ep_rank

    @property
    def address(self) -> str:
        return "no address" if self.transport is None else self.transport.address

    @property
    def due_at_s(self) -> float:
        """When something about it must be looked at."""
        return min(self.late_at_s, self.give_up_at_s)


class Answer(NamedTuple):
    """What an attempt brought; the values lie in the answer's payload."""

    attempt: Attempt
    sums: PartialSums
    answer: ForwardAnswer


def forward_call(
    message: ShardMessage,
    layer: LayerInput,
    *,
    sequence_number: int,
    timeout_s: float,
    placement_version: int,
    completions: Completions,
    tell: Callable[[Outcome], None],
) -> ForwardCall:
    """The call that carries a message. timeout_s: how long the answer will be waited for."""
    hidden_states = layer.hidden_states
    header = expert_pb2.ForwardHeader(
        sequence_number=sequence_number,
        layer_id=layer.layer_id,
        placement_version=placement_version,
        num_rows=message.num_rows,
        num_assignments=message.num_assignments,
        num_partial_sums=message.num_partial_sums,
        dtype=dtype_to_wire(hidden_states.dtype),
        timeout_ms=min(max(1, int(1000 * timeout_s)), MAX_TIMEOUT_MS),
    )
    return ForwardCall(
        sequence_number=sequence_number,
        header=header.SerializeToString(),
        hidden_states=hidden_states,
        message=message,
        answer_bytes=message.num_partial_sums * hidden_states.shape[1] * hidden_states.itemsize,
        completions=completions,
        tell=tell,
    )


def out_of_time(attempt: Attempt, layer_id: int, now_s: float, config: RouterConfig, limit: StepLimit) -> MobulaError:
    """Of a layer that has waited as long as it may, for this attempt among others."""
    if now_s >= limit.deadline_s:
        return DeadlineExceeded(
            f"the deadline of every request of the step passed while layer {layer_id} waited for expert shard "
            f"{attempt.ep_rank} at {attempt.address}; give the calls more time"
        )
    return ShardUnavailable(
        f"expert shard {attempt.ep_rank} at {attempt.address} did not answer for layer {layer_id} within "
        f"forward_timeout_s = {config.forward_timeout_s} s ({attempt.number} attempts"
        f"{', the last failure: ' + attempt.failure if attempt.failure else ''}); retry when the shard is back",
        retry_after_s=1.0,
    )


def not_computed(attempt: Attempt, layer_id: int) -> InternalError:
    """Of work that every replica has refused."""
    return InternalError(
        f"expert shard {attempt.ep_rank} at {attempt.address}, the last to ask, could not compute a forward of "
        f"layer {layer_id}: {attempt.failure}"
    )


def read_partial_sums(message: ShardMessage, answer: ForwardAnswer, hidden_states: Tensor) -> PartialSums:
    """What an answer has, in place.

    Raises the error that it carries, InternalError when it is not the message's, InvalidRequest for another size.
    """
    header, payload, dtype = answer.header, answer.payload, hidden_states.dtype
    if header.HasField("error"):
        if header.error.quarantined_unit_ids:
            raise UnitQuarantined(header.error.message, unit_ids=tuple(header.error.quarantined_unit_ids))
        raise from_code(header.error.code, header.error.message)
    if header.num_partial_sums != message.num_partial_sums or header.dtype != dtype_to_wire(dtype):
        raise InternalError(
            f"the answer has {header.num_partial_sums} partial sums of dtype {header.dtype}, expected "
            f"{message.num_partial_sums} of {dtype}"
        )
    values = RawMatrix(payload, (message.num_partial_sums, hidden_states.shape[1]), dtype)
    expected_bytes = values.shape[0] * values.shape[1] * dtype.itemsize
    if payload.num_bytes != expected_bytes:
        raise InvalidRequest(
            f"{values.shape[0]} partial sums of {values.shape[1]} {dtype} have {expected_bytes} bytes, got "
            f"{payload.num_bytes}"
        )
    return PartialSums(message.partial_sums, values, message.addresses.partial_sums)
