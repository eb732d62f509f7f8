"""Mobula on three hosts: the front door and the controller on one, a shard and a worker on each of two others.

Real Ray between them; each host's gRPC goes through a proxy of its own, so that it can be slowed. Every unit is on both
shards.
"""

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from tests.netns.hosts import Host, Hosts
from tests.netns.proxy_process import PORT as PROXY_PORT

HEAD, *WORKERS = ("head", "w1", "w2")
GATEWAY_PORT, RAY_PORT = 50051, 6379
START_S = 90.0
ACTOR_CPUS = 0.9  # a shard and a worker fit on a worker's two CPUs, neither on the head's one beside the controller
OBJECT_STORE_BYTES = 80 * 1024 * 1024
PYTHON = sys.executable
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Seen:
    """A request as its client saw it. Moments are of time.monotonic(), which all hosts share."""

    case: int
    sent_s: float
    ended_s: float
    token_ids: list[int]
    error: str


class Cluster:
    """Running, with clients that stream all the time. Leaving the block ends every host."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder = folder
        self._hosts = Hosts(folder, (HEAD, *WORKERS))
        self._environment = {
            **os.environ,
            "RAY_TMPDIR": str(folder / "host"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0",
            "PYTHONPATH": str(ROOT),  # where `tests` is
            "grpc_proxy": f"http://127.0.0.1:{PROXY_PORT}",
        }
        spread = {"count": len(WORKERS), "num_cpus": ACTOR_CPUS, "num_threads": 1, "strategy": "SPREAD"}
        self._config = {
            "model": str(model),
            "attention_workers": {**spread, "engine": {"cache_gib": 0.05}},
            "expert_shards": {**spread, "num_replicas": len(WORKERS)},
            "gateway": {"host": "0.0.0.0", "port": GATEWAY_PORT},
            "drain_timeout_s": 1.0,
        }
        self._proxies: dict[str, subprocess.Popen[str]] = {}
        self.seen: list[Seen] = []
        self.serving: list[tuple[float, bool]] = []  # when the controller was asked, what it said

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

    def host(self, name: str) -> Host:
        return self._hosts.hosts[name]

    def others(self, name: str) -> list[Host]:
        return [host for other, host in self._hosts.hosts.items() if other != name]

    def reaches_head(self, name: str) -> bool:
        """Whether a new connection from this host to the head is made within a second."""
        program = f"import socket; socket.create_connection(({self.host(HEAD).address!r}, {RAY_PORT}), 1.0)"
        return (
            self.host(name).start([PYTHON, "-c", program], self._without_proxy(), stderr=subprocess.DEVNULL).wait() == 0
        )

    def set_weather(self, name: str, **weather: float) -> None:
        """Of what this host's gRPC sends and is answered."""
        stdin = self._proxies[name].stdin
        assert stdin
        print(json.dumps(weather), file=stdin, flush=True)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        give_up_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < give_up_s, f"{what}: waited {timeout_s} s in vain; {self._last_words()}"
            time.sleep(0.05)

    def _start(self) -> None:
        for name, host in self._hosts.hosts.items():
            process = host.start(
                [PYTHON, "-m", "tests.netns.proxy_process"],
                self._without_proxy(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._proxies[name] = process
        for process in self._proxies.values():
            assert process.stdout
            assert process.stdout.readline() == "up\n"
        head = self.host(HEAD)
        self._ray_start(head, "--head", f"--port={RAY_PORT}", "--num-cpus=1", "--include-dashboard=false")
        for name in WORKERS:
            self._ray_start(self.host(name), f"--address={head.address}:{RAY_PORT}", "--num-cpus=2")
        config = self._folder / "mobula.yaml"
        config.write_text(yaml.safe_dump(self._config | {"ray": {"address": f"{head.address}:{RAY_PORT}"}}))
        self._serve = self._run(head, "serve", [PYTHON, "-m", "cluster.commands.cli", "serve", "--config", str(config)])
        self._watch(head)

    def _ray_start(self, host: Host, *options: str) -> None:
        command = [PYTHON, "-m", "ray.scripts.scripts", "start", *options, f"--node-ip-address={host.address}"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        started = self._run(host, "ray", command)
        assert started.wait(START_S) == 0, self._last_words(f"{host.name}.ray")

    def _run(self, host: Host, name: str, command: list[str]) -> subprocess.Popen[str]:
        with (self._folder / f"{host.name}.{name}.log").open("w") as log:
            return host.start(command, self._environment, stdout=log, stderr=subprocess.STDOUT)

    def _watch(self, head: Host) -> None:
        """Starts the clients, once the gateway answers."""
        self.wait_until(lambda: "stop:" in self._last_words(), START_S, "the system did not start")
        command = [PYTHON, "-m", "tests.netns.load_process", f"{head.address}:{GATEWAY_PORT}"]
        clients = head.start(command, self._without_proxy(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        threading.Thread(target=self._read, args=(clients,), name="netns-clients", daemon=True).start()

    def _read(self, clients: subprocess.Popen[str]) -> None:
        assert clients.stdout
        for line in clients.stdout:
            fields: dict[str, Any] = json.loads(line)
            if "at_s" in fields:
                self.serving.append((fields["at_s"], fields["is_serving"]))
            else:
                self.seen.append(Seen(**fields))

    def _without_proxy(self) -> dict[str, str]:
        return {key: value for key, value in self._environment.items() if key != "grpc_proxy"}

    def _last_words(self, name: str = f"{HEAD}.serve") -> str:
        path = self._folder / f"{name}.log"
        return path.read_text(errors="replace")[-1500:] if path.exists() else "it never began"
