"""A system of its own for a chaos run: `mobula serve` as a process of this machine, and nothing left of it afterwards.

Ray's files go to a folder of the run, which is also how its processes are recognised, whoever has adopted them.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import yaml

from cluster.chaos.system import System
from cluster.client_access import ClientAccess
from cluster.controller.controller import StartError
from cluster.controller.process import ClusterStatus

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0  # for an orderly end; after it every process is killed
LINGER_S = 10.0  # for Ray's own processes, once that has come
POLL_S = 0.2
FOLDER_VARIABLE = "RAY_TMPDIR"  # where Ray puts its sessions
# Small enough for a laptop: threads take turns on its cores.
SETTINGS: Mapping[str, Any] = {
    "attention_workers": {"count": 2, "num_cpus": 0.5, "num_threads": 1, "engine": {"cache_gib": 0.25}},
    "expert_shards": {"count": 3, "num_cpus": 0.5, "num_threads": 1, "num_replicas": 2},
    "gateway": {"host": "127.0.0.1", "count": 2},
    "drain_timeout_s": 2.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a fault needs around the system before it starts.

    Attributes:
        settings: of the configuration, over the run's own and under a user's.
        environment: variables of every process.
        command: what runs `mobula serve`, in front of it.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()


class LocalDeployment:
    """Leaving the block ends every process and removes every file.

    folder: the run's own, exists from the start, so that a fault can prepare its surroundings there.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mobula-"))
        self.config: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._log = self.folder / "serve.log"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(
        self,
        surroundings: Surroundings,
        settings: Mapping[str, Any],
        show: Callable[[ClusterStatus | None], None] = lambda status: None,
    ) -> System:
        """Waits until every process serves. settings: a user's. Raises StartError with the last lines of its log."""
        self.config = merged(merged(SETTINGS, surroundings.settings), settings)
        gateway = self.config["gateway"]
        for key, count in (("port", 1), ("metrics_port", gateway["count"])):  # fixed: who comes back is found
            gateway.setdefault(key, free_port(gateway["host"], count))
        path = self.folder / "mobula.yaml"
        path.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        command = [*surroundings.command, sys.executable, "-m", "cluster.commands.cli", "serve", "--config", str(path)]
        environment = {**os.environ, **surroundings.environment, FOLDER_VARIABLE: str(self.folder)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        return self._wait_until_serving(f"127.0.0.1:{gateway['port']}", show)

    def stop(self) -> list[str]:
        """Ends it in order where that is still possible, kills the rest, removes the folder. Safe to call twice.

        What had to be killed, by name.
        """
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: at once then
                self._process.wait(STOP_TIMEOUT_S)
                psutil.wait_procs(processes_of(self.folder), timeout=LINGER_S)
        killed = []
        for process in processes_of(self.folder):
            with suppress(psutil.NoSuchProcess):
                killed.append(process.name())
                process.kill()
        if self._process is not None:
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        return killed

    def _wait_until_serving(self, address: str, show: Callable[[ClusterStatus | None], None]) -> System:
        assert self._process is not None
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up_s:
            if self._process.poll() is not None:
                raise StartError(f"the system ended with status {self._process.returncode}: {self._last_words()}")
            system = System(address, ClientAccess())
            status = system.status()
            show(status)
            if status is not None and status.is_serving:
                return system
            system.close()
            time.sleep(POLL_S)
        raise StartError(f"the system does not serve after {START_TIMEOUT_S:.0f} s: {self._last_words()}")

    def _last_words(self, num_lines: int = 8) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with `changes` over them, key by key at every depth."""
    result = {key: merged(value, {}) if isinstance(value, Mapping) else value for key, value in settings.items()}
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old if isinstance(old, Mapping) else {}, value) if isinstance(value, Mapping) else value
    return result


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those that were started with this folder, and still run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(FOLDER_VARIABLE) == str(folder) and process.pid != os.getpid():
                found.append(process)
    return found


def free_port(host: str, count: int = 1) -> int:
    """One that nobody uses now, nor the `count` - 1 after it."""
    while True:
        with ExitStack() as stack:
            probes = [stack.enter_context(_socket(host)) for _ in range(count)]
            probes[0].bind((host, 0))
            port = int(probes[0].getsockname()[1])
            with suppress(OSError, OverflowError):  # one of the others is taken, or beyond the last
                for number, probe in enumerate(probes[1:], start=1):
                    probe.bind((host, port + number))
                return port


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
