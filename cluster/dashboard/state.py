"""The public calls' answers as plain values, for JSON. Field names are the messages'."""

from typing import Any

from cluster.controller.process import ClusterStatus
from protos import generation_pb2


def load_fields(load: generation_pb2.GetExpertLoadResponse) -> dict[str, Any]:
    """num_tokens: [num_moe_layers, n_routed_experts], as counted since the shards started."""
    dispatch = load.dispatch
    return {
        "placement_version": load.placement_version,
        "layer_ids": [layer.layer_id for layer in load.layers],
        "num_tokens": [list(layer.num_tokens) for layer in load.layers],
        "shards": [
            {
                "ep_rank": shard.ep_rank,
                "address": shard.address,
                "num_units": shard.num_units,
                "num_forwards": shard.num_forwards,
                "num_rows": shard.num_rows,
                "num_assignments": shard.num_assignments,
                "weight_bytes": shard.weight_bytes,
            }
            for shard in load.shards
        ],
        "dispatch": {
            "num_tokens_by_ranks": list(dispatch.num_tokens_by_ranks),
            "max_ranks_per_token": dispatch.max_ranks_per_token,
            "sent_bytes": dispatch.sent_bytes,
            "received_bytes": dispatch.received_bytes,
            "num_dropped_assignments": dispatch.num_dropped_assignments,
            "num_device_limit_violations": dispatch.num_device_limit_violations,
        },
    }


def placement_fields(placement: generation_pb2.GetPlacementResponse) -> dict[str, Any]:
    """Each layer: the unit of each expert, and the shards of each unit."""
    return {
        "placement_version": placement.placement_version,
        "ep_size": placement.ep_size,
        "max_ranks_per_token": placement.max_ranks_per_token,
        "layers": [
            {
                "layer_id": layer.layer_id,
                "expert_to_unit": list(layer.expert_to_unit),
                "unit_ep_ranks": [list(unit.ep_ranks) for unit in layer.units],
            }
            for layer in placement.layers
        ],
    }


def model_fields(info: generation_pb2.GetModelInfoResponse) -> dict[str, Any]:
    """What the page's title says."""
    names = (
        "model_id", "model_type", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
        "dp_size", "ep_size", "version",
    )  # fmt: skip
    return {name: getattr(info, name) for name in names}


def status_fields(status: ClusterStatus) -> dict[str, Any]:
    """The controller's view."""
    rebalance = status.rebalance
    return {
        "is_serving": status.is_serving,
        "placement_version": status.placement_version,
        "processes": [
            {
                "name": name,
                "state": health.state.value,
                "address": health.address,
                "pid": health.pid,
                "weight_bytes": health.weight_bytes,
                "detail": health.detail,
            }
            for name, health in status.processes
        ],
        "rebalance": {
            "state": rebalance.state.value,
            "target_version": rebalance.target_version,
            "moved_bytes": rebalance.moved_bytes,
            "planned_bytes": rebalance.planned_bytes,
            "num_done": rebalance.num_done,
            "num_aborted": rebalance.num_aborted,
            "last_result": rebalance.last_result,
            "reason": rebalance.reason,
            "seconds_since_success": rebalance.seconds_since_success,
        },
    }
