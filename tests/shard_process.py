"""An expert shard in a process of its own, for tests that kill, stop, slow or damage one. No Ray.

Run as a program it is the shard: it reads a configuration and its ep_rank, loads, and answers each line of its standard
input with its health.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cluster.config import parse_config
from cluster.controller.process import ProcessHealth, ProcessState
from cluster.roles.preflight import check
from cluster.roles.shard_role import ShardRole
from router.expert_map import ExpertMap

ROOT = Path(__file__).parents[1]
PERIOD_S = 0.1  # of a slowed process, which runs in a part of each


class ShardProcess:
    """Stands where a ShardRole does in tests.system.System."""

    def __init__(self, config: dict[str, Any], ep_rank: int, host: str) -> None:
        self._arguments = json.dumps({"config": config, "ep_rank": ep_rank, "host": host})
        self._process: subprocess.Popen[str] | None = None
        self._health = ProcessHealth(generation="0", state=ProcessState.NEW)

    def load(self, expert_map: ExpertMap) -> None:
        """Plans the same placement by itself."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.shard_process", self._arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.ask("")

    def health(self) -> ProcessHealth:
        """As it was when it was last asked."""
        return self._health

    def ask(self, what: str) -> ProcessHealth:
        """Its health after it did `what`: "" for nothing, "nan" to answer nothing else, "bits" to flip its weights'."""
        assert self._process
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        self._health = ProcessHealth(**answer | {"state": ProcessState(answer["state"])})
        return self._health

    def stop(self, drain_timeout_s: float) -> None:
        """Ends it, whatever was done to it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def signal(self, number: signal.Signals) -> None:
        assert self._process
        os.kill(self._process.pid, number)

    @contextmanager
    def slowed(self, factor: float) -> Iterator[None]:
        """Gets one part in `factor` of the time."""
        is_over = threading.Event()

        def hamper() -> None:
            while not is_over.is_set():
                self.signal(signal.SIGSTOP)
                time.sleep(PERIOD_S * (1 - 1 / factor))
                self.signal(signal.SIGCONT)
                time.sleep(PERIOD_S / factor)

        thread = threading.Thread(target=hamper)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


def main() -> None:
    arguments = json.loads(sys.argv[1])
    config = parse_config(arguments["config"])
    role = ShardRole(config, arguments["ep_rank"], arguments["host"])
    role.load(check(config).expert_map)
    for line in sys.stdin:
        damage(role, line.strip())
        print(json.dumps(asdict(role.health())), flush=True)


def damage(role: ShardRole, what: str) -> None:
    shard = role._shard
    assert shard, role.health().detail
    if what == "nan":
        ffn = shard._ffn
        shard._ffn = lambda *args: ffn(*args).fill_(torch.nan)
    elif what == "bits":
        for unit in shard._store._units.values():
            for expert in unit.experts:
                weights = expert.w2 if isinstance(expert.w2, torch.Tensor) else expert.w2.data
                weights.view(torch.uint8).view(-1)[2::4] ^= 0x40


if __name__ == "__main__":
    main()
