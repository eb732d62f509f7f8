"""A process whose clock jumps while it runs, and one that waits meanwhile."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.chaos.deployment import FOLDER_VARIABLE
from cluster.chaos.faults import clock
from cluster.chaos.faults.clock import CLOCK_FILE, clock_library, set_clock
from cluster.chaos.system import ChaosRefused

try:
    LIBRARY = clock_library()
except ChaosRefused as refused:
    pytest.skip(str(refused), allow_module_level=True)

CLOCKS = "import sys, time\nfor line in sys.stdin: print(time.time(), time.monotonic(), flush=True)"
# A wait until a moment of the wall clock, by a semaphore: 0.2 s whatever the clock says.
WAIT = """
import ctypes, time
class Moment(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]
libc, semaphore = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.sem_init(semaphore, 0, 0)
started = time.monotonic()
until = time.time() + 0.2
libc.sem_timedwait(semaphore, ctypes.byref(Moment(int(until), int(until % 1 * 1e9))))
print(time.monotonic() - started)
"""


def test_a_library_that_cannot_be_loaded_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LIBRARY.name).write_text("no library")
    monkeypatch.setattr(clock, "NATIVE", tmp_path)
    with pytest.raises(ChaosRefused, match=r"cannot be loaded: .*file too short"):
        clock_library()


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, FOLDER_VARIABLE: str(folder), "LD_PRELOAD": str(LIBRARY)}


def test_the_wall_clock_jumps_and_the_monotonic_one_goes_on(tmp_path: Path) -> None:
    set_clock(tmp_path / CLOCK_FILE, 0.0)
    command = [sys.executable, "-c", CLOCKS]
    with subprocess.Popen(
        command, env=environment(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout

        def clocks() -> tuple[float, float]:
            print(file=process.stdin, flush=True)
            wall, monotonic = process.stdout.readline().split()
            return float(wall) - time.time(), float(monotonic) - time.monotonic()

        assert clocks() == pytest.approx((0.0, 0.0), abs=1.0)
        for ahead_s in (3600.0, -90.5, 0.0):
            set_clock(tmp_path / CLOCK_FILE, ahead_s)
            assert clocks() == pytest.approx((ahead_s, 0.0), abs=1.0)


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0])
def test_a_wait_until_a_moment_takes_as_long_as_by_the_jumped_clock(tmp_path: Path, ahead_s: float) -> None:
    set_clock(tmp_path / CLOCK_FILE, ahead_s)
    command = [sys.executable, "-c", WAIT]
    waited = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=True, timeout=20)
    assert 0.15 < float(waited.stdout) < 5.0
