"""The whole system on a real local Ray cluster, over mutual TLS and with a key: it starts, serves, loses processes,
gets them back, and ends.
"""

import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster import client_access
from cluster.client import AdminClient, InferenceClient
from cluster.client_access import ClientAccess
from cluster.commands.terminal import INTERRUPTED
from cluster.config import parse_config
from cluster.controller.controller import StartError
from cluster.controller.process import ProcessHealth
from cluster.roles.actors import ACTOR_THREADS
from cluster.roles.launch import Deployment
from cluster.security.keys import KeyFile, Right, new_key, write_keys
from protos import admin_pb2
from protos import generation_pb2 as pb
from tests.certificates import make_authority
from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.ray

TIMEOUT_S = 120.0
RAY_AGENTS = ("ray::RuntimeEnv", "ray::Dashboard")
PROMPT = "the experts are called"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), "v2", seed=3)
    tls = make_authority(tmp_path_factory.mktemp("tls")).folder
    key, text = new_key("operator", frozenset(Right))
    write_keys(tls / "keys.json", KeyFile(keys=(key,)))
    settings = {
        "model": str(folder),
        "attention_workers": {"count": 2, "num_cpus": 0.5},
        "expert_shards": {"count": 2, "num_cpus": 0.5},
        "gateway": {"port": 0, "metrics_port": 0, "keys": str(tls / "keys.json")},
        "tls": {"processes": str(tls), "clients": str(tls / "public")},
        "drain_timeout_s": 2.0,
    }
    with pytest.MonkeyPatch.context() as environment, Deployment(parse_config(settings)) as deployment:
        environment.setenv(client_access.TLS_CA, str(tls / "public" / "ca.crt"))
        environment.setenv(client_access.API_KEY, text)
        deployment.wait_until_serving(lambda status: None)
        yield deployment


def health_of(deployment: Deployment, name: str) -> ProcessHealth:
    status = deployment.status()
    assert status
    return dict(status.processes)[name]


def generate(deployment: Deployment, num_tokens: int = 24) -> str:
    params = pb.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    with InferenceClient(deployment.address) as client:
        for generation in client.generate(PROMPT, params, timeout_s=TIMEOUT_S):
            text = generation.text
    return text


def wait_until_serving(deployment: Deployment) -> None:
    give_up_s = time.monotonic() + TIMEOUT_S
    while not (status := deployment.status()) or not status.is_serving:
        assert time.monotonic() < give_up_s, status
        time.sleep(0.1)


def wait_until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.1)


def kill(deployment: Deployment, name: str) -> ProcessHealth:
    """As a crash does."""
    health = health_of(deployment, name)
    os.kill(health.pid, signal.SIGKILL)
    return health


def wait_until_replaced(deployment: Deployment, name: str, generation: str) -> None:
    give_up_s = time.monotonic() + TIMEOUT_S
    while health_of(deployment, name).generation in ("", generation):
        assert time.monotonic() < give_up_s
        time.sleep(0.1)
    wait_until_serving(deployment)


def test_attention_and_experts_are_separate_processes(deployment: Deployment) -> None:
    status = deployment.status()
    assert status
    pids = [health.pid for _, health in status.processes]
    assert len(set(pids)) == len(pids) == 5
    assert generate(deployment)


def scraped(deployment: Deployment) -> str:
    with urllib.request.urlopen(f"http://{deployment.metrics_address}/metrics") as response:
        return str(response.read().decode())


def test_one_scrape_gives_the_series_of_every_process(deployment: Deployment) -> None:
    generate(deployment)
    page = scraped(deployment)
    assert page.count("mobula_process_up{") == 5
    assert 'mobula_generation_tokens_total{dp_rank="' in page
    assert 'mobula_ep_rank_tokens_total{ep_rank="1"}' in page
    for line in page.splitlines():
        if line.startswith("mobula_device_limit_violations_total"):
            assert line.endswith(" 0.0")


def test_gateway_says_that_it_serves(deployment: Deployment) -> None:
    with ClientAccess.from_environment().channel(deployment.address, ()) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="mobula.v1.Inference"), timeout=5.0
        )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_an_operator_asks_the_gateway_and_the_controller_answers(deployment: Deployment) -> None:
    with AdminClient(deployment.address) as client:
        answer = client.status()
        plan = client.rebalance(is_dry_run=True)
    status = deployment.status()
    assert status
    assert {process.name: process.pid for process in answer.processes} == {
        name: health.pid for name, health in status.processes
    }
    assert answer.is_serving
    assert plan.old_placement_version == answer.placement_version
    assert not plan.started


def test_a_request_waits_for_a_killed_shard_and_gets_the_same_text(deployment: Deployment) -> None:
    expected = generate(deployment, num_tokens=200)
    params = pb.SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    with InferenceClient(deployment.address) as client:
        answers = client.generate(PROMPT, params, timeout_s=TIMEOUT_S)
        generation = next(answers)
        killed = kill(deployment, "shard-1")
        *_, generation = answers
    assert generation.text == expected
    wait_until_replaced(deployment, "shard-1", killed.generation)


def test_a_killed_worker_comes_back_and_the_other_one_goes_on_with_its_answers_meanwhile(
    deployment: Deployment,
) -> None:
    expected, long = generate(deployment), generate(deployment, num_tokens=200)
    params = pb.SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    with InferenceClient(deployment.address) as client:
        answers = client.generate(PROMPT, params, timeout_s=TIMEOUT_S)
        next(answers)  # of worker 0: the fewest calls in flight, then the lower rank
        killed = kill(deployment, "worker-0")
        *_, generation = answers
    assert generation.text == long
    for _ in range(4):
        assert generate(deployment) == expected
    wait_until_replaced(deployment, "worker-0", killed.generation)
    assert generate(deployment) == expected


def test_a_shard_is_added_and_one_drained_while_requests_run(deployment: Deployment) -> None:
    text = generate(deployment)
    status = deployment.status()
    assert status
    stopping = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool, AdminClient(deployment.address) as client:
        texts = pool.submit(lambda: [generate(deployment) for _ in iter(stopping.is_set, True)])
        try:
            for ep_ranks, ask in (
                ([0, 1, 2], lambda: client.scale_shards(3)),
                ([0, 2], lambda: client.drain(admin_pb2.PROCESS_ROLE_SHARD, 1)),
                ([0, 1], lambda: (client.scale_shards(3), client.drain(admin_pb2.PROCESS_ROLE_SHARD, 2))),
            ):
                version = client.status().placement_version
                ask()
                wait_until(lambda ranks=ep_ranks, old=version: is_placed_on(client, ranks, old))
        finally:
            stopping.set()
        assert set(texts.result(TIMEOUT_S)) == {text}


def test_a_worker_is_added_serves_is_drained_and_comes_back(deployment: Deployment) -> None:
    text = generate(deployment, num_tokens=60)
    with AdminClient(deployment.address) as client, ThreadPoolExecutor(max_workers=6) as pool:
        for count in (3, 2, 3):
            client.scale_workers(count)
            wait_until(lambda count=count: workers_that_serve(client) == list(range(count)))
            texts = pool.map(lambda _: generate(deployment, num_tokens=60), range(6))
            assert set(texts) == {text}
            if count == 3:
                page = scraped(deployment)
                assert float(re.findall(r'^mobula_generation_tokens_total{dp_rank="2"} (\S+)', page, re.M)[0]) > 0
        client.drain(admin_pb2.PROCESS_ROLE_WORKER, 0)
        wait_until(lambda: workers_that_serve(client) == [1, 2])
        assert generate(deployment, num_tokens=60) == text
        assert list(client.scale_workers(2).added_dp_ranks) == []


def workers_that_serve(client: AdminClient) -> list[int]:
    """Ranks of all workers once they are ready, and everything serves."""
    status = client.status()
    workers = [process for process in status.processes if process.name.startswith("worker")]
    is_ready = all(worker.state == admin_pb2.PROCESS_STATE_READY for worker in workers)
    return [int(worker.name.removeprefix("worker-")) for worker in workers] if status.is_serving and is_ready else []


def is_placed_on(client: AdminClient, ep_ranks: list[int], old_version: int) -> bool:
    """Whether exactly these shards are left and have started, under a newer placement, and everything serves."""
    status = client.status()
    names = [process.name for process in status.processes if process.name.startswith("shard")]
    is_new = status.placement_version > old_version
    has_started = all(process.generation for process in status.processes)
    return status.is_serving and has_started and is_new and names == [f"shard-{rank}" for rank in ep_ranks]


def test_what_runs_goes_on_without_the_controller_and_the_next_one_takes_it_over(deployment: Deployment) -> None:
    before = deployment.status()
    assert before
    expected = generate(deployment, num_tokens=200)
    params = pb.SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    address = deployment.address
    with InferenceClient(address) as client:
        answers = client.generate(PROMPT, params, timeout_s=TIMEOUT_S)
        next(answers)
        (controller,) = [
            process
            for process in psutil.Process().children(recursive=True)
            if "ControllerActor" in " ".join(process.cmdline())
        ]
        controller.kill()
        *_, generation = answers
    assert generation.text == expected
    wait_until_serving(deployment)
    after = deployment.status()
    assert after
    assert {name: health.generation for name, health in after.processes} == {
        name: health.generation for name, health in before.processes
    }
    with AdminClient(address) as client:
        give_up_s = time.monotonic() + TIMEOUT_S
        while True:  # the gateway is told of the new controller in a moment
            try:
                assert client.status().is_serving
                break
            except grpc.RpcError:
                assert time.monotonic() < give_up_s
                time.sleep(0.1)


def test_others_who_wait_for_the_system_do_not_take_it_from_its_owner(deployment: Deployment) -> None:
    start = deployment._controller.start
    others = [start.remote(f"other {number}", deployment.config) for number in range(ACTOR_THREADS)]
    while ray.wait(others, num_returns=len(others), timeout=1.0)[1]:
        assert deployment.status()
    for other in others:
        with pytest.raises(StartError, match="another process serves Mobula"):
            ray.get(other)


def assert_only_loopback_is_listened_on(processes: list[psutil.Process]) -> None:
    listening = {
        process.pid: [link.laddr for link in process.net_connections("inet") if link.status == psutil.CONN_LISTEN]
        for process in processes
    }
    names = {process.name() for process in processes if listening[process.pid]}
    assert {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= names
    assert sum("Actor" in name for name in names) >= 4, names
    hosts = {host.removeprefix("::ffff:") for addresses in listening.values() for host, _ in addresses}
    assert all(ipaddress.ip_address(host).is_loopback for host in hosts), listening


@pytest.fixture
def serve(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """`mobula serve` in a process of its own, for the module's deployment still runs in this one."""
    folder = write_checkpoint(tmp_path / "model", "v2", seed=3)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {folder}\nattention_workers: {{count: 1, num_cpus: 0.5}}\nexpert_shards: {{count: 1, num_cpus: 0.5}}\n"
        "gateway: {port: 0, metrics_port: 0}\ndrain_timeout_s: 1.0\nlogging: {json_lines: true}\n"
    )
    command = [sys.executable, "-m", "cluster.commands.cli", "serve", "--config", str(config)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where tests are to ignore it
    ) as process:
        yield process
        if process.poll() is None:  # the test has failed; without this it would be waited for
            process.terminate()


def read_until(serve: "subprocess.Popen[str]", text: str) -> list[str]:
    assert serve.stdout
    lines = []
    for line in serve.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(lines)


def messages(lines: list[str]) -> list[str]:
    """Of lines that are an object each."""
    return [json.loads(line)["message"] for line in lines]


def lose_a_shard(serve: "subprocess.Popen[str]") -> list[str]:
    """The lines until there is another."""
    (shard,) = [child for child in psutil.Process(serve.pid).children(recursive=True) if "Shard" in child.name()]
    shard.kill()
    return read_until(serve, ", pid ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_leaving_the_deployment_leaves_no_process_behind(
    serve: "subprocess.Popen[str]", number: signal.Signals
) -> None:
    """SIGTERM goes to the whole process group, as from a shell that logs out: Ray's servers must not end before the
    system has. All that is written until then is an object a line.
    """
    lines = read_until(serve, "system serves")
    children = psutil.Process(serve.pid).children(recursive=True)
    assert len(children) >= 4, lines
    assert_only_loopback_is_listened_on(children)
    if number is signal.SIGKILL:  # then two of Ray's own agents stay until they give the rest up, a minute later
        children = [child for child in children if not child.name().startswith(RAY_AGENTS)]
        serve.kill()
    else:
        lines += lose_a_shard(serve)
        os.killpg(serve.pid, number)
        rest, _ = serve.communicate(timeout=TIMEOUT_S)
        told = messages([*lines, *rest.splitlines()])
        assert serve.returncode == 0, told
        assert told[-2:] == ["stopping: requests in flight may end; Ctrl-C again stops at once", "stopped"]
        assert not any("(raylet)" in message for message in told)  # it would suspect the kernel
    _, alive = psutil.wait_procs(children, timeout=20.0)
    assert alive == []


def test_ctrl_c_while_the_system_starts_leaves_no_process_behind(serve: "subprocess.Popen[str]") -> None:
    def children() -> list[psutil.Process]:
        return psutil.Process(serve.pid).children(recursive=True)

    wait_until(lambda: any(child.name().startswith(RAY_AGENTS) for child in children()))
    started = children()
    serve.send_signal(signal.SIGINT)
    output, _ = serve.communicate(timeout=TIMEOUT_S)
    assert serve.returncode == INTERRUPTED
    assert messages(output.splitlines())[-1] == "interrupted before the system was up; stopped"
    _, alive = psutil.wait_procs(started, timeout=5.0)
    assert alive == []
