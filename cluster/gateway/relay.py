"""What a gateway does with the ends of a call that it passes on: the client's metadata there, the other side's status
back. Knows nothing of services.
"""

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2

NOT_FORWARDED = ("authorization", "cookie", "user-agent", "content-type", "te")


def forwarded(context: grpc.aio.ServicerContext) -> tuple[tuple[str, str], ...]:
    """The client's own metadata, so that tracing and request ids reach the other side; its key stays here."""
    return tuple(
        (key, value)
        for key, value in context.invocation_metadata() or ()
        if key not in NOT_FORWARDED and not key.startswith("grpc-")
    )


def was_answered(error: grpc.aio.AioRpcError) -> bool:
    """Whether the other side itself ended the call so, rather than the connection to it."""
    return any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())


def error_reason(error: grpc.aio.AioRpcError) -> str:
    """The reason, a constant of protos/errors.py, with which the other side ended the call; "" if it gave none."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            info = error_details_pb2.ErrorInfo()
            if any(detail.Unpack(info) for detail in status_pb2.Status.FromString(value).details):
                return str(info.reason)
    return ""


async def abort_as(context: grpc.aio.ServicerContext, error: grpc.aio.AioRpcError) -> None:
    """Ends the client's call with the other side's status and details."""
    details = tuple(item for item in error.trailing_metadata() or () if item[0] == "grpc-status-details-bin")
    context.set_trailing_metadata(details)
    await context.abort(error.code(), error.details() or "")
