"""Where a worker's time goes: wraps the seams of the code and adds up, exclusively, what each part takes of a step.

Runs inside a worker's process. A seam that the code no longer has is passed over: its time then counts for the part
that calls it.
"""

import importlib
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

STEP, WAIT, BETWEEN = "engine", "wire", "between steps"
FFN, QUEUE = "expert FFN", "queue on the shard"
SEAMS: tuple[tuple[str, str, str], ...] = (  # part, module, name in it
    (STEP, "attention.engine", "Engine.step"),
    ("batch and metadata", "attention.model_runner", "ModelRunner.run"),
    ("norms and residuals", "attention.decoder", "Decoder.forward"),
    ("attention", "attention.mla", "Mla.forward"),
    ("attention", "attention.kernel_mla", "KernelMla.forward"),
    ("gate", "attention.decoder", "choose_experts"),
    ("dense and shared MLP", "attention.layers", "TorchMlp.__call__"),
    ("dense and shared MLP", "attention.layers", "KernelMlp.__call__"),
    ("plan, pack and send", "router.router", "Router.dispatch"),
    (WAIT, "router.router", "Router.combine"),
    ("combine", "router.layer_sums", "sum_partials"),
    ("lm_head", "attention.decoder", "Decoder.logits"),
    ("sampling", "attention.model_runner", "sample"),
)
ANSWER_SEAM = ("router.dispatch_handle", "read_partial_sums")
KERNELS = ("attention", "gate", "dense and shared MLP", FFN, "lm_head", "sampling")


class Stopwatch:
    """Seconds by part of each step whose batch has the shape asked for. One thread's: the engine's.

    busy_outside: of each step, the seconds that the thread was on a processor outside the kernels. Where a core is
    shared with shards, the other clock also counts what they compute while the thread waits for its turn.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        busy_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._clock = clock
        self._busy_clock = busy_clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._nested = [0.0]  # seconds of what was called, by depth
        self._busy_nested = [0.0]
        self._busy_outside = 0.0
        self.busy_outside: list[float] = []
        self._answers: list[tuple[float, float]] = []  # (queue, compute) seconds of a layer's answers
        self._shape = self._wanted = (0, 0)
        self._last_end: float | None = None
        self.steps: list[dict[str, float]] = []

    def begin(self, num_sequences: int, num_tokens: int) -> None:
        """Forgets all, and counts steps of this shape from now on."""
        self._wanted = (num_sequences, num_tokens)
        self.steps = []
        self.busy_outside = []

    def install(self, stack: ExitStack) -> None:
        """Wraps the seams until the stack is left."""
        for part, module, name in SEAMS:
            if (found := _find(module, name)) is not None:
                owner, attribute = found
                wrapped = self.timed(part, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, wrapped))
        if (found := _find(*ANSWER_SEAM)) is not None:
            owner, attribute = found
            stack.enter_context(mock.patch.object(owner, attribute, self._noting(getattr(owner, attribute))))

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted for the part without that of the parts it calls."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if part == "batch and metadata":
                self._shape = (len(args[1].sequences), args[1].num_tokens)
            if part == WAIT:
                waiting_before = self._seconds[WAIT]
            self._nested.append(0.0)
            self._busy_nested.append(0.0)
            start, busy_start = self._clock(), self._busy_clock()
            try:
                return function(*args, **kwargs)
            finally:
                end, busy_end = self._clock(), self._busy_clock()
                self._seconds[part] += end - start - self._nested.pop()
                self._nested[-1] += end - start
                busy = busy_end - busy_start - self._busy_nested.pop()
                self._busy_nested[-1] += busy_end - busy_start
                if part not in KERNELS:
                    self._busy_outside += busy
                if part == WAIT:
                    self._split_wait(waiting_before)
                if part == STEP:
                    self._end_step(start, end)

        return run

    def _noting(self, accept: Callable[..., Any]) -> Callable[..., Any]:
        """Keeps the shard's own timing of every answer."""

        def run(message: Any, answer: Any, hidden_states: Any) -> Any:
            timing = answer.header.timing
            self._answers.append((timing.queue_ns / 1e9, timing.compute_ns / 1e9))
            return accept(message, answer, hidden_states)

        return run

    def _split_wait(self, before: float) -> None:
        """Gives what the slowest shard took its own part; some of it passed while the worker computed, unwaited for."""
        waited = self._seconds[WAIT] - before
        queue, compute = max(self._answers, key=sum, default=(0.0, 0.0))
        compute = min(compute, waited)
        queue = min(queue, waited - compute)
        self._seconds[FFN] += compute
        self._seconds[QUEUE] += queue
        self._seconds[WAIT] -= compute + queue
        self._answers.clear()

    def _end_step(self, start: float, end: float) -> None:
        if self._shape == self._wanted:
            if self._last_end is not None:
                self._seconds[BETWEEN] += start - self._last_end
            self.steps.append(dict(self._seconds))
            self.busy_outside.append(self._busy_outside)
        self._last_end = end if self._shape == self._wanted else None
        self._shape = (0, 0)
        self._busy_outside = 0.0
        self._seconds.clear()


def _find(module: str, name: str) -> tuple[Any, str] | None:
    try:
        owner: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        return None
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    return (owner, attribute) if hasattr(owner, attribute) else None
