"""One layer's rows on their way to the shards and back.

The engine thread owns a handle; transports complete futures from other threads, which reach it through a queue.
A forward is a pure function of its rows, so whatever fails is sent again, to the same shard or to another replica,
under the newest placement, until the layer's time is up.

A handle's life:
1. `start` plans under one placement and sends a message to each shard; it does not wait.
2. `wait` takes answers in order of arrival and puts their partial sums in place.
3. A message that fails is planned again after a short wait, for its own partial sums only. Only if the units themselves
   have changed does the whole layer start again.
4. When nothing is missing `wait` adds the partial sums, in an order that does not depend on any of this.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from protos import expert_pb2
from protos.codec import PayloadReader, decode_frame, dtype_from_wire, dtype_to_wire, encode_frame
from protos.errors import (
    InternalError,
    MobulaError,
    QueueFull,
    ShardUnavailable,
    StalePlacement,
    Unavailable,
    from_code,
)
from router.expert_map import ExpertMap, Int64Array
from router.metrics import RouterMetrics
from router.plan import DispatchPlan, ShardMessage, plan_dispatch, plan_messages, sort_assignments, sum_partials
from router.replicas import choose_replicas
from router.transport import ShardTransport

MIN_RETRY_WAIT_S = 0.005  # the first retry goes out at once, the second after about this time
MAX_RETRY_WAIT_S = 0.1
DOWN_POLL_S = 0.01  # how often a message looks whether its shard is back


class RouterConfig(BaseModel, frozen=True, strict=True, extra="forbid"):
    """How long the router waits for shards."""

    forward_timeout_s: Annotated[float, Field(gt=0)] = 120.0  # per layer, retries included; covers a shard's restart
    attempt_timeout_s: Annotated[float, Field(gt=0)] = 20.0  # without an answer for so long, ask again or elsewhere


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

    routing: the newest placement. turns: numbers that go round, to use replicas in turn.
    """

    config: RouterConfig
    metrics: RouterMetrics
    routing: Callable[[], Routing]
    sequence_numbers: Iterator[int]
    turns: Iterator[int]


@dataclass(slots=True, kw_only=True, eq=False)
class _Call:
    """A message on its way to a shard, or waiting to be sent again at `resend_at_s`."""

    message: ShardMessage
    attempt: int
    address: str
    give_up_at_s: float
    future: Future[bytes]
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
        self._done: SimpleQueue[_Call] = SimpleQueue()
        self._in_flight: set[_Call] = set()
        self._failed: list[_Call] = []
        self._expert_to_unit: Int64Array
        self._plan: DispatchPlan
        self._partial_sums: Tensor

    @property
    def plan(self) -> DispatchPlan:
        """Of the newest start."""
        return self._plan

    def start(self) -> None:
        """Plans under the newest placement and sends every message. Also starts again from the beginning."""
        self.abandon()
        routing = self._context.routing()
        row = routing.expert_map.row(self._layer.layer_id)
        self._expert_to_unit = routing.expert_map.expert_to_unit[row]
        assignments = sort_assignments(self._layer.topk_ids, self._layer.topk_weights, self._expert_to_unit)
        ep_ranks = choose_replicas(
            routing.expert_map.unit_to_ep_ranks[row], next(self._context.turns), self._avoid(routing)
        )
        self._plan = plan_dispatch(len(self._layer.hidden_states), assignments, ep_ranks)
        hidden_states = self._layer.hidden_states
        self._partial_sums = hidden_states.new_empty((self._plan.num_partial_sums + 1, hidden_states.shape[1]))
        self._partial_sums[-1] = 0.0
        for message in self._plan.messages:
            self._send(message, routing, attempt=1)

    def wait(self) -> Tensor:
        """The sum of each row's partial sums, [num_tokens, hidden_size] fp32.

        Raises ShardUnavailable when forward_timeout_s have passed, InternalError when a shard finds fault with the
        message itself.
        """
        try:
            while self._in_flight or self._failed:
                self._resend_due()
                call = self._next_done()
                if call is not None:
                    self._finish(call)
                self._give_up_overdue()
        except MobulaError:
            self.abandon()
            raise
        return sum_partials(self._plan, self._partial_sums)

    def abandon(self) -> None:
        """Gives up whatever is outstanding."""
        for call in self._in_flight:
            call.future.cancel()
        self._in_flight.clear()
        self._failed.clear()

    @staticmethod
    def _avoid(routing: Routing) -> list[int]:
        return routing.down() if routing.expert_map.max_replicas > 1 else []

    def _send(self, message: ShardMessage, routing: Routing, attempt: int) -> None:
        transport = routing.transports[message.ep_rank]
        call = _Call(
            message=message,
            attempt=attempt,
            address=transport.address if transport is not None else "no address",
            give_up_at_s=min(time.monotonic() + self._context.config.attempt_timeout_s, self._deadline_s),
            future=Future(),
        )
        self._in_flight.add(call)
        if transport is None:
            call.future.set_exception(ShardUnavailable(f"shard {message.ep_rank} is down"))
        else:
            sequence_number = next(self._context.sequence_numbers)
            frame = _encode(message, self._layer, sequence_number, routing.expert_map.placement_version)
            self._context.metrics.count_sent(message.ep_rank, message.num_rows, len(frame))
            call.future = transport.forward(sequence_number, frame)
        call.future.add_done_callback(lambda _: self._done.put(call))

    def _next_done(self) -> _Call | None:
        """The next completed call, or None when the time of something else has come."""
        times = [call.give_up_at_s for call in self._in_flight] + [call.resend_at_s for call in self._failed]
        if not times:
            return None
        try:
            return self._done.get(timeout=max(0.0, min(times) - time.monotonic()))
        except Empty:
            return None

    def _finish(self, call: _Call) -> None:
        if call not in self._in_flight:  # given up
            return
        self._in_flight.remove(call)
        try:
            self._accept(call.message, call.future.result())
        except (Unavailable, StalePlacement, QueueFull) as error:
            self._retry(call, error.reason.lower(), str(error))
        except MobulaError as error:
            raise InternalError(
                f"expert shard {call.message.ep_rank} at {call.address} and this worker disagree about a forward of "
                f"layer {self._layer.layer_id}: {error}"
            ) from error

    def _accept(self, message: ShardMessage, frame: bytes) -> None:
        """Puts an answer's partial sums in place. Raises the error that it carries."""
        header, payload = decode_frame(expert_pb2.ForwardResult, frame)
        if header.HasField("error"):
            raise from_code(header.error.code, header.error.message)
        dtype = self._partial_sums.dtype
        if header.num_partial_sums != message.num_partial_sums or dtype_from_wire(header.dtype) != dtype:
            raise InternalError(
                f"the answer has {header.num_partial_sums} partial sums of dtype {header.dtype}, expected "
                f"{message.num_partial_sums} of {dtype}"
            )
        reader = PayloadReader(payload)
        answer = reader.take((message.num_partial_sums, self._partial_sums.shape[1]), dtype)
        self._partial_sums.index_copy_(0, torch.from_numpy(message.partial_sums), answer)
        reader.finish()
        self._context.metrics.count_received(message.ep_rank, len(frame))

    def _retry(self, call: _Call, reason: str, failure: str) -> None:
        """Sends the call's message again soon."""
        wait_s = 0.0 if call.attempt == 1 else min(MIN_RETRY_WAIT_S * 2 ** min(call.attempt, 10), MAX_RETRY_WAIT_S)
        call.reason = reason
        call.failure = failure
        self._put_off(call, wait_s * random.uniform(0.5, 1.0))

    def _put_off(self, call: _Call, wait_s: float) -> None:
        call.resend_at_s = min(time.monotonic() + wait_s, self._deadline_s)
        self._failed.append(call)

    def _resend_due(self) -> None:
        now_s = time.monotonic()
        due = [call for call in self._failed if call.resend_at_s <= now_s]
        if not due:
            return
        routing = self._context.routing()
        row = routing.expert_map.row(self._layer.layer_id)
        if not np.array_equal(routing.expert_map.expert_to_unit[row], self._expert_to_unit):
            self.start()
            return
        self._failed = [call for call in self._failed if call.resend_at_s > now_s]
        for call in due:
            if now_s >= self._deadline_s:
                raise self._out_of_time(call)
            avoid = {*self._avoid(routing), call.message.ep_rank}
            ep_ranks = choose_replicas(routing.expert_map.unit_to_ep_ranks[row], next(self._context.turns), avoid)
            messages = plan_messages(call.message.assignments, ep_ranks)
            if not {message.ep_rank for message in messages}.isdisjoint(routing.down()):
                self._put_off(call, DOWN_POLL_S)
                continue
            for message in messages:
                self._context.metrics.count_retry(call.reason)
                self._send(message, routing, call.attempt + 1)

    def _give_up_overdue(self) -> None:
        """Calls whose attempt has taken too long are given up; a late answer is ignored."""
        now_s = time.monotonic()
        for call in [call for call in self._in_flight if call.give_up_at_s <= now_s and not call.future.done()]:
            self._in_flight.remove(call)
            call.future.cancel()
            if now_s >= self._deadline_s:
                raise self._out_of_time(call)
            self._retry(call, "timeout", f"no answer within {self._context.config.attempt_timeout_s} s")

    def _out_of_time(self, call: _Call) -> ShardUnavailable:
        return ShardUnavailable(
            f"expert shard {call.message.ep_rank} at {call.address} did not answer for layer {self._layer.layer_id} "
            f"within forward_timeout_s = {self._context.config.forward_timeout_s} s ({call.attempt} attempts"
            f"{', the last failure: ' + call.failure if call.failure else ''}); retry when the shard is back",
            retry_after_s=1.0,
        )


def _encode(message: ShardMessage, layer: LayerInput, sequence_number: int, placement_version: int) -> bytes:
    """The ForwardRequest frame; see protos/expert.proto."""
    hidden_states = layer.hidden_states
    header = expert_pb2.ForwardHeader(
        sequence_number=sequence_number,
        layer_id=layer.layer_id,
        placement_version=placement_version,
        num_rows=message.num_rows,
        num_assignments=len(message.assignments),
        num_partial_sums=message.num_partial_sums,
        dtype=dtype_to_wire(hidden_states.dtype),
    )
    is_every_row = message.num_rows == len(hidden_states)  # ascending and distinct, so in place already
    return encode_frame(
        header,
        (
            hidden_states if is_every_row else hidden_states.index_select(0, torch.from_numpy(message.row_ids)),
            torch.from_numpy(message.assignments.weights),
            torch.from_numpy(message.local_rows),
            torch.from_numpy(message.assignments.expert_ids.astype(np.int32)),
            torch.from_numpy(message.local_partial_sums),
        ),
    )


def sequence_numbers() -> Iterator[int]:
    """Unique within a worker, hence within each of its streams; 0 means unset on the wire."""
    return itertools.count(1)
