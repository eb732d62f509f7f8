"""SIGSTOP: a process says nothing any more, but its connections stand, as on a host that hangs or swaps."""

import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from cluster.chaos.fault import Fault
from cluster.chaos.faults.kill import victim
from cluster.chaos.system import ChaosRefused, System

PERIOD_S = 0.1  # of stopping and going on; longer than a forward, shorter than anybody's patience


class Stop(Fault):
    """A process of a role stands still, then goes on."""

    def __init__(self, role: str, seed: int, hold_s: float = 8.0) -> None:
        self.hold_s = hold_s
        self._seed = seed
        self._role = role
        self._name = ""

    def inject(self, system: System) -> Mapping[str, int]:
        self._name = victim(system, self._role, self._seed)
        system.send(self._name, signal.SIGSTOP)
        return {}

    def heal(self, system: System) -> None:
        with suppress(ChaosRefused):  # it was replaced meanwhile
            system.send(self._name, signal.SIGCONT)


class Slow(Fault):
    """A process of a role gets one part in `factor` of the time: stopped and let go again and again."""

    def __init__(self, role: str, seed: int, factor: float = 20.0, hold_s: float = 8.0) -> None:
        self.hold_s = hold_s
        self._seed = seed
        self._role = role
        self._factor = factor
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def inject(self, system: System) -> Mapping[str, int]:
        name = victim(system, self._role, self._seed)
        pid = system.send(name, signal.SIGSTOP)
        self._thread = threading.Thread(target=self._hamper, args=(pid,), name="chaos-slow", daemon=True)
        self._thread.start()
        return {}

    def heal(self, system: System) -> None:
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()

    def _hamper(self, pid: int) -> None:
        """Runs until healed, or until the process is gone."""
        running_s = PERIOD_S / self._factor
        with suppress(ProcessLookupError):
            try:
                while not self._is_over.wait(PERIOD_S - running_s):
                    os.kill(pid, signal.SIGCONT)
                    time.sleep(running_s)
                    os.kill(pid, signal.SIGSTOP)
            finally:
                os.kill(pid, signal.SIGCONT)
