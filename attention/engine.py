"""The engine: takes sequences in, runs steps, gives tokens out. Knows nothing of protobuf, gRPC or the model.

The life of a request here:
1. `submit` (any thread) counts it against `max_num_waiting` and puts it into the inbox; `abort` goes the same way.
2. The engine thread empties the inbox before each step. From here on it alone touches sequences, blocks and cache.
3. `Scheduler.schedule` chooses how many tokens of which sequences the step computes, and allocates their blocks.
4. `ModelRunner.run` computes them, and samples a token for each sequence whose last known token was reached.
5. The sequence takes the token, makes text of it and looks for its end; an ended one gives its blocks back at once.
6. `on_output` (on the engine thread, must not block) tells the listener as the next step's layers begin, or at once
   when there is no next step: who is woken by it runs beside the kernels, not in the engine's way. The last output of
   every sequence is final: a finish reason or an error. A failed step ends exactly the sequences of its batch with that
   error.
7. Without work the thread checks the block accounting and sleeps until there is a message or a socket has something.
"""

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from attention.block_manager import BlockManager
from attention.engine_config import EngineConfig
from attention.inbox import Inbox
from attention.metrics import EngineMetrics, RequestTimeline
from attention.sampler import SampledToken
from attention.scheduler import ScheduledBatch, Scheduler
from attention.sequence import FinishReason, Sequence, SequenceOutput
from protos import errors
from protos.poller import Poller
from router.step_limit import StepLimit

logger = logging.getLogger(__name__)

OnOutput = Callable[[SequenceOutput], None]


class NonFiniteLogits(errors.InternalError):
    """The model's answer for one sequence is not numbers."""

    reason = "NON_FINITE_LOGITS"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What the engine was doing after its latest step."""

    num_running: int = 0
    num_waiting: int = 0
    num_preemptions: int = 0  # since the start
    num_blocks: int
    num_free_blocks: int

    @property
    def cache_usage_ratio(self) -> float:
        return 1.0 - self.num_free_blocks / self.num_blocks


class BatchRunner(Protocol):
    """Computes one step; attention.model_runner.ModelRunner is one."""

    def run(self, batch: ScheduledBatch, on_begun: Callable[[], None]) -> list[SampledToken | None]:
        """One entry a sequence, None for those that need no sample yet. on_begun: called as the layers begin."""


@dataclass(frozen=True, slots=True)
class _Submit:
    sequence: Sequence
    on_output: OnOutput
    arrival_s: float


@dataclass(frozen=True, slots=True)
class _Abort:
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class _Stop:
    deadline_s: float


@dataclass(frozen=True, slots=True)
class _Request:
    on_output: OnOutput
    timeline: RequestTimeline


class Engine:
    """One thread, named engine, that owns all sequences. `submit`, `abort`, `stats` and `stop` are for any thread."""

    def __init__(
        self,
        config: EngineConfig,
        runner: BatchRunner,
        *,
        num_blocks: int,
        metrics: EngineMetrics,
        limit_step: Callable[[StepLimit], None] = lambda _: None,
        poller: Poller | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """num_blocks: of the runner's latent cache, as EngineConfig.num_cache_blocks says. clock: seconds.

        limit_step: told before each step how long it is waited for. poller: where the runner waits too, if anywhere.
        """
        self._config = config
        self._runner = runner
        self._metrics = metrics
        self._limit_step = limit_step
        self._clock = clock
        self._block_manager = BlockManager(num_blocks=num_blocks, block_size=config.block_size)
        self._scheduler = Scheduler(
            self._block_manager,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._requests: dict[Sequence, _Request] = {}
        self._untold: list[tuple[Sequence, OnOutput, SequenceOutput]] = []
        self._stop_deadline_s: float | None = None
        self._next_deadline_s = math.inf  # of any request
        self._stats = EngineStats(num_blocks=num_blocks, num_free_blocks=num_blocks)
        self._num_signs = 0
        self._is_idle = True
        self._inbox: Inbox[_Submit | _Abort | _Stop] = Inbox(poller or Poller())
        self._lock = threading.Lock()  # guards the two below, which other threads read
        self._num_not_started = 0
        self._is_accepting = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs; once it has ended by itself, only a new process helps."""
        return self._thread.is_alive()

    @property
    def signs_of_life(self) -> int | None:
        """A number that changes with every layer, and while one is waited for; None while there is nothing to do."""
        return None if self._is_idle else self._num_signs

    @property
    def stats(self) -> EngineStats:
        return self._stats

    def submit(self, sequence: Sequence, on_output: OnOutput) -> None:
        """Hands a new sequence over; `on_output` is called until an output is final.

        Raises CapacityExceeded, QueueFull, Unavailable.
        """
        if not self._scheduler.can_ever_run(sequence):
            raise errors.CapacityExceeded(
                f"the request may need {sequence.max_num_tokens} tokens of latent cache, there are "
                f"{self._block_manager.max_num_tokens}; shorten it, lower max_tokens or raise cache_gib"
            )
        with self._lock:
            if not self._is_accepting:
                raise errors.WorkerStopping("the worker is stopping; retry on another one", retry_after_s=1.0)
            if self._num_not_started >= self._config.max_num_waiting:
                raise errors.QueueFull(
                    f"{self._num_not_started} requests wait, limit is {self._config.max_num_waiting}; retry later",
                    retry_after_s=1.0,
                )
            self._num_not_started += 1
            self._inbox.put(_Submit(sequence, on_output, self._clock()))

    def abort(self, sequence: Sequence) -> None:
        """Ends a submitted sequence before the next step; nothing happens when it has ended."""
        sequence.is_abandoned = True
        self._inbox.put(_Abort(sequence))

    def stop(self, drain_timeout_s: float = 0.0) -> None:
        """Takes nothing new, lets what is there run for so long, ends the rest with Unavailable, and waits for that."""
        with self._lock:
            self._is_accepting = False
        self._inbox.put(_Stop(self._clock() + drain_timeout_s))
        if self._thread.ident is None:
            self._close()
        else:
            self._thread.join()

    def step(self) -> bool:
        """Empties the inbox and computes one batch. False when there was nothing to compute. For the engine thread."""
        self._num_signs, self._is_idle = self._num_signs + 1, False
        self._empty_inbox()
        if self._stop_deadline_s is not None and self._clock() >= self._stop_deadline_s:
            self._fail(list(self._requests), _stopped())
        self._end_overdue()
        batch = self._scheduler.schedule()
        if batch is None:
            self._tell_all()
        else:
            self._start_timelines(batch)
            self._compute(batch)
            self._metrics.iteration_tokens.observe(batch.num_tokens)
        self._publish_stats()
        return batch is not None

    def _run(self) -> None:
        try:
            while True:
                while self.step():
                    pass
                self._block_manager.check_integrity()
                if self._stop_deadline_s is not None:
                    break
                self._is_idle = True
                self._inbox.wait()
        except Exception:
            logger.exception("the engine thread ends: its own accounting failed, the worker must be restarted")
        finally:
            self._close()

    def _empty_inbox(self) -> None:
        for message in self._inbox.take_all():
            self._handle(message)

    def _handle(self, message: _Submit | _Abort | _Stop) -> None:
        match message:
            case _Submit(sequence, on_output, arrival_s):
                timeline = RequestTimeline(
                    self._metrics,
                    arrival_s=arrival_s,
                    num_prompt_tokens=sequence.num_prompt_tokens,
                    is_resumed=sequence.num_output_tokens > 0,
                )
                self._requests[sequence] = _Request(on_output, timeline)
                self._next_deadline_s = min(self._next_deadline_s, sequence.deadline_s)
                self._scheduler.add(sequence)
            case _Abort(sequence):
                if sequence in self._requests:
                    self._end(sequence, SequenceOutput(finish_reason=FinishReason.ABORT))
            case _Stop(deadline_s):
                self._stop_deadline_s = deadline_s

    def _end_overdue(self) -> None:
        """Ends requests whose clients wait no longer, so that no step is spent on them."""
        now_s = self._clock()
        if now_s < self._next_deadline_s:
            return
        for sequence in [sequence for sequence in self._requests if sequence.deadline_s <= now_s]:
            self._fail([sequence], _overdue(sequence))
        self._next_deadline_s = min((sequence.deadline_s for sequence in self._requests), default=math.inf)

    def _start_timelines(self, batch: ScheduledBatch) -> None:
        now_s = self._clock()
        for scheduled in batch.sequences:
            timeline = self._requests[scheduled.sequence].timeline
            if not timeline.has_started:
                timeline.start(now_s)
                self._forget_waiting()

    def _compute(self, batch: ScheduledBatch) -> None:
        sequences = [scheduled.sequence for scheduled in batch.sequences]
        is_degraded: list[bool] = []
        self._limit_step(
            StepLimit(
                deadline_s=max(sequence.deadline_s for sequence in sequences),
                is_wanted=lambda: not all(sequence.is_abandoned for sequence in sequences),
                on_progress=self._note_progress,
                allows_missing_experts=all(sequence.allows_missing_experts for sequence in sequences),
                on_missing_experts=lambda: is_degraded.append(True),
            )
        )
        try:
            tokens = self._runner.run(batch, self._tell_all)
        except errors.MobulaError as error:
            logger.warning("a step of %d tokens failed: %s: %s", batch.num_tokens, type(error).__name__, error)
            self._fail(sequences, error)
        except Exception:
            internal_error = _internal_error()
            request_ids = [sequence.request_id for sequence in sequences]
            logger.exception(
                "a step of requests %s: %s", ", ".join(request_ids), internal_error, extra={"request_ids": request_ids}
            )
            self._fail(sequences, internal_error)
        else:
            self._scheduler.commit(batch)
            for sequence in sequences:
                sequence.num_degraded_steps += bool(is_degraded)
            now_s = self._clock()
            for sequence, token in zip(sequences, tokens, strict=True):
                if token is not None:
                    self._take(sequence, token, now_s)

    def _note_progress(self) -> None:
        self._num_signs += 1

    def _take(self, sequence: Sequence, token: SampledToken, now_s: float) -> None:
        """Adds a sampled token to its sequence; the listener is yet to be told."""
        if not token.is_finite:
            position = sequence.num_output_tokens
            error = NonFiniteLogits(
                f"the logits of output position {position} are not finite; the weights may be damaged"
            )
            logger.error("request %s: %s", sequence.request_id, error, extra=_log_fields(sequence))
            self._fail([sequence], error)
            return
        try:
            output = sequence.advance(token.token_id, token.logprobs)
        except Exception:
            internal_error = _internal_error()
            logger.exception("request %s: %s", sequence.request_id, internal_error, extra=_log_fields(sequence))
            self._fail([sequence], internal_error)
            return
        timeline = self._requests[sequence].timeline
        timeline.token(now_s)
        if output.finish_reason is None:
            self._note(sequence, self._requests[sequence].on_output, output)
        else:
            timeline.finish(now_s, output.finish_reason)
            self._end(sequence, output)

    def _fail(self, sequences: list[Sequence], error: errors.MobulaError) -> None:
        for sequence in sequences:
            self._end(sequence, SequenceOutput(error=error))

    def _end(self, sequence: Sequence, output: SequenceOutput) -> None:
        """Forgets a sequence, its blocks included; its listener is yet to be told of the final output."""
        request = self._requests.pop(sequence)
        self._scheduler.remove(sequence)
        if not request.timeline.has_started:
            self._forget_waiting()
        self._note(sequence, request.on_output, output)

    def _note(self, sequence: Sequence, on_output: OnOutput, output: SequenceOutput) -> None:
        self._untold.append((sequence, on_output, output))

    def _tell_all(self) -> None:
        untold, self._untold = self._untold, []
        for sequence, on_output, output in untold:
            try:
                on_output(output)
            except Exception:
                logger.exception(
                    "request %s: its listener failed, it is aborted", sequence.request_id, extra=_log_fields(sequence)
                )
                self.abort(sequence)

    def _forget_waiting(self) -> None:
        with self._lock:
            self._num_not_started -= 1

    def _publish_stats(self) -> None:
        num_preemptions = self._scheduler.num_preemptions
        self._metrics.num_preemptions.inc(num_preemptions - self._stats.num_preemptions)
        self._stats = EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_preemptions=num_preemptions,
            num_blocks=self._block_manager.num_blocks,
            num_free_blocks=self._block_manager.num_free,
        )
        self._metrics.num_requests_running.set(self._stats.num_running)
        self._metrics.num_requests_waiting.set(self._stats.num_waiting)
        self._metrics.cache_usage_ratio.set(self._stats.cache_usage_ratio)

    def _close(self) -> None:
        """Nothing is taken any more; whatever is still there ends, even if the accounting is broken."""
        with self._lock:
            self._is_accepting = False
        self._empty_inbox()
        requests, self._requests = self._requests, {}
        for sequence, request in requests.items():
            self._note(sequence, request.on_output, SequenceOutput(error=_stopped()))
        self._tell_all()
        for sequence, request in requests.items():
            self._scheduler.remove(sequence)
            if not request.timeline.has_started:
                self._forget_waiting()
        self._publish_stats()


def _stopped() -> errors.WorkerStopping:
    return errors.WorkerStopping("the worker has stopped; retry on another one", retry_after_s=1.0)


def _overdue(sequence: Sequence) -> errors.DeadlineExceeded:
    return errors.DeadlineExceeded(
        f"the deadline passed after {sequence.num_output_tokens} tokens; give the call more time or lower max_tokens"
    )


def _log_fields(sequence: Sequence) -> dict[str, str]:
    return {"request_id": sequence.request_id}


def _internal_error() -> errors.InternalError:
    """Carries an id, which is to be logged with the traceback."""
    return errors.InternalError(f"internal error; find {secrets.token_hex(6)} in the worker's log")
