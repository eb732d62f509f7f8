"""One layer's rows on their way to the shards and back.

The engine thread owns a handle, and is told the ends of its calls while it waits, for this layer or for another one.
A forward is a pure function of its rows, so whatever fails or is late is sent again, to the same shard or to another
replica, under the newest placement, until the layer's time is up. Answers that came twice have the same bits.

A handle's life:
1. `start` plans under one placement and sends a message to each shard; it does not wait.
2. `wait` takes answers in order of arrival; they stay where they are, in the shard's answer.
3. A message that fails is planned again after a short wait, for its own partial sums only. One that a shard found fault
   with or failed at is asked once of each other replica. Only if the units themselves have changed does the whole layer
   start again.
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
    MobulaError,
    QueueFull,
    ShardUnavailable,
    StalePlacement,
    Unavailable,
    UnitQuarantined,
)
from router.attempt import Attempt, LayerInput, ShardTiming, forward_call, not_computed, out_of_time, read_partial_sums
from router.completions import ForwardAnswer, Outcome
from router.expert_map import Int64Array
from router.finite_check import is_finite, units_of
from router.handle_context import HandleContext
from router.layer_sums import LayerSums
from router.plan import DispatchPlan, ShardMessage, copy_for, plan_again
from router.plan_kernels import plan_layer
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
        self.max_ranks_per_token = 0  # by the placement of the newest start
        self.timings: list[ShardTiming] = []
        self._layer = layer
        self._context = context
        self._limit = limit
        self._deadline_s = min(self.started_s + context.config.forward_timeout_s, limit.deadline_s)
        self._in_flight: set[Attempt] = set()
        self._failed: list[Attempt] = []
        self._version: int | None = None
        self._expert_to_unit: Int64Array
        self._plan: DispatchPlan
        self._sums: LayerSums | None = None

    @property
    def plan(self) -> DispatchPlan:
        """Of the newest start."""
        return self._plan

    @property
    def sums(self) -> LayerSums:
        """Of the newest start."""
        assert self._sums is not None
        return self._sums

    def start(self) -> None:
        """Plans under the newest placement and sends every message. Also starts again from the beginning."""
        self.abandon()
        routing = self._context.routing()
        self._hold_version(routing.expert_map.placement_version)
        self.max_ranks_per_token = routing.max_ranks_per_token
        row = routing.expert_map.row(self._layer.layer_id)
        self._expert_to_unit = routing.expert_map.expert_to_unit[row]
        layer, ep_size = self._layer, routing.expert_map.ep_size
        unit_to_ep_ranks, queues, addresses = self._context.candidates.to_plan(routing, row)
        self._plan = plan_layer(
            layer.topk_ids, layer.topk_weights, self._expert_to_unit, unit_to_ep_ranks, ep_size, queues, addresses
        )
        self._sums = LayerSums(self._plan)
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
            self._wait_while(lambda: self.sums.num_missing > 0)
            sums = self._total()
            if self._context.routing().expert_map.max_replicas == 1 or is_finite(sums):
                return sums
            self._ask_others_whether_finite()
            return self._total()
        finally:
            self.abandon()

    def _total(self) -> Tensor:
        renormalises = self._context.config.missing_experts is MissingExperts.RENORMALISE
        return self.sums.total(self._layer, renormalises=renormalises)

    def _wait_while(self, is_incomplete: Callable[[], bool]) -> None:
        while is_incomplete():
            self._limit.on_progress()
            self._resend_due()
            if not self._context.completions.wait(self._next_due_s()):
                self._look_at_due()
                self._do_without_if_allowed()

    def _do_without_if_allowed(self) -> None:
        """Leaves out what is missing still, when everybody who waits would rather have it so.

        An answer that is not late yet is worth waiting for, unless a layer before did without those who owe it, and
        nothing was heard of them since: they are asked all the same, so that an answer shows that they are back.
        """
        if not self._may_do_without:
            return
        if not self._is_known_missing:
            if self._context.clock() < self.started_s + self._context.config.missing_after_s:
                return
            if any(not (attempt.is_late or attempt.is_probe) for attempt in self._in_flight):
                return
        self._context.ledger.did_without(self._owing())
        messages = [attempt.message for attempt in (*self._in_flight, *self._failed)]
        self._context.metrics.count_missing(self.sums.do_without(messages, self._layer.hidden_states))
        self._limit.on_missing_experts()

    @property
    def _may_do_without(self) -> bool:
        is_allowed = self._context.config.missing_experts is not MissingExperts.WAIT
        return is_allowed and self._limit.allows_missing_experts and self.sums.num_missing > 0

    @property
    def _is_known_missing(self) -> bool:
        owing = self._owing()
        return bool(owing) and self._context.ledger.are_missing(owing)

    def _owing(self) -> list[int]:
        """The shards that were asked for what is missing."""
        return [attempt.ep_rank for attempt in (*self._in_flight, *self._failed) if not attempt.is_probe]

    def _ask_others_whether_finite(self) -> None:
        """Has replicas compute what is not finite for rows that are; a shard that they prove wrong is not trusted."""
        self._failed.clear()  # nothing is missing
        doubts = self.sums.doubts(self._layer.hidden_states)
        for attempt, _ in doubts:
            self._send_to_others(attempt, "not_finite", is_check=True)
        self._wait_while(lambda: any(attempt.is_check for attempt in self._in_flight))
        for attempt, wrong in self.sums.wrong(doubts):
            unit_ids = units_of(attempt.message, wrong, self._expert_to_unit)
            reason = "its sums are not finite where a replica's are"
            self._context.ledger.distrust(attempt.ep_rank, self._layer.layer_id, unit_ids, reason)

    def abandon(self) -> None:
        """Gives up whatever is outstanding, and what was answered."""
        for attempt in self._in_flight:
            self._give_up(attempt)
        self._in_flight.clear()
        self._failed.clear()
        if self._sums is not None:
            self._sums.release()
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
        self,
        message: ShardMessage,
        routing: Routing,
        number: int,
        *,
        is_probe: bool = False,
        is_check: bool = False,
        refused_by: frozenset[int] = frozenset(),
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
            refused_by=refused_by,
        )
        if transport is None:
            self._retry(attempt, ShardUnavailable.reason.lower(), f"shard {message.ep_rank} is down")
            return
        self._in_flight.add(attempt)
        self._context.ledger.sent(attempt)
        attempt.call = call = forward_call(
            message,
            self._layer,
            sequence_number=next(self._context.sequence_numbers),
            timeout_s=attempt.give_up_at_s - now_s,
            placement_version=routing.expert_map.placement_version,
            completions=self._context.completions,
            tell=lambda outcome: self._finish(attempt, outcome),
        )
        transport.forward(call)
        self._context.metrics.count_sent(message.ep_rank, message.num_rows, call.sent_bytes, call.carrier)

    def _give_up(self, attempt: Attempt) -> None:
        """Nobody waits for it any more; a probe's answer is learned from, whenever it comes."""
        self._context.ledger.no_longer_waited_for(attempt)
        if attempt.call is not None and not attempt.is_probe:
            attempt.call.is_given_up = True
            if attempt.transport is not None:
                attempt.transport.cancel(attempt.call)

    def _next_due_s(self) -> float:
        """Seconds until the time of something comes, or until it is time to ask whether anybody waits."""
        if self._may_do_without and self._is_known_missing:
            return 0.0
        times = [attempt.due_at_s for attempt in self._in_flight]
        times += [attempt.resend_at_s for attempt in self._failed]
        return min(WANTED_POLL_S, max(0.0, min(times, default=0.0) - self._context.clock()))

    def _finish(self, attempt: Attempt, outcome: Outcome) -> None:
        """The end of a call; raises nothing, for the engine thread may be waiting for another layer."""
        ledger = self._context.ledger
        if isinstance(outcome, ForwardAnswer):
            ledger.heard_of(attempt.ep_rank)
        if attempt not in self._in_flight:  # given up
            if isinstance(outcome, ForwardAnswer):
                if attempt.is_probe and not outcome.header.HasField("error"):
                    ledger.answered_after_its_layer(attempt, outcome)
                outcome.release()
            ledger.ended(attempt)
            return
        self._in_flight.remove(attempt)
        ledger.ended(attempt)
        ledger.no_longer_waited_for(attempt)
        try:
            if isinstance(outcome, MobulaError):
                raise outcome
            self._take(attempt, outcome)
        except UnitQuarantined as error:
            ledger.distrust(attempt.ep_rank, self._layer.layer_id, error.unit_ids, str(error))
            self._retry(attempt, error.reason.lower(), str(error))
        except (Unavailable, StalePlacement, QueueFull, DeadlineExceeded) as error:
            self._retry(attempt, error.reason.lower(), str(error))
        except MobulaError as error:
            if self._context.routing().expert_map.max_replicas > 1:
                unit_ids = units_of(attempt.message, attempt.message.partial_sums, self._expert_to_unit)
                ledger.distrust(attempt.ep_rank, self._layer.layer_id, unit_ids, str(error))
            attempt.refused_by |= {attempt.ep_rank}
            self._retry(attempt, error.reason.lower(), str(error))

    def _take(self, attempt: Attempt, answer: ForwardAnswer) -> None:
        """Keeps what an answer has. Raises the error that it carries; it is released then."""
        try:
            sums = read_partial_sums(attempt.message, answer, self._layer.hidden_states)
        except MobulaError:
            answer.release()
            raise
        self.timings.append(self._context.ledger.answered(attempt, answer))
        if attempt.is_probe:
            answer.release()
        else:
            self.sums.take(attempt, sums, answer)

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
            if self.sums.has_all_of(attempt.message):
                continue  # another one was faster
            if now_s >= self._deadline_s:
                raise out_of_time(attempt, self._layer.layer_id, now_s, self._context.config, self._limit)
            ep_ranks = self._context.candidates.to_retry(routing, row, attempt.refused_by | {attempt.ep_rank})
            messages = plan_again(attempt.message, self._expert_to_unit, ep_ranks)
            if not attempt.refused_by.isdisjoint(message.ep_rank for message in messages):
                raise not_computed(attempt, self._layer.layer_id)
            waits_for = {other.ep_rank for other in self._in_flight if other.is_late}
            if not {message.ep_rank for message in messages}.isdisjoint({*routing.down(), *waits_for}):
                self._put_off(attempt, DOWN_POLL_S)
                continue
            for message in messages:
                self._context.metrics.count_retry(attempt.reason)
                self._send(message, routing, attempt.number + 1, refused_by=attempt.refused_by)

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
        if not self._context.ledger.is_late(attempt):
            return
        has_asked = attempt.is_probe or self._send_to_others(attempt, "late", is_check=attempt.is_check)
        attempt.late_at_s = (
            math.inf if has_asked else now_s + self._context.config.late_after_s
        )  # somebody may be there

    def _send_to_others(self, attempt: Attempt, reason: str, *, is_check: bool) -> bool:
        """Asks other replicas for an attempt's partial sums, if any can be reached and trusted; whether any can."""
        routing = self._context.routing()
        row = routing.expert_map.row(self._layer.layer_id)
        if not np.array_equal(routing.expert_map.expert_to_unit[row], self._expert_to_unit):
            return False
        ep_ranks = self._context.candidates.to_hedge(routing, row, attempt.refused_by | {attempt.ep_rank})
        others = [part for part in plan_again(attempt.message, self._expert_to_unit, ep_ranks) if part.ep_rank >= 0]
        if others:
            self.sums.expect_twice()
        for message in others:
            self._context.metrics.count_retry(reason)
            self._send(message, routing, attempt.number + 1, is_check=is_check, refused_by=attempt.refused_by)
        return bool(others)
