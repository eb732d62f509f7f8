"""The one table between exceptions and gRPC statuses, with google.rpc details that a client can act on.

Code raises these exceptions; the handlers that protos/rpc.py makes turn them into statuses; nothing else does.
"""

from typing import ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

ERROR_DOMAIN = "mobula"


class MobulaError(Exception):
    """A failure that a caller is told about.

    Attributes:
        code: the gRPC status.
        reason: a constant that programs can compare, in UPPER_SNAKE_CASE.
        field: the request's field at fault, if one is.
        retry_after_s: after how many seconds a retry makes sense, if it does.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, field: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequest(MobulaError):
    """The request can never succeed as it is."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class CorruptFrame(InvalidRequest):
    """Bytes were damaged between two processes; the same forward may succeed when it is sent again."""

    reason = "CORRUPT_FRAME"


class PromptTooLong(InvalidRequest):
    """The prompt does not fit the model's context."""

    reason = "PROMPT_TOO_LONG"


class Unauthenticated(MobulaError):
    """The caller did not show who it is, or what it showed is not valid (any more)."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class PermissionDenied(MobulaError):
    """It is known who the caller is, and that it may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class QueueFull(MobulaError):
    """A bounded queue has no place; the same request may succeed later."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class ClientLimit(MobulaError):
    """One client uses more than its share; others are served."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "CLIENT_LIMIT"


class CapacityExceeded(MobulaError):
    """The request alone is larger than the latent cache."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "CAPACITY_EXCEEDED"


class StalePlacement(MobulaError):
    """A forward named a placement version or a unit that the shard does not hold."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "STALE_PLACEMENT"


class UnitQuarantined(MobulaError):
    """Weights on a shard do not give their known answers any more; another replica may be asked.

    Attributes:
        unit_ids: those of the forward's layer that are quarantined.
    """

    code = grpc.StatusCode.DATA_LOSS
    reason = "UNIT_QUARANTINED"

    def __init__(self, message: str, *, unit_ids: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.unit_ids = unit_ids


class Cancelled(MobulaError):
    """Nobody waited for it any more, so it was not done."""

    code = grpc.StatusCode.CANCELLED
    reason = "CANCELLED"


class RebalanceRefused(MobulaError):
    """Experts cannot be moved now, or not at all under this configuration; the message says which."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "REBALANCE_REFUSED"


class NotServing(MobulaError):
    """What was asked for needs every process to be ready, and one is not."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "NOT_SERVING"


class DeadlineExceeded(MobulaError):
    """A process did not answer in time; what was asked of it may still happen."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class ClientTooSlow(MobulaError):
    """The client did not read its answer, which must not be kept for it without end."""

    code = grpc.StatusCode.ABORTED
    reason = "CLIENT_TOO_SLOW"


class Unavailable(MobulaError):
    """A process is down, starting or draining; a retry may reach another one."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class WorkerStopping(Unavailable):
    """The worker ends before its requests do; another one can go on with them."""

    reason = "WORKER_STOPPING"


class ShardUnavailable(Unavailable):
    """No replica of a placement unit answered in time."""

    reason = "SHARD_UNAVAILABLE"


class InternalError(MobulaError):
    """A fault of ours; the message carries an id to find in the log."""


_BY_GRPC_CODE: dict[int, type[MobulaError]] = {
    code_pb2.INVALID_ARGUMENT: InvalidRequest,
    code_pb2.RESOURCE_EXHAUSTED: QueueFull,
    code_pb2.FAILED_PRECONDITION: StalePlacement,
    code_pb2.UNAVAILABLE: Unavailable,
    code_pb2.CANCELLED: Cancelled,
    code_pb2.DEADLINE_EXCEEDED: DeadlineExceeded,
    code_pb2.DATA_LOSS: UnitQuarantined,
}


def code_number(error: MobulaError) -> int:
    """The google.rpc.Code of an exception, for errors that travel inside a frame."""
    return int(error.code.value[0])


def from_code(code: int, message: str) -> MobulaError:
    """The exception of a google.rpc.Code that came in a frame; unknown codes are internal errors."""
    return _BY_GRPC_CODE.get(code, InternalError)(message)


def to_status(error: MobulaError) -> rpc_status._Status:
    """The status with ErrorInfo, and BadRequest or RetryInfo where they apply."""
    details = [_any(error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN))]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        details.append(_any(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(_any(error_details_pb2.RetryInfo(retry_delay=delay)))
    return rpc_status.to_status(status_pb2.Status(code=code_number(error), message=str(error), details=details))


def _any(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
