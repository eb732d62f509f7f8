"""One Generate call at the gateway: begun on a worker, and gone on with on another one when that is lost.

1. The request goes to a worker as the client sent it, with a seed and an id for one that has none.
2. Answers are passed on as raw bytes; the token ids in them are kept, for they are all that the client has: text is a
   function of the tokens.
3. A worker that is lost or silent, or stops before the answer ends, costs a pause: another one is sent the request and
   those tokens, computes them again and goes on after them. An answer that has begun waits for a worker.
4. Whatever else ends a worker's call ends the client's call alike.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

import grpc
import grpc.aio

from cluster.gateway.metrics import GatewayMetrics, ResumeReason
from cluster.gateway.relay import error_reason, forwarded, was_answered
from cluster.gateway.request_cost import RequestCost
from cluster.gateway.worker_pool import WorkerChannel, WorkerPool
from protos import errors, generation_pb2, rpc, worker_pb2
from protos.tracing import NO_SPAN, Span

logger = logging.getLogger(__name__)

MAX_LOSSES = 3  # workers that a request may lose: it may be what they die of
MAX_SILENCES = 5  # workers that a request leaves because they are silent; then it waits for the next one's word
RETRY_S = 0.1  # between two looks for a worker


class Generation:
    """Used once, from the event loop."""

    def __init__(
        self,
        request: bytes,
        pool: WorkerPool,
        metrics: GatewayMetrics,
        resume_timeout_s: float,
        cost: RequestCost,
        mean_tokens: float,
        span: Span = NO_SPAN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """request: a GenerateRequest. cost: what it is expected to cost; mean_tokens: what requests cost on average.

        clock: seconds.
        """
        self._relayed = worker_pb2.RelayedRequest(
            request=request, request_id=secrets.token_hex(8), seed=secrets.randbits(64)
        )
        self._pool = pool
        self._metrics = metrics
        self._resume_timeout_s = resume_timeout_s
        self._cost = cost
        self._mean_tokens = mean_tokens
        self._span = span
        self.usage: generation_pb2.Usage | None = None  # once it has ended well
        self._clock = clock
        self._has_begun = False  # the client has had an answer
        self._has_ended = False  # the client has had the last answer, or the worker has no more
        self._num_losses = 0
        self._num_silences = 0
        # When its worker was lost or silent; None while it has one that answers, and before the first.
        self._lost_s: float | None = None

    async def answers(self, context: grpc.aio.ServicerContext) -> rpc.Responses:
        """GenerateResponses, to the last one.

        Raises Unavailable when no worker can be had, and the AioRpcError with which a worker ended the call.
        """
        tried: list[WorkerChannel] = []
        while not self._has_ended:
            worker = await self._next_worker(tried)
            tried.append(worker)
            with worker.occupied(self._cost) as occupancy:
                if await worker.connect():
                    async for response in self._answers_of(worker, context):
                        occupancy.begin()
                        tried = [worker]
                        yield response

    async def _answers_of(self, worker: WorkerChannel, context: grpc.aio.ServicerContext) -> rpc.Responses:
        """What the worker answers, until it is lost. Raises as `answers`."""
        self._span.note("mobula.request_id", self._relayed.request_id)
        self._span.note("mobula.dp_rank", worker.dp_rank)
        metadata = self._span.passed_on(forwarded(context))
        call = worker.generate()(self._relayed.SerializeToString(), timeout=context.time_remaining(), metadata=metadata)
        if self._num_silences < MAX_SILENCES:  # else it stays where it is
            worker.calls.add(call)
        try:
            async for response in call:
                self._note(response)
                yield response
        except grpc.aio.AioRpcError as error:
            reason = self._reason_to_go_on(error)
            if reason is None:
                raise
            self._lose(worker, reason, error.details())
        except asyncio.CancelledError:
            if rpc.is_client_gone():
                raise
            if worker.is_silent:
                self._lose(worker, ResumeReason.SILENT, "nothing comes through its connection")
            else:
                self._lose(worker, ResumeReason.LOST, "its connection was closed")
        else:
            self._has_ended = True
        finally:
            worker.calls.discard(call)
            call.cancel()

    def _note(self, response: bytes) -> None:
        message = generation_pb2.GenerateResponse.FromString(response)
        self._relayed.output_token_ids.extend(message.token_ids)
        self._has_begun = True
        self._has_ended = message.HasField("finish_reason")
        self.usage = message.usage if self._has_ended else None
        if message.HasField("usage"):
            self._relayed.num_dropped_assignments = message.usage.num_dropped_assignments
            self._relayed.num_degraded_steps = message.usage.num_degraded_steps
        if self._lost_s is not None:
            self._metrics.observe_pause(self._clock() - self._lost_s)
            self._lost_s = None

    def _reason_to_go_on(self, error: grpc.aio.AioRpcError) -> ResumeReason | None:
        """Why another worker should go on after this one has ended the call so; None if it should not."""
        code = error.code()
        if code is grpc.StatusCode.UNAVAILABLE and not was_answered(error):
            return ResumeReason.LOST
        if code is grpc.StatusCode.UNAVAILABLE and error_reason(error) == errors.WorkerStopping.reason:
            return ResumeReason.STOPPING
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and self._has_begun:
            return ResumeReason.REFUSED
        return None

    def _lose(self, worker: WorkerChannel, reason: ResumeReason, detail: str | None) -> None:
        """Raises Unavailable for a request that has lost too many."""
        if self._has_ended:
            return
        if self._has_begun:
            self._metrics.count_resume(reason)
        if self._has_begun or reason is ResumeReason.SILENT:  # which may be heard again
            self._lost_s = self._clock() if self._lost_s is None else self._lost_s
        logger.warning(
            "request %s: worker %d at %s is gone (%s) after %d tokens, trying another: %s",
            self._relayed.request_id,
            worker.dp_rank,
            worker.address,
            reason,
            len(self._relayed.output_token_ids),
            detail,
            extra={"request_id": self._relayed.request_id},
        )
        self._num_losses += reason is ResumeReason.LOST
        self._num_silences += reason is ResumeReason.SILENT
        if self._num_losses >= MAX_LOSSES:
            raise errors.Unavailable(
                f"{self._num_losses} attention workers were lost while they computed this request; it is not tried "
                "again, for it may be the cause"
            )

    async def _next_worker(self, tried: list[WorkerChannel]) -> WorkerChannel:
        """One that was not tried; an answer that has begun, or whose worker was silent, waits for one.

        Raises Unavailable when there is none.
        """
        while True:
            try:
                return self._pool.choose(tried, self._mean_tokens)
            except errors.Unavailable:
                is_late = self._lost_s is None or self._clock() - self._lost_s >= self._resume_timeout_s
                if is_late or self._pool.is_closed:
                    raise
            await asyncio.sleep(RETRY_S)
            tried.clear()
