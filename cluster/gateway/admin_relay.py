"""The gateway's side of the admin calls: passes them on to the controller as raw bytes, so that clients talk to one
port. Knows nothing of what they say.

The right `admin` is checked before this, by cluster/security/key_guard.py; without `gateway.keys` whoever may generate
may also rebalance.
"""

import asyncio

import grpc
import grpc.aio

from cluster.gateway.relay import abort_as, forwarded, was_answered
from protos import admin_pb2, errors, rpc
from protos.credentials import PLAINTEXT, Credentials, PeerRole

ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"]
SERVICE = ADMIN.full_name
TIMEOUT_S = 65.0  # more than the controller gives a plan, so that it is the one who says that it was late
RETRY_S = 1.0


class AdminRelay:
    """The Admin service over raw bytes. Used from the event loop only."""

    def __init__(self, timeout_s: float = TIMEOUT_S, credentials: Credentials = PLAINTEXT) -> None:
        self._credentials = credentials
        self._timeout_s = timeout_s
        self._address = ""
        self._channel: grpc.aio.Channel | None = None

    async def update(self, address: str) -> None:
        """Where the controller's server is: host:port, or "" while it is not known."""
        if address == self._address:
            return
        stale = self._channel
        self._channel = None
        if address:
            self._channel = self._credentials.channel(address, PeerRole.CONTROLLER, rpc.client_options())
        self._address = address
        if stale:
            await stale.close(grace=0)

    def handlers(self) -> grpc.GenericRpcHandler:
        methods = {method.name: rpc.unary_handler(self._relay(method.name)) for method in ADMIN.methods}
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _relay(self, method: str) -> rpc.UnaryMethod:
        async def relay(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            channel, address = self._channel, self._address
            if channel is None:
                raise errors.Unavailable("the gateway does not know the controller yet; retry", retry_after_s=RETRY_S)
            timeout_s = min(self._timeout_s, context.time_remaining() or self._timeout_s)
            call = channel.unary_unary(f"/{SERVICE}/{method}")
            try:
                return bytes(await call(request, timeout=timeout_s, metadata=forwarded(context)))
            except grpc.aio.AioRpcError as error:
                if was_answered(error) or error.code() not in _CONNECTION_ERRORS:
                    await abort_as(context, error)
                raise _connection_error(error, address, timeout_s) from error
            except asyncio.CancelledError as error:
                if rpc.is_client_gone():
                    raise
                raise errors.Unavailable(
                    f"the controller at {address} was let go of while it was asked; see the status, then ask again",
                    retry_after_s=RETRY_S,
                ) from error

        return relay


_CONNECTION_ERRORS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def _connection_error(error: grpc.aio.AioRpcError, address: str, timeout_s: float) -> errors.MobulaError:
    """What the client is told when not the controller but the connection to it ended the call."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded(
            f"the controller at {address} did not answer within {timeout_s:g} s; what was asked may still be done"
        )
    return errors.Unavailable(
        f"the controller at {address} cannot be reached: {error.details()}; requests are served all the same, but "
        "nothing is supervised or moved until it is back",
        retry_after_s=RETRY_S,
    )
