"""Values and messages of the admin calls."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.controller.admin_messages import cluster_status, rebalance_message, status_message
from cluster.controller.process import ClusterStatus, ProcessHealth, ProcessState
from cluster.controller.rebalance import RebalanceState, RebalanceStatus
from protos import admin_pb2
from tests.fake_controller import MOVES, rebalance_plan

COUNTS = st.integers(0, 2**53)
HEALTH = st.builds(
    ProcessHealth,
    generation=st.text(),
    state=st.sampled_from(ProcessState),
    address=st.text(),
    detail=st.text(),
    pid=COUNTS,
    weight_bytes=COUNTS,
    is_leaving=st.booleans(),
    replaced_generation=st.text(),
)
REBALANCE = st.builds(
    RebalanceStatus,
    state=st.sampled_from(RebalanceState),
    target_version=st.none() | COUNTS,
    moved_bytes=COUNTS,
    planned_bytes=COUNTS,
    num_done=COUNTS,
    num_aborted=COUNTS,
    last_result=st.text(),
    reason=st.text(),
    seconds_since_success=st.none() | st.floats(0, 1e9),
)
STATUS = st.builds(
    ClusterStatus,
    processes=st.lists(st.tuples(st.text(), HEALTH), max_size=3).map(tuple),
    is_serving=st.booleans(),
    placement_version=COUNTS,
    rebalance=REBALANCE,
)


@given(STATUS)
def test_a_status_survives_the_wire(status: ClusterStatus) -> None:
    data = status_message(status).SerializeToString()
    assert cluster_status(admin_pb2.GetStatusResponse.FromString(data)) == status


@pytest.mark.parametrize("number", [0, 99])
def test_a_state_of_another_version_is_refused_by_its_number_or_name(number: int) -> None:
    answer = admin_pb2.GetStatusResponse()
    answer.processes.add(name="shard-0", state=number)
    with pytest.raises(ValueError, match=f"{number or 'PROCESS_STATE_UNSPECIFIED'} that this version does not know"):
        cluster_status(answer)


def test_a_plan_is_told_whole_and_begins_only_when_it_moves_something_and_is_no_dry_run() -> None:
    message = rebalance_message(rebalance_plan(placement_version=4), is_dry_run=False)
    assert [(move.ep_rank, move.layer_id, move.unit_id, move.num_bytes) for move in message.moves] == list(MOVES)
    assert message.moved_bytes == sum(move.num_bytes for move in MOVES)
    assert (message.balancedness_before, message.balancedness_after, message.step_time_ratio) == (0.5, 0.875, 0.75)
    assert (message.old_placement_version, message.new_placement_version, message.num_tokens) == (4, 5, 12_345)
    assert message.is_worth_it
    assert "25.0%" in message.reason
    assert message.started
    assert not rebalance_message(rebalance_plan(), is_dry_run=True).started
    assert not rebalance_message(rebalance_plan(moves=()), is_dry_run=False).started
