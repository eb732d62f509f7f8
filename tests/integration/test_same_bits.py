"""The same batches give the same logits to the bit, for every shard count, placement, replica and transport."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from attention.decoder import Decoder, DecoderWeights
from attention.latent_cache import LatentCache
from cluster import bundled_model
from cluster.checkpoint.checkpoint import Checkpoint
from experts.metrics import ShardMetrics
from experts.servicer import ExpertServer
from experts.shard import ExpertShard, ShardConfig
from experts.weight_store import ExpertModel, Unit
from protos.loop_thread import LoopThread
from protos.poller import Poller
from router.expert_map import ExpertMap
from router.grpc_transport import GrpcTransport
from router.local_transport import LocalTransport
from router.metrics import RouterMetrics
from router.placement import PlacementRequest, place_units
from router.ring_transport import RingTransport
from router.router import Router
from router.router_config import RouterConfig
from router.transport import ShardTransport
from tests.attention.steps import StepRunner, cache_config
from tests.checkpoints import write_checkpoint

PROMPTS = ([5, 9, 200, 31], list(range(3, 60)), [7] * 33)


class Shards:
    """Expert shards under one placement, and a router to them."""

    def __init__(self, checkpoint: Checkpoint, expert_map: ExpertMap, dtype: torch.dtype) -> None:
        decoder = checkpoint.model_config().decoder
        model = ExpertModel(
            moe_layer_ids=decoder.moe_layer_ids,
            n_routed_experts=decoder.gate.n_routed_experts,
            hidden_size=decoder.hidden_size,
            moe_intermediate_size=decoder.moe_intermediate_size,
            dtype=dtype,
        )
        self.decoder_config, self.expert_map = decoder, expert_map
        self.shards = []
        for rank in range(expert_map.ep_size):
            shard = ExpertShard(ShardConfig(ep_rank=rank), model, checkpoint, ShardMetrics(CollectorRegistry(), rank))
            shard.activate(expert_map.placement_version, [Unit(*unit) for unit in expert_map.units_of(rank)])
            shard.start()
            self.shards.append(shard)

    @contextmanager
    def router(self, transport: str) -> Iterator[Router]:
        loop = LoopThread("test")
        servers = []
        addresses = {rank: str(rank) for rank in range(len(self.shards))}
        poller = Poller()
        if transport != "local":
            servers = [loop.run(ExpertServer.start(shard, "127.0.0.1", 0)) for shard in self.shards]
            addresses = {rank: f"127.0.0.1:{server.port}" for rank, server in enumerate(servers)}

        def connect(address: str) -> ShardTransport:
            if transport == "grpc":
                return GrpcTransport(address, loop.loop)
            if transport == "ring":
                return RingTransport(address, loop.loop, poller, 2**24)
            return LocalTransport(self.shards[int(address)].forward, address)

        router = Router(
            config=RouterConfig(forward_timeout_s=30.0),
            gate=self.decoder_config.gate,
            expert_map=self.expert_map,
            addresses=addresses,
            connect=connect,
            metrics=RouterMetrics(CollectorRegistry(), dp_rank=0),
            poller=poller,
        )
        try:
            assert router.wait_until_connected(10.0) == []
            yield router
        finally:
            router.close()
            for server in servers:
                loop.run(server.stop(0.0))
            for shard in self.shards:
                shard.stop()
            loop.stop()


def logits(folder: Path, expert_map: ExpertMap, transport: str, dtype: torch.dtype) -> Tensor:
    """Of one prefill of three sequences in uneven chunks and four decode steps of all of them."""
    checkpoint = Checkpoint.open(folder)
    shards = Shards(checkpoint, expert_map, dtype)
    config = shards.decoder_config
    with shards.router(transport) as router:
        runner = StepRunner(folder, dtype=dtype)
        runner.decoder = Decoder(
            config,
            DecoderWeights.read(checkpoint, config, dtype),
            router,
            LatentCache(cache_config(config, num_blocks=256, dtype=dtype)),
        )
        rows = [runner.sequence([*prompt, *range(10, 14)]) for prompt in PROMPTS]
        runner.step([(row, max(1, len(prompt) // 2)) for row, prompt in zip(rows, PROMPTS, strict=True)])
        runner.step([(row, len(prompt) - max(1, len(prompt) // 2)) for row, prompt in zip(rows, PROMPTS, strict=True)])
        for _ in range(4):
            runner.step([(row, 1) for row in rows])
    return torch.cat([torch.cat(row.logits) for row in rows])


def placement(folder: Path, ep_size: int, num_replicas: int = 1) -> ExpertMap:
    decoder = Checkpoint.open(folder).model_config().decoder
    request = PlacementRequest(
        moe_layer_ids=decoder.moe_layer_ids, gate=decoder.gate, ep_size=ep_size, num_replicas=num_replicas
    )
    return place_units(request)


def shuffled(expert_map: ExpertMap, seed: int) -> ExpertMap:
    """The same units, each on a shard drawn at random."""
    ranks = np.random.default_rng(seed).integers(0, expert_map.ep_size, expert_map.unit_to_ep_ranks.shape[:2])
    return replace(expert_map, unit_to_ep_ranks=ranks[..., None])


@pytest.fixture(scope="module", params=["v2", "v2_lite", "v3", "bundled"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "bundled":
        return bundled_model.path()
    return write_checkpoint(tmp_path_factory.mktemp("model"), request.param, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_equal_to_the_bit_wherever_experts_live(folder: Path, dtype: torch.dtype) -> None:
    expected = logits(folder, placement(folder, 1), "local", dtype)
    assert expected.isfinite().all()
    for ep_size in (2, 3, 5, 12):
        assert torch.equal(logits(folder, placement(folder, ep_size), "local", dtype), expected), ep_size
    assert torch.equal(logits(folder, placement(folder, 3), "grpc", dtype), expected)
    assert torch.equal(logits(folder, placement(folder, 3), "ring", dtype), expected)
    assert torch.equal(logits(folder, placement(folder, 4, num_replicas=2), "local", dtype), expected)
    assert torch.equal(logits(folder, shuffled(placement(folder, 5), seed=1), "grpc", dtype), expected)
