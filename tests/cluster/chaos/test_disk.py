"""Filling a disk, on a small one of a test's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.chaos.faults.disk import DISK_MIB, FillDisk
from cluster.chaos.system import ChaosRefused

# What runs in the mount namespace: fills the disk at argv[1], tries to write one byte more, frees it, writes again.
FILL = """
import sys
from pathlib import Path
from cluster.chaos.faults.disk import fill
disk = Path(sys.argv[1])
print(fill(disk / "filling"))
try:
    (disk / "more").write_bytes(b"x")
except OSError as error:
    print(error.strerror)
(disk / "filling").unlink()
(disk / "more").write_bytes(b"x")
"""


def test_a_full_disk_takes_nothing_and_a_freed_one_does(tmp_path: Path) -> None:
    fault = FillDisk()
    try:
        surroundings = fault.prepare(tmp_path)
    except ChaosRefused as refused:
        pytest.skip(str(refused))
    command = [*surroundings.command, sys.executable, "-c", FILL, str(tmp_path / "ray")]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True, timeout=60)
    size, said = done.stdout.splitlines()
    assert DISK_MIB * 2**20 * 0.9 < int(size) <= DISK_MIB * 2**20
    assert said == "No space left on device"
    assert list((tmp_path / "ray").iterdir()) == [], "the small disk is seen by its own processes only"
