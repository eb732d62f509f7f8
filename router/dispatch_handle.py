"""One layer's rows on their way to the shards and back.

The engine thread owns a handle, and is told the ends of its calls while it waits, for this layer or for another one.
A forward is a pure function of its rows, so whatever fails is sent again, to the same shard or to another replica,
under the newest placement, until the layer's time is up.

A handle's life:
1. `start` plans under one placement and sends a message to each shard; it does not wait.
2. `wait` takes answers in order of arrival; they stay where they are, in the shard's answer.
3. A message that fails is planned again after a short wait, for its own partial sums only. Only if the units themselves
   have changed does the whole layer start again.
4. When nothing is missing `wait` adds the partial sums, in an order that does not depend on any of this.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protos import expert_pb2
from protos.codec import PayloadReader, dtype_from_wire, dtype_to_wire
from protos.errors import (
    InternalError,
    MobulaError,
    QueueFull,
    ShardUnavailable,
    StalePlacement,
    Unavailable,
    from_code,
)
from router.compiled import native
from router.completions import Bytes, Completions, ForwardAnswer, ForwardCall, Outcome
from router.expert_map import ExpertMap, Int64Array
from router.metrics import RouterMetrics
from router.plan import DispatchPlan, PartialSums, ShardMessage, plan_again
from router.plan_kernels import plan_layer, sum_partials
from router.replicas import choose_replicas, usable_replicas
from router.router_config import RouterConfig
from router.shard_queues import ShardQueues
from router.transport import ShardTransport

MIN_RETRY_WAIT_S = 0.005  # the first retry goes out at once, the second after about this time
MAX_RETRY_WAIT_S = 0.1
DOWN_POLL_S = 0.01  # how often a message looks whether its shard is back


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """A placement and the ways to its shards, replaced as a whole.

    transports: by ep_rank; None while the shard is known to be down.
    """

    expert_map: ExpertMap
    transports: tuple[ShardTransport | None, ...]

    def down(self) -> list[int]:
        """The shards that cannot be reached now."""
        return [
            ep_rank
            for ep_rank, transport in enumerate(self.transports)
            if transport is None or not transport.is_connected
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInput:
    """What a layer's routed experts are given, on the CPU; see Router.dispatch."""

    layer_id: int
    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HandleContext:
    """What handles share with their router.

    routing: the newest placement. turns: numbers that go round, to use replicas in turn. handles_by_version: how many
        handles were planned under each placement version; the engine thread writes, any thread reads.
    """

    config: RouterConfig
    metrics: RouterMetrics
    completions: Completions
    routing: Callable[[], Routing]
    sequence_numbers: Iterator[int]
    turns: Iterator[int]
    handles_by_version: dict[int, int]
    queues: ShardQueues


@dataclass(slots=True, kw_only=True, eq=False)
class _Attempt:
    """A message on its way to a shard as `call`, or waiting to be sent again at `resend_at_s`."""

    message: ShardMessage
    number: int
    address: str
    give_up_at_s: float
    call: ForwardCall | None = None
    resend_at_s: float = 0.0
    reason: str = ""
    failure: str = ""


class DispatchHandle:
    """Returned by Router.dispatch, taken by Router.combine, once."""

    def __init__(self, layer: LayerInput, context: HandleContext, device: torch.device) -> None:
        self.device = device
        self.started_s = time.monotonic()
        self.is_combined = False
        self._layer = layer
        self._context = context
        self._deadline_s = self.started_s + context.config.forward_timeout_s
        self._hidden_bytes: Bytes = layer.hidden_states.view(torch.uint8).numpy()  # numpy knows no bfloat16
        self._in_flight: set[_Attempt] = set()
        self._failed: list[_Attempt] = []
        self._error: MobulaError | None = None
        self._version: int | None = None
        self._expert_to_unit: Int64Array
        self._plan: DispatchPlan
        self._answers: list[tuple[PartialSums, ForwardAnswer]] = []

    @property
    def plan(self) -> DispatchPlan:
        """Of the newest start."""
        return self._plan

    def start(self) -> None:
        """Plans under the newest placement and sends every message. Also starts again from the beginning."""
        self.abandon()
        routing = self._context.routing()
        self._hold_version(routing.expert_map.placement_version)
        row = routing.expert_map.row(self._layer.layer_id)
        self._expert_to_unit = routing.expert_map.expert_to_unit[row]
        layer, ep_size = self._layer, routing.expert_map.ep_size
        unit_to_ep_ranks, queues = routing.expert_map.unit_to_ep_ranks[row], None
        if routing.expert_map.max_replicas > 1:
            unit_to_ep_ranks = self._candidates(unit_to_ep_ranks, routing)
            queues = self._context.queues.expected(ep_size)
        self._plan = plan_layer(
            layer.topk_ids, layer.topk_weights, self._expert_to_unit, unit_to_ep_ranks, ep_size, queues
        )
        for message in self._plan.messages:
            self._send(message, routing, number=1)

    def wait(self) -> Tensor:
        """The sum of each row's partial sums, [num_tokens, hidden_size] fp32.

        Raises ShardUnavailable when forward_timeout_s have passed, InternalError when a shard finds fault with the
        message itself.
        """
        try:
            while self._error is None and (self._in_flight or self._failed):
                self._resend_due()
                self._context.completions.wait(self._next_due_s())
                self._give_up_overdue()
            if self._error is not None:
                raise self._error
            return sum_partials(self._plan, [sums for sums, _ in self._answers], self._layer.hidden_states.shape[1])
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Gives up whatever is outstanding, and what was answered."""
        for attempt in self._in_flight:
            self._give_up(attempt)
        self._in_flight.clear()
        self._failed.clear()
        for _, answer in self._answers:
            answer.release()
        self._answers.clear()
        self._hold_version(None)

    def _hold_version(self, version: int | None) -> None:
        """Says under which version this handle has forwards under way."""
        held, self._version = self._version, version
        counts = self._context.handles_by_version
        if version is not None:
            counts[version] = counts.get(version, 0) + 1
        if held is not None:
            counts[held] -= 1
            if not counts[held]:
                del counts[held]

    def _candidates(self, unit_to_ep_ranks: Int64Array, routing: Routing) -> Int64Array:
        """The replicas that may be asked; one of each unit where the plan does not choose itself."""
        if native() is None:
            return choose_replicas(unit_to_ep_ranks, next(self._context.turns), self._avoid(routing))[:, None]
        return usable_replicas(unit_to_ep_ranks, self._avoid(routing))

    @staticmethod
    def _avoid(routing: Routing) -> list[int]:
        return routing.down() if routing.expert_map.max_replicas > 1 else []

    def _send(self, message: ShardMessage, routing: Routing, number: int) -> None:
        transport = routing.transports[message.ep_rank]
        attempt = _Attempt(
            message=message,
            number=number,
            address=transport.address if transport is not None else "no address",
            give_up_at_s=min(time.monotonic() + self._context.config.attempt_timeout_s, self._deadline_s),
        )
        if transport is None:
            self._retry(attempt, ShardUnavailable.reason.lower(), f"shard {message.ep_rank} is down")
            return
        self._in_flight.add(attempt)
        self._context.queues.sent(message.ep_rank, message.num_assignments)
        attempt.call = call = self._call(attempt, routing.expert_map.placement_version)
        transport.forward(call)
        self._context.metrics.count_sent(message.ep_rank, message.num_rows, call.sent_bytes, call.carrier)

    def _call(self, attempt: _Attempt, placement_version: int) -> ForwardCall:
        message = attempt.message
        hidden_states = self._layer.hidden_states
        sequence_number = next(self._context.sequence_numbers)
        header = expert_pb2.ForwardHeader(
            sequence_number=sequence_number,
            layer_id=self._layer.layer_id,
            placement_version=placement_version,
            num_rows=message.num_rows,
            num_assignments=message.num_assignments,
            num_partial_sums=message.num_partial_sums,
            dtype=dtype_to_wire(hidden_states.dtype),
        )
        is_every_row = message.num_rows == len(hidden_states)  # ascending and distinct, so in place already
        return ForwardCall(
            sequence_number=sequence_number,
            header=header.SerializeToString(),
            hidden_states=self._hidden_bytes,
            row_ids=None if is_every_row else message.row_ids,
            assignments=message.assignments,
            answer_bytes=message.num_partial_sums * hidden_states.shape[1] * hidden_states.itemsize,
            completions=self._context.completions,
            tell=lambda outcome: self._finish(attempt, outcome),
        )

    def _give_up(self, attempt: _Attempt) -> None:
        self._context.queues.ended(attempt.message.ep_rank, attempt.message.num_assignments)
        if attempt.call is not None:
            attempt.call.is_given_up = True

    def _next_due_s(self) -> float:
        """Seconds until the time of something comes."""
        times = [attempt.give_up_at_s for attempt in self._in_flight]
        times += [attempt.resend_at_s for attempt in self._failed]
        return max(0.0, min(times, default=0.0) - time.monotonic())

    def _finish(self, attempt: _Attempt, outcome: Outcome) -> None:
        """The end of a call; raises nothing, for the engine thread may be waiting for another layer."""
        if attempt not in self._in_flight:  # given up
            if isinstance(outcome, ForwardAnswer):
                outcome.release()
            return
        self._in_flight.remove(attempt)
        self._context.queues.ended(attempt.message.ep_rank, attempt.message.num_assignments)
        try:
            if isinstance(outcome, MobulaError):
                raise outcome
            self._answers.append((self._partial_sums(attempt, outcome), outcome))
        except (Unavailable, StalePlacement, QueueFull) as error:
            self._retry(attempt, error.reason.lower(), str(error))
        except MobulaError as error:
            self._error = InternalError(
                f"expert shard {attempt.message.ep_rank} at {attempt.address} and this worker disagree about a forward "
                f"of layer {self._layer.layer_id}: {error}"
            )
            self._error.__cause__ = error

    def _partial_sums(self, attempt: _Attempt, answer: ForwardAnswer) -> PartialSums:
        """What an answer has, in place. Raises the error that it carries; it is released then."""
        message, header = attempt.message, answer.header
        dtype = self._layer.hidden_states.dtype
        try:
            if header.HasField("error"):
                raise from_code(header.error.code, header.error.message)
            if header.num_partial_sums != message.num_partial_sums or dtype_from_wire(header.dtype) != dtype:
                raise InternalError(
                    f"the answer has {header.num_partial_sums} partial sums of dtype {header.dtype}, expected "
                    f"{message.num_partial_sums} of {dtype}"
                )
            reader = PayloadReader(answer.payload)
            values = reader.take((message.num_partial_sums, self._layer.hidden_states.shape[1]), dtype)
            reader.finish()
        except MobulaError:
            answer.release()
            raise
        num_bytes = header.ByteSize() + answer.payload.nbytes
        assert attempt.call
        self._context.metrics.count_received(message.ep_rank, num_bytes, attempt.call.carrier)
        timing = header.timing
        self._context.queues.answered(
            message.ep_rank, message.num_assignments, timing.queue_ns / 1e9, timing.compute_ns / 1e9
        )
        return PartialSums(message.partial_sums, values)

    def _retry(self, attempt: _Attempt, reason: str, failure: str) -> None:
        """Sends the attempt's message again soon."""
        wait_s = 0.0 if attempt.number == 1 else min(MIN_RETRY_WAIT_S * 2 ** min(attempt.number, 10), MAX_RETRY_WAIT_S)
        attempt.reason = reason
        attempt.failure = failure
        self._put_off(attempt, wait_s * random.uniform(0.5, 1.0))

    def _put_off(self, attempt: _Attempt, wait_s: float) -> None:
        attempt.resend_at_s = min(time.monotonic() + wait_s, self._deadline_s)
        self._failed.append(attempt)

    def _resend_due(self) -> None:
        if not self._failed:
            return
        now_s = time.monotonic()
        due = [attempt for attempt in self._failed if attempt.resend_at_s <= now_s]
        if not due:
            return
        routing = self._context.routing()
        row = routing.expert_map.row(self._layer.layer_id)
        if not np.array_equal(routing.expert_map.expert_to_unit[row], self._expert_to_unit):
            self.start()
            return
        self._failed = [attempt for attempt in self._failed if attempt.resend_at_s > now_s]
        for attempt in due:
            if now_s >= self._deadline_s:
                raise self._out_of_time(attempt)
            avoid = {*self._avoid(routing), attempt.message.ep_rank}
            ep_ranks = choose_replicas(routing.expert_map.unit_to_ep_ranks[row], next(self._context.turns), avoid)
            messages = plan_again(attempt.message, self._expert_to_unit, ep_ranks)
            if not {message.ep_rank for message in messages}.isdisjoint(routing.down()):
                self._put_off(attempt, DOWN_POLL_S)
                continue
            for message in messages:
                self._context.metrics.count_retry(attempt.reason)
                self._send(message, routing, attempt.number + 1)

    def _give_up_overdue(self) -> None:
        """Attempts that have taken too long are given up; a late answer is ignored."""
        now_s = time.monotonic()
        for attempt in [attempt for attempt in self._in_flight if attempt.give_up_at_s <= now_s]:
            self._in_flight.remove(attempt)
            self._give_up(attempt)
            if now_s >= self._deadline_s:
                raise self._out_of_time(attempt)
            self._retry(attempt, "timeout", f"no answer within {self._context.config.attempt_timeout_s} s")

    def _out_of_time(self, attempt: _Attempt) -> ShardUnavailable:
        return ShardUnavailable(
            f"expert shard {attempt.message.ep_rank} at {attempt.address} did not answer for layer "
            f"{self._layer.layer_id} within forward_timeout_s = {self._context.config.forward_timeout_s} s "
            f"({attempt.number} attempts{', the last failure: ' + attempt.failure if attempt.failure else ''}); "
            "retry when the shard is back",
            retry_after_s=1.0,
        )


def sequence_numbers() -> Iterator[int]:
    """Unique within a worker, hence within each of its streams; 0 means unset on the wire."""
    return itertools.count(1)
