"""Counted load: how many tokens each expert has computed. The compute thread counts, any thread takes snapshots."""

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experts.grouped_ffn import ForwardInput

UInt64Array = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSnapshot:
    """Counts since the shard started.

    num_tokens: [num_moe_layers, n_routed_experts] uint64, (row, expert) pairs computed by each logical expert.
    rows_by_layer: [num_moe_layers] uint64, rows of hidden states that were received.
    num_forwards, num_rows, num_assignments: of all forwards together.
    num_experts_read: how often a computation went through an expert's weights.
    compute_ns: of all computations together.
    """

    num_tokens: UInt64Array
    rows_by_layer: UInt64Array
    num_forwards: int
    num_rows: int
    num_assignments: int
    num_experts_read: int
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
        self._lock = threading.Lock()  # a snapshot is of one moment

    def count(self, layer_id: int, num_forwards: int, forward: ForwardInput, compute_ns: int) -> None:
        """Adds a computation that answered `num_forwards` forwards."""
        counts = np.bincount(forward.expert_ids, minlength=self._num_tokens.shape[1])
        row = self._row_of_layer[layer_id]
        with self._lock:
            self._num_tokens[row] += counts
            self._rows_by_layer[row] += forward.num_rows
            self._num_forwards += num_forwards
            self._num_assignments += forward.num_assignments
            self._num_experts_read += int(np.count_nonzero(counts))
            self._compute_ns += compute_ns

    def snapshot(self) -> LoadSnapshot:
        """The counts so far."""
        with self._lock:
            return LoadSnapshot(
                num_tokens=self._num_tokens.astype(np.uint64),
                rows_by_layer=self._rows_by_layer.astype(np.uint64),
                num_forwards=self._num_forwards,
                num_rows=int(self._rows_by_layer.sum()),
                num_assignments=self._num_assignments,
                num_experts_read=self._num_experts_read,
                compute_ns=self._compute_ns,
            )
