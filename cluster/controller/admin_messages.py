"""The admin calls' values and their messages, in both directions where a client needs the values again."""

from collections.abc import Mapping
from typing import TypeVar

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from cluster.controller.process import ClusterStatus, ProcessHealth, ProcessState, Quarantine
from cluster.controller.rebalance import RebalancePlan, RebalanceState, RebalanceStatus
from protos import admin_pb2

PROCESS_STATES = {f"PROCESS_STATE_{state.name}": state for state in ProcessState}
REBALANCE_STATES = {f"REBALANCE_STATE_{state.name}": state for state in RebalanceState}
StateT = TypeVar("StateT")


def status_message(status: ClusterStatus) -> admin_pb2.GetStatusResponse:
    """What GetStatus answers."""
    return admin_pb2.GetStatusResponse(
        processes=[
            admin_pb2.ProcessStatus(
                name=name,
                state=f"PROCESS_STATE_{health.state.name}",
                address=health.address,
                pid=health.pid,
                weight_bytes=health.weight_bytes,
                detail=health.detail,
                generation=health.generation,
                num_units=health.num_units,
                is_leaving=health.is_leaving,
                replaced_generation=health.replaced_generation,
                quarantines=[admin_pb2.Quarantine(**quarantine._asdict()) for quarantine in health.quarantines],
            )
            for name, health in status.processes
        ],
        is_serving=status.is_serving,
        placement_version=status.placement_version,
        rebalance=_rebalance_status_message(status.rebalance),
    )


def cluster_status(message: admin_pb2.GetStatusResponse) -> ClusterStatus:
    """The value that a message came from. Raises ValueError for a state that this version does not know."""
    processes = tuple(
        (
            process.name,
            ProcessHealth(
                generation=process.generation,
                state=_state(PROCESS_STATES, admin_pb2.ProcessState, process.state),
                address=process.address,
                detail=process.detail,
                pid=process.pid,
                weight_bytes=process.weight_bytes,
                num_units=process.num_units,
                is_leaving=process.is_leaving,
                replaced_generation=process.replaced_generation,
                quarantines=tuple(_quarantine(quarantine) for quarantine in process.quarantines),
            ),
        )
        for process in message.processes
    )
    return ClusterStatus(
        processes=processes,
        is_serving=message.is_serving,
        placement_version=message.placement_version,
        rebalance=_rebalance_status(message.rebalance),
    )


def rebalance_message(plan: RebalancePlan, *, is_dry_run: bool) -> admin_pb2.RebalanceResponse:
    """What Rebalance answers. A plan that moves nothing is never begun."""
    return admin_pb2.RebalanceResponse(
        moves=[admin_pb2.UnitMove(**move._asdict()) for move in plan.moves],
        moved_bytes=plan.moved_bytes,
        balancedness_before=plan.balancedness_before,
        balancedness_after=plan.balancedness_after,
        step_time_ratio=plan.step_time_ratio,
        num_tokens=plan.num_tokens,
        reason=plan.reason,
        is_worth_it=plan.is_worth_it,
        started=plan.changes_anything and not is_dry_run,
        old_placement_version=plan.old.placement_version,
        new_placement_version=plan.new.placement_version,
    )


def _rebalance_status_message(status: RebalanceStatus) -> admin_pb2.RebalanceStatus:
    return admin_pb2.RebalanceStatus(
        state=f"REBALANCE_STATE_{status.state.name}",
        target_version=status.target_version,
        moved_bytes=status.moved_bytes,
        planned_bytes=status.planned_bytes,
        num_done=status.num_done,
        num_aborted=status.num_aborted,
        last_result=status.last_result,
        reason=status.reason,
        seconds_since_success=status.seconds_since_success,
    )


def _rebalance_status(message: admin_pb2.RebalanceStatus) -> RebalanceStatus:
    has_succeeded = message.HasField("seconds_since_success")
    return RebalanceStatus(
        state=_state(REBALANCE_STATES, admin_pb2.RebalanceState, message.state),
        target_version=message.target_version if message.HasField("target_version") else None,
        moved_bytes=message.moved_bytes,
        planned_bytes=message.planned_bytes,
        num_done=message.num_done,
        num_aborted=message.num_aborted,
        last_result=message.last_result,
        reason=message.reason,
        seconds_since_success=message.seconds_since_success if has_succeeded else None,
    )


def _quarantine(message: admin_pb2.Quarantine) -> Quarantine:
    return Quarantine(
        ep_rank=message.ep_rank,
        layer_id=message.layer_id if message.HasField("layer_id") else None,
        unit_id=message.unit_id if message.HasField("unit_id") else None,
        reason=message.reason,
    )


def _state(states: Mapping[str, StateT], enum: EnumTypeWrapper, number: int) -> StateT:
    name = enum.Name(number) if number in enum.values() else str(number)
    if name not in states:
        raise ValueError(f"the answer has a state {name} that this version does not know; use the server's version")
    return states[name]
