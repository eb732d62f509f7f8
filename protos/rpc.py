"""How gRPC is used here: server and channel settings, request parsing, and handlers that answer with statuses.

Handlers take and return raw bytes where it matters and parse with `parse`, so that a malformed request is the
client's INVALID_ARGUMENT and not our INTERNAL.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from protos import errors

logger = logging.getLogger(__name__)

MAX_CLIENT_MESSAGE_BYTES = 4 * 1024 * 1024  # a client's request or one answer; 1M token ids
MAX_FRAME_BYTES = 256 * 1024 * 1024  # rows of one micro-batch to one shard; checked against the config at start
READ_TIMEOUT_S = 30.0  # a client that takes nothing for so long is cut off

MessageT = TypeVar("MessageT", bound=Message)


_KEEPALIVE = [  # of both ends: calls to a peer that says nothing for so long end. A pong needs no Python, only a core
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
]

_RECONNECT = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1_000)]


def client_options() -> list[tuple[str, int]]:
    """Settings of a client's channel, and of the servers that only processes of ours reach for clients."""
    return [
        ("grpc.max_receive_message_length", MAX_CLIENT_MESSAGE_BYTES),
        ("grpc.max_send_message_length", -1),
    ]


def front_options() -> list[tuple[str, int]]:
    """Settings of the server that clients reach: what strangers may hold open, and for how long."""
    return [
        ("grpc.max_receive_message_length", 2 * MAX_CLIENT_MESSAGE_BYTES),  # check_size has the limit
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", 1024),  # calls in flight on one connection
        ("grpc.max_connection_idle_ms", 600_000),
        ("grpc.max_connection_age_ms", 3_600_000),  # then a client connects anew: certificates are looked at again
        ("grpc.max_connection_age_grace_ms", 3_600_000),  # for calls that are under way then
        ("grpc.keepalive_permit_without_calls", 1),  # else the next holds during calls alone, and two hours otherwise
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # more often, and the connection is closed
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.keepalive_time_ms", 60_000),  # a client that is gone without a word is noticed
        ("grpc.keepalive_timeout_ms", 20_000),
    ]


def relay_options() -> list[tuple[str, int]]:
    """Settings of both ends between a gateway and a worker: a client's messages with what was answered already, and a
    hung peer is noticed.
    """
    return [
        ("grpc.max_receive_message_length", 2 * MAX_CLIENT_MESSAGE_BYTES),
        ("grpc.max_send_message_length", -1),
        *_KEEPALIVE,
        *_RECONNECT,
    ]


def frame_options() -> list[tuple[str, int]]:
    """Settings of both ends of the data plane."""
    return [
        ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
        ("grpc.max_send_message_length", MAX_FRAME_BYTES),
        *_KEEPALIVE,
        *_RECONNECT,
    ]


def check_size(request: bytes) -> None:
    """Raises InvalidRequest for what is too large to be passed on: gRPC's own refusal says neither what nor why."""
    if len(request) > MAX_CLIENT_MESSAGE_BYTES:
        raise errors.InvalidRequest(
            f"the request has {len(request)} bytes, limit is {MAX_CLIENT_MESSAGE_BYTES}; send a shorter prompt "
            "(GetModelInfo says how many tokens fit)"
        )


def parse(message_class: type[MessageT], data: bytes) -> MessageT:
    """The request in `data`.

    Raises InvalidRequest when it is not a valid message of the class (truncated, or text that is not UTF-8), and when
    it has fields that this version does not know: what a client asks for is not dropped in silence.
    """
    try:
        message = message_class.FromString(data)
    except DecodeError as error:
        raise errors.InvalidRequest(
            f"the request is not a valid {message_class.DESCRIPTOR.full_name} ({len(data)} bytes): {error}; "
            "strings must be UTF-8"
        ) from error
    _refuse_unknown_fields(message, message_class.DESCRIPTOR.name)
    return message


def _refuse_unknown_fields(message: Message, path: str) -> None:
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise errors.InvalidRequest(
            f"{path} has no field number {unknown[0].field_number} in this version; see the server's reflection",
            field=path,
        )
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else (value,):
                _refuse_unknown_fields(part, f"{path}.{field.name}")


UnaryMethod = Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]
Responses = AsyncGenerator[bytes, None]
StreamMethod = Callable[[bytes, grpc.aio.ServicerContext], Responses]


def unary_handler(method: UnaryMethod) -> grpc.RpcMethodHandler:
    """A unary method over raw bytes whose exceptions become statuses."""

    async def handle(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            return await method(request, context)
        except errors.MobulaError as error:
            await context.abort_with_status(errors.to_status(error))
        except (grpc.aio.AbortError, grpc.aio.BaseError):
            raise
        except Exception:  # the top of a handler's stack: whatever is left is our fault
            error_id = secrets.token_hex(6)
            logger.exception("internal error %s from %s", error_id, context.peer())
            await context.abort_with_status(errors.to_status(_internal(error_id)))
        raise AssertionError("abort returns never")

    return grpc.unary_unary_rpc_method_handler(handle)


def stream_handler(
    method: StreamMethod,
    *,
    read_timeout_s: float | None = READ_TIMEOUT_S,
    on_cut_off: Callable[[], None] = lambda: None,
) -> grpc.RpcMethodHandler:
    """A server-streaming method over raw bytes whose exceptions become statuses.

    read_timeout_s: for the client to make room for a message; None: as long as it likes. Then `method`'s `yield` raises
    ClientTooSlow, so that what it holds is free, `on_cut_off` is called, and the client is told, should it read on.
    """

    async def handle(request: bytes, context: grpc.aio.ServicerContext) -> None:
        try:
            async with aclosing(method(request, context)) as responses:
                async for response in responses:
                    try:
                        await _write(context, response, read_timeout_s)
                    except errors.ClientTooSlow as error:
                        await responses.athrow(error)
                        raise
        except errors.MobulaError as error:
            if isinstance(error, errors.ClientTooSlow):
                on_cut_off()
            await context.abort_with_status(errors.to_status(error))
        except (grpc.aio.AbortError, grpc.aio.BaseError):
            raise
        except Exception:  # as above
            error_id = secrets.token_hex(6)
            logger.exception("internal error %s from %s", error_id, context.peer())
            await context.abort_with_status(errors.to_status(_internal(error_id)))

    return grpc.unary_stream_rpc_method_handler(handle)


def is_client_gone() -> bool:
    """Whether the running handler's call was cancelled, rather than a call of the handler's own.

    Such a one is cancelled when its channel is closed. A handler that ends so, its own call going on, would leave the
    client without any status.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


async def _write(context: grpc.aio.ServicerContext, response: bytes, timeout_s: float | None) -> None:
    """Returns when the transport, which holds so many bytes at most, has taken it. Raises ClientTooSlow."""
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(response)
    except TimeoutError as error:
        raise errors.ClientTooSlow(f"nothing was read for {timeout_s:g} s; read the answer while it comes") from error


def _internal(error_id: str) -> errors.InternalError:
    return errors.InternalError(f"internal error; find {error_id} in the server's log")
