"""`mobula chaos run` that is cut off by Ctrl-C leaves no process and no file."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

pytestmark = pytest.mark.ray

START_S, STOP_S = 60.0, 40.0


def processes_with(folder: str) -> list[psutil.Process]:
    """Those whose files go there."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("TMPDIR") == folder:
                found.append(process)
    return found


def test_ctrl_c_leaves_nothing_behind() -> None:
    with TemporaryDirectory(prefix="mc-") as folder:  # a short name: Ray has sockets in it
        command = [sys.executable, "-m", "cluster.commands.cli", "chaos", "run", "kill-shard", "--json"]
        with subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": folder},
            stdout=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where tests are to ignore it
        ) as run:
            give_up_s = time.monotonic() + START_S
            while not any("raylet" in process.name() for process in processes_with(folder)):
                assert time.monotonic() < give_up_s
                assert run.poll() is None
                time.sleep(0.2)
            run.send_signal(signal.SIGINT)
            output, _ = run.communicate(timeout=STOP_S)
        assert run.returncode not in (0, None)
        assert output == b""
        assert [process.name() for process in processes_with(folder)] == []
        assert list(Path(folder).iterdir()) == []
