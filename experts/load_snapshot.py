"""A shard's counters at one moment: a value, which the controller reads without what shards compute with."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
