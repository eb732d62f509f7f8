"""What a worker knows of its shards from its own forwards: queues, times, lateness, and whose numbers to trust.

Knows nothing of layers' sums, nor of what follows from what it knows: routing.py chooses.
"""

from collections.abc import Callable, Container, Iterable

from router.attempt import Attempt, ShardTiming
from router.completions import ForwardAnswer
from router.metrics import RouterMetrics
from router.router_config import RouterConfig
from router.service_times import ServiceTimes
from router.shard_health import ShardHealth
from router.shard_queues import ShardQueues
from router.unit_trust import UnitTrust


class ShardLedger:
    """Belongs to the engine thread, but for what health and trust say otherwise."""

    def __init__(self, config: RouterConfig, metrics: RouterMetrics, clock: Callable[[], float]) -> None:
        self.queues = ShardQueues(clock)
        self.health = ShardHealth(clock)
        self.trust = UnitTrust(clock)
        self._times = ServiceTimes(config.late_after_s, config.attempt_timeout_s)
        self._metrics = metrics
        self._clock = clock
        self._missing: set[int] = set()

    def keep_shards(self, ep_ranks: Container[int]) -> None:
        """Forgets the other ones, which have gone: a shard that comes instead is another one.

        What was sent to them ends as ever. Replicas whose numbers were wrong are tried again in time.
        """
        self.queues.keep_shards(ep_ranks)
        self.health.keep_shards(ep_ranks)
        self._times.keep_shards(ep_ranks)
        self._missing = {ep_rank for ep_rank in self._missing if ep_rank in ep_ranks}

    def sent(self, attempt: Attempt) -> None:
        """It is on its way."""
        self.queues.sent(attempt.ep_rank, attempt.message.num_assignments)

    def no_longer_waited_for(self, attempt: Attempt) -> None:
        """It has its end, or was given up."""
        self.queues.ended(attempt.ep_rank, attempt.message.num_assignments)

    def ended(self, attempt: Attempt) -> None:
        """Its end was told, waited for or not."""
        if attempt.is_late:
            assert attempt.call
            self.health.ended(attempt.ep_rank, attempt.call.sequence_number)

    def did_without(self, ep_ranks: Iterable[int]) -> None:
        """A layer went on without what it had asked these for."""
        self._missing.update(ep_ranks)

    def are_missing(self, ep_ranks: Iterable[int]) -> bool:
        """Whether a layer did without each of them, and nothing was heard of them since."""
        return self._missing.issuperset(ep_ranks)

    def heard_of(self, ep_rank: int) -> None:
        """An answer of it came, whatever it says and whoever waits for it."""
        self._missing.discard(ep_rank)

    def answered(self, attempt: Attempt, answer: ForwardAnswer) -> ShardTiming:
        """An answer came, and is waited for."""
        assert attempt.call
        message, timing = attempt.message, _timing(attempt, answer, self._clock())
        ep_rank, num_assignments = message.ep_rank, message.num_assignments
        seconds = timing.answered_s - timing.sent_s
        num_bytes = answer.header.ByteSize() + answer.payload.num_bytes
        self._metrics.count_received(ep_rank, num_bytes, attempt.call.carrier)
        self._metrics.count_times(ep_rank, seconds, timing.queue_s, timing.compute_s)
        self.queues.answered(ep_rank, num_assignments, timing.queue_s, timing.compute_s)
        self._times.answered(ep_rank, num_assignments, seconds)
        if not attempt.is_late:
            self.health.punctual(ep_rank)
        return timing

    def answered_after_its_layer(self, probe: Attempt, answer: ForwardAnswer) -> None:
        """A probe's answer came, and was taken up some time later: its shard's own times decide whether it was late."""
        if probe.is_late:  # that much is known
            return
        timing = _timing(probe, answer, self._clock())
        limit_s = self._late_after_s(probe)
        if timing.answered_s - timing.sent_s < limit_s:
            self.health.punctual(probe.ep_rank)
        elif timing.queue_s + timing.compute_s >= limit_s:
            self._note_late(probe)

    def is_late(self, attempt: Attempt) -> bool:
        """Whether its answer is late by now; else when to look again is noted in it."""
        if attempt.is_late:
            return True
        late_at_s = attempt.sent_s + self._late_after_s(attempt)
        if late_at_s > self._clock():
            attempt.late_at_s = late_at_s
            return False
        self._note_late(attempt)
        return True

    def distrust(self, ep_rank: int, layer_id: int, unit_ids: Iterable[int], reason: str) -> None:
        """A shard's numbers for these units are wrong, or it has none."""
        for unit_id in unit_ids:
            self.trust.distrust(ep_rank, layer_id, unit_id, reason)

    def _late_after_s(self, attempt: Attempt) -> float:
        return self._times.late_after_s(attempt.ep_rank, attempt.message.num_assignments)

    def _note_late(self, attempt: Attempt) -> None:
        assert attempt.call
        attempt.is_late = True
        self._metrics.count_late(attempt.ep_rank)
        self.health.late(attempt.ep_rank, attempt.call.sequence_number)


def _timing(attempt: Attempt, answer: ForwardAnswer, now_s: float) -> ShardTiming:
    timing = answer.header.timing
    return ShardTiming(attempt.ep_rank, attempt.sent_s, now_s, timing.queue_ns / 1e9, timing.compute_ns / 1e9)
