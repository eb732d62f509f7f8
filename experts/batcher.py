"""Forwards that wait, and the one thread that computes them.

Takes everything that waits for the layer of the oldest forward and computes it as one; never waits for more. The same
thread sleeps on the sockets of rings, so that a forward that comes over one is computed and answered without another
thread. Forwards that were given up, or that nobody waits for any more, are not computed. Knows nothing of frames or
streams.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

from experts.grouped_ffn import ForwardInput
from experts.weight_store import LayerWeights
from protos.errors import Cancelled, DeadlineExceeded, InternalError, MobulaError, QueueFull, Unavailable
from protos.memory import Matrix, as_tensor
from protos.poller import Poller

logger = logging.getLogger(__name__)

MAX_POLLS = 16  # before a computation: what came meanwhile may be merged, or takes a forward back


class ForwardOutput(NamedTuple):
    """One forward's share of a computation.

    partial_sums: [num_partial_sums, hidden_size]. compute_ns: of the whole computation.
    """

    partial_sums: Matrix
    queue_ns: int
    compute_ns: int


@dataclass(slots=True, kw_only=True, eq=False)
class WaitingForward:
    """A forward with the weights that it was admitted under, which stay alive until it is done.

    on_done: called once in the compute thread; again, with an error, if it raises.
    out: [num_partial_sums, hidden_size], where the partial sums are to be written; None for a tensor of their own.
    num_bytes: of memory that it keeps while it waits. timeout_ns: after it arrived, when nobody waits for it any more.
    is_given_up: nobody waits for it; may be set from any thread.
    """

    weights: LayerWeights
    forward: ForwardInput
    on_done: Callable[[ForwardOutput | MobulaError], None]
    out: Matrix | None = None
    num_bytes: int = 0
    timeout_ns: int | None = None
    arrived_ns: int = 0
    is_given_up: bool = False


Compute = Callable[[list[WaitingForward]], Matrix]  # the merged partial sums, forward after forward
Count = Callable[[list[WaitingForward], int, int], None]  # started_ns and compute_ns of their computation


class Batcher:
    """`submit` from any thread; `compute` runs in the batcher's own thread, "experts".

    A forward that is computed alone may be computed right into its `out`. count: told of a computation after it was
    answered, for a worker waits for the answer. counting: held from the first answer until all is counted; who waits
    for it finds the counts of what was answered, and must not keep it, for that would hold up answers. when_idle:
    called in that thread when nothing waits, `idle_interval_s` after the time before.
    """

    def __init__(
        self,
        compute: Compute,
        max_waiting: int,
        max_waiting_bytes: int,
        count: Count = lambda *_: None,
        counting: AbstractContextManager[object] | None = None,
        when_idle: Callable[[], None] = lambda: None,
        idle_interval_s: float | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.poller = Poller()  # what is registered runs in the compute thread, between computations
        self._compute = compute
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._count = count
        self._counting = nullcontext() if counting is None else counting
        self._when_idle = when_idle
        self._idle_interval_s = idle_interval_s
        self._idled_ns = 0
        self._clock_ns = clock_ns
        self._waiting: list[WaitingForward] = []
        self._lock = threading.Lock()
        self._is_stopping = False
        self._is_idle = True
        self._num_rounds = 0
        self._thread = threading.Thread(target=self._run, name="experts", daemon=True)

    @property
    def num_waiting(self) -> int:
        """Forwards in the queue."""
        return len(self._waiting)

    @property
    def signs_of_life(self) -> int | None:
        """A number that changes while the thread works; None while there is nothing to do."""
        return None if self._is_idle else self._num_rounds

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Computes what waits, refuses what comes, ends the thread."""
        with self._lock:
            self._is_stopping = True
        self.poller.wake()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, waiting: WaitingForward) -> None:
        """Queues a forward. Raises QueueFull, or Unavailable once stopping."""
        waiting.arrived_ns = self._clock_ns()
        with self._lock:
            if self._is_stopping:
                raise Unavailable("the shard is draining; ask another one")
            if len(self._waiting) >= self._max_waiting:
                raise QueueFull(
                    f"{len(self._waiting)} forwards wait, limit is {self._max_waiting}; retry, or add shards",
                    retry_after_s=0.01,
                )
            if (num_bytes := sum(other.num_bytes for other in self._waiting)) > self._max_waiting_bytes:
                raise QueueFull(
                    f"forwards with {num_bytes} bytes wait, limit is {self._max_waiting_bytes}; retry, or add shards",
                    retry_after_s=0.01,
                )
            self._waiting.append(waiting)
        self.poller.wake()

    def compute_next(self) -> int:
        """Computes what waits for the layer of the oldest forward; how many forwards that answered."""
        taken = self._take_batch()
        started_ns = self._clock_ns()  # now that no later forward can be among them
        batch = [waiting for waiting in taken if not _was_dropped(waiting, started_ns)]
        if not batch:
            return 0
        weights = batch[0].weights
        try:
            sums = self._compute(batch)
        except Exception as error:
            logger.exception("computing layer %d failed", weights.layer_id)
            failure = InternalError(f"computing layer {weights.layer_id} failed: {error}")
            for waiting in batch:
                _tell(waiting, failure)
            return len(batch)
        compute_ns = self._clock_ns() - started_ns
        with self._counting:
            self._answer(batch, sums, started_ns, compute_ns)
            self._count(batch, started_ns, compute_ns)
        return len(batch)

    def _answer(self, batch: list[WaitingForward], sums: Matrix, started_ns: int, compute_ns: int) -> None:
        start = 0
        for waiting in batch:
            end = start + waiting.forward.num_partial_sums
            mine = sums if len(batch) == 1 else as_tensor(sums)[start:end]
            if waiting.out is not None and mine is not waiting.out:
                mine = as_tensor(waiting.out).copy_(as_tensor(mine))
            start = end
            output = ForwardOutput(partial_sums=mine, queue_ns=started_ns - waiting.arrived_ns, compute_ns=compute_ns)
            _tell(waiting, output)

    def refuse(self, weights: LayerWeights, error: MobulaError) -> None:
        """Answers what waits for a layer with an error. The compute thread's."""
        with self._lock:
            refused = [waiting for waiting in self._waiting if waiting.weights.layer_id == weights.layer_id]
            self._waiting = [waiting for waiting in self._waiting if waiting.weights.layer_id != weights.layer_id]
        for waiting in refused:
            _tell(waiting, error)

    def _use_idle_time(self) -> None:
        if self._idle_interval_s is None or self._waiting or self._is_stopping:
            return
        now_ns = self._clock_ns()
        if now_ns - self._idled_ns >= self._idle_interval_s * 1e9:
            self._idled_ns = now_ns
            self._when_idle()

    def _take_batch(self) -> list[WaitingForward]:
        """Everything for the oldest forward's layer and version, in order of arrival."""
        with self._lock:
            if not self._waiting:
                return []
            weights = self._waiting[0].weights
            batch = [waiting for waiting in self._waiting if waiting.weights is weights]
            self._waiting = [waiting for waiting in self._waiting if waiting.weights is not weights]
        return batch

    def _run(self) -> None:
        while self._waiting or not self._is_stopping:
            self._is_idle = True
            try:
                self.poller.poll(0.0 if self._waiting or self._is_stopping else self._idle_interval_s)
                self._num_rounds, self._is_idle = self._num_rounds + 1, False
                for _ in range(MAX_POLLS):
                    if not self.poller.poll(0.0):
                        break
                self.compute_next()
                self._use_idle_time()
            except Exception:  # the thread's top: one forward's fault is not the others'
                logger.exception("a forward failed in an unexpected way")
        self._is_idle = True
        self.poller.end()


def _was_dropped(waiting: WaitingForward, now_ns: int) -> bool:
    """Answers a forward that nobody waits for."""
    waited_ns = now_ns - waiting.arrived_ns
    if waiting.is_given_up:
        _tell(waiting, Cancelled(f"dropped after it waited {waited_ns / 1e9:.3f} s"))
        return True
    if waiting.timeout_ns is not None and waited_ns > waiting.timeout_ns:
        _tell(waiting, DeadlineExceeded(f"dropped after it waited {waited_ns / 1e9:.3f} s: nobody waits any more"))
        return True
    return False


def _tell(waiting: WaitingForward, outcome: ForwardOutput | MobulaError) -> None:
    """Answers a forward, with an error where its answer cannot be given: nobody waits for what never comes."""
    layer_id = waiting.weights.layer_id
    try:
        waiting.on_done(outcome)
    except Exception as error:
        logger.exception("a forward of layer %d could not be answered; the others are", layer_id)
        if isinstance(outcome, ForwardOutput):
            _tell(waiting, InternalError(f"a forward of layer {layer_id} could not be answered: {error}"))
