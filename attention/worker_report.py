"""What a worker tells clients besides text: the model, the experts' load as the shards count it, and where they live.

Lives on the worker's event loop. Knows nothing of how tokens are routed beyond the map and the router's counters.
"""

import asyncio
from collections.abc import Mapping

import grpc
import grpc.aio

from protos import errors, expert_pb2, expert_pb2_grpc, generation_pb2, rpc
from protos.credentials import PLAINTEXT, Credentials, PeerRole
from router.expert_map import ExpertMap
from router.gate_config import GateConfig
from router.metrics import DispatchStats
from router.router import Router

SHARD_TIMEOUT_S = 5.0


class WorkerReport:
    """Implements attention.servicer.ClusterInfo."""

    def __init__(
        self,
        router: Router,
        gate: GateConfig,
        model_info: generation_pb2.GetModelInfoResponse,
        credentials: Credentials = PLAINTEXT,
    ) -> None:
        """model_info: without ep_size, which changes."""
        self._credentials = credentials
        self._router = router
        self._gate = gate
        self._model_info = model_info
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._addresses: dict[int, str] = {}

    async def update_shards(self, addresses: Mapping[int, str]) -> None:
        """The shards to ask, by ep_rank."""
        for address in set(addresses.values()) - set(self._channels):
            self._channels[address] = self._credentials.channel(address, PeerRole.SHARD, rpc.frame_options())
        self._addresses = dict(addresses)
        for address in set(self._channels) - set(addresses.values()):
            await self._channels.pop(address).close(grace=0)

    async def model_info(self) -> generation_pb2.GetModelInfoResponse:
        """What is served, and by how many shards now."""
        info = generation_pb2.GetModelInfoResponse(ep_size=len(self._router.expert_map.ep_ranks))
        info.MergeFrom(self._model_info)
        return info

    async def expert_load(self) -> generation_pb2.GetExpertLoadResponse:
        """Counters of all shards and this worker's dispatch counters. Raises Unavailable if a shard does not answer."""
        expert_map, addresses = self._router.expert_map, self._addresses
        answers = await asyncio.gather(*(self._shard_load(rank, addresses[rank]) for rank in sorted(addresses)))
        response = generation_pb2.GetExpertLoadResponse(placement_version=expert_map.placement_version)
        totals = {layer_id: [0] * expert_map.n_routed_experts for layer_id in expert_map.moe_layer_ids}
        for rank, load in zip(sorted(addresses), answers, strict=True):
            for layer in load.layers:
                total = totals[layer.layer_id]
                for expert_id, count in enumerate(layer.num_tokens):
                    total[expert_id] += count
            response.shards.add(
                ep_rank=rank,
                address=addresses[rank],
                num_units=load.num_units,
                num_forwards=load.num_forwards,
                num_rows=load.num_rows,
                num_assignments=load.num_assignments,
                weight_bytes=load.weight_bytes,
            )
        for layer_id, counts in totals.items():
            response.layers.add(layer_id=layer_id, num_tokens=counts)
        response.dispatch.CopyFrom(_dispatch(self._router.stats()))
        return response

    async def placement(self) -> generation_pb2.GetPlacementResponse:
        """The newest expert map."""
        return _placement(self._router.expert_map, self._gate)

    async def close(self) -> None:
        await self.update_shards({})

    async def _shard_load(self, ep_rank: int, address: str) -> expert_pb2.GetShardLoadResponse:
        if address not in self._channels:
            raise _no_load(ep_rank, address, "it is no longer in use")
        stub = expert_pb2_grpc.ExpertShardStub(self._channels[address])
        try:
            load: expert_pb2.GetShardLoadResponse = await stub.GetShardLoad(
                expert_pb2.GetShardLoadRequest(), timeout=SHARD_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise _no_load(ep_rank, address, error.code().name) from error
        except asyncio.CancelledError as error:  # also when update_shards closes the channel
            if rpc.is_client_gone():
                raise
            raise _no_load(ep_rank, address, "it is no longer in use") from error
        return load


def _no_load(ep_rank: int, address: str, why: str) -> errors.ShardUnavailable:
    return errors.ShardUnavailable(
        f"shard {ep_rank} at {address} did not report its load: {why}; retry later", retry_after_s=1.0
    )


def _dispatch(stats: DispatchStats) -> generation_pb2.DispatchStats:
    return generation_pb2.DispatchStats(
        num_tokens_by_ranks=stats.num_tokens_by_ranks,
        max_ranks_per_token=stats.max_ranks_per_token,
        sent_bytes=stats.sent_bytes,
        received_bytes=stats.received_bytes,
        num_dropped_assignments=stats.num_dropped_assignments,
        num_device_limit_violations=stats.num_device_limit_violations,
    )


def _placement(expert_map: ExpertMap, gate: GateConfig) -> generation_pb2.GetPlacementResponse:
    response = generation_pb2.GetPlacementResponse(
        placement_version=expert_map.placement_version,
        ep_size=expert_map.ep_size,
        max_ranks_per_token=expert_map.max_ranks_per_token(gate),
    )
    for row, layer_id in enumerate(expert_map.moe_layer_ids):
        layer = response.layers.add(layer_id=layer_id, expert_to_unit=expert_map.expert_to_unit[row].tolist())
        for ranks in expert_map.unit_to_ep_ranks[row].tolist():
            layer.units.add(ep_ranks=[rank for rank in ranks if rank >= 0])
    return response
