"""The whole system, started as a user starts it: `mobula serve` as a process of its own, called over gRPC.

Knows nothing of what is measured on it.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from types import TracebackType
from typing import Any, Self

import psutil
import yaml

from tests.bench.row import Unmeasurable

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 40.0
MAX_NUM_SEQS = 128
MAX_LINES = 10_000  # of unread output
LAST_LINES = 6  # of the output of a system that did not start
SERVING = re.compile(r"serving\S* .* at (\S+:\d+)")


class ServedSystem:
    """`mobula serve` with one worker. Leaving the block stops every process.

    start_s: seconds from the command to its word that it serves.
    """

    def __init__(self, model: Path, *, num_threads: int, num_shards: int = 2, **settings: Any) -> None:
        """num_threads: cores to share out. settings: further keys of the configuration, over those made here."""
        worker, shard = thread_counts(num_threads, num_shards)
        self._config: dict[str, Any] = {
            "model": str(model),
            "gateway": {"port": 0, "metrics_port": 0},
            "attention_workers": {"count": 1, "num_threads": worker, "engine": {"max_num_seqs": MAX_NUM_SEQS}},
            "expert_shards": {"count": num_shards, "num_threads": shard},
            "drain_timeout_s": 1.0,
        }
        _merge(self._config, settings)
        self.address = ""
        self.start_s = 0.0

    def __enter__(self) -> Self:
        """Raises Unmeasurable with the last lines of its output when it does not start."""
        self._folder = tempfile.TemporaryDirectory(prefix="mobula-bench-")
        path = Path(self._folder.name) / "mobula.yaml"
        path.write_text(yaml.safe_dump(self._config), encoding="utf-8")
        start = time.monotonic()
        self._process = start_process([sys.executable, "-m", "cluster.cli", "serve", "--config", str(path)])
        try:
            self.address = self._wait_until_serving(start + START_TIMEOUT_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.start_s = time.monotonic() - start
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop_process(self._process)
        self._folder.cleanup()

    def memory_bytes(self) -> dict[str, int]:
        """Proportional set size by kind of process, Ray's own included."""
        return memory_bytes(self._process.pid)

    def _wait_until_serving(self, deadline_s: float) -> str:
        lines: list[str] = []
        for line in output_lines(self._process, deadline_s):
            lines.append(line.strip())
            if match := SERVING.search(line):
                return match.group(1)
        raise Unmeasurable("mobula serve did not start: " + " / ".join(lines[-LAST_LINES:]))


def thread_counts(num_cores: int, num_shards: int) -> tuple[int, int]:
    """Threads of the worker and of each shard. They take turns, so each side may have all cores."""
    return num_cores, max(1, num_cores // num_shards)


def start_process(command: list[str], **environment: str) -> "subprocess.Popen[str]":
    """With its output as one stream of lines, unbroken and at once, in a process group of its own."""
    settings = {"COLUMNS": "400", "PYTHONUNBUFFERED": "1", "TERM": "dumb", "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | settings | environment,
        start_new_session=True,
    )


def stop_process(process: "subprocess.Popen[str]") -> None:
    """Asks, waits, and ends whatever is left of the process and its children."""
    family = _family(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for member in family:
        if member.is_running() and member.pid != process.pid:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()


def output_lines(process: "subprocess.Popen[str]", deadline_s: float) -> Iterator[str]:
    """Lines of its output until it ends or the deadline (time.monotonic) passes; what follows is read and dropped."""
    lines: Queue[str | None] = Queue(MAX_LINES)

    def put(line: str | None) -> None:
        with suppress(Full):  # nobody reads any more
            lines.put_nowait(line)

    def read() -> None:
        assert process.stdout
        with suppress(ValueError):  # closed by stop_process
            for line in process.stdout:
                put(line)
        put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except Empty:
            return
        if line is None:
            return
        yield line


def memory_bytes(pid: int) -> dict[str, int]:
    """Proportional set size of a process and all below it, by kind of process."""
    sizes: dict[str, int] = {}
    for process in _family(pid):
        try:
            size, name = _pss_bytes(process.pid), _kind(process)
        except (OSError, psutil.NoSuchProcess):
            continue  # it ended meanwhile
        sizes[name] = sizes.get(name, 0) + size
    return sizes


def parse_pss_bytes(text: str) -> int:
    """From the text of /proc/PID/smaps_rollup."""
    return next(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def _pss_bytes(pid: int) -> int:
    return parse_pss_bytes(Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii"))


def _kind(process: psutil.Process) -> str:
    """worker, shard, gateway, controller, or ray for everything that Ray runs besides."""
    command = " ".join(process.cmdline())
    for role in ("Worker", "Shard", "Gateway", "Controller"):
        if re.search(rf"ray::\w*{role}(Role|Actor)", command):
            return role.lower()
    return "serve" if "cluster.cli" in command else "ray"


def _family(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _merge(target: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value
