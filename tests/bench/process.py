"""Processes that the bench starts: their output line by line, their memory, their end. Knows nothing of their work."""

import os
import re
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from types import TracebackType
from typing import Self

import psutil

STOP_TIMEOUT_S = 40.0
MAX_LINES = 10_000  # of unread output; more are dropped
NUM_LAST_LINES = 2
IDLE_SHARE, IDLE_LOOK_S = 0.1, 0.3  # of one core, over so long


class BenchProcess:
    """A command in a process group of its own, with one stream of output. Leaving the block ends it and its children.

    start_s: time.monotonic when it was started.
    """

    def __init__(self, command: list[str], **environment: str) -> None:
        settings = {"COLUMNS": "400", "PYTHONUNBUFFERED": "1", "TERM": "dumb", "RAY_USAGE_STATS_ENABLED": "0"}
        self.started_s = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | settings | environment,
            start_new_session=True,
        )
        self._lines: Queue[str | None] = Queue(MAX_LINES)
        self._last: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def last_words(self) -> str:
        """The last lines that were read, for messages."""
        return " / ".join(line for line in self._last if line) or "no output"

    def read_line(self, deadline_s: float) -> str | None:
        """The next line of its output; None at its end or when the deadline (time.monotonic) passes."""
        try:
            line = self._lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except Empty:
            return None
        if line is not None:
            self._last = [*self._last, line.strip()][-NUM_LAST_LINES:]
        return line

    def write_line(self, line: str) -> None:
        """Raises OSError when the process has ended."""
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        """Asks it to end, waits, and kills whatever is left of it and its children."""
        family = process_tree(self.pid)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for member in family:
            with suppress(psutil.NoSuchProcess):
                if member.pid != self.pid and member.is_running():
                    member.kill()
        if self._process.stdin:
            with suppress(OSError):
                self._process.stdin.close()

    def memory_bytes(self) -> dict[str, int]:
        """Proportional set size of it and all below it, by kind of process."""
        sizes: dict[str, int] = {}
        for process in process_tree(self.pid):
            with suppress(OSError, psutil.NoSuchProcess):  # it ended meanwhile
                name = process_kind(process.cmdline())
                text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
                sizes[name] = sizes.get(name, 0) + parse_pss_bytes(text)
        return sizes

    def cpu_s(self) -> float:
        """Seconds on a processor so far, of it and all below it that still run."""
        seconds = 0.0
        for process in process_tree(self.pid):
            with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                times = process.cpu_times()
                seconds += times.user + times.system
        return seconds

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Waits until it leaves the processor to others, as threads that spin for work do some time after it; whether
        it does."""
        give_up_at_s = time.monotonic() + timeout_s
        while time.monotonic() < give_up_at_s:
            before_s = self.cpu_s()
            time.sleep(IDLE_LOOK_S)
            if 0.0 <= self.cpu_s() - before_s < IDLE_SHARE * IDLE_LOOK_S:  # less than 0: a child has ended
                return True
        return False

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with suppress(Full):
                self._lines.put_nowait(line)
        with suppress(Full):
            self._lines.put_nowait(None)


def process_tree(pid: int) -> list[psutil.Process]:
    """A process and all below it; empty when it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def parse_pss_bytes(text: str) -> int:
    """From the text of /proc/PID/smaps_rollup."""
    return next(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def process_kind(command: list[str]) -> str:
    """worker, shard, gateway or controller; serve for the command itself; else the program or the Ray process."""
    text = " ".join(command)
    for role in ("Worker", "Shard", "Gateway", "Controller"):
        if re.search(rf"ray::\w*{role}(Role|Actor)", text):
            return role.lower()
    if "cluster.commands.cli" in text:
        return "serve"
    return "ray" if "ray" in text else Path(command[0]).name if command else "?"
