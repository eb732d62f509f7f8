"""Stands before every method of a server and refuses calls before their handlers run: a check that raises MobulaError
ends the call with its status. Streams are checked again while they last, so that what is revoked ends. Refusals are
logged, a few in a second at most: who knocks without rest cannot fill the disk. Knows nothing of what is checked.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

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
                with self._watch(method, context):
                    return await behaviour(request, context)
            except Refused as refused:
                await self._refuse(method, context, refused)

        async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                with self._watch(method, context) as watch:
                    async with aclosing(behaviour(request, context)) as answers:
                        async for answer in answers:
                            watch.is_in_handler = False
                            yield answer
                            watch.is_in_handler = True
                            watch.raise_if_failed()
            except Refused as refused:
                await self._refuse(method, context, refused)

        return stream if inspect.isasyncgenfunction(behaviour) else call

    def _watch(self, method: str, context: grpc.aio.ServicerContext) -> "_Watch":
        return _Watch(lambda: self._check(method, context), self._recheck_s)

    async def _refuse(self, method: str, context: grpc.aio.ServicerContext, refused: "Refused") -> None:
        self._log.refused(method, context.peer(), refused.error)
        await context.abort_with_status(to_status(refused.error))


class Refused(Exception):
    """A check failed, at first or later."""

    def __init__(self, error: MobulaError) -> None:
        super().__init__(str(error))
        self.error = error


class _Watch:
    """Around one call's handler: checks before it and while it runs, and cancels it when a check fails.

    is_in_handler: else gRPC is writing an answer of it, and a cancellation would leave the client without a status.
    """

    def __init__(self, check: Callable[[], None], recheck_s: float) -> None:
        self._check = check
        self._recheck_s = recheck_s
        self._failure: MobulaError | None = None
        self.is_in_handler = True

    def __enter__(self) -> Self:
        """Raises Refused."""
        self._task = asyncio.current_task()
        self._look()
        self.raise_if_failed()
        self._timer = asyncio.get_running_loop().call_later(self._recheck_s, self._look_again)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises Refused in the place of the cancellation that was ours."""
        self._timer.cancel()
        assert self._task
        if kind is asyncio.CancelledError and self._failure and self._task.uncancel() == 0:
            raise Refused(self._failure) from None

    def raise_if_failed(self) -> None:
        """Raises Refused."""
        if self._failure:
            raise Refused(self._failure)

    def _look(self) -> None:
        try:
            self._check()
        except MobulaError as error:
            self._failure = error

    def _look_again(self) -> None:
        self._look()
        assert self._task
        if self._failure and self.is_in_handler:
            self._task.cancel()
        else:
            self._timer = asyncio.get_running_loop().call_later(self._recheck_s, self._look_again)


class RefusalLog:
    """Logs refusals, and how many it left out."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._second = 0
        self._num_logged = 0
        self._num_left_out = 0

    def refused(self, method: str, peer: str, error: Exception) -> None:
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
