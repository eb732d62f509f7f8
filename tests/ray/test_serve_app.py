"""The Serve application on a real local Ray cluster, as a RayService deploys it."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import yaml
from ray import serve

from cluster.client import InferenceClient
from cluster.serve_app import AppArgs, app
from protos import generation_pb2 as pb
from tests.checkpoints import write_checkpoint
from tests.integration.test_fixed_ports import free_port

pytestmark = pytest.mark.ray

ROLE_LABEL = "ep/role"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file as in k8s/base: roles find their nodes by label."""
    role = {"count": 1, "num_cpus": 0.5}
    settings = {
        "model": str(write_checkpoint(tmp_path / "model", "v2", seed=3)),
        "attention_workers": role | {"labels": {ROLE_LABEL: "everything"}},
        "expert_shards": role | {"labels": {ROLE_LABEL: "everything"}},
        "controller": {"labels": {ROLE_LABEL: "everything"}},
        "gateway": {"port": free_port(), "metrics_port": 0, "labels": {ROLE_LABEL: "everything"}},
        "ray": {"address": "auto"},
        "drain_timeout_s": 1.0,
    }
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.init(
        address="local",
        num_cpus=4,
        labels={ROLE_LABEL: "everything"},
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=80 * 2**20,
        log_to_driver=False,
    )
    yield
    serve.shutdown()
    ray.shutdown()


def test_serve_starts_the_system_shows_its_status_and_ends_it(ray_cluster: None, config: Path) -> None:
    http_port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": http_port})
    serve.run(app(AppArgs(config=str(config))), name="mobula", route_prefix="/")  # returns when it is up
    with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/", timeout=30) as response:
        status = json.load(response)
    assert status["is_serving"]
    processes = {process["name"]: process for process in status["processes"]}
    assert sorted(processes) == ["gateway-0", "shard-0", "worker-0"]
    with InferenceClient(processes["gateway-0"]["address"]) as client:
        params = pb.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        assert [answer.num_tokens for answer in client.generate("experts", params, timeout_s=60.0)][-1] == 8
    running = [psutil.Process(process["pid"]) for process in processes.values()]

    serve.delete("mobula")

    _, alive = psutil.wait_procs(running, timeout=30.0)
    assert alive == []
