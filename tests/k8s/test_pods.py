"""The Pods of cpu-demo as hosts, without Kubernetes: what its manifests say starts, serves, is probed, scraped, scaled,
and hands over when a Pod ends.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.k8s.manifests import K8S, render
from tests.k8s.pod_prometheus import PodPrometheus
from tests.k8s.pods import Pods
from tests.netns.hosts import missing

pytestmark = [pytest.mark.pods, pytest.mark.timeout(600), pytest.mark.skipif(bool(missing()), reason=missing())]
BOARDS = K8S / "components" / "monitoring" / "boards"


@pytest.fixture(scope="module")
def pods() -> Iterator[Pods]:
    manifests = render("overlays/raycluster")
    with TemporaryDirectory(prefix="mobula-") as folder, Pods(manifests, Path(folder), num_spare_experts=1) as pods:
        yield pods


@pytest.fixture(scope="module")
def metrics(pods: Pods, tmp_path_factory: pytest.TempPathFactory) -> PodPrometheus:
    try:
        return PodPrometheus(pods, tmp_path_factory.mktemp("prometheus"))
    except LookupError as error:
        pytest.skip(str(error))


def board_queries() -> list[str]:
    """Of every panel, over seconds."""
    boards = [json.loads(path.read_text(encoding="utf-8")) for path in BOARDS.glob("*.json")]
    queries = {target["expr"] for board in boards for panel in board["panels"] for target in panel["targets"]}
    return sorted(query.replace("$__rate_interval", "20s").replace("$__range", "1m") for query in queries)


def shards(pods: Pods) -> dict[str, str]:
    """Addresses of the shards that hold weights, by name."""
    processes = pods.status()["processes"]
    return {p["name"]: p["address"] for p in processes if p["name"].startswith("shard") and p["weight_bytes"]}


def ready_workers(pods: Pods) -> list[str]:
    status = pods.status()
    workers = [p for p in status["processes"] if p["name"].startswith("worker")]
    is_ready = all(worker["state"] == "ready" for worker in workers)
    return [worker["name"] for worker in workers] if status["is_serving"] and is_ready else []


def generate(pods: Pods) -> str:
    address = pods.port("gateway-0", "serve-grpc")
    command = ["mobula", "generate", "def main():", "--temperature", "0", "--max-tokens", "8", "--address", address]
    answer = pods.run("head-0", command)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout.splitlines()[0]


def test_pods_start_serve_scale_show_on_the_boards_and_hand_over(pods: Pods, metrics: PodPrometheus) -> None:
    used = [pod for pod in pods.roles if pod.startswith(("gateway", "attention"))]
    for pod in used:
        pods.wait_until(lambda pod=pod: pods.is_ready(pod), f"{pod} is not ready", 20.0)
    experts = [pod for pod in pods.roles if pod.startswith("expert")]
    assert sum(pods.is_ready(pod) for pod in experts) == 2  # the spare one has no shard
    text = generate(pods)

    gateway = ["--address", pods.port("gateway-0", "serve-grpc")]
    assert pods.run("gateway-0", ["mobula", "scale", "shards", "3", *gateway]).returncode == 0
    pods.wait_until(lambda: len(shards(pods)) == 3, "no third shard with units", 60.0)
    assert all(pods.is_ready(pod) for pod in experts)
    assert generate(pods) == text
    assert pods.run("gateway-0", ["mobula", "scale", "shards", "2", *gateway]).returncode == 0
    pods.wait_until(lambda: len(shards(pods)) == 2, "the third shard did not leave", 60.0)
    assert generate(pods) == text

    for count in (1, 2):
        assert pods.run("gateway-0", ["mobula", "scale", "workers", str(count), *gateway]).returncode == 0
        pods.wait_until(lambda count=count: len(ready_workers(pods)) == count, f"no {count} workers", 60.0)
        assert generate(pods) == text

    load = pods.start("head-0", "load", [sys.executable, "-m", "tests.netns.load_process", gateway[1]])
    give_up_s = time.monotonic() + 40.0
    while empty := [query for query, found in metrics.query(board_queries()).items() if not found]:
        assert time.monotonic() < give_up_s, empty
        time.sleep(1.0)
    load.stdin.close()
    assert load.wait(60.0) == 0, pods.last_words()

    (leaving,) = [pod for pod in experts if pods.port(pod, "serve-expert") == shards(pods)["shard-0"]]
    ended = pods.end(leaving)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not pods.is_ready(leaving)
    pods.wait_until(lambda: len(shards(pods)) == 2, "no shard took its place", 60.0)
    assert pods.port(leaving, "serve-expert") not in shards(pods).values()
    assert generate(pods) == text

    assert pods.stop_serving() == 0, pods.last_words()
