"""Ping-pong: a step's rows in micro-batches, so that one's attention is computed while another's experts are away.

More of them cost, because every weight is read once for each. What pays depends on the shards, the wire and the number
of rows; so it is measured while serving. Rows have the same bits either way.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from attention.attention_plan import AttentionPlan
from attention.rotary import Rotation

MAX_MICRO_BATCHES = 2
MIN_ROWS = 8  # of a step that is cut; below, reading every weight twice never pays
TRIAL_INTERVAL = 64  # steps of a size between two trials of the count that is not in use
SMOOTHING = 0.2  # weight of the newest step in a mean


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """Some of a step's rows on their way through the layers.

    routed: the dispatcher's handle of the rows' routed experts while they are away; the rest of the mixture is in
    `hidden_states` already, fp32.
    """

    plan: AttentionPlan
    rotation: Rotation
    hidden_states: Tensor  # [num_rows, hidden_size]
    routed: Any | None = None


@dataclass(slots=True)
class _Means:
    """Seconds a step of one size class, by number of micro-batches."""

    seconds_per_row: dict[int, float] = field(default_factory=dict)
    num_steps: int = 0


class MicroBatchCount:
    """Chooses the number of micro-batches of a step from the times of those before it. Owner: the engine thread."""

    def __init__(self, fixed: int | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        """fixed: always so many, where there are as many rows; unset: as measured."""
        self._fixed = fixed
        self._clock = clock
        self._means: dict[int, _Means] = {}  # by size class, a power of two of rows

    def choose(self, num_rows: int) -> int:
        """For a step of so many rows."""
        if self._fixed is not None:
            return max(1, min(self._fixed, num_rows))
        if num_rows < MIN_ROWS:
            return 1
        means = self._means.setdefault(num_rows.bit_length(), _Means())
        means.num_steps += 1
        for count in range(1, MAX_MICRO_BATCHES + 1):
            if count not in means.seconds_per_row:
                return count
        best = min(means.seconds_per_row, key=lambda count: means.seconds_per_row[count])
        is_trial = means.num_steps % TRIAL_INTERVAL == 0
        return MAX_MICRO_BATCHES + 1 - best if is_trial else best

    def record(self, num_rows: int, count: int, seconds: float) -> None:
        """What a step took."""
        if self._fixed is not None or num_rows < MIN_ROWS:
            return
        means = self._means.setdefault(num_rows.bit_length(), _Means()).seconds_per_row
        newest = seconds / num_rows
        means[count] = newest if count not in means else means[count] + SMOOTHING * (newest - means[count])

    def now_s(self) -> float:
        """The clock that steps are timed with."""
        return self._clock()
