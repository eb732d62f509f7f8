"""kill -9 of a raylet: a node is lost with all that ran on it, and another one joins a moment later, as a cluster's
operator sees to it.

Needs a deployment of its own: a Ray cluster of two nodes on this machine, a shard and a worker on each, every unit on
both shards. The lost node is the one without the controller.
"""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from cluster.chaos.deployment import FOLDER_VARIABLE, Surroundings, free_port
from cluster.chaos.fault import Fault
from cluster.chaos.system import CONTROLLER, RAYLET, ChaosRefused, System

HOST = "127.0.0.1"
NUM_NODES = 2
NODE_CPUS = 2  # Ray counts whole ones
ACTOR_CPUS = 0.8  # a node has place for a shard, a worker, controller and gateways, and for no more
OBJECT_STORE_BYTES = 80 * 1024 * 1024
START_S = 60.0
REPLACED_AFTER_S = 1.0


class KillRaylet(Fault):
    """Of the node without the controller."""

    hold_s = REPLACED_AFTER_S
    needs_own_deployment = True

    def __init__(self) -> None:
        self._address = f"{HOST}:{free_port(HOST)}"
        self._environment: dict[str, str] = {}
        self._replacement: subprocess.Popen[bytes] | None = None

    def prepare(self, folder: Path) -> Surroundings:
        self._environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0",
        }
        self._folder = folder
        port = self._address.rpartition(":")[2]
        self._wait(self._ray_start("--head", f"--port={port}", "--include-dashboard=false"))
        self._wait(self._start_node())
        spread = {"strategy": "STRICT_SPREAD", "num_cpus": ACTOR_CPUS, "count": NUM_NODES}
        return Surroundings(
            settings={
                "attention_workers": spread,
                "expert_shards": spread,
                "ray": {"address": self._address},
            },
            environment=self._environment,
        )

    def inject(self, system: System) -> Mapping[str, int]:
        pids = system.pids()
        nodes = {
            raylet: {child.pid for child in psutil.Process(pids[raylet]).children()}
            for raylet in system.members(RAYLET)
        }
        lost = [raylet for raylet, children in nodes.items() if pids.get(CONTROLLER) not in children]
        if len(nodes) < NUM_NODES or not lost:
            raise ChaosRefused(f"of {len(nodes)} nodes {len(lost)} can be lost; processes were not spread over them")
        os.kill(pids[lost[0]], signal.SIGKILL)
        return {name: pid for name, pid in pids.items() if pid in nodes[lost[0]]}

    def heal(self, system: System) -> None:
        self._replacement = self._start_node()

    def close(self) -> None:
        if self._replacement is not None:
            self._replacement.communicate()

    def _start_node(self) -> "subprocess.Popen[bytes]":
        return self._ray_start(f"--address={self._address}")

    def _ray_start(self, *options: str) -> "subprocess.Popen[bytes]":
        """Ends when the node runs."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, f"--node-ip-address={HOST}"]
        command += ["--min-worker-port=0", "--max-worker-port=0"]  # any free ones: the nodes share an address
        command += [f"--num-cpus={NODE_CPUS}", f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        environment = {**os.environ, **self._environment, FOLDER_VARIABLE: str(self._folder)}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

    def _wait(self, start: "subprocess.Popen[bytes]") -> None:
        output, _ = start.communicate(timeout=START_S)
        if start.returncode:
            raise ChaosRefused(f"a Ray node did not start: {output.decode(errors='replace')[-500:]}")
