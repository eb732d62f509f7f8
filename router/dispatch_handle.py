"""One layer's rows on their way to the shards and back.

The engine thread owns a handle, and is told the ends of its calls while it waits, for this layer or for another one.
A forward is a pure function of its rows, so whatever fails or is late is sent again, to the same shard or to another
replica, under the newest placement, until the layer's time is up. Answers that came twice have the same bits.

A handle's life:
1. `start` plans under one placement and sends a message to each shard; it does not wait.
2. `wait` takes answers in order of arrival; they stay where they are, in the shard's answer.
3. A message that fails is planned again after a short wait, for its own partial sums only. Only if the units themselves
   have changed does the whole layer start again.
4. A message that is late is sent to other replicas too, and the first answer counts.
5. When nothing is missing `wait` adds the partial sums, in an order that does not depend on any of this.
"""

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from protos.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    MobulaError,
    QueueFull,
    ShardUnavailable,
    StalePlacement,
    Unavailable,
    UnitQuarantined,
)
from router.attempt import Answer, Attempt, LayerInput, ShardTiming, forward_call, out_of_time, read_partial_sums
from router.completions import Bytes, ForwardAnswer, Outcome
from router.expert_map import Int64Array
from router.finite_check import confirmed_wrong, doubtful, is_finite, units_of
from router.handle_context import HandleContext
from router.missing_experts import BoolArray, LeftOut, leave_out, renormalised
from router.plan import DispatchPlan, ShardMessage, copy_for, plan_again
from router.plan_kernels import plan_layer, sum_partials
from router.router_config import MissingExperts
from router.routing import Routing
from router.step_limit import StepLimit

MIN_RETRY_WAIT_S = 0.005  # the first retry goes out at once, the second after about this time
MAX_RETRY_WAIT_S = 0.1
WANTED_POLL_S = 0.1  # how often a layer that waits asks whether anybody waits for it
DOWN_POLL_S = 0.01  # how often a message looks whether its shard is back


class DispatchHandle:
    """Returned by Router.dispatch, taken by Router.combine, once."""

    def __init__(self, layer: LayerInput, context: HandleContext, device: torch.device, limit: StepLimit) -> None:
        self.device = device
        self.started_s = context.clock()
        self.is_combined = False
        self.timings: list[ShardTiming] = []
        self._layer = layer
        self._context = context
        self._limit = limit
        self._deadline_s = min(self.started_s + context.config.forward_timeout_s, limit.deadline_s)
        self._in_flight: set[Attempt] = set()
        self._failed: list[Attempt] = []
        self._error: MobulaError | None = None
        self._version: int | None = None
        self._expert_to_unit: Int64Array
        self._plan: DispatchPlan
        self._answers: list[Answer] = []
        self._hidden_bytes: Bytes = layer.hidden_states.view(torch.uint8).numpy()  # numpy knows no bfloat16
        self._num_missing = 0  # partial sums of the plan
        self._is_missing: BoolArray | None = None  # each of them; kept only once something was asked for twice
        self._left_out: LeftOut | None = None

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
        candidates, queues = self._context.candidates.to_plan(routing, row)
        self._plan = plan_layer(layer.topk_ids, layer.topk_weights, self._expert_to_unit, candidates, ep_size, queues)
        self._num_missing = self._plan.num_partial_sums
        self._is_missing = None
        for message in self._plan.messages:
            self._send(message, routing, number=1)
        if routing.expert_map.max_replicas > 1:
            self._probe(routing, row)

    def wait(self) -> Tensor:
        """The sum of each row's partial sums, [num_tokens, hidden_size] fp32.

        Raises ShardUnavailable when forward_timeout_s have passed, DeadlineExceeded or Cancelled when nobody waits any
        more, InternalError when a shard finds fault with the message itself.
        """
        try:
            self._wait_while(lambda: self._num_missing > 0)
            sums = self._sum()
            if self._context.routing().expert_map.max_replicas == 1 or is_finite(sums):
                return sums
            self._ask_others_whether_finite()
            return self._sum()
        finally:
            self.abandon()

    def _wait_while(self, is_incomplete: Callable[[], bool]) -> None:
        while self._error is None and is_incomplete():
            self._resend_due()
            if not self._context.completions.wait(self._next_due_s()):
                self._look_at_due()
                self._do_without_if_allowed()
        if self._error is not None:
            raise self._error

    def _do_without_if_allowed(self) -> None:
        """Leaves out what is missing still, when everybody who waits would rather have it so."""
        config, limit = self._context.config, self._limit
        if config.missing_experts is MissingExperts.WAIT or not limit.allows_missing_experts or not self._num_missing:
            return
        if self._context.clock() < self.started_s + config.missing_after_s:
            return
        messages, like = [a.message for a in (*self._in_flight, *self._failed)], self._layer.hidden_states
        self._left_out = leave_out(messages, self._missing(), len(like), like)
        self._num_missing = 0
        self._context.metrics.count_missing(self._left_out.num_assignments)
        limit.on_missing_experts()

    def _missing(self) -> BoolArray:
        """Which partial sums are."""
        if self._is_missing is not None:
            return self._is_missing
        is_missing = np.ones(self._plan.num_partial_sums, dtype=np.bool_)
        for _, sums, _ in self._answers:
            is_missing[sums.partial_sums] = False
        return is_missing

    def _sum(self) -> Tensor:
        """Of answers that came twice the newest counts."""
        answers, layer, left_out = [sums for _, sums, _ in self._answers], self._layer, self._left_out
        if left_out is not None:
            answers.append(left_out.zeros)
        sums = sum_partials(self._plan, answers, layer.hidden_states.shape[1])
        if left_out is None or self._context.config.missing_experts is not MissingExperts.RENORMALISE:
            return sums
        return renormalised(sums, left_out, layer.topk_weights, layer.topk_ids)

    def _ask_others_whether_finite(self) -> None:
        """Has replicas compute what is not finite for rows that are; a shard that they prove wrong is not trusted."""
        self._failed.clear()  # nothing is missing
        doubts = [
            (attempt, partial_sums)
            for attempt, sums, _ in self._answers
            if len(partial_sums := doubtful(self._plan, sums, self._layer.hidden_states))
        ]
        for attempt, _ in doubts:
            self._send_to_others(attempt, "not_finite", is_check=True)
        self._wait_while(lambda: any(attempt.is_check for attempt in self._in_flight))
        checks = [sums for attempt, sums, _ in self._answers if attempt.is_check]
        for attempt, partial_sums in doubts:
            wrong = confirmed_wrong(partial_sums, checks)
            for unit_id in units_of(attempt.message, wrong, self._expert_to_unit):
                reason = "its sums are not finite where a replica's are"
                self._context.trust.distrust(attempt.ep_rank, self._layer.layer_id, unit_id, reason)

    def abandon(self) -> None:
        """Gives up whatever is outstanding, and what was answered."""
        for attempt in self._in_flight:
            self._give_up(attempt)
        self._in_flight.clear()
        self._failed.clear()
        for _, _, answer in self._answers:
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

    def _probe(self, routing: Routing, row: int) -> None:
        """Sends a quarantined shard a copy of some rows, when it is time, to see how punctual it is."""
        ep_rank = self._context.candidates.to_probe(routing)
        if ep_rank is None:
            return
        holds = (routing.expert_map.unit_to_ep_ranks[row] == ep_rank).any(axis=1)  # [num_units]
        message = copy_for(ep_rank, self._plan.messages, self._expert_to_unit, holds)
        if message is not None:
            self._send(message, routing, number=1, is_probe=True)

    def _send(
        self, message: ShardMessage, routing: Routing, number: int, *, is_probe: bool = False, is_check: bool = False
    ) -> None:
        transport, config, now_s = routing.transports[message.ep_rank], self._context.config, self._context.clock()
        attempt = Attempt(
            message=message,
            number=number,
            transport=transport,
            sent_s=now_s,
            late_at_s=now_s + config.late_after_s,
            give_up_at_s=min(now_s + config.attempt_timeout_s, self._deadline_s),
            is_probe=is_probe,
            is_check=is_check,
        )
        if transport is None:
            self._retry(attempt, ShardUnavailable.reason.lower(), f"shard {message.ep_rank} is down")
            return
        self._in_flight.add(attempt)
        self._context.queues.sent(message.ep_rank, message.num_assignments)
        attempt.call = call = forward_call(
            message,
            self._layer,
            self._hidden_bytes,
            sequence_number=next(self._context.sequence_numbers),
            timeout_s=attempt.give_up_at_s - now_s,
            placement_version=routing.expert_map.placement_version,
            completions=self._context.completions,
            tell=lambda outcome: self._finish(attempt, outcome),
        )
        transport.forward(call)
        self._context.metrics.count_sent(message.ep_rank, message.num_rows, call.sent_bytes, call.carrier)

    def _give_up(self, attempt: Attempt) -> None:
        self._context.queues.ended(attempt.ep_rank, attempt.message.num_assignments)
        if attempt.call is not None:
            attempt.call.is_given_up = True
            if attempt.transport is not None and not attempt.is_probe:
                attempt.transport.cancel(attempt.call)

    def _next_due_s(self) -> float:
        """Seconds until the time of something comes, or until it is time to ask whether anybody waits."""
        times = [attempt.due_at_s for attempt in self._in_flight]
        times += [attempt.resend_at_s for attempt in self._failed]
        return min(WANTED_POLL_S, max(0.0, min(times, default=0.0) - self._context.clock()))

    def _finish(self, attempt: Attempt, outcome: Outcome) -> None:
        """The end of a call; raises nothing, for the engine thread may be waiting for another layer."""
        assert attempt.call is not None
        if attempt.is_late:
            self._context.health.ended(attempt.ep_rank, attempt.call.sequence_number)
        if attempt not in self._in_flight:  # given up
            if isinstance(outcome, ForwardAnswer):
                outcome.release()
            return
        self._in_flight.remove(attempt)
        self._context.queues.ended(attempt.ep_rank, attempt.message.num_assignments)
        try:
            if isinstance(outcome, MobulaError):
                raise outcome
            self._take(attempt, outcome)
        except UnitQuarantined as error:
            for unit_id in error.unit_ids:
                self._context.trust.distrust(attempt.ep_rank, self._layer.layer_id, unit_id, str(error))
            self._retry(attempt, error.reason.lower(), str(error))
        except (Unavailable, StalePlacement, QueueFull, DeadlineExceeded) as error:
            self._retry(attempt, error.reason.lower(), str(error))
        except MobulaError as error:
            self._error = InternalError(
                f"expert shard {attempt.ep_rank} at {attempt.address} and this worker disagree about a forward of "
                f"layer {self._layer.layer_id}: {error}"
            )
            self._error.__cause__ = error

    def _take(self, attempt: Attempt, answer: ForwardAnswer) -> None:
        """Keeps what an answer has. Raises the error that it carries; it is released then."""
        try:
            sums = read_partial_sums(attempt.message, answer, self._layer.hidden_states)
        except MobulaError:
            answer.release()
            raise
        self._learn(attempt, answer)
        if attempt.is_check:
            self._answers.append(Answer(attempt, sums, answer))
            return
        if attempt.is_probe:
            answer.release()
            return
        num_new = attempt.message.num_partial_sums
        if self._is_missing is not None:
            num_new = int(self._is_missing[sums.partial_sums].sum())
            self._is_missing[sums.partial_sums] = False
        if not num_new:
            answer.release()
            return
        self._num_missing -= num_new
        self._answers.append(Answer(attempt, sums, answer))

    def _learn(self, attempt: Attempt, answer: ForwardAnswer) -> None:
        """What an answer says of its shard."""
        context, message, timing = self._context, attempt.message, answer.header.timing
        assert attempt.call
        now_s, queue_s, compute_s = context.clock(), timing.queue_ns / 1e9, timing.compute_ns / 1e9
        seconds = now_s - attempt.sent_s
        self.timings.append(ShardTiming(message.ep_rank, attempt.sent_s, now_s, queue_s, compute_s))
        num_bytes = answer.header.ByteSize() + answer.payload.nbytes
        context.metrics.count_received(message.ep_rank, num_bytes, attempt.call.carrier)
        context.metrics.count_times(message.ep_rank, seconds, queue_s, compute_s)
        context.queues.answered(message.ep_rank, message.num_assignments, queue_s, compute_s)
        context.times.answered(message.ep_rank, message.num_assignments, seconds)
        if not attempt.is_late:
            context.health.punctual(message.ep_rank)

    def _retry(self, attempt: Attempt, reason: str, failure: str) -> None:
        """Sends the attempt's message again soon, if anybody waits for it."""
        if attempt.is_probe or attempt.is_check:
            return
        wait_s = 0.0 if attempt.number == 1 else min(MIN_RETRY_WAIT_S * 2 ** min(attempt.number, 10), MAX_RETRY_WAIT_S)
        attempt.reason = reason
        attempt.failure = failure
        self._put_off(attempt, wait_s * random.uniform(0.5, 1.0))

    def _put_off(self, attempt: Attempt, wait_s: float) -> None:
        attempt.resend_at_s = min(self._context.clock() + wait_s, self._deadline_s)
        self._failed.append(attempt)

    def _resend_due(self) -> None:
        if not self._failed:
            return
        now_s = self._context.clock()
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
            if self._is_missing is not None and not self._is_missing[attempt.message.partial_sums].any():
                continue  # another one was faster
            if now_s >= self._deadline_s:
                raise out_of_time(attempt, self._layer.layer_id, now_s, self._context.config, self._limit)
            ep_ranks = self._context.candidates.to_retry(routing, row, attempt.ep_rank)
            messages = plan_again(attempt.message, self._expert_to_unit, ep_ranks)
            waits_for = {other.ep_rank for other in self._in_flight if other.is_late}
            if not {message.ep_rank for message in messages}.isdisjoint({*routing.down(), *waits_for}):
                self._put_off(attempt, DOWN_POLL_S)
                continue
            for message in messages:
                self._context.metrics.count_retry(attempt.reason)
                self._send(message, routing, attempt.number + 1)

    def _look_at_due(self) -> None:
        """Attempts that are late are sent to others too; those that took far too long are given up."""
        now_s = self._context.clock()
        if not self._limit.is_wanted():
            raise Cancelled(f"every request of the step has left while layer {self._layer.layer_id} waited")
        for attempt in [attempt for attempt in self._in_flight if attempt.due_at_s <= now_s]:
            if attempt.give_up_at_s > now_s:
                self._look_whether_late(attempt, now_s)
                continue
            self._in_flight.remove(attempt)
            self._give_up(attempt)
            if now_s >= self._deadline_s:
                raise out_of_time(attempt, self._layer.layer_id, now_s, self._context.config, self._limit)
            self._retry(attempt, "timeout", f"no answer within {self._context.config.attempt_timeout_s} s")

    def _look_whether_late(self, attempt: Attempt, now_s: float) -> None:
        context, message = self._context, attempt.message
        if not attempt.is_late:
            late_at_s = attempt.sent_s + context.times.late_after_s(message.ep_rank, message.num_assignments)
            if late_at_s > now_s:
                attempt.late_at_s = late_at_s
                return
            attempt.is_late = True
            context.metrics.count_late(message.ep_rank)
            assert attempt.call
            context.health.late(message.ep_rank, attempt.call.sequence_number)
        has_asked = attempt.is_probe or self._send_to_others(attempt, "late", is_check=attempt.is_check)
        attempt.late_at_s = math.inf if has_asked else now_s + context.config.late_after_s  # somebody may be there

    def _send_to_others(self, attempt: Attempt, reason: str, *, is_check: bool) -> bool:
        """Asks other replicas for an attempt's partial sums, if any can be reached and trusted; whether any can."""
        routing = self._context.routing()
        row = routing.expert_map.row(self._layer.layer_id)
        if not np.array_equal(routing.expert_map.expert_to_unit[row], self._expert_to_unit):
            return False
        ep_ranks = self._context.candidates.to_hedge(routing, row, attempt.ep_rank)
        others = [part for part in plan_again(attempt.message, self._expert_to_unit, ep_ranks) if part.ep_rank >= 0]
        self._is_missing = self._missing() if others else self._is_missing
        for message in others:
            self._context.metrics.count_retry(reason)
            self._send(message, routing, attempt.number + 1, is_check=is_check)
        return bool(others)
