"""The whole system, started as a user starts it: `mobula serve` as a process of its own, called over gRPC.

Knows nothing of what is measured on it.
"""

import re
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from cluster.roles.compute_threads import share_of
from tests.bench.process import BenchProcess
from tests.bench.row import Unmeasurable

START_TIMEOUT_S = 180.0
MAX_NUM_SEQS = 128
SERVING = re.compile(r"serving\S* .* at (\S+:\d+)")
SERVE = ("-m", "cluster.commands.cli", "serve")
ONE_PROCESS = ("-m", "tests.bench.one_process")


class ServedSystem:
    """A running system with one worker. Leaving the block stops every process.

    address: host:port that answers the inference API. start_s: seconds from the command to its word that it serves.
    """

    def __init__(
        self, model: Path, *, num_threads: int, num_shards: int = 2, in_one_process: bool = False, **settings: Any
    ) -> None:
        """num_threads: cores to share out. in_one_process: the same code without Ray, gateway and wire.

        settings: further keys of the configuration, over those made here.
        """
        worker, shard = share_of(num_threads, 1), share_of(num_threads, num_shards)  # as by default
        self._config: dict[str, Any] = {
            "model": str(model),
            "gateway": {"port": 0, "metrics_port": 0},
            "attention_workers": {"count": 1, "num_threads": worker, "engine": {"max_num_seqs": MAX_NUM_SEQS}},
            "expert_shards": {"count": num_shards, "num_threads": shard},
            "drain_timeout_s": 1.0,
        }
        merge(self._config, settings)
        self._module = ONE_PROCESS if in_one_process else SERVE
        self.address = ""
        self.start_s = 0.0

    def __enter__(self) -> Self:
        """Raises Unmeasurable with the last lines of its output when it does not start."""
        self._folder = tempfile.TemporaryDirectory(prefix="mobula-bench-")
        path = Path(self._folder.name) / "mobula.yaml"
        path.write_text(yaml.safe_dump(self._config), encoding="utf-8")
        self._process = BenchProcess([sys.executable, *self._module, "--config", str(path)])
        try:
            self.address = self._wait_until_serving()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.start_s = time.monotonic() - self._process.started_s
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stop()
        self._folder.cleanup()

    def memory_bytes(self) -> dict[str, int]:
        """Proportional set size by kind of process, Ray's own included."""
        return self._process.memory_bytes()

    def _wait_until_serving(self) -> str:
        deadline_s = self._process.started_s + START_TIMEOUT_S
        while (line := self._process.read_line(deadline_s)) is not None:
            if match := SERVING.search(line):
                return match.group(1)
        raise Unmeasurable(f"the system did not start: {self._process.last_words}")


def merge(target: dict[str, Any], changes: dict[str, Any]) -> None:
    """Puts `changes` into `target`, key by key at every depth."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            merge(target[key], value)
        else:
            target[key] = value
