"""Ports and addresses as probes and scrapers of a cluster find them."""

import socket
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config import MobulaConfig, parse_config
from cluster.controller.process import ProcessState
from cluster.roles.preflight import check
from cluster.roles.shard_role import ShardRole
from cluster.roles.worker_role import WorkerRole
from tests.checkpoints import write_checkpoint

POD_IP = "127.0.0.9"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((POD_IP, 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def config(tmp_path: Path) -> MobulaConfig:
    def ports() -> dict[str, int]:
        return {"count": 1} | {name: free_port() for name in ("port", "metrics_port", "health_port")}

    folder = write_checkpoint(tmp_path, "v2", seed=3)
    return parse_config({"model": str(folder), "expert_shards": ports(), "attention_workers": ports()})


def probe(address: str) -> health_pb2.HealthCheckResponse.ServingStatus:
    """What a kubelet asks: the service with the empty name."""
    with grpc.insecure_channel(address) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5.0).status


def test_a_role_listens_at_the_address_of_its_pod_and_its_probe_means_weights_and_a_map(
    config: MobulaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POD_IP", POD_IP)
    expert_map = check(config).expert_map
    shard, worker = ShardRole(config, 0, None), WorkerRole(config, 0, None)
    for role in (shard, worker):
        role.load(expert_map)
    shard_address = f"{POD_IP}:{config.expert_shards.port}"
    worker_address = f"{POD_IP}:{config.attention_workers.port}"
    assert shard.health().address == shard_address, shard.health()
    assert shard.health().metrics_address == f"{POD_IP}:{config.expert_shards.metrics_port}"
    assert worker.health().metrics_address == f"{POD_IP}:{config.attention_workers.metrics_port}"
    assert probe(shard_address) == health_pb2.HealthCheckResponse.SERVING
    worker_addresses = worker_address, f"{POD_IP}:{config.attention_workers.health_port}"
    assert probe(f"{POD_IP}:{config.expert_shards.health_port}") == health_pb2.HealthCheckResponse.SERVING
    for address in worker_addresses:
        assert probe(address) == health_pb2.HealthCheckResponse.NOT_SERVING  # it knows no shards yet
    worker.update_placement(expert_map, {0: shard_address})
    for address in worker_addresses:
        assert probe(address) == health_pb2.HealthCheckResponse.SERVING
    worker.stop(0.0)
    shard.stop(0.0)


def test_a_taken_port_is_named_with_the_key_that_changes_it(
    config: MobulaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POD_IP", POD_IP)
    worker = WorkerRole(config, 0, None)
    with socket.create_server((POD_IP, config.attention_workers.port)):
        worker.load(check(config).expert_map)
    assert worker.health().state is ProcessState.FAILED
    assert "attention_workers.port" in worker.health().detail
