"""A wall clock that jumps, as when a machine's time is set: forward, and later back.

Needs a deployment of its own, for whose processes alone the clock jumps: cluster/chaos/native/clock.c is loaded into
each, and reads the difference to the machine's clock from a file.
"""

import ctypes
import importlib.machinery
import struct
from collections.abc import Mapping
from pathlib import Path

from cluster.chaos.deployment import Surroundings
from cluster.chaos.fault import Fault
from cluster.chaos.system import ChaosRefused, System

NATIVE = Path(__file__).parent.parent / "native"
CLOCK_FILE = "clock"  # in the run's folder; clock.c knows the name
JUMP_S = 3600.0


class ClockJump(Fault):
    """An hour ahead for a while."""

    hold_s = 8.0
    needs_own_deployment = True

    def __init__(self, jump_s: float = JUMP_S) -> None:
        self._jump_s = jump_s
        self._file = Path()

    def prepare(self, folder: Path) -> Surroundings:
        self._file = folder / CLOCK_FILE
        set_clock(self._file, 0.0)
        return Surroundings(environment={"LD_PRELOAD": str(clock_library())})

    def inject(self, system: System) -> Mapping[str, int]:
        set_clock(self._file, self._jump_s)
        return {}

    def heal(self, system: System) -> None:
        set_clock(self._file, 0.0)


def set_clock(file: Path, ahead_s: float) -> None:
    """How far processes that were started with the library are ahead of the machine. In place: they have it mapped."""
    with file.open("r+b" if file.exists() else "wb", buffering=0) as opened:
        opened.write(struct.pack("=d", ahead_s))


def clock_library() -> Path:
    """Raises ChaosRefused where it was not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = NATIVE / f"library{suffix}"
        if path.is_file():
            try:
                ctypes.CDLL(str(path))  # as LD_PRELOAD it would be left out with a line that nobody sees
            except OSError as error:
                raise ChaosRefused(f"the library that sets a process's clock cannot be loaded: {error}") from error
            return path
    raise ChaosRefused("the library that sets a process's clock was not built; install the package with a C compiler")
