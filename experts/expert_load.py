"""Counted load: how many tokens each expert has computed. The compute thread counts, any thread takes snapshots.

What is computed is noted, and added up some computations later or when a snapshot is taken. A computation pushes all
else out of the caches, so adding up after each took 0.2 ms; many at once take a tenth of that each.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experts.grouped_ffn import ForwardInput, assignment_array
from experts.load_snapshot import LoadSnapshot

MAX_NOTED = 64  # computations
MAX_NOTED_ASSIGNMENTS = 2**14  # 16 bytes each, kept meanwhile


class _Computation(NamedTuple):
    """row: of the counts. assignments: of each forward that it answered, as the forward has them."""

    row: int
    assignments: list[bytes]
    num_rows: int
    compute_ns: int


class ExpertLoad:
    """Adds up what was computed."""

    def __init__(self, moe_layer_ids: tuple[int, ...], n_routed_experts: int) -> None:
        self._row_of_layer = {layer_id: row for row, layer_id in enumerate(moe_layer_ids)}
        self._num_tokens = np.zeros((len(moe_layer_ids), n_routed_experts), dtype=np.int64)
        self._rows_by_layer = np.zeros(len(moe_layer_ids), dtype=np.int64)
        self._num_forwards = 0
        self._num_assignments = 0
        self._num_experts_read = 0
        self._compute_ns = 0
        self._noted: list[_Computation] = []
        self._num_noted_assignments = 0
        self._lock = threading.Lock()  # a snapshot is of one moment

    def count(self, layer_id: int, forwards: Sequence[ForwardInput], compute_ns: int) -> None:
        """Adds a computation that answered these forwards."""
        row = self._row_of_layer[layer_id]
        assignments = [forward.assignment_bytes for forward in forwards]
        num_rows = sum(forward.num_rows for forward in forwards)
        with self._lock:
            self._noted.append(_Computation(row, assignments, num_rows, compute_ns))
            self._num_noted_assignments += sum(forward.num_assignments for forward in forwards)
            if len(self._noted) >= MAX_NOTED or self._num_noted_assignments > MAX_NOTED_ASSIGNMENTS:
                self._add_noted()

    def _add_noted(self) -> None:
        """With the lock."""
        noted, self._noted, self._num_noted_assignments = self._noted, [], 0
        for computation in noted:
            expert_ids = np.concatenate([assignment_array(one)[2] for one in computation.assignments])
            counts = np.bincount(expert_ids, minlength=self._num_tokens.shape[1])
            self._num_tokens[computation.row] += counts
            self._rows_by_layer[computation.row] += computation.num_rows
            self._num_forwards += len(computation.assignments)
            self._num_assignments += len(expert_ids)
            self._num_experts_read += int(np.count_nonzero(counts))
            self._compute_ns += computation.compute_ns

    def snapshot(self) -> LoadSnapshot:
        """The counts so far."""
        with self._lock:
            self._add_noted()
            return LoadSnapshot(
                num_tokens=self._num_tokens.astype(np.uint64),
                rows_by_layer=self._rows_by_layer.astype(np.uint64),
                num_forwards=self._num_forwards,
                num_rows=int(self._rows_by_layer.sum()),
                num_assignments=self._num_assignments,
                num_experts_read=self._num_experts_read,
                compute_ns=self._compute_ns,
            )
