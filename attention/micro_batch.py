"""Ping-pong: a step's rows in micro-batches, so that one's attention is computed while another's experts are away.

More of them cost, because every weight is read once for each. What pays depends on the shards, the wire and the number
of rows; so it is measured while serving. Rows have the same bits either way.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attention.attention_plan import AttentionPlan
from attention.rotary import Rotation

MAX_MICRO_BATCHES = 2
MIN_ROWS = 8  # of a step that is cut; below, reading every weight twice never pays
NUM_TRIALS = 3  # steps with each count, in turn, before one is chosen; the best of each counts, as the first is cold
TRIAL_INTERVAL = 64  # steps of a kind between two trials of the count that is not in use
SMOOTHING = 0.2  # weight of the newest step in a mean
MIN_GAIN = 0.03  # of a step's time, for which it is cut; less is noise


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """Some of a step's rows on their way through the layers.

    routed: the dispatcher's handle of the rows' routed experts while they are away; the rest of the mixture is in
    `hidden_states` already, fp32.
    """

    plan: AttentionPlan
    last_plan: AttentionPlan  # of the last layer, which may be computed for some of the rows only
    rotation: Rotation
    hidden_states: Tensor  # [num_rows, hidden_size]
    num_dropped: Tensor  # [num_rows] int64, assignments that the overload valve left out so far
    routed: Any | None = None

    def count_dropped(self, num_dropped: Tensor) -> None:
        """Of the rows of a layer: [num_rows] int64, or of the last one [n]."""
        if len(num_dropped) == len(self.num_dropped):
            self.num_dropped += num_dropped
        else:
            self.num_dropped[self.last_plan.output_rows] += num_dropped


def within(rows: slice, wanted: Sequence[int] | None) -> list[int] | None:
    """Those of the step's wanted rows that lie in `rows`, counted from its start; None for all."""
    return None if wanted is None else [row - rows.start for row in wanted if rows.start <= row < rows.stop]


class _Kind:
    """Steps of one kind: the seconds a row that each count takes."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._num_trials = dict.fromkeys(range(1, MAX_MICRO_BATCHES + 1), 0)
        self._seconds_per_row: dict[int, float] = {}

    def choose(self) -> int:
        self._num_steps += 1
        count = min(self._num_trials, key=lambda count: self._num_trials[count])
        if self._num_trials[count] < NUM_TRIALS:
            return count
        best = min(
            self._seconds_per_row, key=lambda count: self._seconds_per_row[count] * (1 - MIN_GAIN * (count == 1))
        )
        is_trial = self._num_steps % TRIAL_INTERVAL == 0
        return MAX_MICRO_BATCHES + 1 - best if is_trial else best

    def record(self, count: int, seconds_per_row: float) -> None:
        mean = self._seconds_per_row.get(count)
        if mean is None or (self._num_trials[count] < NUM_TRIALS and seconds_per_row < mean):
            self._seconds_per_row[count] = seconds_per_row
        elif self._num_trials[count] >= NUM_TRIALS:
            self._seconds_per_row[count] = mean + SMOOTHING * (seconds_per_row - mean)
        self._num_trials[count] += 1


class MicroBatchCount:
    """Chooses the number of micro-batches of a step from the times of those before it. Owner: the engine thread.

    Steps are of one kind when they have about the same number of rows, and of sequences: decodes and prompts differ.
    """

    def __init__(self, fixed: int | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        """fixed: always so many, where there are as many rows; unset: as measured."""
        self._fixed = fixed
        self._clock = clock
        self._kinds: dict[tuple[int, int], _Kind] = {}  # by powers of two of rows and sequences

    def choose(self, num_rows: int, num_seqs: int) -> int:
        """For a step of so many rows of so many sequences."""
        if self._fixed is not None:
            return max(1, min(self._fixed, num_rows))
        return 1 if num_rows < MIN_ROWS else self._kind(num_rows, num_seqs).choose()

    def record(self, num_rows: int, num_seqs: int, count: int, seconds: float) -> None:
        """What such a step took."""
        if self._fixed is None and num_rows >= MIN_ROWS:
            self._kind(num_rows, num_seqs).record(count, seconds / num_rows)

    def now_s(self) -> float:
        """The clock that steps are timed with."""
        return self._clock()

    def _kind(self, num_rows: int, num_seqs: int) -> _Kind:
        return self._kinds.setdefault((num_rows.bit_length(), num_seqs.bit_length()), _Kind())
