"""Forwards that wait, and the one thread that computes them.

Takes everything that waits for the layer of the oldest forward and computes it as one; never waits for more. Knows
nothing of frames or streams; forwards whose future was cancelled are dropped unseen.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from experts.grouped_ffn import ForwardInput
from experts.weight_store import LayerWeights
from protos.errors import InternalError, QueueFull, Unavailable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardOutput:
    """One forward's share of a computation.

    partial_sums: [num_partial_sums, hidden_size]. compute_ns: of the whole computation.
    """

    partial_sums: Tensor
    queue_ns: int
    compute_ns: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WaitingForward:
    """A forward with the weights that it was admitted under, which stay alive until it is done."""

    weights: LayerWeights
    forward: ForwardInput
    arrived_ns: int
    future: Future[ForwardOutput] = field(default_factory=Future)


Compute = Callable[[LayerWeights, list[ForwardInput]], Tensor]  # the merged partial sums, forward after forward


class Batcher:
    """`submit` from any thread; `compute` runs in the batcher's own thread, "experts"."""

    def __init__(self, compute: Compute, max_waiting: int, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._compute = compute
        self._max_waiting = max_waiting
        self._clock_ns = clock_ns
        self._waiting: list[WaitingForward] = []
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="experts", daemon=True)

    @property
    def num_waiting(self) -> int:
        """Forwards in the queue."""
        return len(self._waiting)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Computes what waits, refuses what comes, ends the thread."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, weights: LayerWeights, forward: ForwardInput) -> Future[ForwardOutput]:
        """Queues a forward. Raises QueueFull, or Unavailable once stopping."""
        waiting = WaitingForward(weights=weights, forward=forward, arrived_ns=self._clock_ns())
        with self._changed:
            if self._is_stopping:
                raise Unavailable("the shard is draining; ask another one")
            if len(self._waiting) >= self._max_waiting:
                raise QueueFull(
                    f"{len(self._waiting)} forwards wait, limit is {self._max_waiting}; retry, or add shards",
                    retry_after_s=0.01,
                )
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting.future

    def compute_next(self) -> int:
        """Computes what waits for the layer of the oldest forward; how many forwards that answered."""
        with self._changed:
            batch = self._take_batch()
        batch = [waiting for waiting in batch if waiting.future.set_running_or_notify_cancel()]
        if not batch:
            return 0
        started_ns = self._clock_ns()
        try:
            sums = self._compute(batch[0].weights, [waiting.forward for waiting in batch])
        except Exception as error:
            logger.exception("computing layer %d failed", batch[0].weights.layer_id)
            failure = InternalError(f"computing layer {batch[0].weights.layer_id} failed: {error}")
            for waiting in batch:
                waiting.future.set_exception(failure)
            return len(batch)
        compute_ns = self._clock_ns() - started_ns
        start = 0
        for waiting in batch:
            end = start + waiting.forward.num_partial_sums
            waiting.future.set_result(
                ForwardOutput(
                    partial_sums=sums[start:end], queue_ns=started_ns - waiting.arrived_ns, compute_ns=compute_ns
                )
            )
            start = end
        return len(batch)

    def _take_batch(self) -> list[WaitingForward]:
        """Everything for the oldest forward's layer and version, in order of arrival. The caller holds the lock."""
        if not self._waiting:
            return []
        weights = self._waiting[0].weights
        batch = [waiting for waiting in self._waiting if waiting.weights is weights]
        self._waiting = [waiting for waiting in self._waiting if waiting.weights is not weights]
        return batch

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_stopping)
                if not self._waiting:
                    return
            self.compute_next()
