"""Counted load: how many tokens each expert has computed. The compute thread counts, any thread takes snapshots."""

import threading

import numpy as np

from experts.grouped_ffn import ForwardInput
from experts.load_snapshot import LoadSnapshot


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
