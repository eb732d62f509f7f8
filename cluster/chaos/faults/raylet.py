"""kill -9 of a raylet: a node is lost with all that ran on it, and another one joins a moment later, as a cluster's
operator sees to it.

Needs a deployment of its own: a Ray cluster of several nodes on this machine, a head and NUM_NODES that hold a shard
each.
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
from cluster.chaos.faults.kill import victim
from cluster.chaos.system import RAYLET, ChaosRefused, System
from cluster.controller.process import RoleName

HOST = "127.0.0.1"
NUM_NODES = 3
HEAD_CPUS, NODE_CPUS = 1, 2  # Ray counts whole ones
ACTOR_CPUS = 0.9  # so that the head has place for controller and gateway only, a node for a shard and a worker
OBJECT_STORE_BYTES = 80 * 1024 * 1024
START_S = 60.0
REPLACED_AFTER_S = 1.0


class KillRaylet(Fault):
    """Of a node that holds a shard."""

    hold_s = REPLACED_AFTER_S
    needs_own_deployment = True

    def __init__(self, seed: int) -> None:
        self._seed = seed
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
        self._wait(self._ray_start("--head", f"--port={port}", f"--num-cpus={HEAD_CPUS}", "--include-dashboard=false"))
        for _ in range(NUM_NODES):  # one after the other: Ray gives a node half a minute, however busy the machine is
            self._wait(self._start_node())
        spread = {"strategy": "SPREAD", "num_cpus": ACTOR_CPUS}
        return Surroundings(
            settings={
                "attention_workers": spread,
                "expert_shards": {**spread, "count": NUM_NODES},
                "ray": {"address": self._address},
            },
            environment=self._environment,
        )

    def inject(self, system: System) -> Mapping[str, int]:
        shard = psutil.Process(system.pids()[victim(system, RoleName.SHARD, self._seed)])
        raylet = shard.parent()
        if raylet is None or raylet.name() != RAYLET:
            raise ChaosRefused(f"pid {shard.pid} is no child of a raylet")
        children = {child.pid for child in raylet.children()}
        os.kill(raylet.pid, signal.SIGKILL)
        return {name: pid for name, pid in system.pids().items() if pid in children}

    def heal(self, system: System) -> None:
        self._replacement = self._start_node()

    def close(self) -> None:
        if self._replacement is not None:
            self._replacement.communicate()

    def _start_node(self) -> "subprocess.Popen[bytes]":
        return self._ray_start(f"--address={self._address}", f"--num-cpus={NODE_CPUS}")

    def _ray_start(self, *options: str) -> "subprocess.Popen[bytes]":
        """Ends when the node runs."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, f"--node-ip-address={HOST}"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        environment = {**os.environ, **self._environment, FOLDER_VARIABLE: str(self._folder)}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

    def _wait(self, start: "subprocess.Popen[bytes]") -> None:
        output, _ = start.communicate(timeout=START_S)
        if start.returncode:
            raise ChaosRefused(f"a Ray node did not start: {output.decode(errors='replace')[-500:]}")
