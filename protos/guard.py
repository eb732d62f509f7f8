"""Stands before every method of a server and refuses calls before their handlers run: a check that raises MobulaError
ends the call with its status. Streams are checked again while they last, so that what is revoked ends. Refusals are
logged, a few in a second at most: who knocks without rest cannot fill the disk. Knows nothing of what is checked.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
import grpc.aio

from protos.errors import MobulaError, to_status

logger = logging.getLogger(__name__)

HEALTH_PREFIX = "/grpc.health.v1.Health/"
MAX_LOGGED_PER_S = 10
RECHECK_S = 30.0  # between two checks of a stream

Check = Callable[[str, grpc.aio.ServicerContext], None]
Behaviour = Callable[..., Any]
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Runs `check(method, context)` before each call; a method is "/package.Service/Method"."""

    def __init__(
        self, check: Check, *, recheck_s: float = RECHECK_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._check = check
        self._recheck_s = recheck_s
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
            try:
                with self._admitted(method, context):
                    return await behaviour(request, context)
            except Refused as refused:
                await self._refuse(method, context, refused)

        async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                with self._admitted(method, context):
                    async with aclosing(behaviour(request, context)) as answers:
                        async for answer in answers:
                            yield answer
            except Refused as refused:
                await self._refuse(method, context, refused)

        return stream if inspect.isasyncgenfunction(behaviour) else call

    @contextmanager
    def _admitted(self, method: str, context: grpc.aio.ServicerContext) -> Iterator[None]:
        """Around a call's handler, which is cancelled when a later check fails. Raises Refused."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task
        failure = self._failure(method, context)
        if failure:
            raise Refused(failure)
        timer: asyncio.TimerHandle

        def check_again() -> None:
            nonlocal failure, timer
            failure = self._failure(method, context)
            if failure:
                task.cancel()
            else:
                timer = loop.call_later(self._recheck_s, check_again)

        timer = loop.call_later(self._recheck_s, check_again)
        try:
            yield
        except asyncio.CancelledError:
            if failure is None or task.uncancel() > 0:  # the client's cancellation
                raise
            raise Refused(failure) from None
        finally:
            timer.cancel()

    def _failure(self, method: str, context: grpc.aio.ServicerContext) -> MobulaError | None:
        try:
            self._check(method, context)
        except MobulaError as error:
            return error
        return None

    async def _refuse(self, method: str, context: grpc.aio.ServicerContext, refused: "Refused") -> None:
        self._log.refused(method, context.peer(), refused.error)
        await context.abort_with_status(to_status(refused.error))


class Refused(Exception):
    """A check failed, at first or later."""

    def __init__(self, error: MobulaError) -> None:
        super().__init__(str(error))
        self.error = error


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
