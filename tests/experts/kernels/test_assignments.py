import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.forward_frame import ForwardLimits, check_assignments
from experts.kernels.assignments import kernel_accepts
from protos.errors import MobulaError
from router.plan import plan_layer
from tests.experts.kernels.instruction_sets import needs_kernels
from tests.fake_experts import grouped_gate, placed, random_rows

GATE = grouped_gate()


def numpy_accepts(assignments: np.ndarray, limits: ForwardLimits) -> bool:
    try:
        check_assignments(assignments[1], assignments[2], assignments[3], limits)
    except MobulaError:
        return False
    return True


@needs_kernels
@given(
    num_tokens=st.integers(0, 6),
    seed=st.integers(0, 99),
    changes=st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 99), st.sampled_from([-1, 1, 7, -(2**31), 2**31 - 1]))
    ),
    num_partial_sums=st.sampled_from([0, 1, -1, 2**31]),
    num_rows=st.sampled_from([0, -1]),
)
@settings(max_examples=300)
def test_the_kernel_accepts_what_numpy_accepts_and_nothing_else(num_tokens, seed, changes, num_partial_sums, num_rows):
    expert_map = placed(GATE, 2)
    rows = random_rows(GATE, num_tokens, hidden_size=2, seed=seed)
    plan = plan_layer(
        rows.topk_ids, rows.topk_weights, expert_map.expert_to_unit[0], expert_map.unit_to_ep_ranks[0, :, 0]
    )
    for message in plan.messages:
        held = np.where(expert_map.expert_to_unit[0] % 2 == message.ep_rank, expert_map.expert_to_unit[0], -1)
        assignments = message.assignments.copy()
        for column, place, change in changes:
            place %= message.num_assignments
            was = int(assignments[column, place])
            assignments[column, place] = min(was + change, 2**31 - 1) if change > 0 else change
        limits = ForwardLimits(
            layer_id=1, placement_version=1, num_rows=message.num_rows + num_rows,
            num_partial_sums=message.num_partial_sums + num_partial_sums, expert_to_unit=held,
        )  # fmt: skip
        accepted = kernel_accepts(
            assignments.tobytes(), held.ctypes.data, len(held), limits.num_rows % 2**32, limits.num_partial_sums % 2**32
        )
        assert accepted == numpy_accepts(assignments, limits)
        assert accepted or changes or num_partial_sums or num_rows  # an honest message is
