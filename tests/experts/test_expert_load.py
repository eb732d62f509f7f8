import numpy as np
import pytest
import torch

from experts.expert_load import MAX_NOTED, MAX_NOTED_ASSIGNMENTS, ExpertLoad
from experts.grouped_ffn import ForwardInput

LAYERS, NUM_EXPERTS = (3, 7), 8


def forward(*expert_ids: int) -> ForwardInput:
    assignments = np.zeros((4, len(expert_ids)), dtype=np.int32)
    assignments[2] = expert_ids
    return ForwardInput(hidden_states=torch.zeros(2, 4), assignment_bytes=assignments.tobytes(), num_partial_sums=1)


@pytest.mark.parametrize("num_computations", [0, 1, MAX_NOTED - 1, MAX_NOTED, MAX_NOTED + 1, 3 * MAX_NOTED + 5])
def test_a_snapshot_has_every_computation_once_however_many_are_noted(num_computations: int) -> None:
    load = ExpertLoad(LAYERS, NUM_EXPERTS)
    for _ in range(num_computations):
        load.count(7, [forward(1), forward(1, 5)], compute_ns=10)
    for _ in range(2):  # taking one changes nothing
        snapshot = load.snapshot()
        assert snapshot.num_tokens.tolist() == [[0] * 8, [0, 2 * num_computations, 0, 0, 0, num_computations, 0, 0]]
        assert snapshot.rows_by_layer.tolist() == [0, 4 * num_computations]
        assert (snapshot.num_forwards, snapshot.num_rows) == (2 * num_computations, 4 * num_computations)
        assert (snapshot.num_assignments, snapshot.num_experts_read) == (3 * num_computations, 2 * num_computations)
        assert snapshot.compute_ns == 10 * num_computations


def test_large_computations_are_not_kept() -> None:
    load = ExpertLoad(LAYERS, NUM_EXPERTS)
    load.count(3, [forward(*[2] * (MAX_NOTED_ASSIGNMENTS + 1))], compute_ns=1)
    assert load._noted == []
    assert load.snapshot().num_tokens[0].tolist() == [0, 0, MAX_NOTED_ASSIGNMENTS + 1, 0, 0, 0, 0, 0]
