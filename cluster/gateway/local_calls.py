"""Calls to a gateway's services from within its process, without a connection.

What stands behind a method (a relay to a worker, the controller) is what a client reaches; only the wire in front of it
is left out. Belongs to the gateway's event loop.
"""

from collections.abc import Sequence
from typing import NamedTuple, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

ResponseT = TypeVar("ResponseT", bound=Message)


class LocalCallFailed(grpc.aio.AbortError):  # type: ignore[misc]  # grpc has no types
    """The method ended with a status other than OK. Handlers let it pass, as they do the error of an aborted call."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code


class LocalCalls:
    """The unary methods of some services."""

    def __init__(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._handlers = tuple(handlers)

    async def call(self, method: str, request: Message, response_class: type[ResponseT]) -> ResponseT:
        """The answer of "package.Service/Method". Raises LocalCallFailed."""
        details = _CallDetails(f"/{method}")
        found = (handler.service(details) for handler in self._handlers)
        handler = next(method_handler for method_handler in found if method_handler is not None)
        answer: bytes = await handler.unary_unary(request.SerializeToString(), _LocalContext())
        return response_class.FromString(answer)


class _CallDetails(NamedTuple):
    method: str
    invocation_metadata: tuple[tuple[str, str], ...] = ()


class _LocalContext:
    """As much of a ServicerContext as the gateway's handlers use: a caller without metadata and deadline."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def time_remaining(self) -> None:
        return None

    def peer(self) -> str:
        return "this process"

    def set_trailing_metadata(self, metadata: object) -> None:
        """Nobody reads it."""

    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn:
        raise LocalCallFailed(code, details)

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        raise LocalCallFailed(status.code, status.details)
