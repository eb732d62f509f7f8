"""What a gateway does with the ends of a call that it passes on: the client's metadata there, the other side's status
back. Knows nothing of services.
"""

import grpc
import grpc.aio


def forwarded(context: grpc.aio.ServicerContext) -> tuple[tuple[str, str], ...]:
    """The client's own metadata, so that tracing and request ids reach the other side."""
    skipped = ("user-agent", "grpc-", "content-type", "te")
    return tuple((key, value) for key, value in context.invocation_metadata() or () if not key.startswith(skipped))


def was_answered(error: grpc.aio.AioRpcError) -> bool:
    """Whether the other side itself ended the call so, rather than the connection to it."""
    return any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())


async def abort_as(context: grpc.aio.ServicerContext, error: grpc.aio.AioRpcError) -> None:
    """Ends the client's call with the other side's status and details."""
    details = tuple(item for item in error.trailing_metadata() or () if item[0] == "grpc-status-details-bin")
    context.set_trailing_metadata(details)
    await context.abort(error.code(), error.details() or "")
