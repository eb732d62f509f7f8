"""Stands before every method of a server and refuses calls before their handlers run: a check that raises MobulaError
ends the call with its status. Refusals are logged, a few in a second at most: who knocks without rest cannot fill the
disk. Knows nothing of what is checked.
"""

import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from protos.errors import MobulaError, to_status

logger = logging.getLogger(__name__)

HEALTH_PREFIX = "/grpc.health.v1.Health/"
MAX_LOGGED_PER_S = 10

Check = Callable[[str, grpc.aio.ServicerContext], None]
Behaviour = Callable[..., Any]
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Runs `check(method, context)` before each call; a method is "/package.Service/Method"."""

    def __init__(self, check: Check, clock: Callable[[], float] = time.monotonic) -> None:
        self._check = check
        self._log = RefusalLog(clock)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        method = str(handler_call_details.method)
        guarded = {kind: self._guarded(method, getattr(handler, kind)) for kind in _KINDS if getattr(handler, kind)}
        return handler._replace(**guarded)

    def _guarded(self, method: str, behaviour: Behaviour) -> Behaviour:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            await self._admit(method, context)
            return await behaviour(request, context)

        async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            await self._admit(method, context)
            async with aclosing(behaviour(request, context)) as answers:
                async for answer in answers:
                    yield answer

        return stream if inspect.isasyncgenfunction(behaviour) else call

    async def _admit(self, method: str, context: grpc.aio.ServicerContext) -> None:
        try:
            self._check(method, context)
        except MobulaError as error:
            self._log.refused(method, context.peer(), error)
            await context.abort_with_status(to_status(error))


class RefusalLog:
    """Logs refusals, and how many it left out."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._second = 0
        self._num_logged = 0
        self._num_left_out = 0

    def refused(self, method: str, peer: str, error: MobulaError) -> None:
        second = int(self._clock())
        if second != self._second:
            if self._num_left_out:
                logger.warning("%d more calls were refused", self._num_left_out)
            self._second, self._num_logged, self._num_left_out = second, 0, 0
        if self._num_logged >= MAX_LOGGED_PER_S:
            self._num_left_out += 1
            return
        self._num_logged += 1
        logger.warning("refused %s from %s: %s", method, peer, error)
