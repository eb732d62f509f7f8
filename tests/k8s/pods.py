"""An overlay's Pods as hosts on this machine: each runs what its manifest says, with real Ray between them.

There is no Kubernetes here: a Pod is a network namespace with an address of its own, Ray is started as KubeRay starts
it (`ray start` with the group's parameters, labels and limits), and a probe is the call that a kubelet makes. Paths
below /tmp are moved into each host's own folder, for hosts share this machine's files.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import yaml

from tests.k8s.manifests import ROOT, Group, Manifest, groups, of_kind, ray_cluster_spec
from tests.netns.hosts import Host, Hosts

START_S = 150.0
AT_ONCE = 3  # Pods that start
ATTEMPTS = 4
BIN = Path(sys.executable).parent
PROBE = """
import sys, grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5.0)
sys.exit(answer.status != health_pb2.HealthCheckResponse.SERVING)
"""


class Pods:
    """Of an overlay with a plain RayCluster. Leaving the block ends every one."""

    def __init__(self, manifests: list[Manifest], folder: Path, num_spare_experts: int = 0) -> None:
        """num_spare_experts: more Pods of that group than it says, as if its replicas had been raised."""
        self._folder = folder
        self._groups = groups(manifests)
        spec = ray_cluster_spec(manifests)
        self._auth_mode = spec["authOptions"]["mode"]
        self._serve = spec["headGroupSpec"]["template"]["spec"]["containers"][1]
        counts = {role: group.replicas for role, group in self._groups.items()}
        counts["expert"] += num_spare_experts
        self.roles = {f"{role}-{i}": role for role, count in counts.items() for i in range(count)}
        self._hosts = Hosts(folder, list(self.roles))
        self._token = secrets.token_hex(32)
        (config_map,) = of_kind(manifests, "ConfigMap")
        self._config = yaml.safe_load(self._moved(config_map["data"]["cluster.yaml"]))
        self._serving: subprocess.Popen[str]

    def __enter__(self) -> Self:
        self._hosts.__enter__()
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hosts.__exit__(None, None, None)

    def host(self, pod: str) -> Host:
        return self._hosts.hosts[pod]

    def run(
        self, pod: str, command: Sequence[str], timeout_s: float = 60.0, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command on a Pod, its paths moved."""
        moved = [self._moved(part) for part in command]
        moved[0] = str(BIN / moved[0]) if (BIN / moved[0]).exists() else moved[0]
        return subprocess.run(
            self.host(pod).command(moved),
            env=self._environment(pod),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            input=stdin,
        )

    def is_ready(self, pod: str) -> bool:
        """What the kubelet would find with the Pod's readiness probe."""
        port = self._groups[self.roles[pod]].container["readinessProbe"]["grpc"]["port"]
        address = f"{self.host(pod).address}:{port}"
        return self.run(pod, [sys.executable, "-c", PROBE, address]).returncode == 0

    def port(self, pod: str, name: str) -> str:
        """host:port of a port that the manifest names."""
        return f"{self.host(pod).address}:{self._groups[self.roles[pod]].ports[name]}"

    def end(self, pod: str) -> subprocess.CompletedProcess[str]:
        """What Kubernetes does first when it ends a Pod: the preStop command."""
        command = self._groups[self.roles[pod]].container["lifecycle"]["preStop"]["exec"]["command"]
        return self.run(pod, [BIN.joinpath(command[0]).as_posix(), *command[1:]], timeout_s=150.0)

    def status(self) -> dict[str, Any]:
        """The system, asked from a Pod of the gateways."""
        address = self.port("gateway-0", "serve-grpc")
        answer = self.run("gateway-0", ["mobula", "status", "--json", "--address", address])
        assert answer.returncode == 0, answer.stderr
        status: dict[str, Any] = json.loads(answer.stdout)
        return status

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
        give_up_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < give_up_s, f"{what}: waited {timeout_s} s in vain; {self.last_words()}"
            time.sleep(0.5)

    def stop_serving(self) -> int:
        """SIGTERM to `mobula serve`. Returns its exit status."""
        (process,) = psutil.Process(self._serving.pid).children()  # nsenter's
        process.terminate()
        return self._serving.wait(START_S)

    def last_words(self) -> str:
        """What each process printed last."""
        return "\n".join(f"{log.name}: {log.read_text()[-600:]}" for log in sorted(self._folder.glob("*.log")))

    def _start(self) -> None:
        head, *others = self.roles
        for pods in ([head], *(others[i : i + AT_ONCE] for i in range(0, len(others), AT_ONCE))):
            self._start_ray(pods)
        config = self._folder / "cluster.yaml"
        config.write_text(yaml.safe_dump(self._config))
        command = [str(BIN / self._serve["command"][0]), *self._serve["command"][1:-1], str(config)]
        self._serving = self.start("head-0", "serve", command)
        log = self._folder / "head-0.serve.log"
        self.wait_until(lambda: "stop:" in log.read_text() or self._serving.poll() is not None, "it did not start")
        assert self._serving.poll() is None, self.last_words()

    def _start_ray(self, pods: Sequence[str]) -> None:
        """Again where it fails, as a kubelet would: `ray start` waits for half a minute, a busy machine for longer."""
        for _ in range(ATTEMPTS):
            starting = {p: self.start(p, "ray", self._ray_start(p, self._groups[self.roles[p]])) for p in pods}
            pods = [pod for pod, process in starting.items() if process.wait(START_S)]
            if not pods:
                return
            for pod in pods:
                self.run(pod, ["ray", "stop", "--force"])
        raise AssertionError(f"Ray does not start on {pods}: {self.last_words()}")

    def _ray_start(self, pod: str, group: Group) -> list[str]:
        address = self.host(pod).address
        head = self.host("head-0").address
        is_head = group.role == "head"
        options = ["--head", "--port=6379", "--include-dashboard=false"] if is_head else [f"--address={head}:6379"]
        parameters = {"num-cpus": group.container["resources"]["limits"]["cpu"]} | group.ray_start
        options += [f"--{name}={value}" for name, value in parameters.items()]
        options += [f"--labels={name}={value}" for name, value in group.ray_labels.items()]
        options += ["--metrics-export-port=8080", f"--node-ip-address={address}"]
        return [str(BIN / "ray"), "start", *options]

    def start(self, pod: str, name: str, command: list[str]) -> subprocess.Popen[str]:
        """A process that ends with the Pod. name: of its log."""
        with (self._folder / f"{pod}.{name}.log").open("w") as log:
            return self.host(pod).start(
                command, self._environment(pod), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )

    def _environment(self, pod: str) -> dict[str, str]:
        given = self._groups[self.roles[pod]].container["env"]
        ours = {variable["name"]: self._moved(variable["value"]) for variable in given if "value" in variable}
        return {
            **os.environ,
            **ours,
            "PYTHONPATH": str(ROOT),
            "POD_IP": self.host(pod).address,
            "no_proxy": "*",  # whatever way out this machine has, the hosts have none
            "RAY_TMPDIR": str(self._hosts_folder),
            "RAY_AUTH_MODE": self._auth_mode,
            "RAY_AUTH_TOKEN": self._token,
        }

    @property
    def _hosts_folder(self) -> Path:
        return self._folder / "host"

    def _moved(self, text: str) -> str:
        return text.replace("/tmp/", f"{self._hosts_folder}/") if text != "/tmp" else str(self._hosts_folder)
